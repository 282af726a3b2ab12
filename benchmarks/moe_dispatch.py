"""How fast are the routed experts on a GPU, beside transformers' other implementations and the machine's measured limits?

  python benchmarks/moe_dispatch.py             # a GPU: checks, then measures; none: the prediction on paper
  python benchmarks/moe_dispatch.py --paper     # the prediction, bytes and FLOPs of every kernel
  python benchmarks/moe_dispatch.py --record    # appends to results.csv
  python benchmarks/moe_dispatch.py --tune      # times other tiles, for the tables of moe_kernels.py

bf16, K1's and Light's shapes. Every candidate is compared with the eager loop before it is timed. The limits are measured in
the same run: copying memory, and one large matmul. The prediction of a kernel is the larger of its bytes over the bandwidth
and its FLOPs over the matmul rate; what a kernel reads is counted once, as if the second-level cache never missed.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import record

from modeling_axk1 import AxK1Config, moe_kernels
from modeling_axk1.modeling_axk1 import AxK1Experts

PEERS = ("eager", "grouped_mm", "batched_mm", "sonicmoe", "deepgemm")
# It copies the weights of every token's experts: 64 tokens of K1 are 45 GB.
BATCHED_MM_TOKENS = 8
TOKENS = (1, 8, 64, 512, 4096, 16384)
# NVIDIA's data sheet of the H200 (SXM): memory, and dense bf16. A run on a GPU uses what it measures.
H200_BYTES_A_SECOND, H200_FLOPS = 4.8e12, 989e12
BF16_BYTES = 2


class Shape(NamedTuple):
    hidden: int
    experts: int
    width: int
    top_k: int


class Cost(NamedTuple):
    kernel: str
    bytes: float
    flops: float

    def seconds(self, bytes_a_second: float, flops_a_second: float) -> float:
        return max(self.bytes / bytes_a_second, self.flops / flops_a_second)


def shape_of(preset: str) -> Shape:
    config = AxK1Config.preset(preset)
    return Shape(config.hidden_size, config.n_routed_experts, config.moe_intermediate_size, config.num_experts_per_tok)


def hit_experts(shape: Shape, tokens: int) -> float:
    """How many experts have a token, on average, if every token's choices are uniform."""
    return shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens)


def paper(shape: Shape, tokens: int, backward: bool) -> list[Cost]:
    """Bytes to and from memory, and FLOPs, of each kernel; with `backward`, of a forward that keeps and of its backward."""
    H, I, K, P = shape.hidden, shape.width, shape.top_k, tokens * shape.top_k  # noqa: E741
    matrix = hit_experts(shape, tokens) * H * I * BF16_BYTES
    pairs_H, pairs_I, tokens_H = (n * BF16_BYTES for n in (P * H, P * I, tokens * H))
    flops = 2 * P * H * I
    costs = [
        Cost("route", tokens * shape.experts * 4 + P * 12, 0),
        Cost("count, place", P * 24, 0),
        Cost("up", 2 * matrix + tokens_H + pairs_I * (3 if backward else 1), 2 * flops),
        Cost("rows (down)", matrix + pairs_I + pairs_H, flops),
        Cost("combine", pairs_H + tokens_H + P * 4 + tokens * K * 8, 0),
    ]
    if backward:
        every_matrix = shape.experts * H * I * BF16_BYTES
        costs += [
            Cost("count, place", P * 24, 0),
            Cost("act_backward", matrix + tokens_H + pairs_I * 5, flops),
            Cost("outer (down)", tokens_H + pairs_I + every_matrix, flops),
            Cost("outer (gate, up)", tokens_H + 2 * pairs_I + 2 * every_matrix, 2 * flops),
            Cost("rows (x)", 2 * matrix + 2 * pairs_I + pairs_H, 2 * flops),
            Cost("combine", pairs_H + tokens_H + tokens * K * 8, 0),
            Cost("route_backward", tokens * shape.experts * 8 + P * 12, 0),
        ]
    return costs


