"""How does a decoding step attend over the latent cache on a GPU?  Triton kernels for the absorbed form of latent attention.

All heads attend over the same latents, which are keys and values at once: `attend` reads each part of the cache once for a
block of heads and leaves a sum of its own, `merge` makes one softmax of the parts (split-K). So few tokens keep a whole GPU
busy. Nothing waits for the host, nothing is atomic. For inference: no gradient.

The cache is one tensor, or pages: a table of theirs for each row, and each token's latent and key cut in two halves, as
transformers' continuous batching keeps them (see cache_axk1.py).

Axes: B batch, N heads, S attended tokens, L latent, D rope size, P parts of the cache, C pages, M pages of a row, T tokens of a
page, W half of L + D, rounded up.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .moe_dispatch import here
from .moe_kernels import (
    DTYPES,
    add_product,
    capability,
    cdiv,
    jit,
    launch,
    next_power_of_two,
    precision,
    store,
    tl,
)


class Block(NamedTuple):
    """What a program of `attend` takes at a time, and how many programs are wanted: one or two on each of 132 multiprocessors."""

    heads: int
    tokens: int
    warps: int
    stages: int
    programs: int


# Measured on an H200 with `benchmarks/mla_decode.py --tune`: from so many cached tokens on (of all rows) reading each latent
# once, for 64 heads, is faster; below, four times as many programs are.
FEW_HEADS = Block(16, 32, warps=4, stages=3, programs=264)
HOPPER_HEADS = Block(64, 64, warps=8, stages=2, programs=132)
# Triton 3.6 to 3.8 give the other one 353 KB of shared memory there, 3.9 214; this one 214 and 144. Not timed.
BLACKWELL_HEADS = Block(64, 32, warps=8, stages=2, programs=132)
# By compute capability, for caches of MANY_TOKENS and more.
MANY_HEADS = {(9, 0): HOPPER_HEADS, (10, 0): BLACKWELL_HEADS, (10, 3): BLACKWELL_HEADS}
MANY_TOKENS = 16384
# Numbers that one program of `merge` adds up.
MERGED = 4096


@jit
def halved(number, step, HALF: tl.constexpr, RUN: tl.constexpr):
    """Where a token's numbers stand, of which those from HALF on are `step` further; the compiler is told of runs of RUN."""
    return tl.max_contiguous(tl.multiple_of(number + tl.where(number < HALF, 0, step), RUN), RUN)


