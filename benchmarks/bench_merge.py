"""How fast and how large is our merge beside mergekit 0.1.5, and does each write every tensor?

Each merge runs in a process of its own, mergekit's under the Python of `--mergekit`: it does not install beside our pins.
    python3.11 -m venv mergekit-venv
    mergekit-venv/bin/pip install torch==2.13.0 && mergekit-venv/bin/pip install mergekit==0.1.5
    python benchmarks/bench_merge.py --mergekit mergekit-venv/bin/python
Correctness comes first, against the plain sum in fp32 rounded once to bf16: ours must equal it bit for bit, mergekit's may be a
bf16 step away (it multiplies and adds in one rounding, so a sum near the middle of two bf16 numbers can fall to the other).
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from rich.progress import track
from timing import options_parser, record, show
from transformers import AXK1Config, AXK1ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from conversion.checkpoint import StoredTensor, open_checkpoint, read_elements

ALPHA = 0.8
ROOT = Path(__file__).parents[1]
MEBIBYTE = 2**20
# Between two neighbouring numbers, relative to the smaller: 8 and 24 bits of precision.
BF16_STEP, FP32_STEP = 2**-7, 2**-23

# What both children share: seconds of the merge alone, and the most memory of its own (not the page cache's) that the process
# held during it, beyond what it held with all libraries loaded.
MEASURE = """
import json, sys, threading, time

def own_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

def measure(merge):
    peak, over = 0, threading.Event()
    def watch():
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, own_bytes())
    before, watcher = own_bytes(), threading.Thread(target=watch)
    watcher.start()
    begun = time.perf_counter()
    merge()
    elapsed_s = time.perf_counter() - begun
    over.set()
    watcher.join()
    print(json.dumps({"elapsed_s": elapsed_s, "peak_bytes": peak - before}))

thinking, nonthinking, out, alpha, threads = sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4]), int(sys.argv[5])
import torch
torch.set_num_threads(threads)
"""
OURS = """
from conversion import merge_checkpoints
measure(lambda: merge_checkpoints(thinking, nonthinking, out, alpha=alpha, progress=False))
"""
MERGEKIT = """
from mergekit.config import MergeConfiguration
from mergekit.merge import MergeOptions, run_merge
config = MergeConfiguration.model_validate({
    "merge_method": "linear",
    "parameters": {"normalize": False},
    "models": [
        {"model": thinking, "parameters": {"weight": alpha}},
        {"model": nonthinking, "parameters": {"weight": 1 - alpha}},
    ],
    "dtype": "float32",
    "out_dtype": "bfloat16",
})
options = MergeOptions(copy_tokenizer=False, low_cpu_memory=True, lazy_unpickle=True, quiet=True, write_model_card=False)
measure(lambda: run_merge(config, out, options=options))
"""


def run_merge(python: str, code: str, folders: tuple[Path, Path], out: Path, threads: int) -> dict:
    """Merge in a fresh process. Returns its `elapsed_s`, `peak_bytes`; RuntimeError with its words if it fails."""
    command = [python, "-c", MEASURE + code, *map(str, folders), str(out), str(ALPHA), str(threads)]
    child = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if child.returncode:
        raise RuntimeError(f"{python} could not merge:\n{child.stderr[-3000:]}")
    return json.loads(child.stdout.splitlines()[-1])


def save_pair(folder: Path, build) -> tuple[Path, Path]:
    """Two random models of one architecture in bf16."""
    folders = folder / "thinking", folder / "nonthinking"
    for seed, target in enumerate(folders):
        torch.manual_seed(seed)
        build().to(torch.bfloat16).save_pretrained(target)
    return folders


def dense_model(layers: int, hidden: int):
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=32_000, hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64, tie_word_embeddings=False,
        )
    )  # fmt: skip


def experts_model():
    """Stock transformers' axk1 with 64 experts in each of 7 layers: 1,464 tensors on disk."""
    return AXK1ForCausalLM(
        AXK1Config(
            vocab_size=256, hidden_size=64, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=8,
            num_attention_heads=2, num_key_value_heads=2, n_routed_experts=64, num_experts_per_tok=8, n_group=1,
            topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        )
    )  # fmt: skip


