"""How do routed experts run on a GPU?  Triton kernels: routing, dispatch, grouped matmuls that gather their rows, combine.

Forward: `route` goes from a token's logits to its experts and weights; `count` and `place` sort the token-expert pairs by
expert and cut them into tiles of rows; `up` gathers each tile's token rows and ends in SwiGLU; `rows` multiplies by the down
projection and puts each result at its pair's own place; `combine` sums a token's pairs in fp32. Backward: `act_backward`,
`outer` (weight gradients), `rows`, `combine` and `route_backward`. Nothing waits for the host, nothing is atomic: the same
inputs give the same bits, in a CUDA graph too. Kept for backward: the layer input and the gate/up output.

With TRITON_INTERPRET=1 in the environment the same kernels run on CPU tensors.

Axes: T tokens, K experts a token, P = T * K pairs, E experts, H hidden, I expert width, B blocks of pairs, M tiles of rows.
"""

from __future__ import annotations

import math
import subprocess
from typing import NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton import jit
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    # Whether kernels run on CPU tensors: Triton settles that when it is imported.
    INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
except ImportError:
    # moe_dispatch.py then runs transformers' own experts, and says so.
    triton, tl, INTERPRETED = None, None, False

    def jit(kernel=None, **options):
        return kernel or jit


# Compute capabilities of GPUs with 227 KB of shared memory a program (others: 99 KB at least) and warp-group matmuls.
LARGE_SHARED_MEMORY = ((9, 0), (10, 0), (10, 3))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# cp.async and bf16 tensor cores.
OLDEST_CAPABILITY = (8, 0)
# Pairs that one program of `count` and `place` takes (the first that holds them all, else the last), and how many of them, of
# the tiles, and of the blocks it compares at once.
PAIR_BLOCKS, COMPARED = (32, 128, 512), 32
# Numbers that one program of `combine` adds up.
COMBINED = 8192
# Numbers of pairs' rows up to which a training step holds them all before it sums them: 32 MB in bf16.
HELD_AT_ONCE = 1 << 24
# Tiles of rows whose programs run side by side, so that they find each other's weights in the second-level cache.
TILE_GROUP = 8
# What the RuntimeErrors say that Triton raises when it cannot compile; its other errors have classes.
COMPILE_FAILURES = ("C compiler", "PassManager::run failed")


class CompileError(RuntimeError):
    """A kernel does not compile on this machine."""


class Tile(NamedTuple):
    """One program's part of a matmul: rows x columns of the result, `depth` of the sum at a time.

    rows: a power of two, or 1.5 times one. Of `up`, columns of gate and as many of up.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Of each matmul. The first three have the same rows: they share one schedule."""

    up: Tile
    down: Tile
    act_backward: Tile
    outer: Tile


# Measured on an H200 with `benchmarks/moe_dispatch.py --tune`; by the rows of a tile. A matmul of many rows is bound by what its
# tiles read out of the second-level cache, rows + columns a step: 192 x 256 is the largest whose sums fit the registers.
OUTER = Tile(128, 256, 64, warps=8, stages=4)
HOPPER = {
    64: Tiles(Tile(64, 64, 128, 4, 4), Tile(64, 128, 64, 4, 4), Tile(64, 128, 64, 4, 4), OUTER),
    128: Tiles(Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), OUTER),
    192: Tiles(Tile(192, 128, 64, 8, 3), Tile(192, 256, 64, 8, 3), Tile(192, 128, 64, 8, 4), OUTER),
}
# Chosen on paper, not yet measured: shared memory of all stages (2 bytes a number) within the GPU's, sums within half of its
# registers.
AMPERE = {
    128: Tiles(
        up=Tile(128, 64, 32, warps=8, stages=4),
        down=Tile(128, 128, 32, warps=8, stages=4),
        act_backward=Tile(128, 128, 32, warps=8, stages=4),
        outer=Tile(128, 128, 32, warps=8, stages=4),
    )
}
# fp32 that is not allowed to become TF32 has no tensor cores; what counts is that it is right.
SINGLE = {64: Tiles(*[Tile(64, 32, 32, warps=4, stages=2)] * 4)}
# Up to so many tokens an expert's rows fit one tile, so that its weights are read once; bound by that reading. `up` and `down`.
SMALL_BATCH = 64
HOPPER_SMALL = Tile(16, 128, 128, warps=8, stages=3), Tile(16, 64, 256, warps=8, stages=3)
AMPERE_SMALL = (Tile(16, 32, 128, warps=4, stages=3),) * 2
# Small, so that tests on small tensors see several tiles of everything.
INTERPRETER = {48: Tiles(*[Tile(48, 32, 32, warps=4, stages=1)] * 3, Tile(32, 32, 32, warps=4, stages=1))}


def tiles_for(capability: tuple[int, int] | None, dtype: torch.dtype, tokens: int, rows_an_expert: float) -> Tiles:
    """By the GPU's compute capability (None: the interpreter). `tokens` <= SMALL_BATCH: one tile holds an expert's rows."""
    if capability is None:
        choices, small = INTERPRETER, (INTERPRETER[min(INTERPRETER)].up,) * 2
    elif dtype == torch.float32:
        choices, small = SINGLE, (SINGLE[64].up,) * 2
    else:
        choices, small = (HOPPER, HOPPER_SMALL) if capability in LARGE_SHARED_MEMORY else (AMPERE, AMPERE_SMALL)
    rows = max(16, next_power_of_two(tokens))
    if rows < SMALL_BATCH or (rows == SMALL_BATCH and rows not in choices):
        up, down = (tile._replace(rows=rows) for tile in small)
        return Tiles(up, down, down, choices[max(choices)].outer)
    # What an expert's tiles read a step, beside 256 columns; an empty row costs what a full one does. A standard deviation above
    # the average, for half the experts have more rows than that and would need another tile.
    held = rows_an_expert + math.sqrt(rows_an_expert)
    return choices[min(choices, key=lambda rows: math.ceil(held / rows) * (rows + 256))]


