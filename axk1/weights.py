"""How are weights joined and carried over from the command line?  `axk1 merge`, `adapter` and `convert`."""

import argparse
from pathlib import Path

from axk1.parsing import add_command

MERGE = """examples:
  axk1 merge THINKING NONTHINKING MERGED                        0.8 x THINKING + 0.2 x NONTHINKING
  axk1 merge THINKING NONTHINKING SWEEP --alphas 0.6 0.7 0.8 0.9  SWEEP/alpha-0.6 ... SWEEP/alpha-0.9

Each is a folder of safetensors, of any architecture. Memory does not grow with the model. Killed, or out of disk
space: run the same command again, it goes on where it was."""
ADAPTER = """examples:
  axk1 adapter merge MODEL ADAPTER MERGED     W + scale x B A: a checkpoint without adapter, for everyone
  axk1 adapter export ADAPTER FOR_VLLM        the routed experts' adapters one by one, as vLLM names them

ADAPTER is what `axk1 sft --use_peft true` saved, or PEFT. MODEL is unquantised, also where the adapter was trained on a
quantised one. Memory of a merge does not grow with the model. Killed: run the same command again, it goes on."""
CONVERT = """examples:
  axk1 convert inspect CHECKPOINT                      format, layout, parameters, what is missing
  axk1 convert to-hf CHECKPOINT MODEL --tokenizer DIR  Megatron (rank files or torch_dist) to safetensors
  axk1 convert to-megatron MODEL CHECKPOINT --tp 2 --pp 2 --ep 4 --format legacy
  axk1 convert to-megatron OLD NEW --tp 4              reshard one Megatron checkpoint into another
  axk1 convert verify A B                              two checkpoints of any formats, bit for bit

CHECKPOINT is the folder with latest_checkpointed_iteration.txt, or an iter_* or release folder. Neither Megatron nor a GPU is
needed, memory does not grow with the model, and nothing in a checkpoint is ever run. Killed, or out of disk space: run the
same command again, it goes on where it was."""


def add(commands) -> None:
    _add_merge(commands)
    _add_adapter(commands)
    _add_convert(commands)


def _add_merge(commands) -> None:
    command = add_command(
        commands, "merge", merge, "merge a thinking and a non-thinking model, tensor by tensor", MERGE
    )
    command.add_argument(
        "thinking_dir", metavar="THINKING", type=Path, help="also gives config, tokenizer and template"
    )
    command.add_argument("nonthinking_dir", metavar="NONTHINKING", type=Path)
    command.add_argument("out_dir", metavar="OUT", type=Path, help="written whole or not at all")
    weight = command.add_mutually_exclusive_group()
    weight.add_argument("--alpha", type=float, default=0.8, help="weight of the thinking model (default 0.8)")
    weight.add_argument("--alphas", type=float, nargs="+", metavar="ALPHA", help="one folder OUT/alpha-X for each")
    command.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="size of an output file (default 5)")


def _add_adapter(commands) -> None:
    summary = "merge a LoRA adapter into its model, or write it as vLLM reads it"
    directions = add_command(commands, "adapter", None, summary, ADAPTER).add_subparsers(
        metavar="DIRECTION", required=True
    )
    command = add_command(directions, "merge", adapter_merge, "write the model with the adapter in it", ADAPTER)
    command.add_argument("model_dir", metavar="MODEL", type=Path, help="folder of safetensors; never changed")
    command.add_argument("adapter_dir", metavar="ADAPTER", type=Path)
    command.add_argument("out_dir", metavar="OUT", type=Path, help="written whole or not at all")
    command.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="size of an output file (default 5)")
    command = add_command(directions, "export", adapter_export, "write the adapter expert by expert", ADAPTER)
    command.add_argument("adapter_dir", metavar="ADAPTER", type=Path)
    command.add_argument("out_dir", metavar="OUT", type=Path)


