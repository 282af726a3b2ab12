"""How fast are the routed experts on a GPU, beside transformers' other implementations and the machine's measured limits?

  python benchmarks/moe_dispatch.py             # a GPU: checks, then measures; none: the prediction on paper
  python benchmarks/moe_dispatch.py --paper     # the prediction, bytes and FLOPs of every kernel
  python benchmarks/moe_dispatch.py --record    # appends to results.csv
  python benchmarks/moe_dispatch.py --tune      # times other tiles, for the tables of moe_kernels.py
  python benchmarks/moe_dispatch.py --profile   # milliseconds of each kernel in a training step

bf16, K1's and Light's shapes. Every candidate is compared with the eager loop before it is timed. The limits are measured in
the same run: copying memory, and one large matmul. The prediction of a kernel is the larger of its bytes over the bandwidth
and its FLOPs over the matmul rate; what a kernel reads is counted once, as if the second-level cache never missed.
"""

import argparse
import multiprocessing
import os
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import record
from torch.profiler import ProfilerActivity, profile

from modeling_axk1 import AxK1Config, moe_kernels
from modeling_axk1.modeling_axk1 import AxK1Experts

PEERS = ("eager", "grouped_mm", "batched_mm", "sonicmoe", "deepgemm")
# It copies the weights of every token's experts: 64 tokens of K1 are 45 GB.
BATCHED_MM_TOKENS = 8
TOKENS = (1, 8, 64, 512, 4096, 16384)
# NVIDIA's data sheet of the H200 (SXM): memory, and dense bf16. A run on a GPU uses what it measures.
H200_BYTES_A_SECOND, H200_FLOPS = 4.8e12, 989e12
BF16_BYTES = 2
# The eager loop's backward writes all weights once an expert: where it takes longer, its first call is its time.
SLOW_MS = 500


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


def those_that_run(
    experts: AxK1Experts, inputs: tuple, backward: bool
) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, float]]:
    """Ours and the peers that this machine can run, each compared with the eager loop: within bf16's rounding.

    Second, the milliseconds of the eager loop where one call is slow enough to be its own measurement.
    """
    eager = step(experts, "eager", inputs, backward)
    runs, slow = {"eager": eager}, {}
    ms, truth = once_ms(eager)
    if ms > SLOW_MS:
        runs, slow = {}, {"eager": ms}
    truth = truth.float()
    assert truth.norm() > 0, "vacuous comparison"
    for name in ("ours", *PEERS[1:]):
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
    return runs, slow


def medians_ms(runs: dict[str, Callable], rounds: int, label: str) -> dict[str, float]:
    """Candidates take turns; each turn is Triton's timer, which empties the second-level cache before every call."""
    from triton.testing import do_bench

    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in track(range(rounds), description=label, transient=True):
        for name, run in runs.items():
            times[name].append(do_bench(run, warmup=10, rep=50, return_mode="median"))
    return {name: statistics.median(values) for name, values in times.items()}


def once_ms(run: Callable[[], object]) -> tuple[float, object]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    result = run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end), result