@jit
def route(
    logits_TE,
    bias_E,
    weight_TK,
    expert_TK,
    experts,
    scale,
    BIASED: tl.constexpr,
    NORMALISE: tl.constexpr,
    TOP_TWO: tl.constexpr,
    GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP_K: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    PADDED_SIZE: tl.constexpr,
    PADDED_K: tl.constexpr,
):
    """One token's experts and weights, from its scores in a tile [groups, experts of a group]; of equals the lowest id first."""
    token = tl.program_id(0).to(tl.int64)
    g, s, k = tl.arange(0, PADDED_GROUPS), tl.arange(0, PADDED_SIZE), tl.arange(0, PADDED_K)
    size = experts // GROUPS
    e = g[:, None] * size + s[None, :]
    real = (g < GROUPS)[:, None] & (s < size)[None, :]
    score = tl.sigmoid(tl.load(logits_TE + token * experts + e, mask=real, other=0.0))
    choice = score
    if BIASED:
        choice += tl.load(bias_E + e, mask=real, other=0.0)
    choice = tl.where(real, choice, float("-inf"))
    if TOP_GROUPS < GROUPS:
        group, at = tl.max(choice, 1, return_indices=True)
        if TOP_TWO:
            group += tl.max(tl.where(s[None, :] == at[:, None], float("-inf"), choice), 1)
        eligible = tl.zeros([PADDED_GROUPS], tl.int32)
        for _ in range(TOP_GROUPS):
            best = tl.argmax(group, 0)
            eligible = tl.where(g == best, 1, eligible)
            group = tl.where(g == best, float("-inf"), group)
        choice = tl.where((eligible > 0)[:, None], choice, float("-inf"))
    weight = tl.zeros([PADDED_K], tl.float32)
    chosen = tl.zeros([PADDED_K], tl.int32)
    for i in range(TOP_K):
        best, at = tl.max(choice, 1, return_indices=True)
        group_of_best = tl.argmax(best, 0)
        expert = group_of_best * size + tl.sum(tl.where(g == group_of_best, at, 0), 0)
        hit = (e == expert) & real
        weight = tl.where(k == i, tl.sum(tl.sum(tl.where(hit, score, 0.0), 1), 0), weight)
        chosen = tl.where(k == i, expert, chosen)
        choice = tl.where(hit, float("-inf"), choice)
    if NORMALISE:
        weight /= tl.sum(weight, 0) + 1e-20
    tl.store(weight_TK + token * TOP_K + k, weight * scale, mask=k < TOP_K)
    tl.store(expert_TK + token * TOP_K + k, chosen.to(tl.int64), mask=k < TOP_K)


@jit
def route_backward(
    grad_TK,
    logits_TE,
    expert_TK,
    grad_TE,
    experts,
    top_k,
    scale,
    NORMALISE: tl.constexpr,
    PADDED_K: tl.constexpr,
    BINS: tl.constexpr,
):
    """One token's gradient of the logits: zero but for its own experts."""
    token = tl.program_id(0).to(tl.int64)
    k, e = tl.arange(0, PADDED_K), tl.arange(0, BINS)
    own = k < top_k
    expert = tl.load(expert_TK + token * top_k + k, mask=own, other=0).to(tl.int32)
    score = tl.sigmoid(tl.load(logits_TE + token * experts + expert, mask=own, other=0.0))
    grad = tl.load(grad_TK + token * top_k + k, mask=own, other=0.0) * scale
    if NORMALISE:
        total = tl.sum(tl.where(own, score, 0.0), 0) + 1e-20
        grad = (grad - tl.sum(grad * score, 0) / total) / total
    grad = tl.where(own, grad * score * (1 - score), 0.0)
    row = tl.sum(tl.where(expert[:, None] == e[None, :], grad[:, None], 0.0), 0)
    tl.store(grad_TE + token * experts + e, row, mask=e < experts)