def _add_convert(commands) -> None:
    summary = "turn Megatron checkpoints into safetensors and back, compare and inspect them"
    directions = add_command(commands, "convert", None, summary, CONVERT).add_subparsers(
        metavar="DIRECTION", required=True
    )

    command = add_command(directions, "to-hf", convert_to_hf, "write a folder that from_pretrained loads", CONVERT)
    _add_conversion(command)

    command = add_command(directions, "to-megatron", convert_to_megatron, "write a Megatron checkpoint", CONVERT)
    _add_conversion(command)
    command.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks (default 1)")
    command.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline stages (default 1)")
    command.add_argument("--vpp", type=int, metavar="N", help="chunks a stage, for interleaved pipelines (default 1)")
    command.add_argument("--ep", type=int, default=1, metavar="N", help="expert-parallel ranks (default 1)")
    command.add_argument("--etp", type=int, metavar="N", help="tensor-parallel ranks inside experts (default: as --tp)")
    command.add_argument(
        "--format",
        choices=["torch_dist", "legacy"],
        default="torch_dist",
        help="torch_dist (default; Megatron loads it in any layout) or legacy rank files",
    )
    command.add_argument("--first-stage-layers", type=int, metavar="N", help="layers of the first stage, where uneven")
    command.add_argument("--last-stage-layers", type=int, metavar="N", help="layers of the last stage, where uneven")
    command.add_argument(
        "--transformer-engine",
        action=argparse.BooleanOptionalAction,
        help="that spec's names (default: a Megatron source's own, else the local spec's)",
    )
    command.add_argument("--vocab-divisor", type=int, metavar="N", help="make_vocab_size_divisible_by (default 128)")
    command.add_argument("--iteration", type=int, metavar="N", help="write iter_N (default: release)")
    command.add_argument(
        "--mtp-layer-name",
        choices=["transformer_layer", "mtp_model_layer"],
        default="transformer_layer",
        help="of rank files; megatron-core 0.17 and later read mtp_model_layer (default transformer_layer)",
    )

    command = add_command(directions, "verify", convert_verify, "compare two checkpoints bit for bit", CONVERT)
    command.add_argument("a", metavar="A", type=Path, help="of any format")
    command.add_argument("b", metavar="B", type=Path, help="of any format")
    _add_reading(command)
    command.add_argument(
        "--workers", type=int, metavar="N", help="tensors compared at a time (default: cores, at most 4)"
    )

    command = add_command(directions, "inspect", convert_inspect, "say what a checkpoint is and what it lacks", CONVERT)
    command.add_argument("source", metavar="SRC", type=Path)
    _add_reading(command)


def _add_conversion(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="SRC", type=Path, help="a checkpoint of any format; never changed")
    command.add_argument("target", metavar="DST", type=Path, help="written whole or not at all")
    _add_reading(command)
    command.add_argument("--shard-gb", type=float, default=5.0, metavar="GB", help="size of an output file (default 5)")
    command.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="files written, and then tensors compared, at a time; each file has threads of its own to hash and to write it "
        "besides (default: cores, at most 4; fewer where they would hold more than twice the largest tensor)",
    )
    command.add_argument("--no-verify", action="store_true", help="do not compare the result with the source")
    command.add_argument("--check-nan", action="store_true", help="look for NaN in the source first")
    command.add_argument("--dry-run", action="store_true", help="print files, bytes, memory and time, write nothing")


def _add_reading(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--vocab-size", type=int, metavar="N", help="the true one, where a checkpoint holds the padded one only"
    )
    command.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="copied along; its length is the vocabulary, if unknown"
    )
    command.add_argument(
        "--config", type=Path, metavar="DIR", help="a config.json to take token ids from and to agree with"
    )
    command.add_argument(
        "--post-norm", metavar="NAME", help="how the norm behind the MLP is called (post_mlp_layernorm, ...)"
    )
    command.add_argument(
        "--drop-fp8-state", action="store_true", help="leave FP8 scaling state behind; the weights are whole"
    )


def merge(
    thinking_dir: Path,
    nonthinking_dir: Path,
    out_dir: Path,
    alpha: float,
    alphas: list[float] | None,
    shard_gb: float,
) -> None:
    from conversion import merge_checkpoints
    from conversion.merging import alpha_text, check_alpha, is_merge_of, rest_text

    shard_bytes = _bytes(shard_gb)
    targets = {out_dir / f"alpha-{alpha_text(each)}": each for each in alphas} if alphas else {out_dir: alpha}
    # A finished merge has no journal beside it; a sweep that was killed goes on behind it.
    finished = [
        target
        for target in targets
        if alphas and target.exists() and not target.with_name(target.name + ".partial.jsonl").exists()
    ]
    # All of a sweep is checked before any of it is written: a merge of a large model takes its time.
    for target, weight in targets.items():
        check_alpha(weight)
        if target in finished and not is_merge_of(target, thinking_dir, nonthinking_dir, weight):
            said = f"{alpha_text(weight)} x {thinking_dir.name} + {rest_text(weight)} x {nonthinking_dir.name}"
            raise ValueError(f"{target} is there already, but is not {said}; choose another OUT or remove it.")
    for target, weight in targets.items():
        if target in finished:
            print(f"{target} is there already")
            continue
        merge_checkpoints(thinking_dir, nonthinking_dir, target, alpha=weight, shard_bytes=shard_bytes)
        print(f"wrote {target}: {alpha_text(weight)} x {thinking_dir} + {rest_text(weight)} x {nonthinking_dir}")


