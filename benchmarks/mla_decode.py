"""How fast does a decoding step attend over the latent cache on a GPU, and how far from reading the cache once?

  python benchmarks/mla_decode.py             # a GPU: checks, then measures; none: the prediction on paper
  python benchmarks/mla_decode.py --record    # appends to results.csv
  python benchmarks/mla_decode.py --tune      # times other blocks of heads and tokens, for mla_kernels.py

K1's sizes (64 heads, 512 + 64 numbers a token), bf16, one layer's attention core in a CUDA graph: ours, the same in torch's
operators, and what reading the cache takes at the rate of a copy measured in the same run.
"""

import argparse
from unittest import mock

import torch
from moe_dispatch import (
    BF16_BYTES,
    H200_BYTES_A_SECOND,
    H200_FLOPS,
    compile_beforehand,
    in_graph,
    measured_limits,
    medians_ms,
)
from rich.console import Console
from rich.table import Table
from timing import record

from modeling_axk1 import mla_kernels
from modeling_axk1.moe_kernels import CompileError

HEADS, LATENT, ROPE = 64, 512, 64
CASES = [(batch, tokens) for batch in (1, 16) for tokens in (1024, 4096, 16384, 131072)]
# From query and latents to scores, and from weights and latents to the context.
FLOPS_A_PAIR = 2 * (LATENT + ROPE) + 2 * LATENT


def parts_of(batch: int, tokens: int) -> int:
    """Of the cache, on a GPU like the H200."""
    return mla_kernels.split(mla_kernels.block_of(batch, HEADS, tokens, mla_kernels.HOPPER_HEADS), batch, HEADS, tokens)[0]


def paper_us(batch: int, tokens: int, bytes_a_second: float, flops_a_second: float) -> float:
    """The larger of reading the cache once (with queries and the parts' sums) and of the FLOPs."""
    parts = parts_of(batch, tokens)
    cache_bytes = batch * tokens * (LATENT + ROPE) * BF16_BYTES
    other_bytes = batch * HEADS * ((LATENT + ROPE + LATENT) * BF16_BYTES + 2 * parts * (LATENT + 2) * 4)
    return 1e6 * max(
        (cache_bytes + other_bytes) / bytes_a_second, batch * HEADS * tokens * FLOPS_A_PAIR / flops_a_second
    )


def inputs_of(batch: int, tokens: int, device: str = "cuda") -> tuple:
    shapes = ((HEADS, LATENT), (HEADS, ROPE), (tokens, LATENT), (tokens, ROPE))
    tensors = [torch.randn(batch, *shape, device=device, dtype=torch.bfloat16) for shape in shapes]
    seen_BS = torch.ones(batch, tokens, dtype=torch.bool, device=device)
    seen_BS[0, : tokens // 3] = False
    return *tensors, seen_BS, (128 + ROPE) ** -0.5


def check(inputs: tuple) -> None:
    """No less accurate than torch's operators in bf16, up to half as much again."""
    wide = [t.float() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in inputs]
    truth = mla_kernels.torch_attend_latents(*wide)
    errors = [
        ((attend(*inputs).float() - truth).norm() / truth.norm()).item()
        for attend in (mla_kernels.kernels_attend_latents, mla_kernels.torch_attend_latents)
    ]
    assert truth.norm() > 0 and errors[0] <= 1.5 * errors[1], errors


def measure(rounds: int, recorded: bool) -> None:
    machine = torch.cuda.get_device_name()
    limits = measured_limits(rounds)
    table = Table("batch", "cached tokens", "ours [us]", "torch [us]", "torch / ours", "of the limit", title=machine)
    for batch, tokens in CASES:
        inputs = inputs_of(batch, tokens)
        check(inputs)
        runs = {
            "ours": in_graph(lambda inputs=inputs: mla_kernels.kernels_attend_latents(*inputs)),
            "torch": in_graph(lambda inputs=inputs: mla_kernels.torch_attend_latents(*inputs)),
        }
        times = medians_ms(runs, rounds, f"{batch} x {tokens}") | {"limit": paper_us(batch, tokens, *limits) / 1e3}
        table.add_row(
            str(batch), f"{tokens:,}", f"{1e3 * times['ours']:.1f}", f"{1e3 * times['torch']:.1f}",
            f"{times['torch'] / times['ours']:.2f}x", f"{times['limit'] / times['ours']:.0%}",
        )  # fmt: skip
        if recorded:
            record("mla_decode", f"batch {batch}, {tokens} cached tokens, bf16", times, peer="torch", machine=machine)
    Console(width=130).print(table)


TRIALS = [
    mla_kernels.Block(*trial)
    for trial in (
        (16, 32, 8, 3, 264), (16, 32, 4, 3, 264), (16, 64, 4, 2, 264), (32, 64, 8, 2, 132), (64, 32, 8, 3, 132),
        (64, 64, 8, 2, 132),
    )
]  # fmt: skip


def compile_trial(*trial: int) -> str:
    block = mla_kernels.Block(*trial)
    try:
        with mock.patch.object(mla_kernels, "block_for", lambda *_: block):
            check(inputs_of(2, 1024))
    except (CompileError, AssertionError) as error:
        return f"{block}: {str(error).splitlines()[0][:150]}"
    return ""


def tune(rounds: int) -> None:
    """Microseconds of each trial, compiled and checked beforehand."""
    broken = compile_beforehand(compile_trial, set(TRIALS))
    cases = [(1, 1024), (1, 16384), (1, 131072), (16, 1024), (16, 16384), (16, 65536), (64, 4096)]
    columns = (*mla_kernels.Block._fields, *(f"{batch} x {tokens:,}" for batch, tokens in cases))
    table = Table(*columns, title=f"microseconds of rows x cached tokens, {torch.cuda.get_device_name()}")
    rows = {trial: [] for trial in TRIALS if trial not in broken}
    for batch, tokens in cases:
        inputs = inputs_of(batch, tokens)
        for trial in rows:
            with mock.patch.object(mla_kernels, "block_for", lambda *_, trial=trial: trial):
                run = {"": in_graph(lambda inputs=inputs: mla_kernels.kernels_attend_latents(*inputs))}
                rows[trial].append(1e3 * medians_ms(run, rounds, f"{batch} x {tokens}")[""])
    for trial, times in rows.items():
        table.add_row(*map(str, trial), *(f"{us:.1f}" for us in times))
    Console(width=150).print(table)


def print_paper() -> None:
    title = f"prediction at {H200_BYTES_A_SECOND / 1e12:.1f} TB/s and {H200_FLOPS / 1e12:.0f} TFLOP/s"
    table = Table("batch", "cached tokens", "parts", "microseconds a layer", title=title)
    for batch, tokens in CASES:
        us = paper_us(batch, tokens, H200_BYTES_A_SECOND, H200_FLOPS)
        table.add_row(str(batch), f"{tokens:,}", str(parts_of(batch, tokens)), f"{us:.1f}")
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help="append the figures to results.csv")
    parser.add_argument("--tune", action="store_true", help="time other blocks of heads and tokens")
    options = parser.parse_args()
    torch.manual_seed(0)
    if torch.cuda.is_available() and options.tune:
        tune(options.rounds)
    elif torch.cuda.is_available():
        measure(options.rounds, options.record)
    else:
        print("No figure here is measured, because there is no CUDA device:")
        print_paper()


if __name__ == "__main__":
    main()