# What varies with the number of tokens is not specialised, or new lengths would be waited for while kernels compile anew.
@jit(do_not_specialize=["pairs"])
def count(expert_P, count_BE, pairs, experts, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """How many of a block's pairs chose each expert."""
    block = tl.program_id(0)
    p = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(expert_P + p, mask=p < pairs, other=-1).to(tl.int32)
    counts = tl.histogram(expert, BINS, mask=(expert >= 0) & (expert < experts))
    tl.store(count_BE + block * BINS + tl.arange(0, BINS), counts)


@jit(do_not_specialize=["pairs", "blocks", "tiles"])
def place(
    expert_P,
    count_BE,
    pair_P,
    start_E,
    tile_M3,
    pairs,
    experts,
    blocks,
    tiles,
    ALONE: tl.constexpr,
    ROWS: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPARED: tl.constexpr,
):
    """Where each pair of a block goes: behind all pairs of lower experts and the earlier ones of its own.

    Writes pair_P (the pairs in sorted order), start_E (E + 1 row numbers) and the schedule: expert, first row and end of the
    expert's rows for each tile of ROWS rows, expert -1 past the last. Pairs of experts outside 0..E-1 go nowhere. ALONE: there
    is one block, which counts for itself; so has a decoding step one kernel fewer.
    """
    block = tl.program_id(0)
    e = tl.arange(0, BINS)
    p = block * BLOCK + tl.arange(0, BLOCK)
    expert = tl.load(expert_P + p, mask=p < pairs, other=-1).to(tl.int32)
    ours = (expert >= 0) & (expert < experts)
    total_E = tl.zeros([BINS], tl.int32)
    before_E = tl.zeros([BINS], tl.int32)
    if ALONE:
        total_E = tl.histogram(expert, BINS, mask=ours)
    else:
        for first in range(0, blocks, COMPARED):
            b = first + tl.arange(0, COMPARED)
            counts_BE = tl.load(count_BE + b[:, None] * BINS + e[None, :], mask=(b < blocks)[:, None], other=0)
            total_E += tl.sum(counts_BE, 0)
            before_E += tl.sum(tl.where((b < block)[:, None], counts_BE, 0), 0)
    end_E = tl.cumsum(total_E, 0)
    first_E = end_E - total_E
    if block == 0:
        tl.store(start_E + e, first_E, mask=e <= experts)

    rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, BLOCK, COMPARED):
        q = block * BLOCK + first + tl.arange(0, COMPARED)
        other = tl.load(expert_P + q, mask=q < pairs, other=-1).to(tl.int32)
        rank += tl.sum(((other[None, :] == expert[:, None]) & (q[None, :] < p[:, None])).to(tl.int32), 1)
    row = tl.gather(first_E + before_E, tl.where(ours, expert, 0), 0) + rank
    tl.store(pair_P + row, p, mask=ours)

    tiles_E = (total_E + ROWS - 1) // ROWS
    last_E = tl.cumsum(tiles_E, 0)
    shift_E = first_E - (last_E - tiles_E) * ROWS
    for first in range(block * COMPARED, tiles, blocks * COMPARED):
        m = first + tl.arange(0, COMPARED)
        # Experts whose tiles all lie before tile m: as many as m's own expert has before it, and all of them past the end.
        owner = tl.sum((last_E[None, :] <= m[:, None]).to(tl.int32), 1)
        live = owner < experts
        owner = tl.where(live, owner, 0)
        at = tile_M3 + m * 3
        tl.store(at, tl.where(live, owner, -1), mask=m < tiles)
        tl.store(at + 1, tl.gather(shift_E, owner, 0) + m * ROWS, mask=m < tiles)
        tl.store(at + 2, tl.gather(end_E, owner, 0), mask=m < tiles)


@jit
def store(at, value, mask):
    """Store fp32 in the dtype that `at` points to, rounded to the nearest, ties to even."""
    if INTERPRETED and at.dtype.element_ty == tl.bfloat16:
        # Triton's interpreter would cut the lower bits off.
        bits = value.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        tl.store(at, (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), mask=mask)
    else:
        tl.store(at, value.to(at.dtype.element_ty), mask=mask)


@jit
def own_tile(tile_M3, tiles, columns, COLUMNS: tl.constexpr, GROUP: tl.constexpr):
    """This program's expert (-1: nothing to do), its first row among the sorted pairs, the expert's last, its tile of columns.

    GROUP tiles of rows go side by side.
    """
    program = tl.program_id(0)
    across = tl.cdiv(columns, COLUMNS)
    group = program // (GROUP * across)
    size = tl.minimum(tiles - group * GROUP, GROUP)
    within = program % (GROUP * across)
    at = tile_M3 + (group * GROUP + within % size) * 3
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), within // size


@jit
def own_rows(first, end, skipped, ROWS: tl.constexpr):
    """Rows of a tile, and which of them are live; dead ones repeat the first, so that what is loaded is memory that exists."""
    row = first + skipped + tl.arange(0, ROWS)
    live = row < end
    return tl.where(live, row, first), live


