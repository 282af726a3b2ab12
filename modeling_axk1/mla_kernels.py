"""How does a decoding step attend over the latent cache on a GPU?  Triton kernels for the absorbed form of latent attention.

All heads attend over the same latents, which are keys and values at once: `attend` reads each part of the cache once for a
block of heads and leaves a sum of its own, `merge` makes one softmax of the parts (split-K). So few tokens keep a whole GPU
busy. Nothing waits for the host, nothing is atomic. For inference: no gradient.

Axes: B batch, N heads, S attended tokens, L latent, D rope size, P parts of the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .moe_dispatch import here
from .moe_kernels import DTYPES, add_product, jit, launch, precision, store, tl, triton

# Heads and tokens that a program takes at a time. Chosen on paper, not yet measured: queries and two stages of latents within
# 99 KB of shared memory at 512 + 64 numbers a token.
HEADS, TOKENS = 16, 32
# Programs enough for two on each multiprocessor of an H100 or H200.
PROGRAMS = 264
# Numbers that one program of `merge` adds up.
MERGED = 4096


# What grows with the cache is not specialised, or a generation would wait while kernels compile anew.
@jit(do_not_specialize=["tokens", "mask_stride"])
def attend(
    query_BNL,
    query_BND,
    latent_BSL,
    rope_BSD,
    mask_BS,
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
    MASK: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    PADDED_LATENT: tl.constexpr,
    PADDED_ROPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One part of the cache for a block of heads: sum_BPNL = sum of exp(score - max) * latent, state_BPN2 = max and sum of exp.

    MASK: "none", "bool" (false: hidden) or "add".
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
    end = tl.minimum((part + 1) * part_tokens, tokens)
    for first in range(part * part_tokens, end, TOKENS):
        s = first + tl.arange(0, TOKENS)
        inside = s < end
        at = latent_BSL + batch * latent_stride + s[:, None].to(tl.int64) * latent + c[None, :]
        key = tl.load(at, mask=inside[:, None] & (c < latent)[None, :], other=0.0)
        at = rope_BSD + batch * rope_stride + s[:, None].to(tl.int64) * rope + d[None, :]
        key_rope = tl.load(at, mask=inside[:, None] & (d < rope)[None, :], other=0.0)
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
    scale = tl.exp(best - tl.max(best, 0))
    total = tl.sum(tl.load(state_BPN2 + place * 2 + 1, mask=real, other=0.0) * scale, 0)
    inside = c < latent
    sums = tl.load(sum_BPNL + place[:, None] * latent + c[None, :], mask=real[:, None] & inside[None, :], other=0.0)
    store(out_BNL + (batch * heads + n) * latent + c, tl.sum(sums * scale[:, None], 0) / total, inside)


def split(batch: int, heads: int, tokens: int) -> tuple[int, int]:
    """How many parts the cache is cut into, and tokens a part: enough parts to fill the GPU, each of whole tiles."""
    wanted = max(1, PROGRAMS // (batch * triton.cdiv(heads, HEADS)))
    part_tokens = TOKENS * triton.cdiv(triton.cdiv(tokens, TOKENS), wanted)
    return triton.cdiv(tokens, part_tokens), part_tokens


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
    (batch, heads, latent), (_, tokens, rope) = query_BNL.shape, rope_BSD.shape
    kind = "none" if mask_BS is None else "bool" if mask_BS.dtype == torch.bool else "add"
    if mask_BS is not None:
        mask_BS = mask_BS.view(torch.uint8) if kind == "bool" else mask_BS
        mask_BS = mask_BS if mask_BS.stride(1) == 1 else mask_BS.contiguous()
    parts, part_tokens = split(batch, heads, tokens)
    new = dict(dtype=torch.float32, device=query_BNL.device)
    sum_BPNL, state_BPN2 = torch.empty(batch, parts, heads, latent, **new), torch.empty(batch, parts, heads, 2, **new)
    launch(
        attend, (batch, triton.cdiv(heads, HEADS), parts),
        query_BNL, query_BND, latent_BSL, rope_BSD, mask_BS, sum_BPNL, state_BPN2, heads, tokens, latent, rope,
        latent_BSL.stride(0), rope_BSD.stride(0), mask_BS.stride(0) if kind != "none" else 0, part_tokens, scale,
        MASK=kind, HEADS=HEADS, TOKENS=TOKENS, PADDED_LATENT=max(16, triton.next_power_of_2(latent)),
        PADDED_ROPE=max(16, triton.next_power_of_2(rope)), PRECISION=precision(), warps=8, stages=3,
    )  # fmt: skip
    out_BNL, padded = torch.empty_like(query_BNL), triton.next_power_of_2(parts)
    columns = max(16, MERGED // padded)
    launch(
        merge, (batch, heads, triton.cdiv(latent, columns)), sum_BPNL, state_BPN2, out_BNL, heads, latent, parts,
        PADDED=padded, COLUMNS=columns,
    )  # fmt: skip
    return out_BNL


def torch_attend_latents(
    query_BNL: Tensor, query_BND: Tensor, latent_BSL: Tensor, rope_BSD: Tensor, mask_BS: Tensor | None, scale: float
) -> Tensor:
    """The same in torch's operators: the kernels' oracle, and what runs if they do not compile."""
    score_BNS = (query_BNL @ latent_BSL.mT + query_BND @ rope_BSD.mT).float() * scale
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