def plain_merge(a: StoredTensor, b: StoredTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The oracle: one tensor, in memory, in fp32, rounded once; and how far a right sum may be from it."""
    wide_a, wide_b = (read_elements(tensor).float() for tensor in (a, b))
    merged = (ALPHA * wide_a + (1 - ALPHA) * wide_b).to(a.dtype)
    # The second part is the sum's own rounding in fp32, all that is left where the two models cancel.
    return merged, BF16_STEP * merged.float().abs() + FP32_STEP * (wide_a.abs() + wide_b.abs())


def compare(folders: tuple[Path, Path], out: Path) -> dict[str, int]:
    """Tensors of the source; how many `out` holds, how many within a bf16 step of the oracle, how many equal to it."""
    a, b, merged = (open_checkpoint(folder) for folder in (*folders, out))
    counts = {"expected": len(a), "written": 0, "near": 0, "equal": 0}
    for name in a.keys() & merged.keys():
        (truth, allowed), found = plain_merge(a[name], b[name]), read_elements(merged[name])
        counts["written"] += 1
        counts["near"] += bool(((found.float() - truth.float()).abs() <= allowed).all())
        counts["equal"] += torch.equal(found, truth)
    return counts


def find_merges(mergekit_python: str | None) -> dict[str, tuple[str, str]]:
    """The Python and the code of each candidate. SystemExit if the given Python has no mergekit."""
    merges = {"ours": (sys.executable, OURS)}
    if mergekit_python is None:
        print(
            "Missing: --mergekit PYTHON, a Python that has mergekit 0.1.5 (--help says how to make one). Ours runs alone."
        )
        return merges
    ask = "from importlib.metadata import version; import mergekit.merge; print(version('mergekit'))"
    child = subprocess.run([mergekit_python, "-c", ask], capture_output=True, text=True)
    if child.returncode:
        sys.exit(f"{mergekit_python} cannot import mergekit: {child.stderr.strip().splitlines()[-1]}")
    print(f"mergekit {child.stdout.split()[-1]}")
    return merges | {"mergekit": (mergekit_python, MERGEKIT)}


def main() -> None:
    parser = options_parser(__doc__, rounds=5)
    parser.add_argument("--mergekit", metavar="PYTHON", help="the Python that has mergekit 0.1.5")
    parser.add_argument("--layers", type=int, default=16, help="of the dense model (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=1024, help="of the dense model (default: %(default)s, 0.7 GB)")
    options = parser.parse_args()
    merges = find_merges(options.mergekit)
    with tempfile.TemporaryDirectory() as name:
        show_completeness(Path(name) / "axk1", merges, options.threads)
        compare_speed(Path(name) / "dense", merges, options)


def show_completeness(folder: Path, merges: dict, threads: int) -> None:
    folders = save_pair(folder, experts_model)
    for name, (python, code) in merges.items():
        run_merge(python, code, folders, folder / name, threads)
        counts = compare(folders, folder / name)
        print(f"axk1 with 7 x 64 experts: {name} writes {counts['written']:,} of {counts['expected']:,} tensors")
        assert counts["near"] == counts["written"], counts
        assert name != "ours" or counts["equal"] == counts["expected"], counts


def compare_speed(folder: Path, merges: dict, options) -> None:
    folders = save_pair(folder, lambda: dense_model(options.layers, options.hidden))
    nbytes = sum(tensor.nbytes for tensor in open_checkpoint(folders[0]).values())
    runs: dict[str, list[dict]] = {name: [] for name in merges}
    # One turn to check and to warm the page cache, then the turns that count.
    for turn in track(range(options.rounds + 1), description="dense", transient=True):
        for name, (python, code) in merges.items():
            out = folder / f"{name}-{turn}"
            measured = run_merge(python, code, folders, out, options.threads)
            if turn == 0:
                counts = compare(folders, out)
                print(
                    f"dense: {name} writes {counts['near']} of {counts['expected']} tensors, {counts['equal']} bit for bit"
                )
                assert counts["near"] == counts["expected"], counts
                assert name != "ours" or counts["equal"] == counts["expected"], counts
            else:
                runs[name].append(measured)
            for path in sorted(out.iterdir()):
                path.unlink()
    times_ms = {name: 1000 * median(run["elapsed_s"] for run in of) for name, of in runs.items()}
    peaks = {name: max(run["peak_bytes"] for run in of) for name, of in runs.items()}
    peer = "mergekit" if "mergekit" in merges else "ours"
    case = f"dense {nbytes / 1e9:.2f} GB bf16"
    show(f"merge, {options.threads} threads", {case: times_ms}, peer=peer)
    for name, peak in peaks.items():
        print(f"{name}: peak {peak / MEBIBYTE:,.0f} MiB beyond the libraries")
    if options.record:
        torch.set_num_threads(options.threads)
        record("merge", case, times_ms, peer=peer)


if __name__ == "__main__":
    main()
