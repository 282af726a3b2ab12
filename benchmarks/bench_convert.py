"""How fast is a Megatron checkpoint converted beside `cp` of the same bytes, and in how much memory, whatever its size?

Speed: random weights of A.X K1's proportions, from each Megatron format to safetensors and back, hashing included, verification
timed apart; correctness first. `cp` and the conversions take turns, the page cache warm for all. Memory: sparse files of
`--memory-gb`, in a process of its own that watches its anonymous memory.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timing import memory_bytes, options_parser, record, show

from conversion import convert_to_hf, convert_to_megatron, verify
from conversion.checkpoint import Shard, TensorSpec, plan_shards, shard_header, write_index
from conversion.weight_map import hf_shapes, rows_of
from modeling_axk1 import AxK1Config, count_parameters

# What Megatron-Bridge says of itself, in its releases and issues (NVIDIA-NeMo/Megatron-Bridge), beside what is shown here.
PEER = """
                    | Megatron-Bridge 0.3.1                                   | here
memory              | the whole model in host memory (issue 1783)             | twice the largest tensor at most, measured below
multi-token prediction | "TODO" in its DeepSeek-V3 bridge (later: 1886)       | both ways, both names
post-MLP norm       | no                                                      | both ways, four names and a configurable one
CPU only            | import yes, export wants CUDA or NCCL (issue 3295)      | both ways, no Megatron installed
untrusted files     | one torch.load(weights_only=False)                      | allow-listed, nothing runs
A.X K1              | no bridge was found                                     | yes
"""


def config_of_size(nbytes: float) -> AxK1Config:
    """Light's proportions, as many layers as the bytes in bf16 allow."""

    def with_layers(layers: int) -> AxK1Config:
        return AxK1Config.preset(
            "light", vocab_size=32768, num_hidden_layers=layers, bos_token_id=None, eos_token_id=None
        )

    layers = 2
    while 2 * count_parameters(with_layers(layers + 1))["total"] <= nbytes:
        layers += 1
    return with_layers(layers)


def write_model(folder: Path, config: AxK1Config, random: bool) -> int:
    """A Hugging Face folder of that config: random numbers, or a sparse file of zeros. Returns the bytes of its tensors."""
    folder.mkdir()
    config.save_pretrained(folder)
    specs = []
    for name, shape in hf_shapes(rows_of(config)).items():
        dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
        specs.append(TensorSpec(name, dtype, shape))
    shards = plan_shards(specs, 10**9)
    # Normal numbers, so that none is NaN; repeated, as no copy or hash looks for repetitions.
    noise = torch.randn(2**25).to(torch.bfloat16).view(torch.uint8).numpy().tobytes() if random else b""
    for shard in shards:
        _write_shard(folder / shard.filename, shard, noise)
    write_index(folder, shards)
    return sum(shard.nbytes for shard in shards)


def _write_shard(path: Path, shard: Shard, noise: bytes) -> None:
    with path.open("wb") as file:
        header = shard_header(shard)
        file.write(header)
        left = shard.nbytes if noise else 0
        while left:
            left -= file.write(noise[:left])
        file.truncate(len(header) + shard.nbytes)


def measure_speed(folder: Path, gigabytes: float, rounds: int) -> dict[str, dict[str, float]]:
    config = config_of_size(gigabytes * 1e9)
    nbytes = write_model(folder / "hf", config, random=True)
    print(f"{nbytes / 1e9:.2f} GB, {config.num_hidden_layers} layers; checking first")
    convert_to_megatron(folder / "hf", folder / "torch_dist", format="torch_dist")
    convert_to_megatron(folder / "hf", folder / "legacy", format="legacy", pp=config.num_hidden_layers)
    convert_to_hf(folder / "legacy", folder / "back")
    assert verify(folder / "hf", folder / "back") == [], "the round trip is not the identity"
    shutil.rmtree(folder / "back")
    results = {}
    # Files of half a gigabyte: enough of them for two workers.
    for source, target, convert in (
        ("torch_dist", "hf", convert_to_hf),
        ("legacy", "hf", convert_to_hf),
        ("hf", "torch_dist", convert_to_megatron),
    ):
        case = f"{source} to {target}, {nbytes / 1e9:.1f} GB"
        results[case] = compare_with_cp(folder, folder / source, convert, {"shard_bytes": 5 * 10**8}, rounds)
    return results