def kept_bytes_a_token(shape: Shape) -> tuple[int, int]:
    """For backward: ours (layer input, gate/up output), and the tensors that autograd keeps in transformers' grouped_mm.

    The second: gathered rows, gate/up output, silu of gate, act, and the unweighted output, which the gradient of the routing
    weights needs. Counted with torch's saved_tensors_hooks, both keep only indices and weights beside (2% of the second).
    """
    H, I, K = shape.hidden, shape.width, shape.top_k  # noqa: E741
    return BF16_BYTES * (H + K * 2 * I), BF16_BYTES * K * (2 * H + 4 * I)


def print_paper(bytes_a_second: float, flops_a_second: float) -> None:
    console = Console(width=130)
    for preset in ("k1", "light"):
        shape = shape_of(preset)
        ours, theirs = kept_bytes_a_token(shape)
        title = f"{preset} {tuple(shape)}: prediction at {bytes_a_second / 1e12:.2f} TB/s and {flops_a_second / 1e12:.0f} TFLOP/s"
        table = Table("tokens", "direction", "MB", "GFLOP", "microseconds", "largest kernels", title=title)
        for tokens in TOKENS:
            for backward in (False, True):
                costs = paper(shape, tokens, backward)
                seconds = [cost.seconds(bytes_a_second, flops_a_second) for cost in costs]
                largest = sorted(zip(seconds, costs), reverse=True)[:3]
                table.add_row(
                    f"{tokens:,}", "forward + backward" if backward else "forward",
                    f"{sum(cost.bytes for cost in costs) / 1e6:,.1f}", f"{sum(cost.flops for cost in costs) / 1e9:,.1f}",
                    f"{sum(seconds) * 1e6:,.1f}", ", ".join(f"{c.kernel} {s / sum(seconds):.0%}" for s, c in largest),
                )  # fmt: skip
        console.print(table)
        console.print(f"kept for backward: {ours:,} bytes a token, grouped_mm {theirs:,} ({ours / theirs:.0%})\n")


def experts_layer(shape: Shape, device: str, dtype: torch.dtype) -> AxK1Experts:
    config = AxK1Config.preset(
        "nano", hidden_size=shape.hidden, n_routed_experts=shape.experts, moe_intermediate_size=shape.width,
        num_experts_per_tok=shape.top_k, n_group=1, topk_group=1,
    )  # fmt: skip
    with torch.device("meta"):
        experts = AxK1Experts(config).to(dtype)
    experts.to_empty(device=device)
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.02)
    return experts