def in_graph(run: Callable[[], object]) -> Callable[[], object]:
    """The same as one replayed CUDA graph, as a compiled decoding step runs it: what the GPU takes, not Python."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


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
    rows, out = x.new_empty(ids.numel(), shape.hidden).normal_(), torch.empty_like(x)
    mean = ids.numel() / shape.experts
    rows_a_tile = moe_kernels.tiles_for(moe_kernels.capability(x), x.dtype, len(x), mean).up.rows

    def run() -> None:
        moe_kernels.sort_pairs(ids, shape.experts, rows_a_tile)
        moe_kernels.sum_pairs(rows, ids, weights, shape.experts, out)

    times = medians_ms({"ours": in_graph(run), "copy": in_graph(rows.clone)}, rounds, "dispatch and combine")
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
                runs, slow = those_that_run(experts, inputs, backward)
                peaks = {name: peak_mb(runs[name]) for name in ("ours", "grouped_mm") if name in runs}
                if tokens <= moe_kernels.SMALL_BATCH and not backward:
                    # The eager loop asks the host which experts were hit: no graph can hold it.
                    runs = {name: run if name == "eager" else in_graph(run) for name, run in runs.items()}
                    case += ", in a CUDA graph"
                times = medians_ms(runs, options.rounds, case) | slow
                times["best peer"] = min(ms for name, ms in times.items() if name != "ours")
                # The router is not part of an experts layer.
                costs = [cost for cost in paper(shape, tokens, backward) if not cost.kernel.startswith("route")]
                limit_ms = 1e3 * sum(cost.seconds(bytes_a_second, flops_a_second) for cost in costs)
                shares = f"{peaks['ours']:,.0f}" + (
                    f", {peaks['ours'] / peaks['grouped_mm']:.0%}" if "grouped_mm" in peaks else ""
                )
                table.add_row(
                    case, *(f"{times[n]:.3f}" if n in times else "-" for n in ("ours", *PEERS)),
                    f"{times['best peer'] / times['ours']:.2f}x", f"{limit_ms / times['ours']:.0%}", shares,
                )  # fmt: skip
                print(case, {name: round(ms, 4) for name, ms in times.items()}, f"limit {limit_ms:.4f}", shares, flush=True)
                if options.record:
                    record("moe_dispatch", case, times | {"limit": limit_ms}, peer="best peer", machine=machine)
            ours_us, copy_us = dispatch_and_combine(shape, inputs, options.rounds)
            print(
                f"{preset}, {tokens} tokens: dispatch and combine {ours_us:.1f} us, {ours_us / copy_us:.2f}x of a copy"
            )
        Console(width=200).print(table)
        del experts


def profile_kernels(options: argparse.Namespace) -> None:
    """Milliseconds of each kernel in forward and backward, by torch's profiler."""
    for preset in options.shapes:
        shape = shape_of(preset)
        experts = experts_layer(shape, "cuda", torch.bfloat16)
        columns = ("tokens", "all", "kernels, those of 1% or more")
        table = Table(*columns, title=f"{preset} {tuple(shape)}, {torch.cuda.get_device_name()}, milliseconds")
        for tokens in options.tokens:
            run = step(experts, "axk1", inputs_of(shape, tokens, "cuda", torch.bfloat16), True)
            run()
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                for _ in range(options.rounds):
                    run()
                torch.cuda.synchronize()
            times = {e.key: e.device_time_total / options.rounds / 1e3 for e in profiled.key_averages()}
            total = sum(times.values())
            named = sorted(((ms, name) for name, ms in times.items() if ms >= total / 100), reverse=True)
            table.add_row(f"{tokens:,}", f"{total:.3f}", ", ".join(f"{name.split('(')[0]} {ms:.3f}" for ms, name in named))
        Console(width=130).print(table)
        del experts


# What to try instead of the tiles of moe_kernels.py: rows, columns, depth, warps, stages. The rows of the first three are one
# schedule's, so they stay.
LARGE = {
    "up": [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 32, 8, 5), (128, 128, 128, 8, 2), (128, 64, 64, 4, 3),
           (128, 64, 64, 4, 4), (128, 64, 64, 8, 4), (128, 64, 128, 4, 2)],
    "down": [(128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 256, 32, 8, 5), (128, 256, 128, 8, 2), (128, 128, 64, 4, 3),
             (128, 128, 64, 4, 4), (128, 128, 64, 8, 4), (128, 128, 128, 4, 3)],
    "act_backward": [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (128, 256, 64, 8, 3),
                     (128, 64, 64, 4, 4), (128, 128, 128, 8, 2)],
    "outer": [(128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (128, 256, 32, 8, 4), (128, 256, 32, 8, 6), (128, 256, 128, 8, 2),
              (256, 128, 64, 8, 4), (64, 256, 64, 4, 2), (128, 128, 64, 4, 3), (128, 128, 64, 4, 4), (128, 128, 32, 4, 4),
              (128, 128, 64, 8, 4), (128, 128, 128, 8, 3)],
}  # fmt: skip
# For few tokens; the rows become those of the batch.
FEW = [(16, *rest) for rest in (
    (32, 128, 4, 3), (32, 128, 4, 4), (32, 256, 4, 3), (32, 256, 4, 4), (32, 256, 8, 3), (32, 512, 8, 2), (64, 128, 4, 3),
    (64, 128, 4, 4), (64, 128, 8, 4), (64, 256, 8, 3), (64, 256, 4, 2), (128, 64, 4, 4), (128, 128, 8, 3), (16, 256, 4, 4),
    (16, 512, 4, 3),
)]  # fmt: skip

# Of weight gradients where an expert has few rows: a program stores zeros or one product, and several share a multiprocessor.
FEW_OUTER = [(128, 256, 64, 8, 4), (128, 256, 32, 8, 2), (128, 128, 64, 4, 2), (128, 128, 32, 4, 2), (128, 128, 16, 8, 2),
             (64, 256, 32, 4, 2), (64, 256, 16, 4, 1), (64, 128, 32, 4, 2), (32, 256, 32, 4, 2)]  # fmt: skip


def trials(tokens: int, shape: Shape) -> list[tuple[str, moe_kernels.Tiles]]:
    """Each kernel's tile by itself, the others as they are."""
    base = moe_kernels.tiles_for((9, 0), torch.bfloat16, tokens, tokens * shape.top_k / shape.experts)
    tried = LARGE if tokens > moe_kernels.SMALL_BATCH else {"up": FEW, "down": FEW, "outer": FEW_OUTER}
    found = []
    for part, tiles in tried.items():
        for tile in map(moe_kernels.Tile._make, tiles):
            changed = base._replace(**{part: tile if part == "outer" else tile._replace(rows=getattr(base, part).rows)})
            found.append((part, changed))
    return found