@jit
def gathered_rows(x_TH, pair_P, first, end, skipped, top_k, hidden, ROWS: tl.constexpr):
    """`own_rows`, and where their tokens' rows begin."""
    row, live = own_rows(first, end, skipped, ROWS)
    return row, live, x_TH + (tl.load(pair_P + row) // top_k).to(tl.int64) * hidden


@jit
def in_bounds(column, columns, EVEN: tl.constexpr):
    """Columns past the end repeat the first. Even sizes skip that: it would hide from the compiler that columns are adjacent."""
    if EVEN:
        return column
    return tl.where(column < columns, column, 0)


@jit
def load_rows(at, k, depth, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=(k < depth)[None, :], other=0.0)


@jit
def load_columns(at, k, depth, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(at)
    return tl.load(at, mask=(k < depth)[:, None], other=0.0)


@jit
def add_product(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:
        # Triton's interpreter would multiply the bits of bf16 numbers; in fp32 their products are exact, as on tensor cores.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@jit
def products(
    a_rows,
    more_a_rows,
    b_columns,
    b_step,
    depth,
    ROWS: tl.constexpr,
    MORE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """a b in fp32 [ROWS, COLUMNS] and, if MORE, [MORE, COLUMNS]: pointers to a's rows and to b's columns.

    The entries of b's columns are `b_step` apart.
    """
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    more_acc = acc
    if MORE:
        more_acc = tl.zeros([MORE, COLUMNS], tl.float32)
    for first in range(0, depth, DEPTH):
        k = first + tl.arange(0, DEPTH)
        a = load_rows(a_rows[:, None] + k[None, :], k, depth, EVEN)
        b = load_columns(b_columns[None, :] + k[:, None] * b_step, k, depth, EVEN)
        acc = add_product(a, b, acc, PRECISION)
        if MORE:
            more_a = load_rows(more_a_rows[:, None] + k[None, :], k, depth, EVEN)
            more_acc = add_product(more_a, b, more_acc, PRECISION)
    return acc, more_acc


@jit(do_not_specialize=["tiles"])
def up(
    x_TH,
    weight_E2IH,
    pair_P,
    tile_M3,
    gate_up_P2I,
    act_PI,
    tiles,
    width,
    hidden,
    top_k,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    MORE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """act = silu(gate x) * (up x) of a tile of sorted pairs, whose token rows are gathered here; KEEP stores gate and up too.

    Gate and up are one matmul of twice the columns.
    """
    expert, first, end, n = own_tile(tile_M3, tiles, width, COLUMNS, GROUP)
    if expert >= 0:
        both = tl.arange(0, 2 * COLUMNS)
        column = in_bounds(n * COLUMNS + tl.where(both < COLUMNS, both, both - COLUMNS), width, EVEN)
        weight = weight_E2IH + expert.to(tl.int64) * 2 * width * hidden
        w_columns = weight + (column + tl.where(both < COLUMNS, 0, width)) * hidden
        row, live, x_rows = gathered_rows(x_TH, pair_P, first, end, 0, top_k, hidden, ROWS)
        more_row, more_live, more_x_rows = row, live, x_rows
        if MORE:
            more_row, more_live, more_x_rows = gathered_rows(x_TH, pair_P, first, end, ROWS, top_k, hidden, MORE)
        acc, more_acc = products(
            x_rows, more_x_rows, w_columns, 1, hidden, ROWS, MORE, 2 * COLUMNS, DEPTH, EVEN, PRECISION
        )
        swiglu(acc, gate_up_P2I, act_PI, row, live, n, width, KEEP, ROWS, COLUMNS)
        if MORE:
            swiglu(more_acc, gate_up_P2I, act_PI, more_row, more_live, n, width, KEEP, MORE, COLUMNS)


@jit
def swiglu(
    acc, gate_up_P2I, act_PI, row, live, n, width, KEEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    gate, value = acc.reshape(ROWS, 2, COLUMNS).permute(0, 2, 1).split()
    column = n * COLUMNS + tl.arange(0, COLUMNS)
    stored = live[:, None] & (column < width)[None, :]
    at_row = row[:, None].to(tl.int64) * width
    store(act_PI + at_row + column[None, :], gate * tl.sigmoid(gate) * value, stored)
    if KEEP:
        at = gate_up_P2I + 2 * at_row + column[None, :]
        store(at, gate, stored)
        store(at + width, value, stored)


@jit(do_not_specialize=["tiles"])
def rows(
    a_PD,
    weight,
    pair_P,
    tile_M3,
    out_PC,
    tiles,
    columns,
    depth,
    weight_columns,
    TRANSPOSED: tl.constexpr,
    ROWS: tl.constexpr,
    MORE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of a, in sorted order, times `columns` of their expert's matrix, each put at its pair's own place.

    weight is [E, weight_columns, depth], or [E, depth, weight_columns] if TRANSPOSED, from the first of the columns on.
    """
    expert, first, end, n = own_tile(tile_M3, tiles, columns, COLUMNS, GROUP)
    if expert >= 0:
        column = n * COLUMNS + tl.arange(0, COLUMNS)
        b = weight + expert.to(tl.int64) * weight_columns * depth
        if TRANSPOSED:
            b_columns, b_step = b + in_bounds(column, columns, EVEN), weight_columns
        else:
            b_columns, b_step = b + in_bounds(column, columns, EVEN) * depth, 1
        if MORE and first + ROWS < end:
            rows_of_tile(
                a_PD, b_columns, b_step, pair_P, out_PC, first, end, column, columns, depth,
                ROWS, MORE, COLUMNS, DEPTH, EVEN, PRECISION,
            )  # fmt: skip
        else:
            rows_of_tile(
                a_PD, b_columns, b_step, pair_P, out_PC, first, end, column, columns, depth,
                ROWS, 0, COLUMNS, DEPTH, EVEN, PRECISION,
            )  # fmt: skip


@jit
def rows_of_tile(
    a_PD,
    b_columns,
    b_step,
    pair_P,
    out_PC,
    first,
    end,
    column,
    columns,
    depth,
    ROWS: tl.constexpr,
    MORE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """With MORE rows only where they are live: most experts' last tile has no more than ROWS."""
    row, live = own_rows(first, end, 0, ROWS)
    a_rows = a_PD + row.to(tl.int64) * depth
    more_row, more_live, more_a_rows = row, live, a_rows
    if MORE:
        more_row, more_live = own_rows(first, end, ROWS, MORE)
        more_a_rows = a_PD + more_row.to(tl.int64) * depth
    acc, more_acc = products(
        a_rows, more_a_rows, b_columns, b_step, depth, ROWS, MORE, COLUMNS, DEPTH, EVEN, PRECISION
    )
    put(acc, out_PC, pair_P, row, live, column, columns)
    if MORE:
        put(more_acc, out_PC, pair_P, more_row, more_live, column, columns)


@jit
def put(acc, out_PC, pair_P, row, live, column, columns):
    at = out_PC + tl.load(pair_P + row)[:, None].to(tl.int64) * columns + column[None, :]
    store(at, acc, live[:, None] & (column < columns)[None, :])


@jit
def combine(
    row_PC,
    expert_P,
    weight_P,
    out_TC,
    columns,
    out_columns,
    experts,
    top_k,
    WEIGHTED: tl.constexpr,
    PAIRS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out = sum over a token's pairs of weight * row, in fp32; pairs of other ranks' experts have no row and add nothing.

    The rows are `columns` of the out_columns of out, which begins with the first of them.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, PAIRS)
    p = token * top_k + k
    expert = tl.load(expert_P + p, mask=k < top_k, other=-1)
    ours = (expert >= 0) & (expert < experts)
    inside = column < columns
    at = row_PC + p[:, None] * columns + column[None, :]
    row = tl.load(at, mask=ours[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if WEIGHTED:
        row *= tl.load(weight_P + p, mask=ours, other=0.0).to(tl.float32)[:, None]
    store(out_TC + token * out_columns + column, tl.sum(row, 0), inside)


@jit(do_not_specialize=["tiles", "pairs"])
def act_backward(
    grad_TH,
    weight_EHI,
    pair_P,
    tile_M3,
    gate_up_P2I,
    weight_P,
    grad_gate_up_P2I,
    act_PI,
    dot_NP,
    tiles,
    width,
    hidden,
    top_k,
    pairs,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    MORE: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From the gradient of the output to that of gate and up.

    <grad, down @ act> = <grad @ down, act>: dot_NP, the share of these columns in the routing weight's gradient, needs no
    stored expert output. ACT stores weight * act, which the gradient of `down` needs.
    """
    expert, first, end, n = own_tile(tile_M3, tiles, width, COLUMNS, GROUP)
    if expert >= 0:
        column = n * COLUMNS + tl.arange(0, COLUMNS)
        b = weight_EHI + expert.to(tl.int64) * hidden * width + in_bounds(column, width, EVEN)
        row, live, grad_rows = gathered_rows(grad_TH, pair_P, first, end, 0, top_k, hidden, ROWS)
        more_row, more_live, more_grad_rows = row, live, grad_rows
        if MORE:
            more_row, more_live, more_grad_rows = gathered_rows(grad_TH, pair_P, first, end, ROWS, top_k, hidden, MORE)
        grad, more_grad = products(
            grad_rows, more_grad_rows, b, width, hidden, ROWS, MORE, COLUMNS, DEPTH, EVEN, PRECISION
        )
        dot_P = dot_NP + n.to(tl.int64) * pairs
        swiglu_backward(
            grad, pair_P, weight_P, gate_up_P2I, grad_gate_up_P2I, act_PI, dot_P, row, live, n, width, ACT, ROWS, COLUMNS
        )
        if MORE:
            swiglu_backward(
                more_grad, pair_P, weight_P, gate_up_P2I, grad_gate_up_P2I, act_PI, dot_P, more_row, more_live, n, width,
                ACT, MORE, COLUMNS,
            )  # fmt: skip


@jit
def swiglu_backward(
    grad,
    pair_P,
    weight_P,
    gate_up_P2I,
    grad_gate_up_P2I,
    act_PI,
    dot_P,
    row,
    live,
    n,
    width,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """In halves, because a whole tile of everything that is read and written here does not fit the registers."""
    left, right = grad.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
    half = n * COLUMNS + tl.arange(0, COLUMNS // 2)
    pair = tl.load(pair_P + row)
    weight = tl.load(weight_P + pair).to(tl.float32)
    at_row = row.to(tl.int64) * width
    dot = half_backward(left, weight, gate_up_P2I, grad_gate_up_P2I, act_PI, at_row, live, half, width, ACT)
    half += COLUMNS // 2
    dot += half_backward(right, weight, gate_up_P2I, grad_gate_up_P2I, act_PI, at_row, live, half, width, ACT)
    tl.store(dot_P + pair, dot, mask=live)


@jit
def half_backward(
    grad, weight, gate_up_P2I, grad_gate_up_P2I, act_PI, at_row, live, column, width, ACT: tl.constexpr
):
    """Of a tile [rows, columns]; returns <grad, act> of each row, which is the routing weight's gradient."""
    stored = live[:, None] & (column < width)[None, :]
    at = 2 * at_row[:, None] + column[None, :]
    gate = tl.load(gate_up_P2I + at, mask=stored, other=0.0).to(tl.float32)
    value = tl.load(gate_up_P2I + at + width, mask=stored, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    act = silu * value
    dot = tl.sum(grad * act, 1)
    if ACT:
        weighted = act * weight[:, None]
        store(act_PI + at_row[:, None] + column[None, :], weighted, stored)
    grad *= weight[:, None]
    grad_gate = grad * value * (sigmoid + silu * (1 - sigmoid))
    store(grad_gate_up_P2I + at, grad_gate, stored)
    store(grad_gate_up_P2I + at + width, grad * silu, stored)
    return dot


@jit
def outer(
    a_rows,
    b_rows,
    pair_P,
    start_E,
    out_ERC,
    out_rows,
    columns,
    top_k,
    GATHER_A: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """An expert's weight gradient, the sum over its pairs of a b^T; a [T, rows] is gathered by token, or b is [T, columns].

    The other one is in sorted order. An expert without pairs gets zeros.
    """
    expert = tl.program_id(1)
    across, down = tl.cdiv(columns, COLUMNS), tl.cdiv(out_rows, ROWS)
    group = tl.program_id(0) // (GROUP * across)
    size = tl.minimum(down - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * across)
    r = (group * GROUP + within % size) * ROWS + tl.arange(0, ROWS)
    column = (within // size) * COLUMNS + tl.arange(0, COLUMNS)
    first, end = tl.load(start_E + expert), tl.load(start_E + expert + 1)
    a_at = a_rows + in_bounds(r, out_rows, EVEN)
    b_at = b_rows + in_bounds(column, columns, EVEN)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    d = tl.arange(0, DEPTH)
    token = tl.load(pair_P + first + d, mask=first + d < end, other=0) // top_k
    for start in range(first, end, DEPTH):
        p = start + d
        live = p < end
        if GATHER_A:
            p_a, p_b = token, p
        else:
            p_a, p_b = p, token
        # A step ahead: were the rows' loads to wait for it in the same step, Triton would overlap no more than one step.
        token = tl.load(pair_P + p + DEPTH, mask=p + DEPTH < end, other=0) // top_k
        a = tl.load(a_at[:, None] + p_a.to(tl.int64)[None, :] * out_rows, mask=live[None, :], other=0.0)
        b = tl.load(b_at[None, :] + p_b.to(tl.int64)[:, None] * columns, mask=live[:, None], other=0.0)
        acc = add_product(a, b, acc, PRECISION)
    at = out_ERC + expert.to(tl.int64) * out_rows * columns + r[:, None].to(tl.int64) * columns + column[None, :]
    store(at, acc, (r < out_rows)[:, None] & (column < columns)[None, :])


def launch(kernel, grid: tuple, *arguments, warps: int = 4, stages: int = 1, **constants) -> None:
    """Run a kernel on the device of its first argument. CompileError if it cannot be compiled here."""
    with torch.cuda.device_of(arguments[0]):
        try:
            # Asked for, because Triton 3.9 warns of a coming change of the default.
            kernel[grid](*arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True, **constants)
        except (CompilationError, OutOfResources, PTXASError, subprocess.CalledProcessError) as error:
            raise CompileError(f"{kernel.__name__}: {error}") from error
        except RuntimeError as error:
            if any(words in str(error) for words in COMPILE_FAILURES):
                raise CompileError(f"{kernel.__name__}: {error}") from error
            raise


def launch_matmul(kernel, tile: Tile, grid: tuple, even: bool, *arguments, **constants) -> None:
    # 192 rows are 128 and 64 more: Triton's blocks are powers of two.
    rows = next_power_of_two(tile.rows + 1) // 2
    if kernel is not outer:
        constants["MORE"] = tile.rows - rows
    launch(
        kernel, grid, *arguments, warps=tile.warps, stages=tile.stages, ROWS=rows, COLUMNS=tile.columns,
        DEPTH=tile.depth, GROUP=TILE_GROUP, EVEN=even, PRECISION=precision(), **constants,
    )  # fmt: skip


# Triton's own of these two can be called in kernels too, and take five microseconds here, ten times in a decoding layer.
def cdiv(number: int, by: int) -> int:
    return -(-number // by)


def next_power_of_two(number: int) -> int:
    """The smallest that is not below."""
    return 1 << (number - 1).bit_length()


def fitted(tile: Tile, columns: int) -> Tile:
    """Half as many columns a tile where they divide the matrix evenly and the whole ones do not (2,688 of the Light model)."""
    half = tile.columns // 2
    return tile._replace(columns=half) if columns % tile.columns and columns % half == 0 and half >= 16 else tile


def launch_tiles(kernel, tile: Tile, tiles: int, columns: int, depth: int, *arguments, **constants) -> None:
    """Run a kernel whose programs are the schedule's tiles of rows times the tiles of columns."""
    tile = fitted(tile, columns)
    even = columns % tile.columns == 0 and depth % tile.depth == 0
    launch_matmul(kernel, tile, (tiles * cdiv(columns, tile.columns),), even, *arguments, **constants)


def capability(tensor: Tensor) -> tuple[int, int] | None:
    return None if INTERPRETED else torch.cuda.get_device_capability(tensor.device)


def precision() -> str:
    """Of fp32 matmuls, as torch has been told."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def kernels_route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    method: str,
    groups: int,
    top_groups: int,
    top_k: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Routing weights [T, K] fp32 and expert ids [T, K] int64 from fp32 logits: AxK1TopkRouter's in one kernel.

    Of equal scores the lowest id goes first; torch.topk leaves that open.
    """
    logits_TE, (tokens, experts) = logits_TE.contiguous(), logits_TE.shape
    weight_TK = logits_TE.new_empty(tokens, top_k)
    expert_TK = torch.empty(tokens, top_k, dtype=torch.int64, device=logits_TE.device)
    if tokens:
        launch(
            route, (tokens,), logits_TE, bias_E, weight_TK, expert_TK, experts, scale, BIASED=bias_E is not None,
            NORMALISE=normalise, TOP_TWO=method == "noaux_tc", GROUPS=groups, TOP_GROUPS=top_groups, TOP_K=top_k,
            PADDED_GROUPS=next_power_of_two(groups), PADDED_SIZE=next_power_of_two(experts // groups),
            PADDED_K=next_power_of_two(top_k), warps=1,
        )  # fmt: skip
    return weight_TK, expert_TK


def kernels_route_backward(
    grad_TK: Tensor, logits_TE: Tensor, expert_TK: Tensor, normalise: bool, scale: float
) -> Tensor:
    (tokens, experts), top_k = logits_TE.shape, expert_TK.shape[1]
    grad_TE = logits_TE.new_empty(tokens, experts)
    if tokens:
        launch(
            route_backward, (tokens,), grad_TK.contiguous(), logits_TE.contiguous(), expert_TK, grad_TE, experts, top_k,
            scale, NORMALISE=normalise, PADDED_K=next_power_of_two(top_k), BINS=next_power_of_two(experts),
        )  # fmt: skip
    return grad_TE


def sort_pairs(expert_TK: Tensor, experts: int, rows_a_tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort token-expert pairs by expert, stably. Returns int32 pair_P, start_E1 and the schedule tile_M3 (see `place`).

    The entries of pair_P past start_E1[-1] are undefined.
    """
    pairs = expert_TK.numel()
    block = next((size for size in PAIR_BLOCKS if pairs <= size), PAIR_BLOCKS[-1])
    blocks, bins = cdiv(pairs, block), max(32, next_power_of_two(experts + 1))
    hit = min(pairs, experts)
    new = dict(dtype=torch.int32, device=expert_TK.device)
    count_BE = torch.empty(blocks, bins, **new)
    pair_P, start_E1 = torch.empty(pairs, **new), torch.empty(experts + 1, **new)
    # As many as there can be: each hit expert has one tile with a row and then one every rows_a_tile rows.
    tile_M3 = torch.empty(hit + (pairs - hit) // rows_a_tile, 3, **new)
    if blocks > 1:
        launch(count, (blocks,), expert_TK, count_BE, pairs, experts, BINS=bins, BLOCK=block)
    launch(
        place, (blocks,), expert_TK, count_BE, pair_P, start_E1, tile_M3, pairs, experts, blocks, len(tile_M3),
        ALONE=blocks == 1, ROWS=rows_a_tile, BINS=bins, BLOCK=block, COMPARED=COMPARED, warps=min(8, block // 32),
    )  # fmt: skip
    return pair_P, start_E1, tile_M3


def sum_pairs(row_PC: Tensor, expert_TK: Tensor, weight_TK: Tensor | None, experts: int, out_TC: Tensor) -> None:
    """Into out_TC, which may be some columns of a tensor."""
    (tokens, top_k), columns = expert_TK.shape, row_PC.shape[1]
    padded = next_power_of_two(top_k)
    width = max(32, COMBINED // padded)
    launch(
        combine, (tokens, cdiv(columns, width)), row_PC, expert_TK, weight_TK, out_TC, columns, out_TC.stride(0),
        experts, top_k, WEIGHTED=weight_TK is not None, PAIRS=padded, COLUMNS=width,
    )  # fmt: skip


def multiply_and_sum(
    a_PD: Tensor,
    weight: Tensor,
    transposed: bool,
    sorted_pairs: tuple[Tensor, Tensor, Tensor],
    expert_TK: Tensor,
    weight_TK: Tensor | None,
    tile: Tile,
    at_once: int,
) -> Tensor:
    """`rows` and `combine`: [T, C] from rows in sorted order and a stacked weight [E, C, D], or [E, D, C] if transposed.

    Of many pairs `at_once` columns at a time, because all of them would be what a training step holds most of at its peak.
    """
    (tokens, _), pairs, (pair_P, _, tile_M3) = expert_TK.shape, expert_TK.numel(), sorted_pairs
    tiles, (experts, depth, columns) = tile_M3.shape[0], weight.shape
    if not transposed:
        depth, columns = columns, depth
    if pairs * columns <= HELD_AT_ONCE:
        at_once = columns
    at_once = min(columns, tile.columns * cdiv(at_once, tile.columns))
    out_TC, held = a_PD.new_empty(tokens, columns), a_PD.new_empty(pairs * at_once)
    for first in range(0, columns, at_once):
        own = slice(first, min(first + at_once, columns))
        row_PC = held[: pairs * (own.stop - first)].view(pairs, -1)
        launch_tiles(
            rows, tile, tiles, row_PC.shape[1], depth, a_PD, weight[:, :, own] if transposed else weight[:, own],
            pair_P, tile_M3, row_PC, tiles, row_PC.shape[1], depth, columns, TRANSPOSED=transposed,
        )  # fmt: skip
        sum_pairs(row_PC, expert_TK, weight_TK, experts, out_TC[:, own])
    return out_TC


def weight_gradient(
    a: Tensor,
    b: Tensor,
    sorted_pairs: tuple[Tensor, Tensor, Tensor],
    top_k: int,
    weight_ERC: Tensor,
    tile: Tile,
    gather_a: bool,
) -> Tensor:
    """Gradient of a stacked weight [E, R, C]: a has R columns and b C; one is a row a token, the other a row a sorted pair."""
    experts, out_rows, columns = weight_ERC.shape
    tile = fitted(tile, columns)
    out_ERC = torch.empty_like(weight_ERC)
    grid = (cdiv(out_rows, tile.rows) * cdiv(columns, tile.columns), experts)
    even = out_rows % tile.rows == 0 and columns % tile.columns == 0
    launch_matmul(
        outer, tile, grid, even, a, b, *sorted_pairs[:2], out_ERC, out_rows, columns, top_k, GATHER_A=gather_a
    )
    return out_ERC


def check(x_TH: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor) -> None:
    dtypes = {t.dtype for t in (x_TH, gate_up_E2IH, down_EHI)}
    if len(dtypes) > 1 or x_TH.dtype not in DTYPES:
        raise ValueError(
            f"Tokens and experts are {', '.join(sorted(map(str, dtypes)))} but the kernels of experts_implementation='axk1' take "
            "one of bfloat16, float16 and float32; convert the model with .to(torch.bfloat16), or use 'grouped_mm'."
        )
    if expert_TK.dtype not in (torch.int64, torch.int32) or not weight_TK.is_floating_point():
        raise ValueError(
            f"Expert ids are {expert_TK.dtype} and routing weights {weight_TK.dtype}; "
            "give ids as torch.int64 or torch.int32 and weights as floating point, [T, K] each."
        )


def kernels_forward(
    x_TH: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """Returns the output [T, H] and the gate/up output [P, 2I] in sorted order (no rows unless `keep`), both in x's dtype.

    Ids outside 0..E-1 (experts of other ranks) add nothing and cost nothing. ValueError for other dtypes than DTYPES.
    """
    check(x_TH, expert_TK, weight_TK, gate_up_E2IH, down_EHI)
    x_TH, expert_TK, weight_TK, gate_up_E2IH, down_EHI = (
        t.contiguous() for t in (x_TH, expert_TK, weight_TK, gate_up_E2IH, down_EHI)
    )
    (tokens, top_k), (experts, hidden, width), pairs = expert_TK.shape, down_EHI.shape, expert_TK.numel()
    gate_up_P2I = x_TH.new_empty(pairs if keep else 0, 2 * width)
    if not pairs:
        return torch.zeros_like(x_TH), gate_up_P2I
    tiles = tiles_for(capability(x_TH), x_TH.dtype, tokens, pairs / experts)
    pair_P, _, tile_M3 = sorted_pairs = sort_pairs(expert_TK, experts, tiles.up.rows)
    act_PI = x_TH.new_empty(pairs, width)
    launch_tiles(
        up, tiles.up, len(tile_M3), width, hidden,
        x_TH, gate_up_E2IH, pair_P, tile_M3, gate_up_P2I, act_PI, len(tile_M3), width, hidden, top_k, KEEP=keep,
    )  # fmt: skip
    at_once = width if keep else hidden
    out_TH = multiply_and_sum(act_PI, down_EHI, False, sorted_pairs, expert_TK, weight_TK, tiles.down, at_once)
    return out_TH, gate_up_P2I


def kernels_backward(
    grad_TH: Tensor,
    x_TH: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    gate_up_E2IH: Tensor,
    down_EHI: Tensor,
    gate_up_P2I: Tensor,
    need_gate_up: bool,
    need_down: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, gate_up and down (the last two empty unless needed: frozen experts under LoRA cost nothing)."""
    grad_TH, x_TH, expert_TK, weight_TK, gate_up_E2IH, down_EHI = (
        t.contiguous() for t in (grad_TH, x_TH, expert_TK, weight_TK, gate_up_E2IH, down_EHI)
    )
    (tokens, top_k), (experts, hidden, width), pairs = expert_TK.shape, down_EHI.shape, expert_TK.numel()
    grad_gate_up = torch.zeros_like(gate_up_E2IH) if need_gate_up and not pairs else gate_up_E2IH.new_empty(0)
    grad_down = torch.zeros_like(down_EHI) if need_down and not pairs else down_EHI.new_empty(0)
    if not pairs:
        return torch.zeros_like(x_TH), torch.zeros_like(weight_TK), grad_gate_up, grad_down
    tiles = tiles_for(capability(x_TH), x_TH.dtype, tokens, pairs / experts)
    pair_P, start_E1, tile_M3 = sorted_pairs = sort_pairs(expert_TK, experts, tiles.up.rows)
    grad_gate_up_P2I = torch.empty_like(gate_up_P2I)
    act_PI = x_TH.new_empty(pairs if need_down else 0, width)
    # Zeros: pairs of other ranks' experts are written by no program.
    dot_NP = torch.zeros(
        cdiv(width, fitted(tiles.act_backward, width).columns), pairs, dtype=torch.float32, device=x_TH.device
    )
    launch_tiles(
        act_backward, tiles.act_backward, len(tile_M3), width, hidden,
        grad_TH, down_EHI, pair_P, tile_M3, gate_up_P2I, weight_TK, grad_gate_up_P2I, act_PI, dot_NP,
        len(tile_M3), width, hidden, top_k, pairs, ACT=need_down,
    )  # fmt: skip
    if need_down:
        grad_down = weight_gradient(grad_TH, act_PI, sorted_pairs, top_k, down_EHI, tiles.outer, gather_a=True)
    # Half a gigabyte at K1's size, less at the peak that follows.
    del act_PI
    if need_gate_up:
        grad_gate_up = weight_gradient(
            grad_gate_up_P2I, x_TH, sorted_pairs, top_k, gate_up_E2IH, tiles.outer, gather_a=False
        )
    grad_x_TH = multiply_and_sum(
        grad_gate_up_P2I, gate_up_E2IH, True, sorted_pairs, expert_TK, None, tiles.down, width
    )
    grad_weight_TK = dot_NP.sum(dim=0).view(tokens, top_k).to(weight_TK.dtype)
    return grad_x_TH, grad_weight_TK, grad_gate_up, grad_down