# What grows with the cache is not specialised, or a generation would wait while kernels compile anew.
@jit(do_not_specialize=["tokens", "mask_stride"])
def attend(
    query_BNL,
    query_BND,
    latent_BSL,
    rope_BSD,
    mask_BS,
    table_BM,
    length_B,
    sum_BPNL,
    state_BPN2,
    heads,
    tokens,
    latent,
    rope,
    latent_stride,
    rope_stride,
    mask_stride,
    part_tokens,
    scale,
    PAGE: tl.constexpr,
    HALF: tl.constexpr,
    RUN: tl.constexpr,
    MASK: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    PADDED_LATENT: tl.constexpr,
    PADDED_ROPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One part of the cache for a block of heads: sum_BPNL = sum of exp(score - max) * latent, state_BPN2 = max and sum of exp.

    MASK: "none", "bool" (false: hidden) or "add". PAGE: 0, or the tokens of a page; latent_BSL then are the pages of all rows
    [C, PAGE, HALF], those of the first halves; rope_stride leads from a token's first half to its second one, `tokens` are
    those that a row of the table has room for, and length_B those that it has.
    """
    batch, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    n = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    c, d = tl.arange(0, PADDED_LATENT), tl.arange(0, PADDED_ROPE)
    row = batch * heads + n
    live = (n < heads)[:, None]
    query = tl.load(query_BNL + row[:, None] * latent + c[None, :], mask=live & (c < latent)[None, :], other=0.0)
    query_rope = tl.load(query_BND + row[:, None] * rope + d[None, :], mask=live & (d < rope)[None, :], other=0.0)
    best = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, PADDED_LATENT], tl.float32)
    width = tokens // PAGE if PAGE else 0
    if PAGE:
        tokens = tl.load(length_B + batch)
    end = tl.minimum((part + 1) * part_tokens, tokens)
    for first in range(part * part_tokens, end, TOKENS):
        s = first + tl.arange(0, TOKENS)
        inside = s < end
        if PAGE:
            page = tl.load(table_BM + batch * width + s // PAGE, mask=inside, other=0).to(tl.int64)
            token = latent_BSL + (page * PAGE + s % PAGE)[:, None] * HALF
            at = token + halved(c, rope_stride, HALF, RUN)[None, :]
            at_rope = token + halved(latent + d, rope_stride, HALF, RUN)[None, :]
        else:
            at = latent_BSL + batch * latent_stride + s[:, None].to(tl.int64) * latent + c[None, :]
            at_rope = rope_BSD + batch * rope_stride + s[:, None].to(tl.int64) * rope + d[None, :]
        key = tl.load(at, mask=inside[:, None] & (c < latent)[None, :], other=0.0)
        key_rope = tl.load(at_rope, mask=inside[:, None] & (d < rope)[None, :], other=0.0)
        score = add_product(query, tl.trans(key), tl.zeros([HEADS, TOKENS], tl.float32), PRECISION)
        score = add_product(query_rope, tl.trans(key_rope), score, PRECISION) * scale
        if MASK == "bool":
            seen = tl.load(mask_BS + batch * mask_stride + s, mask=inside, other=0)
            score = tl.where((seen != 0)[None, :], score, float("-inf"))
        if MASK == "add":
            score += tl.load(mask_BS + batch * mask_stride + s, mask=inside, other=0.0).to(tl.float32)[None, :]
        if MASK != "none":
            # The lowest number and not -inf: a row that sees nothing must not become NaN.
            score = tl.maximum(score, -3.4028234663852886e38)
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        weight = tl.exp(score - higher[:, None])
        shrink = tl.exp(best - higher)
        total = total * shrink + tl.sum(weight, 1)
        acc = add_product(weight.to(key.dtype), key, acc * shrink[:, None], PRECISION)
        best = higher
    place = (batch * tl.num_programs(2) + part) * heads + n
    tl.store(sum_BPNL + place[:, None] * latent + c[None, :], acc, mask=live & (c < latent)[None, :])
    tl.store(state_BPN2 + place * 2, best, mask=n < heads)
    tl.store(state_BPN2 + place * 2 + 1, total, mask=n < heads)


@jit(do_not_specialize=["parts"])
def merge(sum_BPNL, state_BPN2, out_BNL, heads, latent, parts, PADDED: tl.constexpr, COLUMNS: tl.constexpr):
    """The softmax over all parts from those of each part, in fp32."""
    batch, n = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p, c = tl.arange(0, PADDED), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    place = (batch * parts + p) * heads + n
    real = p < parts
    best = tl.load(state_BPN2 + place * 2, mask=real, other=float("-inf"))
    # A row of no tokens, as CUDA graphs pad a batch, gives 0.
    scale = tl.where(best == float("-inf"), 0.0, tl.exp(best - tl.max(best, 0)))
    total = tl.sum(tl.load(state_BPN2 + place * 2 + 1, mask=real, other=0.0) * scale, 0)
    inside = c < latent
    sums = tl.load(sum_BPNL + place[:, None] * latent + c[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    total = tl.where(total == 0.0, 1.0, total)
    store(out_BNL + (batch * heads + n) * latent + c, tl.sum(sums * scale[:, None], 0) / total, inside)


def block_for(query_BNL: Tensor, tokens: int) -> Block:
    # Shared memory does not hold as many heads in fp32.
    known = MANY_HEADS if query_BNL.dtype != torch.float32 else {}
    return block_of(*query_BNL.shape[:2], tokens, known.get(capability(query_BNL), FEW_HEADS))


def block_of(batch: int, heads: int, tokens: int, many: Block) -> Block:
    return many if heads > FEW_HEADS.heads and batch * tokens >= MANY_TOKENS else FEW_HEADS


def split(block: Block, batch: int, heads: int, tokens: int) -> tuple[int, int]:
    """How many parts the cache is cut into, and tokens a part: enough parts to fill the GPU, each of whole tiles."""
    wanted = max(1, block.programs // (batch * cdiv(heads, block.heads)))
    part_tokens = block.tokens * cdiv(cdiv(tokens, block.tokens), wanted)
    return cdiv(tokens, part_tokens), part_tokens


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels run on these dtypes."""
    return len({t.dtype for t in tensors}) == 1 and tensors[0].dtype in DTYPES


def kernels_attend_latents(
    query_BNL: Tensor, query_BND: Tensor, latent_BSL: Tensor, rope_BSD: Tensor, mask_BS: Tensor | None, scale: float
) -> Tensor:
    """softmax((q_latent . latent + q_rope . rope) * scale + mask) latent for one new token of each row: [B, N, L].

    mask_BS is boolean (false: hidden), added (floating), or None; the rows of the cache may lie apart, as in a view of a
    buffer with room to grow, and its tokens may not.
    """
    query_BNL, query_BND = query_BNL.contiguous(), query_BND.contiguous()
    latent_BSL, rope_BSD = (t if t.stride()[1:] == (t.shape[2], 1) else t.contiguous() for t in (latent_BSL, rope_BSD))
    kind = "none" if mask_BS is None else "bool" if mask_BS.dtype == torch.bool else "add"
    if mask_BS is not None:
        mask_BS = mask_BS.view(torch.uint8) if kind == "bool" else mask_BS
        mask_BS = mask_BS if mask_BS.stride(1) == 1 else mask_BS.contiguous()
    strides = latent_BSL.stride(0), rope_BSD.stride(0), mask_BS.stride(0) if kind != "none" else 0
    cache = (latent_BSL, rope_BSD, mask_BS, None, None)
    return in_parts(query_BNL, query_BND, cache, rope_BSD.shape[1], strides, scale, MASK=kind, PAGE=0, HALF=0, RUN=1)


def kernels_attend_pages(
    query_BNL: Tensor,
    query_BND: Tensor,
    first_CTW: Tensor,
    second_CTW: Tensor,
    table_BM: Tensor,
    length_B: Tensor,
    scale: float,
) -> Tensor:
    """The same over pages, contiguous and on one device: [B, N, L], 0 for a row of length 0.

    first_CTW, second_CTW: halves of each token's latent and rotated key, one behind the other; table_BM int32, the pages of a
    row in order; length_B int32, its tokens. What the table says behind a row's length is never read.
    """
    (tokens, half), latent = first_CTW.shape[1:], query_BNL.shape[2]
    step, odd_bytes = divmod(second_CTW.data_ptr() - first_CTW.data_ptr(), first_CTW.element_size())
    assert not odd_bytes, odd_bytes
    strides = 0, step - half, 0
    cache = (first_CTW, second_CTW, None, table_BM.contiguous(), length_B.contiguous())
    room, queries = table_BM.shape[1] * tokens, (query_BNL.contiguous(), query_BND.contiguous())
    page = {"PAGE": tokens, "HALF": half, "RUN": math.gcd(half, step, latent, 16)}
    return in_parts(*queries, cache, room, strides, scale, MASK="none", **page)


def in_parts(
    query_BNL: Tensor, query_BND: Tensor, cache: tuple, tokens: int, strides: tuple, scale: float, **constants
) -> Tensor:
    """`attend` and `merge` over a cache of at most so many tokens a row."""
    (batch, heads, latent), rope = query_BNL.shape, query_BND.shape[2]
    block = block_for(query_BNL, tokens)
    parts, part_tokens = split(block, batch, heads, tokens)
    new = dict(dtype=torch.float32, device=query_BNL.device)
    sum_BPNL, state_BPN2 = torch.empty(batch, parts, heads, latent, **new), torch.empty(batch, parts, heads, 2, **new)
    launch(
        attend, (batch, cdiv(heads, block.heads), parts), query_BNL, query_BND, *cache, sum_BPNL, state_BPN2, heads,
        tokens, latent, rope, *strides, part_tokens, scale, HEADS=block.heads, TOKENS=block.tokens,
        PADDED_LATENT=max(16, next_power_of_two(latent)), PADDED_ROPE=max(16, next_power_of_two(rope)),
        PRECISION=precision(), warps=block.warps, stages=block.stages, **constants,
    )  # fmt: skip
    out_BNL, padded = torch.empty_like(query_BNL), next_power_of_two(parts)
    columns = max(16, MERGED // padded)
    launch(
        merge, (batch, heads, cdiv(latent, columns)), sum_BPNL, state_BPN2, out_BNL, heads, latent, parts,
        PADDED=padded, COLUMNS=columns,
    )  # fmt: skip
    return out_BNL


def torch_attend_latents(
    query_BNL: Tensor, query_BND: Tensor, latent_BSL: Tensor, rope_BSD: Tensor, mask_BS: Tensor | None, scale: float
) -> Tensor:
    """The same in torch's operators: the kernels' oracle, and what runs if they do not compile."""
    score_BNS = query_BNL @ latent_BSL.mT + query_BND @ rope_BSD.mT
    score_BNS = score_BNS.to(torch.promote_types(score_BNS.dtype, torch.float32)) * scale
    if mask_BS is not None and mask_BS.dtype == torch.bool:
        score_BNS = score_BNS.masked_fill(~mask_BS[:, None], torch.finfo(torch.float32).min)
    elif mask_BS is not None:
        score_BNS = score_BNS + mask_BS[:, None]
    return score_BNS.softmax(dim=-1).to(latent_BSL.dtype) @ latent_BSL


def attend_latents_here(
    query_BNL: Tensor, query_BND: Tensor, latent_BSL: Tensor, rope_BSD: Tensor, mask_BS: Tensor | None, scale: float
) -> Tensor:
    arguments = (query_BNL, query_BND, latent_BSL, rope_BSD, mask_BS, scale)
    return here(kernels_attend_latents, torch_attend_latents, *arguments)


# An operator for torch.compile.
attend_latents_op = torch.library.custom_op("axk1::attend_latents", attend_latents_here, mutates_args=())


@attend_latents_op.register_fake
def _(query_BNL, query_BND, latent_BSL, rope_BSD, mask_BS, scale):
    return query_BNL.new_empty(query_BNL.shape)


def attend_latents(*arguments) -> Tensor:
    """`attend_latents_op`, without what an operator costs where nothing is compiled."""
    return (attend_latents_op if torch.compiler.is_compiling() else attend_latents_here)(*arguments)


def torch_attend_pages(
    query_BNL: Tensor,
    query_BND: Tensor,
    first_CTW: Tensor,
    second_CTW: Tensor,
    table_BM: Tensor,
    length_B: Tensor,
    scale: float,
) -> Tensor:
    """The same in torch's operators: every row's pages side by side, then `torch_attend_latents`."""
    page_BM = table_BM.long().clamp(min=0)
    token_BSW = torch.cat([first_CTW[page_BM], second_CTW[page_BM]], dim=-1).flatten(1, 2)
    sizes = query_BNL.shape[2], query_BND.shape[2]
    latent_BSL, rope_BSD = token_BSW[..., : sum(sizes)].split(sizes, dim=-1)
    mask_BS = torch.arange(token_BSW.shape[1], device=length_B.device) < length_B[:, None]
    # What stands behind a row's length may be anything, NaN included.
    latent_BSL = latent_BSL.masked_fill(~mask_BS[..., None], 0.0)
    return torch_attend_latents(query_BNL, query_BND, latent_BSL, rope_BSD, mask_BS, scale)


def attend_pages_here(
    query_BNL: Tensor,
    query_BND: Tensor,
    first_CTW: Tensor,
    second_CTW: Tensor,
    table_BM: Tensor,
    length_B: Tensor,
    scale: float,
) -> Tensor:
    arguments = (query_BNL, query_BND, first_CTW, second_CTW, table_BM, length_B, scale)
    if not takes(query_BNL, first_CTW):
        return torch_attend_pages(*arguments)
    return here(kernels_attend_pages, torch_attend_pages, *arguments)


attend_pages_op = torch.library.custom_op("axk1::attend_pages", attend_pages_here, mutates_args=())


@attend_pages_op.register_fake
def _(query_BNL, query_BND, first_CTW, second_CTW, table_BM, length_B, scale):
    return query_BNL.new_empty(query_BNL.shape)


def attend_pages(*arguments) -> Tensor:
    """`attend_pages_op`, without what an operator costs where nothing is compiled."""
    return (attend_pages_op if torch.compiler.is_compiling() else attend_pages_here)(*arguments)