def compile_trial(part: str, tiles: moe_kernels.Tiles) -> str:
    """In a process of its own: into Triton's cache on disk. Returns what went wrong."""
    torch.cuda.init()
    shape = Shape(1024, 16, 512, 8)
    experts = experts_layer(shape, "cuda", torch.bfloat16)
    x, ids, weights = inputs_of(shape, 128 if tiles.up.rows > 64 else 8, "cuda", torch.bfloat16)
    layer = (x, ids, weights, experts.gate_up_proj.data, experts.down_proj.data)
    try:
        with mock.patch.object(moe_kernels, "tiles_for", lambda *_: tiles):
            _, gate_up = moe_kernels.kernels_forward(*layer, part not in ("up", "down"))
            if part not in ("up", "down"):
                moe_kernels.kernels_backward(x, *layer, gate_up, True, True)
        torch.cuda.synchronize()
    except (moe_kernels.CompileError, RuntimeError) as error:
        return f"{part} {tuple(getattr(tiles, part))}: {str(error).splitlines()[0][:150]}"
    return ""


def tune(options: argparse.Namespace) -> None:
    """Milliseconds of forward (or backward) of a layer with each tile of one kernel; compiled beforehand by several processes."""
    every = {
        tokens: [trial for trial in trials(tokens, shape_of(options.shapes[0])) if trial[0] in options.kernels]
        for tokens in options.tokens
    }
    unique = {trial for tokens in every for trial in every[tokens]}
    broken = compile_beforehand(compile_trial, unique)
    for preset in options.shapes:
        shape, timed = shape_of(preset), []
        experts = experts_layer(shape, "cuda", torch.bfloat16)
        for tokens, tried in every.items():
            x, ids, weights = inputs_of(shape, tokens, "cuda", torch.bfloat16)
            layer = (x, ids, weights, experts.gate_up_proj.data, experts.down_proj.data)
            for part, tiles in tried:
                if (part, tiles) in broken:
                    continue
                with mock.patch.object(moe_kernels, "tiles_for", lambda *_, tiles=tiles: tiles):
                    ms = time_of_layer(layer, part in ("act_backward", "outer"), options.rounds)
                timed.append((tokens, part, ms, getattr(tiles, part)))
        columns = ("tokens", "kernel", "milliseconds", *moe_kernels.Tile._fields)
        table = Table(*columns, title=f"{preset}, {torch.cuda.get_device_name()}")
        for tokens, part, ms, tile in sorted(timed):
            table.add_row(str(tokens), part, f"{ms:.4f}", *map(str, tile))
        Console(width=130).print(table)
        del experts, layer


def compile_beforehand(compiles: Callable, trials: set) -> set:
    """By several processes, into Triton's cache on disk. Prints what does not compile, and returns it."""
    broken = set()
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {trial: pool.submit(compiles, *trial) for trial in trials}
        for trial, future in track(futures.items(), description="compiling", transient=True):
            if future.result():
                print(future.result())
                broken.add(trial)
    return broken


def time_of_layer(layer: tuple, backward: bool, rounds: int) -> float:
    if backward:
        gate_up = moe_kernels.kernels_forward(*layer, True)[1]
        run = lambda: moe_kernels.kernels_backward(layer[0], *layer, gate_up, True, True)  # noqa: E731
    else:
        run = lambda: moe_kernels.kernels_forward(*layer, False)  # noqa: E731
        if len(layer[0]) <= moe_kernels.SMALL_BATCH:
            run = in_graph(run)
    return medians_ms({"": run}, rounds, "tune")[""]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--shapes", nargs="+", choices=["k1", "light"], default=["k1", "light"])
    parser.add_argument("--rounds", type=int, default=5, help="turns of each candidate (default: %(default)s)")
    parser.add_argument("--paper", action="store_true", help="only the prediction")
    parser.add_argument("--tune", action="store_true", help="time other tiles, those of the first shape, on every shape")
    parser.add_argument("--profile", action="store_true", help="time each kernel of a training step, ours alone")
    parser.add_argument("--kernels", nargs="+", choices=list(LARGE), default=list(LARGE), help="which to tune")
    parser.add_argument("--record", action="store_true", help="append the figures to results.csv")
    options = parser.parse_args()
    if options.paper or not torch.cuda.is_available():
        print("No figure here is measured" + (":" if options.paper else ", because there is no CUDA device:"))
        print_paper(H200_BYTES_A_SECOND, H200_FLOPS)
        return
    torch.manual_seed(0)
    (tune if options.tune else profile_kernels if options.profile else measure)(options)


if __name__ == "__main__":
    main()