def inputs_of(shape: Shape, tokens: int, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    ids = torch.rand(tokens, shape.experts, device=device).topk(shape.top_k, dim=1).indices
    weights = torch.rand(tokens, shape.top_k, device=device)
    return torch.randn(tokens, shape.hidden, device=device, dtype=dtype), ids, weights


def step(experts: AxK1Experts, implementation: str, inputs: tuple, backward: bool) -> Callable[[], torch.Tensor]:
    x, ids, weights = inputs

    def run() -> torch.Tensor:
        experts.config._experts_implementation = implementation
        if not backward:
            with torch.no_grad():
                return experts(x, ids, weights)
        experts.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        experts(leaf, ids, weights).backward(x)
        return leaf.grad

    return run


def those_that_run(experts: AxK1Experts, inputs: tuple, backward: bool) -> dict[str, Callable[[], torch.Tensor]]:
    """Ours and the peers that this machine can run, each compared with the eager loop: within bf16's rounding."""
    truth = step(experts, "eager", inputs, backward)().float()
    assert truth.norm() > 0, "vacuous comparison"
    runs = {}
    for name in ("ours", *PEERS):
        if name == "batched_mm" and len(inputs[0]) > BATCHED_MM_TOKENS:
            continue
        run = step(experts, "axk1" if name == "ours" else name, inputs, backward)
        try:
            result = run().float()
        except (ImportError, RuntimeError, ValueError, OSError) as error:
            if name == "ours":
                raise
            print(f"{name} does not run here: {str(error).splitlines()[0]}")
            continue
        error = ((result - truth).norm() / truth.norm()).item()
        assert error < 1e-2, f"{name}: relative error {error:.1e}"
        runs[name] = run
    return runs


def medians_ms(runs: dict[str, Callable], rounds: int, label: str) -> dict[str, float]:
    """Candidates take turns; each turn is Triton's timer, which empties the second-level cache before every call."""
    from triton.testing import do_bench

    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in track(range(rounds), description=label, transient=True):
        for name, run in runs.items():
            times[name].append(do_bench(run, warmup=10, rep=50, return_mode="median"))
    return {name: statistics.median(values) for name, values in times.items()}


def measured_limits(rounds: int) -> tuple[float, float]:
    """Bytes a second of a copy (read and written), and bf16 FLOPs a second of one large matmul."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    times = medians_ms({"copy": lambda: target.copy_(source), "matmul": lambda: a @ b}, rounds, "limits")
    return 2 * source.numel() / times["copy"] * 1e3, 2 * 8192**3 / times["matmul"] * 1e3


def peak_mb(run: Callable[[], object]) -> float:
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def dispatch_and_combine(shape: Shape, inputs: tuple, rounds: int) -> tuple[float, float]:
    """Microseconds of sort and combine alone, and of reading and writing each pair's row once."""
    x, ids, weights = inputs
    rows = x.new_empty(ids.numel(), shape.hidden).normal_()
    rows_a_tile = moe_kernels.tiles_for(moe_kernels.capability(x), x.dtype, len(x)).up.rows

    def run() -> torch.Tensor:
        moe_kernels.sort_pairs(ids, shape.experts, rows_a_tile)
        return moe_kernels.sum_pairs(rows, ids, weights, shape.experts)

    times = medians_ms({"ours": run, "copy": rows.clone}, rounds, "dispatch and combine")
    return times["ours"] * 1e3, times["copy"] * 1e3


def measure(options: argparse.Namespace) -> None:
    machine = torch.cuda.get_device_name()
    bytes_a_second, flops_a_second = measured_limits(options.rounds)
    print(f"{machine}: copies {bytes_a_second / 1e12:.2f} TB/s, one matmul {flops_a_second / 1e12:.0f} TFLOP/s")
    print_paper(bytes_a_second, flops_a_second)
    for preset in options.shapes:
        shape = shape_of(preset)
        experts = experts_layer(shape, "cuda", torch.bfloat16)
        columns = ["case", "ours", *PEERS, "best peer / ours", "of the limit", "peak MB, of grouped_mm's"]
        table = Table(*columns, title=f"{preset} {tuple(shape)}, {machine}, milliseconds")
        for tokens in options.tokens:
            inputs = inputs_of(shape, tokens, "cuda", torch.bfloat16)
            for backward in (False, True):
                case = f"{preset}, {tokens} tokens, {'forward + backward' if backward else 'forward'}, bf16"
                runs = those_that_run(experts, inputs, backward)
                times = medians_ms(runs, options.rounds, case)
                times["best peer"] = min(ms for name, ms in times.items() if name != "ours")
                # The router is not part of an experts layer.
                costs = [cost for cost in paper(shape, tokens, backward) if not cost.kernel.startswith("route")]
                limit_ms = 1e3 * sum(cost.seconds(bytes_a_second, flops_a_second) for cost in costs)
                peaks = {name: peak_mb(runs[name]) for name in ("ours", "grouped_mm") if name in runs}
                shares = f"{peaks['ours']:,.0f}" + (
                    f", {peaks['ours'] / peaks['grouped_mm']:.0%}" if "grouped_mm" in peaks else ""
                )
                table.add_row(
                    case, *(f"{times[n]:.3f}" if n in times else "-" for n in ("ours", *PEERS)),
                    f"{times['best peer'] / times['ours']:.2f}x", f"{limit_ms / times['ours']:.0%}", shares,
                )  # fmt: skip
                if options.record:
                    record("moe_dispatch", case, times | {"limit": limit_ms}, peer="best peer", machine=machine)
            ours_us, copy_us = dispatch_and_combine(shape, inputs, options.rounds)
            print(
                f"{preset}, {tokens} tokens: dispatch and combine {ours_us:.1f} us, {ours_us / copy_us:.2f}x of a copy"
            )
        Console(width=200).print(table)
        del experts


def variants(tile: moe_kernels.Tile) -> list[moe_kernels.Tile]:
    """The tile and its neighbours: other columns, depths, stages and warps. The rows stay, the kernels share them."""
    changes = [
        {},
        *({"columns": tile.columns * n // 2} for n in (1, 4)),
        *({"depth": tile.depth * n // 2} for n in (1, 4)),
    ]
    changes += [{"stages": tile.stages + n} for n in (-1, 1)] + [{"warps": 12 - tile.warps}]
    return [tile._replace(**change) for change in changes]


def tune(options: argparse.Namespace) -> None:
    """Milliseconds of forward (and backward) with each variant of one kernel's tile; a tile too large for the GPU says so."""
    shape, timed = shape_of(options.shapes[0]), []
    experts = experts_layer(shape, "cuda", torch.bfloat16)
    for tokens in (8, 16384):
        x, ids, weights = inputs_of(shape, tokens, "cuda", torch.bfloat16)
        layer = (x, ids, weights, experts.gate_up_proj.data, experts.down_proj.data)
        tiles = moe_kernels.tiles_for(moe_kernels.capability(x), x.dtype, tokens)
        for part in tiles._fields if tokens > moe_kernels.SMALL_BATCH else tiles._fields[:2]:
            for tile in variants(getattr(tiles, part)):
                changed = tiles._replace(**{part: tile})
                with mock.patch.object(moe_kernels, "tiles_for", lambda *_, changed=changed: changed):
                    try:
                        ms = time_of_layer(layer, backward=part in ("act_backward", "outer"), rounds=options.rounds)
                    except moe_kernels.CompileError as error:
                        print(f"{tokens} tokens, {part}, {tuple(tile)}: {error}")
                        continue
                timed.append((tokens, part, ms, tile))
    table = Table("tokens", "kernel", "milliseconds", *moe_kernels.Tile._fields, title=torch.cuda.get_device_name())
    for tokens, part, ms, tile in sorted(timed):
        table.add_row(str(tokens), part, f"{ms:.3f}", *map(str, tile))
    Console(width=130).print(table)


def time_of_layer(layer: tuple, backward: bool, rounds: int) -> float:
    gate_up = moe_kernels.kernels_forward(*layer, backward)[1]
    if backward:
        return medians_ms(
            {"": lambda: moe_kernels.kernels_backward(layer[0], *layer, gate_up, True, True)}, rounds, "tune"
        )[""]
    return medians_ms({"": lambda: moe_kernels.kernels_forward(*layer, False)}, rounds, "tune")[""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--shapes", nargs="+", choices=["k1", "light"], default=["k1", "light"])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate (default: %(default)s)")
    parser.add_argument("--paper", action="store_true", help="only the prediction")
    parser.add_argument("--tune", action="store_true", help="time other tiles on the first of the shapes")
    parser.add_argument("--record", action="store_true", help="append the figures to results.csv")
    options = parser.parse_args()
    if options.paper or not torch.cuda.is_available():
        print("No figure here is measured" + (":" if options.paper else ", because there is no CUDA device:"))
        print_paper(H200_BYTES_A_SECOND, H200_FLOPS)
        return
    torch.manual_seed(0)
    (tune if options.tune else measure)(options)


if __name__ == "__main__":
    main()