def adapter_merge(model_dir: Path, adapter_dir: Path, out_dir: Path, shard_gb: float) -> None:
    from conversion import merge_adapter

    merge_adapter(model_dir, adapter_dir, out_dir, shard_bytes=_bytes(shard_gb))
    print(f"wrote {out_dir}: {model_dir} with {adapter_dir} in it")


def adapter_export(adapter_dir: Path, out_dir: Path) -> None:
    from conversion import export_adapter

    warnings = export_adapter(adapter_dir, out_dir)
    print(f"wrote {out_dir}: {adapter_dir}, expert by expert", *warnings, sep="\n")


def _reading(options: dict):
    from conversion import Reading

    names = ("vocab_size", "tokenizer", "config", "post_norm", "drop_fp8_state")
    return Reading(**{name: options.pop(name) for name in names})


def convert_to_hf(source: Path, target: Path, shard_gb: float, **options) -> None:
    from conversion import to_hf

    reading, running = _reading(options), _running(options)
    _convert(to_hf(source, target, reading=reading, shard_bytes=_bytes(shard_gb), **options), **running)


def convert_to_megatron(source: Path, target: Path, shard_gb: float, **options) -> None:
    from conversion import to_megatron

    reading, running = _reading(options), _running(options)
    _convert(to_megatron(source, target, reading=reading, shard_bytes=_bytes(shard_gb), **options), **running)


def _bytes(gigabytes: float) -> int:
    if not 0 < gigabytes < float("inf"):
        raise ValueError(f"--shard-gb {gigabytes} is no size of a file; 5 is usual.")
    return int(gigabytes * 1e9)


def _running(options: dict) -> dict:
    return {name: options.pop(name) for name in ("workers", "no_verify", "check_nan", "dry_run")}


def _convert(conversion, workers: int | None, no_verify: bool, check_nan: bool, dry_run: bool) -> None:
    from modeling_axk1.configuration_axk1 import in_units

    for name in conversion.opened.added:
        print(f"{name} is not in the source; a constant stands for it")
    if dry_run:
        plan = conversion.plan(workers)
        for name, size in plan.files:
            print(f"  {name:<60}{size:>18,} bytes")
        print(f"{len(plan.files)} files, {plan.nbytes:,} bytes ({in_units(plan.nbytes)}); ", end="")
        print(
            f"memory {plan.memory_bytes / 1e6:,.0f} MB; about {plan.seconds:,.0f} s and as long again to verify, ",
            end="",
        )
        print(f"if the disk keeps up with the {plan.bytes_per_s / 1e9:.2f} GB/s that a worker read and hashed just now")
        return
    done = conversion.run(workers=workers, verify=not no_verify, check_nan=check_nan)
    print(f"wrote {done.path}: {done.files} files, {in_units(done.nbytes)} in {done.write_s:.1f} s", end="")
    print(f", verified bit for bit in {done.verify_s:.1f} s" if done.verify_s is not None else ", not verified")


def convert_verify(a: Path, b: Path, workers: int | None, **options) -> None:
    from conversion import verify

    differing = verify(a, b, reading=_reading(options), workers=workers)
    for difference in differing:
        print(f"differs: {difference}")
    if differing:
        raise ValueError(f"{len(differing)} tensors differ between {a} and {b}.")
    print(f"{a} and {b} hold the same model, bit for bit")


def convert_inspect(source: Path, **options) -> None:
    from conversion import inspect

    facts = inspect(source, _reading(options))
    problem = facts.pop("problem", None)
    for name, value in facts.items():
        print(f"{name:<20}{value:,}" if type(value) is int else f"{name:<20}{value}")
    if problem:
        raise ValueError(problem)