def compare_with_cp(folder: Path, source: Path, convert, options: dict, rounds: int) -> dict[str, float]:
    """Median milliseconds of `cp`, of the conversion by one worker and by several, and of the verification.

    A conversion ends with its files on the disk, `cp` with them in the cache: its `sync` is timed beside it.
    """
    target = folder / "target"
    times: dict[str, list[float]] = {"ours": [], "one worker": [], "cp": [], "cp, then sync": [], "verification": []}

    def timed(name: str, run) -> None:
        os.sync()
        begun = time.perf_counter()
        run()
        times[name].append(1000 * (time.perf_counter() - begun))
        shutil.rmtree(target)

    copy = partial(subprocess.run, ["cp", "-r", "--sparse=never", source, target], check=True)
    for turn in range(rounds):
        timed("cp", copy)
        timed("ours", partial(convert, source, target, verify=False, progress=False, **options))
        timed("one worker", partial(convert, source, target, workers=1, verify=False, progress=False, **options))
        timed("cp, then sync", lambda: (copy(), os.sync()))
        done = convert(source, target, progress=False, **options)
        times["verification"].append(1000 * done.verify_s)
        shutil.rmtree(target)
        print(
            f"{source.name}, turn {turn + 1} of {rounds}: " + ", ".join(f"{k} {v[-1]:.0f} ms" for k, v in times.items())
        )
    return {name: statistics.median(values) for name, values in times.items()}


def measure_memory(folder: Path, gigabytes: float) -> None:
    """Peak anonymous memory, beyond what the process holds before it begins, of a conversion there and back."""
    begun = time.perf_counter()
    nbytes = write_model(folder / "sparse", config_of_size(gigabytes * 1e9), random=False)
    start, peak, done = memory_bytes("RssAnon"), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], memory_bytes("RssAnon") - start)

    watcher = threading.Thread(target=watch)
    watcher.start()
    convert_to_megatron(folder / "sparse", folder / "megatron")
    shutil.rmtree(folder / "sparse")
    convert_to_hf(folder / "megatron", folder / "back")
    done.set()
    watcher.join()
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(
        f"{nbytes / 1e9:.1f} GB there and back, verified, in {time.perf_counter() - begun:.0f} s: {peak[0] / 1e6:.0f} MB beyond "
        f"the start of the process, {whole / 1e6:.0f} MB in all, imports and mapped libraries included"
    )


def show_peer() -> None:
    table = Table(title="beside NVIDIA Megatron-Bridge, as it describes itself", show_header=True)
    head, *rows = [[cell.strip() for cell in line.split("|")] for line in PEER.strip("\n").splitlines()]
    for column in head:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    Console(width=150).print(table)


def main() -> None:
    parser = options_parser(__doc__, rounds=3)
    parser.add_argument(
        "--gb", type=float, default=2.0, help="size for the speed (default: %(default)s; four times that on disk)"
    )
    parser.add_argument(
        "--memory-gb", type=float, default=20.0, help="size for the memory (default: %(default)s; twice on disk)"
    )
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--memory-only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_only:
        measure_memory(Path(options.memory_only), options.memory_gb)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = measure_speed(Path(folder), options.gb, options.rounds)
    show("conversion beside cp of the same bytes, flushed to the disk both", results, peer="cp, then sync")
    if options.record:
        for case, times in results.items():
            record("convert", case, times, peer="cp")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        command = [sys.executable, __file__, "--memory-only", folder, "--memory-gb", str(options.memory_gb)]
        subprocess.run(command, check=True)
    show_peer()


if __name__ == "__main__":
    main()
