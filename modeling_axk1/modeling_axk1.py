"""How does A.X K1 compute?  The mathematics top to bottom: norm, RoPE, latent attention, router, experts, layer, model, heads.

Parameter names in memory and on disk are those of transformers' own `axk1`, so one checkpoint serves both, and vLLM.

Axes: B batch, Q new tokens, S attended tokens (cached ones included), N heads, D head size, L latent (kv_lora_rank),
T = B * Q tokens, K experts a token, E routed experts, G groups, H hidden.
"""

import inspect
import math
import os
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessor
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .cache_axk1 import grow_in_place, page_sizes, row_lengths, update_pages
from .configuration_axk1 import AxK1Config
from .fp8_axk1 import fp8_experts_forward
from .generation_axk1 import ThinkingGenerationMixin
from .loading_axk1 import read_in_parts
from .loss_axk1 import fused_causal_lm_loss, next_token_targets
from .mla_kernels import attend_latents, attend_pages, takes
from .moe_dispatch import axk1_experts_forward, missing_for_kernels, route
from .mtp_axk1 import AxK1CausalLMOutput, DraftingGenerationMixin, mtp_targets
from .quantization_axk1 import QuantizesExperts

logger = logging.get_logger(__name__)

# Registered here and not in __init__.py, which a Hub folder with remote code never runs.
ALL_EXPERTS_FUNCTIONS.register("axk1", axk1_experts_forward)
ALL_EXPERTS_FUNCTIONS.register("axk1_fp8", fp8_experts_forward)
# Separate experts on disk, fused in memory, by the very mapping of stock transformers: registered once more, because
# transformers withholds it from classes that live outside its own package.
register_checkpoint_conversion_mapping("axk1", get_checkpoint_conversion_mapping("axk1"), overwrite=True)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) * weight and 1 / rms(x); the statistic in fp32, the product in x's dtype.  [Zhang & Sennrich 2019]"""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # The norm reads x once and writes nothing of its size, where a mean of squares writes the squares.
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = (norm * norm / x.shape[-1] + eps).rsqrt()
    return weight * (wide * scale).to(x.dtype), scale


class RMSNormFunction(torch.autograd.Function):
    """The norm with its gradient written out: it keeps x and one number a token, where autograd keeps three copies of x.

    On CPU, forward + backward take about half of autograd's time.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        output, scale = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        unit = x * scale  # fp32, as scale is
        grad = grad.to(unit.dtype)
        product = grad * unit
        grad_weight = product.flatten(0, -2).sum(dim=0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = (product @ weight.to(unit.dtype))[..., None] / x.shape[-1]
        grad_x = torch.addcmul(grad * weight, unit, mean, value=-1).mul_(scale)
        return grad_x.to(x.dtype), grad_weight, None


class AxK1RMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        # torch's own kernel takes a GPU one launch; on CPU there is none, and it knows neither two dtypes nor split tensors.
        if hidden_states.is_cuda and hidden_states.dtype == self.weight.dtype and type(hidden_states) is Tensor:
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        if torch.is_grad_enabled():
            return RMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)[0]


class AxK1UnusedNorm(AxK1RMSNorm):
    """The dense layer's MoE output norm: in every released checkpoint and in no computation.

    Kept so that a saved model still loads in vLLM; never with a gradient, which DDP would wait for in vain.
    """

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        # Also on the path of `from_pretrained`, which makes new parameters.
        super().register_parameter(name, param.requires_grad_(False))

    def forward(self, hidden_states: Tensor) -> Tensor:
        raise RuntimeError("The dense layer's post_mlp_layernorm is stored but never applied.")


class AxK1RotaryEmbedding(nn.Module):
    """cos and sin [B, Q, rope size] of every RoPE type that transformers knows, YaRN's magnitude included."""

    def __init__(self, config: AxK1Config):
        super().__init__()
        self.config = config
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        # These names are what transformers' weight initialisation and dynamic RoPE look for.
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: AxK1Config, **kwargs) -> tuple[Tensor, float]:
        size = config.qk_rope_head_dim
        exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
        return config.rope_parameters["rope_theta"] ** -exponents, 1.0

    def _apply(self, fn, recurse=True):
        """Moves with the model but stays fp32: in bf16, angles of K1 at position 1,000 are up to 0.4 radians off."""
        frequencies = {name: self._buffers[name] for name in ("inv_freq", "original_inv_freq")}
        super()._apply(fn, recurse)
        for name, exact in frequencies.items():
            if self._buffers[name].dtype != exact.dtype:
                self._buffers[name] = exact.to(self._buffers[name].device)
        return self

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float32)
        angles = torch.cat((angles, angles), dim=-1)
        return (angles.cos() * self.attention_scaling).to(x.dtype), (angles.sin() * self.attention_scaling).to(x.dtype)


def pairs(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of the first and the second members of the pairs that RoPE rotates."""
    return (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x in one new tensor, its last entries turned by the angles (half as many) of cos and sin."""
    half = cos.shape[-1]
    x1, x2 = pairs(x[..., -2 * half :], interleaved)
    output = x.clone(memory_format=torch.contiguous_format)
    output[..., -2 * half : -half] = x1 * cos - x2 * sin
    output[..., -half:] = x2 * cos + x1 * sin
    return output


class RotateFunction(torch.autograd.Function):
    """RoPE with its gradient written out: no split, concatenation or zero-filled gradient in between."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return rotated(x, cos, sin, interleaved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        cos, sin = ctx.saved_tensors
        half = cos.shape[-1]
        g1, g2 = grad[..., -2 * half : -half], grad[..., -half:]
        grad_x = grad.clone()
        x1, x2 = pairs(grad_x[..., -2 * half :], ctx.interleaved)
        x1.copy_(g1 * cos + g2 * sin)
        x2.copy_(g2 * cos - g1 * sin)
        return grad_x, None, None, None


def rotate(x_BQND: Tensor, cos_BQD: Tensor, sin_BQD: Tensor, interleaved: bool) -> Tensor:
    """Apply RoPE to the last entries of each head, as many as cos has; the entries before them stay.

    Interleaved pairs (x0, x1), (x2, x3) come out as halves, for queries and keys alike.
    """
    half = cos_BQD.shape[-1] // 2
    turn = RotateFunction.apply if torch.is_grad_enabled() else rotated
    return turn(x_BQND, cos_BQD[:, :, None, :half], sin_BQD[:, :, None, :half], interleaved)


def yarn_softmax_scale(rope_parameters: dict) -> float:
    """The factor on the softmax scale; 1 unless `mscale_all_dim` is set (K1 leaves it 0).  [YaRN, DeepSeek-V3]"""
    mscale, factor = rope_parameters.get("mscale_all_dim", 0), rope_parameters.get("factor", 1.0)
    if rope_parameters["rope_type"] == "default" or not mscale or factor <= 1:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) ** 2


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T * scaling, masked) v; returns [B, Q, N, D] and the weights [B, N, Q, S]."""
    weights = masked_softmax(query @ key.transpose(2, 3) * scaling, attention_mask)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def matrix_of(module: nn.Module) -> Tensor | None:
    """This rank's rows of the W in module(x) = x @ W.T, or None if it does more: adapter, quantisation, hook, offload.

    Under transformers' tensor parallelism ("colwise") these are the rows of the rank's own heads, without gradient only: with
    one, the latents' is a sum over ranks, which the module itself makes.
    """
    if type(module) is not nn.Linear or module.bias is not None:
        return None
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return None
    weight = module.weight
    if isinstance(weight, DTensor):
        mine = weight.placements == (Shard(0),) and weight.device_mesh.mesh_dim_names == ("tp",)
        return weight.to_local() if mine and not torch.is_grad_enabled() else None
    # accelerate's hooks replace it on the instance
    plain = type(weight) in (nn.Parameter, Tensor) and "forward" not in module.__dict__
    return weight if plain else None


class AxK1Attention(nn.Module):
    """Multi-head latent attention with a query latent: two forms of one function.  [paper; DeepSeek-V2, section 2.1]

    Cached a token: the normalised latent [L] and the rotated key [rope size] that all heads share. The *expanded* form runs
    every latent through `kv_b_proj` and attends as usual: right for many queries. The *absorbed* form multiplies
    `kv_b_proj` into the queries and the outputs and attends over the latents themselves: right for few.
    """

    recompute = False  # see AxK1PreTrainedModel.recompute_selectively

    def __init__(self, config: AxK1Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.attention_dropout = config.attention_dropout
        self.nope, self.rope, self.value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.latent, self.interleaved = config.kv_lora_rank, config.rope_interleave
        self.num_key_value_groups = 1  # read by transformers' attention functions
        self.is_causal = True
        self.scaling = config.qk_head_dim**-0.5 * yarn_softmax_scale(config.rope_parameters)
        hidden, heads = config.hidden_size, config.num_attention_heads
        self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=config.attention_bias)
        self.q_a_layernorm = AxK1RMSNorm(config.q_lora_rank)
        self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent + self.rope, bias=config.attention_bias)
        self.kv_a_layernorm = AxK1RMSNorm(self.latent)
        self.kv_b_proj = nn.Linear(self.latent, heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(heads * self.value, hidden, bias=config.attention_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        cache=None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """`cache` is continuous batching's (`generate_batch`), whose rows are one long row of requests under one mask."""
        B, Q, _ = hidden_states.shape
        q_latent = self.q_a_layernorm(self.q_a_proj(hidden_states))
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).split([self.latent, self.rope], dim=-1)
        # One "head" each, so that every kind of cache layer can hold them.
        latent_B1SL = self.kv_a_layernorm(latent).view(B, 1, Q, -1)
        k_rope = rotate(k_rope.view(B, Q, 1, -1), *position_embeddings, self.interleaved)
        k_rope_B1SD = k_rope.transpose(1, 2)
        if past_key_values is not None:
            latent_B1SL, k_rope_B1SD = past_key_values.update(latent_B1SL, k_rope_B1SD, self.layer_idx)
            if torch.is_grad_enabled():
                # A later step may write into the cache's memory, which the backward of this one still has to read.
                latent_B1SL, k_rope_B1SD = latent_B1SL.clone(), k_rope_B1SD.clone()
        if cache is not None:
            latent_B1SL, k_rope_B1SD = update_pages(cache, latent_B1SL, k_rope_B1SD, self.layer_idx, kwargs)
            if kwargs.get("block_table") is not None:
                return self.o_proj(self.attend_pages(q_latent, position_embeddings, kwargs).reshape(B, Q, -1)), None

        cached = past_key_values is not None or cache is not None
        if cached and self.absorbs(Q, latent_B1SL.shape[2], attention_mask):
            attend = self.attend_absorbed
        elif self.recompute and self.training:
            attend = partial(checkpoint, self.attend_expanded, use_reentrant=False, context_fn=keep_attention_core)
        else:
            attend = self.attend_expanded
        output, weights = attend(q_latent, latent_B1SL, k_rope_B1SD, position_embeddings, attention_mask, **kwargs)
        return self.o_proj(output.reshape(B, Q, -1)), weights

    @property
    def implementation(self) -> str:
        """The attention function's name; continuous batching's "paged|" only tells who updates the cache, which we do."""
        return self.config._attn_implementation.removeprefix("paged|")

    def queries(self, q_latent: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """[B, N, Q, nope + rope], the last part rotated."""
        q_BQND = self.q_b_proj(q_latent).view(*q_latent.shape[:2], -1, self.nope + self.rope)
        return rotate(q_BQND, *position_embeddings, self.interleaved).transpose(1, 2)

    def attend_expanded(self, q_latent, latent_B1SL, k_rope_B1SD, position_embeddings, attention_mask, **kwargs):
        """Keys and values for every head from every latent, then any attention function of transformers."""
        B, _, S, _ = latent_B1SL.shape
        query = self.queries(q_latent, position_embeddings)
        # Three axes: on CPU, bitsandbytes' 8-bit layers take no more.
        expanded = self.kv_b_proj(latent_B1SL[:, 0]).view(B, S, -1, self.nope + self.value).transpose(1, 2)
        k_nope, value = expanded.split([self.nope, self.value], dim=-1)
        key = torch.cat((k_nope, k_rope_B1SD.expand(-1, k_nope.shape[1], -1, -1)), dim=-1)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        return attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def absorbs(self, queries: int, keys: int, attention_mask) -> bool:
        """Whether the absorbed form gives the same result here, and cheaper: multiply-adds a head counted for both forms."""
        if matrix_of(self.kv_b_proj) is None or (self.training and self.attention_dropout):
            return False
        # Several queries with no mask, or a padding mask alone, lean on the attention function's own idea of causality.
        spells_out = isinstance(attention_mask, BlockMask) or (attention_mask is not None and attention_mask.dim() == 4)
        if queries > 1 and not spells_out:
            return False
        up, pairs = self.latent * (self.nope + self.value), queries * keys
        absorbed = queries * up + pairs * (2 * self.latent + self.rope)
        expanded = keys * up + pairs * (self.nope + self.rope + self.value)
        return absorbed < expanded

    def attend_absorbed(self, q_latent, latent_B1SL, k_rope_B1SD, position_embeddings, attention_mask, **kwargs):
        """Attention over the latents: k_nope = W_k c gives q . k_nope = (W_k^T q) . c, and the values W_v c come out last."""
        query = self.queries(q_latent, position_embeddings)
        B, N, Q, _ = query.shape
        q_nope, q_rope = query.split([self.nope, self.rope], dim=-1)
        latent_BSL, k_rope_BSD = latent_B1SL[:, 0], k_rope_B1SD[:, 0]
        w_key, w_value = self.up_projections(N)
        q_absorbed = q_nope @ w_key
        eager = self.implementation == "eager"
        if Q == 1 and not eager and steps_on_kernels(q_absorbed, q_rope, latent_BSL, k_rope_BSD):
            mask = spelled_out(attention_mask, latent_BSL)
            mask_BS = None if mask is None else mask[:, 0, -1].expand(B, -1)
            context = attend_latents(
                q_absorbed[:, :, 0], q_rope[:, :, 0], latent_BSL, k_rope_BSD, mask_BS, self.scaling
            )
            return (context[:, :, None] @ w_value.mT).transpose(1, 2), None
        q_absorbed = q_absorbed.reshape(B, N * Q, -1)
        # The long matrix on the left: with it transposed on the right, CPU matmuls take up to twice as long.
        scores = torch.baddbmm(
            latent_BSL @ q_absorbed.mT,
            k_rope_BSD,
            q_rope.reshape(B, N * Q, -1).mT,
            beta=self.scaling,
            alpha=self.scaling,
        )
        weights = masked_softmax(scores.mT.reshape(B, N, Q, -1), attention_mask)
        context = (weights.view(B, N * Q, -1) @ latent_BSL).view(B, N, Q, -1)
        output = (context @ w_value.mT).transpose(1, 2)
        # Like the expanded form: only eager attention has weights to show.
        return output, weights if eager else None

    def up_projections(self, heads: int) -> tuple[Tensor, Tensor]:
        """The matrices of `kv_b_proj` that make keys and values of the latents: [N, nope, L] and [N, value, L]."""
        return matrix_of(self.kv_b_proj).view(heads, self.nope + self.value, -1).split([self.nope, self.value], dim=1)

    def attend_pages(self, q_latent: Tensor, position_embeddings: tuple[Tensor, Tensor], kwargs: dict) -> Tensor:
        """Continuous batching's decoding step by a block table: one token [1, Q, .] of each request, absorbed, in its pages."""
        if matrix_of(self.kv_b_proj) is None:
            raise ValueError("kv_b_proj has changed since continuous batching began; end it, and begin anew.")
        q_nope, q_rope = self.queries(q_latent, position_embeddings)[0].split([self.nope, self.rope], dim=-1)
        w_key, w_value = self.up_projections(len(q_nope))
        pages = kwargs["k_cache"].squeeze(2), kwargs["v_cache"].squeeze(2), kwargs["block_table"], row_lengths(kwargs)
        context_QNL = attend_pages((q_nope @ w_key).transpose(0, 1), q_rope.transpose(0, 1), *pages, self.scaling)
        return (context_QNL.transpose(0, 1) @ w_value.mT).transpose(0, 1)


def steps_on_kernels(*tensors: Tensor) -> bool:
    """Whether mla_kernels.py can take a decoding step on these tensors: a GPU it supports, one dtype, no gradient."""
    return not (torch.is_grad_enabled() or missing_for_kernels(tensors[0].device)) and takes(*tensors)


def spelled_out(mask: Tensor | None, latent_BSL: Tensor) -> Tensor | None:
    """A decoding step's mask, in whichever of the forms that `masked_softmax` knows, as [B, 1, 1, S]."""
    B, S, _ = latent_BSL.shape
    if isinstance(mask, BlockMask):
        return create_mask(mask.mask_mod, B, 1, 1, S, device=latent_BSL.device)
    return mask[:, None, None, -S:].bool() if mask is not None and mask.dim() == 2 else mask


def masked_softmax(scores_BNQS: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax in fp32 under any attention function's mask: additive or boolean [B, 1, Q, S], padding [B, S], Flex's blocks."""
    B, _, Q, S = scores_BNQS.shape
    if isinstance(mask, BlockMask):
        mask = create_mask(mask.mask_mod, B, 1, Q, S, device=scores_BNQS.device)
    if mask is not None:
        mask = mask[:, None, None, -S:].bool() if mask.dim() == 2 else mask
        if mask.dtype == torch.bool:
            # The lowest number and not -inf: a padding row that attends to nothing must not become NaN.
            scores_BNQS = scores_BNQS.masked_fill(~mask, torch.finfo(scores_BNQS.dtype).min)
        else:
            scores_BNQS = scores_BNQS + mask
    return scores_BNQS.softmax(dim=-1, dtype=torch.float32).to(scores_BNQS.dtype)


class AxK1MLP(nn.Module):
    """SwiGLU: the dense FFN of the first layer and the shared expert."""

    recompute = False

    def __init__(self, config: AxK1Config, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def choose_experts(
    scores_TE: Tensor, bias_E: Tensor | None, *, method: str, groups: int, top_groups: int, top_k: int
) -> Tensor:
    """Ids of the `top_k` experts of each token, [T, K] int64, in no order.  [paper, routing; DeepSeek-V3, section 2.1.2]

    scores_TE fp32 in (0, 1); bias_E fp32 steers the choice, never the weight. A group's score is the sum of its two best
    biased scores (noaux_tc) or its best score (group_limited_greedy); only the `top_groups` best groups stay eligible.
    """
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if groups > 1:
        choice_TGE = choice_TE.view(-1, groups, choice_TE.shape[-1] // groups)
        if method == "noaux_tc":
            group_TG = choice_TGE.topk(2, dim=-1).values.sum(dim=-1)
        else:
            group_TG = choice_TGE.amax(dim=-1)
        best = group_TG.topk(top_groups, dim=-1, sorted=False).indices
        barred_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(1, best, False)
        choice_TE = choice_TGE.masked_fill(barred_TG[..., None], float("-inf")).flatten(1)
    return choice_TE.topk(top_k, dim=-1, sorted=False).indices


def weigh_experts(scores_TE: Tensor, expert_TK: Tensor, normalise: bool, scale: float) -> Tensor:
    """Routing weights [T, K] in the scores' dtype: the chosen scores, made to sum to 1 if `normalise`, times `scale`."""
    weight_TK = scores_TE.gather(1, expert_TK)
    if normalise:
        weight_TK = weight_TK / (weight_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return weight_TK * scale


class AxK1TopkRouter(nn.Module):
    """Sigmoid router in fp32 with auxiliary-loss-free balancing.

    `expert_load` [E] int64 counts the last training pass's tokens an expert: E numbers for a callback to read.
    """

    def __init__(self, config: AxK1Config):
        super().__init__()
        experts = config.n_routed_experts
        self.method, self.top_k = config.topk_method, config.num_experts_per_tok
        self.groups, self.top_groups = config.n_group, config.topk_group
        self.normalise, self.scale = config.norm_topk_prob, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.zeros(experts, config.hidden_size))
        bias = torch.zeros(experts, dtype=torch.float32) if config.has_router_bias else None
        self.register_buffer("e_score_correction_bias", bias)
        self.register_buffer("expert_load", torch.zeros(experts, dtype=torch.int64), persistent=False)

    def _apply(self, fn, recurse=True):
        """Moves with the model but stays fp32: in bf16, steps of the balancing would vanish."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias is not None and self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns logits [T, E] fp32, routing weights [T, K] fp32 and expert ids [T, K] int64."""
        hidden_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        # Autocast would take the fp32 inputs for a reason to compute in bf16.
        with torch.autocast(hidden_TH.device.type, enabled=False):
            logits_TE = F.linear(hidden_TH.to(torch.float32), self.weight.to(torch.float32))
        if missing_for_kernels(logits_TE.device):
            scores_TE = logits_TE.sigmoid()
            expert_TK = self.choose(scores_TE.detach())
            weight_TK = weigh_experts(scores_TE, expert_TK, self.normalise, self.scale)
        else:
            weight_TK, expert_TK = route(
                logits_TE, self.e_score_correction_bias, self.method, self.groups, self.top_groups, self.top_k,
                self.normalise, self.scale,
            )  # fmt: skip
        if self.training:
            # Overwritten, not added to: a recomputation under gradient checkpointing leaves it right.
            ones = torch.ones_like(expert_TK).flatten()
            self.expert_load.zero_().scatter_add_(0, expert_TK.flatten(), ones)
        return logits_TE, weight_TK, expert_TK

    def choose(self, scores_TE: Tensor) -> Tensor:
        return choose_experts(
            scores_TE,
            self.e_score_correction_bias,
            method=self.method,
            groups=self.groups,
            top_groups=self.top_groups,
            top_k=self.top_k,
        )


@use_experts_implementation
class AxK1Experts(nn.Module):
    """All routed experts of a layer, fused: gate_up_proj [E, 2I, H] (gate rows first), down_proj [E, H, I]."""

    def __init__(self, config: AxK1Config):
        super().__init__()
        self.num_experts = config.n_routed_experts
        self.hidden_dim, self.intermediate_dim = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_act]
        self.register_load_state_dict_pre_hook(fuse_separate_experts)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The "eager" implementation; "axk1" (moe_dispatch.py) is the default one."""
        output = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # expert parallelism marks other ranks' experts so
                continue
            token, slot = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            rows = F.linear(self.act_fn(gate) * up, self.down_proj[expert]) * top_k_weights[token, slot, None]
            output.index_add_(0, token, rows.to(output.dtype))
        return output


def fuse_separate_experts(
    experts: AxK1Experts, state_dict, prefix, metadata, strict, missing, unexpected, errors
) -> None:
    """Let a bare `load_state_dict` read the on-disk layout, `experts.E.{gate,up,down}_proj.weight`, into the fused one.

    That is how Trainer resumes. A shard may hold some of a layer's experts: the others keep their present values.
    """
    size = experts.intermediate_dim
    places = {
        "gate_proj": (experts.gate_up_proj, slice(0, size)),
        "up_proj": (experts.gate_up_proj, slice(size, None)),
        "down_proj": (experts.down_proj, slice(None)),
    }
    names = {f"{prefix}{e}.{p}.weight": (e, p) for e in range(experts.num_experts) for p in places}
    found = names.keys() & state_dict.keys()
    if not found:
        return
    fused = {
        parameter: torch.empty_like(parameter, device="cpu") if parameter.is_meta else parameter.detach().clone()
        for parameter in (experts.gate_up_proj, experts.down_proj)
    }
    for name in found:
        (expert, projection), tensor = names[name], state_dict.pop(name)
        parameter, rows = places[projection]
        target = fused[parameter][expert, rows]
        if target.shape != tensor.shape:
            errors.append(f"size mismatch for {name}: {tuple(tensor.shape)} in the file, {tuple(target.shape)} here.")
            continue
        target.copy_(tensor)
    if strict or experts.gate_up_proj.is_meta:
        missing.extend(sorted(names.keys() - found))
    state_dict[prefix + "gate_up_proj"] = fused[experts.gate_up_proj]
    state_dict[prefix + "down_proj"] = fused[experts.down_proj]


class AxK1MoE(nn.Module):
    """Routed experts + shared expert, then the second norm of "dual normalization".  [paper]"""

    recompute = False

    def __init__(self, config: AxK1Config):
        super().__init__()
        self.experts = AxK1Experts(config)
        self.gate = AxK1TopkRouter(config)
        self.shared_experts = AxK1MLP(config, config.moe_intermediate_size * config.n_shared_experts)
        if config.post_mlp_norm:
            self.post_mlp_layernorm = AxK1RMSNorm(config.hidden_size, config.rms_norm_eps)
        else:
            self.post_mlp_layernorm = nn.Identity()

    def forward(self, hidden_states: Tensor) -> Tensor:
        _, weight_TK, expert_TK = self.gate(hidden_states)
        flat_TH = hidden_states.view(-1, hidden_states.shape[-1])
        routed = self.experts(flat_TH, expert_TK, weight_TK).view_as(hidden_states)
        return self.post_mlp_layernorm(routed + self.shared_experts(hidden_states))


class AxK1DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: AxK1Config, layer_idx: int):
        super().__init__()
        self.self_attn = AxK1Attention(config, layer_idx)
        if config.mlp_layer_types[layer_idx] == "sparse":
            self.mlp = AxK1MoE(config)
        else:
            self.mlp = AxK1MLP(config, config.intermediate_size)
            if config.post_mlp_norm:
                self.mlp.post_mlp_layernorm = AxK1UnusedNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = AxK1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = AxK1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_load_state_dict_pre_hook(move_post_mlp_norm)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs,
    ) -> Tensor:
        attention, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + attention
        mlp_input = self.post_attention_layernorm(hidden_states)
        if self.mlp.recompute and self.training:
            return hidden_states + checkpoint(self.mlp, mlp_input, use_reentrant=False, context_fn=keep_routing)
        return hidden_states + self.mlp(mlp_input)


class AxK1MTPLayer(AxK1DecoderLayer):
    """Multi-token prediction: one decoder layer over hidden states joined with the next tokens' embeddings.  [DeepSeek-V3, 2.2]

    The last of `model.layers`, under the names of released DeepSeek checkpoints. Embedding and head are the model's own.
    """

    def __init__(self, config: AxK1Config, depth: int):
        # A block of the last layer's kind, as Megatron has it.
        super().__init__(config, config.num_hidden_layers - 1)
        self.self_attn.layer_idx = depth  # in a cache of its own
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = AxK1RMSNorm(hidden, eps), AxK1RMSNorm(hidden, eps)
        self.eh_proj = nn.Linear(2 * hidden, hidden, bias=False)
        self.shared_head = nn.ModuleDict({"norm": AxK1RMSNorm(hidden, eps)})

    def forward(self, hidden_states: Tensor, next_embeds: Tensor, **kwargs) -> Tensor:
        """Both [B, Q, H]; returns [B, Q, H] for the head, and for the next such layer."""
        joined = torch.cat([self.enorm(next_embeds), self.hnorm(hidden_states)], dim=-1)
        return self.shared_head["norm"](super().forward(self.eh_proj(joined), **kwargs))


def move_post_mlp_norm(layer, state_dict, prefix, *_) -> None:
    """On disk the MoE output norm stands beside the mlp, in memory inside it (as stock transformers has it)."""
    on_disk = f"{prefix}post_mlp_layernorm.weight"
    if on_disk in state_dict:
        state_dict[f"{prefix}mlp.post_mlp_layernorm.weight"] = state_dict.pop(on_disk)


def tie_lm_head(model: "AxK1ForCausalLM", state_dict, prefix, *_) -> None:
    """A file of tied embeddings holds them once."""
    embedding, head = f"{prefix}model.embed_tokens.weight", f"{prefix}lm_head.weight"
    if model.config.tie_word_embeddings and embedding in state_dict:
        state_dict.setdefault(head, state_dict[embedding])


def keep_outputs_of(operators: list) -> tuple:
    """Checkpoint contexts that keep the results of these operators and recompute everything else."""

    def policy(ctx, operator, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if operator in operators else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def keep_routing() -> tuple:
    """For recomputing an MoE: the first pass's experts, so that a rounding difference cannot send a token elsewhere."""
    return keep_outputs_of([torch.ops.aten.topk.default, torch.ops.axk1.route.default])


def keep_attention_core() -> tuple:
    """For recomputing the MLA up-projections: the attention core's result, which is small and dear."""
    aten = torch.ops.aten
    return keep_outputs_of(
        [
            aten._scaled_dot_product_flash_attention_for_cpu.default,
            aten._scaled_dot_product_flash_attention.default,
            aten._scaled_dot_product_efficient_attention.default,
            aten._scaled_dot_product_cudnn_attention.default,
        ]
    )


def damaged_file(folder: str | os.PathLike) -> str:
    """The first safetensors file in `folder` that does not open, or `folder` where none is found."""
    for path in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                continue
        except SafetensorError:
            return str(path)
    return str(folder)


class AxK1PreTrainedModel(QuantizesExperts, PreTrainedModel):
    """What every A.X K1 class is to transformers: its config, its names on disk, what it supports and how it begins."""

    config_class = AxK1Config
    config: AxK1Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["AxK1DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": AxK1DecoderLayer,
        "attentions": AxK1Attention,
        "router_logits": OutputRecorder(AxK1TopkRouter, index=0),
    }
    _keep_in_fp32_modules_strict = ["e_score_correction_bias"]
    # The release routes without a correction bias.
    _keys_to_ignore_on_load_missing = ["e_score_correction_bias"]
    _keys_to_ignore_on_load_unexpected = ["inv_freq"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info: bool = False, **kwargs):
        """As transformers', but a damaged file is named, and a missing weight is an error (a classifier head may be new)."""
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(
                f"{damaged_file(pretrained_model_name_or_path)} is damaged ({error}); copy or download it again."
            ) from error
        missing = sorted(name for name in info["missing_keys"] if not name.startswith("score."))
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights that its configuration asks for, "
                f"{missing[0]} the first; use the config.json that belongs to these weights, or the class that saved them."
            )
        return (model, info) if output_loading_info else model

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *rest, **options):
        """As transformers', but ranks of tensor parallelism read no byte that another one reads, unless it is to be quantised."""
        with read_in_parts(model) if load_config.hf_quantizer is None else nullcontext():
            return QuantizesExperts._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, *rest, **options
            )

    def _resolve_parallel_plans(self, distributed_config):
        """As transformers', but a tensor-parallel size that would cut through a head is refused."""
        plans = super()._resolve_parallel_plans(distributed_config)
        heads, ranks = self.config.num_attention_heads, distributed_config.tp_size
        if heads % ranks and any(name.endswith("self_attn.q_b_proj") for name in plans[0]):
            raise ValueError(f"tp_size={ranks} does not divide num_attention_heads={heads}; use a divisor.")
        return plans

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """As transformers', but each pipeline stage counts its layers from 0.

        Masks and positions follow layer 0 of the cache, which else only the first stage fills. Multi-token-prediction layers
        have a cache of their own, and keep their places in it.
        """
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)
        layers = [module for module in model.modules() if isinstance(module, AxK1DecoderLayer)]
        held = [layer for layer in layers if not isinstance(layer, AxK1MTPLayer)]
        for layer_idx, layer in enumerate(held):
            layer.self_attn.layer_idx = layer_idx
        return model

    def _move_missing_keys_from_meta_to_device(self, missing_keys, *args, **kwargs) -> None:
        """Before transformers would give missing weights random values: no file holds prediction layers, so neither do we."""
        missing_keys = set(missing_keys) - drop_absent_mtp_layers(self, set(missing_keys))
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        return super().get_correct_experts_implementation("axk1" if requested_experts is None else requested_experts)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        """Whole-layer checkpointing recomputes everything but the routing decision."""
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and options.get("use_reentrant") is False and "context_fn" not in options:
            gradient_checkpointing_func = partial(gradient_checkpointing_func, context_fn=keep_routing)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def recompute_selectively(self, enable: bool = True) -> None:
        """Recompute in backward only the MLA up-projections and the MLPs, as the paper trained.  [paper, pre-training]

        Cheaper than whole-layer `gradient_checkpointing_enable`: the attention core and the down-projections run once.
        """
        for module in self.modules():
            if isinstance(module, AxK1Attention | AxK1MLP | AxK1MoE):
                module.recompute = enable

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, AxK1TopkRouter):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.expert_load)
            if module.e_score_correction_bias is not None:
                init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, AxK1Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, AxK1UnusedNorm):
            # Transformers knows a norm by its class's name, which this one's does not hold: memory as it was would be saved.
            init.ones_(module.weight)


def drop_absent_mtp_layers(model: AxK1PreTrainedModel, missing_keys: set[str]) -> set[str]:
    """Remove the multi-token-prediction layers if all their weights are missing, with a warning; returns their names."""
    base, layers = model.base_model, model.config.num_hidden_layers
    prefix = "" if base is model else f"{model.base_model_prefix}."
    places = [f"layers.{layers + depth}." for depth in range(len(base.mtp_layers))]
    names = {name for name, _ in model.named_parameters() if name.startswith(tuple(prefix + at for at in places))}
    if not names or not names <= missing_keys:
        return set()
    logger.warning(
        f"num_nextn_predict_layers={len(places)} but the checkpoint holds no weight of such a layer: multi-token prediction "
        "is off and the loaded configuration says 0."
    )
    del base.layers[layers:]
    for holder in (base, model):
        holder._no_split_modules = set(holder._no_split_modules) - {"AxK1MTPLayer"}
    model.config.num_nextn_predict_layers = 0
    ignored = model._keys_to_ignore_on_load_missing or ()
    model._keys_to_ignore_on_load_missing = {*ignored, *(re.escape(prefix + at) for at in places)}
    return {key for key in missing_keys if key.startswith(tuple(prefix + at for at in places))}


class AxK1Model(AxK1PreTrainedModel):
    """Embedding, decoder layers and last norm: token ids [B, Q] to hidden states [B, Q, H]."""

    def __init__(self, config: AxK1Config):
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([AxK1DecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.layers.extend(AxK1MTPLayer(config, depth) for depth in range(config.num_nextn_predict_layers))
        self.norm = AxK1RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = AxK1RotaryEmbedding(config)
        self.gradient_checkpointing = False
        if config.num_nextn_predict_layers:
            # accelerate's FSDP refuses the name of a layer that the model does not have.
            self._no_split_modules = [*self._no_split_modules, "AxK1MTPLayer"]
        # Stock transformers drops the dense layers' unused norms when it saves.
        dense = [i for i, kind in enumerate(config.mlp_layer_types) if kind == "dense"]
        self._keys_to_ignore_on_load_missing = [
            *(self._keys_to_ignore_on_load_missing or []),
            *(rf"layers\.{i}\.mlp\.post_mlp_layernorm" for i in dense),
        ]
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        """Hidden states [B, Q, H] after the final norm; `router_logits` (one [T, E] a sparse layer) on request."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Both or neither of input_ids and inputs_embeds were given; give exactly one.")
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and not torch.compiler.is_compiling():
            grow_in_place(past_key_values)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        placed = self.place(inputs_embeds, attention_mask, position_ids, past_key_values)
        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(hidden_states, use_cache=use_cache, **placed, **kwargs)
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)

    def place(self, inputs_embeds: Tensor, attention_mask, position_ids: Tensor | None, past_key_values) -> dict:
        """What every layer needs to know of where the tokens stand: mask, positions, angles, cache."""
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        return {
            "position_embeddings": self.rotary_emb(inputs_embeds, position_ids),
            "attention_mask": mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }

    @property
    def mtp_layers(self) -> nn.ModuleList:
        return self.layers[self.config.num_hidden_layers :]

    def predict_next(
        self,
        depth: int,
        hidden_states: Tensor,
        next_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> Tensor:
        """What the head reads [B, Q, H] to predict the token `depth` + 2 places on, by multi-token-prediction layer `depth`.

        hidden_states: `last_hidden_state` for depth 0, else what depth - 1 returned. next_embeds: of the token depth + 1 on.
        past_key_values: a cache of the prediction layers' own.
        """
        if past_key_values is not None:
            grow_in_place(past_key_values)
        placed = self.place(next_embeds, attention_mask, position_ids, past_key_values)
        return self.mtp_layers[depth](hidden_states, next_embeds, **placed, **kwargs)


def sequence_balance_loss(logits_BQE: Tensor, expert_BQK: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Sequence-wise balance loss of one sigmoid router, a scalar fp32: 1 where perfectly balanced.  [DeepSeek-V3, eq. 17-20]

    f_e = share of a sequence's choices that went to e, times E; P_e = mean of its scores normalised to sum 1. The loss is
    sum_e f_e P_e, averaged over sequences. attention_mask [B, Q], 0 for padding, which counts nowhere.
    """
    B, Q, E = logits_BQE.shape
    scores_BQE = logits_BQE.sigmoid()
    shares_BQE = scores_BQE / scores_BQE.sum(dim=-1, keepdim=True)
    chosen_BQE = torch.zeros_like(scores_BQE).scatter_(2, expert_BQK, 1.0 / expert_BQK.shape[-1])
    if attention_mask is None:
        attention_mask = torch.ones(B, Q, device=logits_BQE.device)
    mask_BQ1 = attention_mask[:, :, None].to(scores_BQE.dtype)
    tokens_B1 = mask_BQ1.sum(dim=1).clamp(min=1)
    fraction_BE = (chosen_BQE * mask_BQ1).sum(dim=1) / tokens_B1 * E
    share_BE = (shares_BQE * mask_BQ1).sum(dim=1) / tokens_B1
    return (fraction_BE * share_BE).sum(dim=-1).mean()


class AxK1ForCausalLM(AxK1PreTrainedModel, ThinkingGenerationMixin, DraftingGenerationMixin):
    """The model with its head: token ids [B, Q] to logits [B, Q, V]; `generate` in two modes."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: AxK1Config):
        super().__init__(config)
        self.model = AxK1Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_load_state_dict_pre_hook(tie_lm_head)
        self.post_init()

    def _get_name(self) -> str:
        """The name on disk: from a list of such names Trainer's label smoothing knows that targets are the next tokens."""
        return "AXK1ForCausalLM"

    def init_continuous_batching(self, *args, **kwargs):
        """As transformers', which `generate_batch` and its server call, with pages that hold latents."""
        manager = super().init_continuous_batching(*args, **kwargs)
        if manager.batch_processor is None:
            layers = self.model.layers[: self.config.num_hidden_layers]
            if any(matrix_of(layer.self_attn.kv_b_proj) is None for layer in layers):
                # Out of block tables only the absorbed form attends.
                manager.continuous_batching_config.max_blocks_per_request = 0
            # transformers makes room for what those processors need that it converted itself, not for ours.
            processors = manager.logit_processor.logits_processor
            manager.logit_processor.tensors_required = sum(isinstance(p, ContinuousBatchingLogitsProcessor) for p in processors)
            # The pages' sizes are read from the configuration, once.
            config, self.config = self.config, page_sizes(self.config)
            try:
                manager.batch_processor = manager._create_batch_processor()
            finally:
                self.config = config
        if "kwargs" not in inspect.signature(manager.batch_processor.cache.update).parameters:
            raise ValueError(
                f"continuous batching of transformers {transformers.__version__} fills its pages in another way than 5.23's; "
                "install that or a newer one, or call generate."
            )
        return manager

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        mtp_loss_weight: float | None = None,
        **kwargs,
    ) -> AxK1CausalLMOutput:
        """Logits [B, Q or logits_to_keep, vocab]; with `labels`, the loss, to which `router_aux_loss_coef` adds `aux_loss`.

        Multi-token-prediction layers add `mtp_loss` times `mtp_loss_weight` (default: the configuration's), unless the cache
        holds tokens already, whose hidden states they would need. skip_logits (default: the configuration's
        `fused_linear_loss` while training on labels) takes the losses in chunks of tokens and returns no logits.
        """
        fused = self.config.fused_linear_loss if skip_logits is None else skip_logits
        if skip_logits is None:
            skip_logits = fused and self.training and labels is not None
        if skip_logits and labels is None:
            raise ValueError("skip_logits=True leaves nothing to return without labels; pass labels or leave it out.")
        balance = labels is not None and self.config.router_aux_loss_coef > 0
        if balance:
            kwargs["output_router_logits"] = True
        predicts = labels is not None and len(self.model.mtp_layers) > 0
        predicts = predicts and (past_key_values is None or past_key_values.get_seq_length() == 0)
        where = {"attention_mask": attention_mask, "position_ids": position_ids}
        tokens = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        outputs = self.model(**tokens, **where, past_key_values=past_key_values, use_cache=use_cache, **kwargs)
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = None if skip_logits else self.lm_head(hidden_states[:, kept, :])
        loss = aux_loss = mtp_loss = None
        if labels is not None:
            loss = self.token_loss(hidden_states[:, kept, :], logits, labels=labels, **kwargs)
        if balance:
            aux_loss = self.balance_loss(outputs.router_logits, hidden_states.shape[:2], attention_mask)
            loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        if predicts:
            mtp_loss = self.mtp_loss(hidden_states, **tokens, **where, labels=labels, fused=fused, **kwargs)
            weight = self.config.mtp_loss_weight if mtp_loss_weight is None else mtp_loss_weight
            loss = loss + weight * mtp_loss.to(loss.device)
            mtp_loss = mtp_loss.detach()
        return AxK1CausalLMOutput(
            loss=loss,
            aux_loss=aux_loss,
            mtp_loss=mtp_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def token_loss(self, hidden_states: Tensor, logits: Tensor | None, **targets) -> Tensor:
        """transformers' loss from the logits, or from the head's input where there are none."""
        weight = matrix_of(self.lm_head) if logits is None else None
        # A rank of tensor parallelism holds a part of the vocabulary only.
        if weight is not None and len(weight) == self.config.vocab_size:
            return fused_causal_lm_loss(hidden_states, weight, **targets)
        if logits is None:
            logger.warning_once(
                f"the loss takes whole logits, because lm_head ({type(self.lm_head).__name__}) is no plain linear layer here."
            )
            logits = self.lm_head(hidden_states)
        return self.loss_function(logits=logits, vocab_size=self.config.vocab_size, **targets)

    def mtp_loss(
        self,
        hidden_states: Tensor,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor,
        fused: bool,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        **kwargs,
    ) -> Tensor:
        """Mean over the prediction layers of their cross-entropy, each over its own targets.  [DeepSeek-V3, eq. 24-25]

        Like the main loss a mean over targets, or their sum over `num_items_in_batch` where that is given; 0 without targets.
        """
        embeds = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        mask_BQ = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        targets = next_token_targets(labels, ignore_index) if shift_labels is None else shift_labels
        losses = []
        for depth in range(len(self.model.mtp_layers)):
            # The last places see the first tokens; nothing is predicted there.
            following = embeds.roll(-depth - 1, dims=1)
            hidden_states = self.model.predict_next(
                depth, hidden_states, following, attention_mask, position_ids, **kwargs
            )
            logits = None if fused else self.lm_head(hidden_states)
            ahead = mtp_targets(targets, depth, position_ids, mask_BQ, ignore_index)
            items = (ahead != ignore_index).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            reading = {"shift_labels": ahead, "num_items_in_batch": items, "ignore_index": ignore_index}
            losses.append(self.token_loss(hidden_states, logits, labels=None, **reading, **kwargs))
        return torch.stack(losses).mean()

    def balance_loss(self, router_logits: tuple[Tensor, ...], shape: tuple[int, int], attention_mask) -> Tensor:
        """Mean over sparse layers of `sequence_balance_loss`."""
        mask_BQ = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
        layers = self.model.layers[: self.config.num_hidden_layers]
        routers = [module for module in layers.modules() if isinstance(module, AxK1TopkRouter)]
        losses = []
        for router, logits_TE in zip(routers, router_logits, strict=True):
            expert_TK = router.choose(logits_TE.detach().sigmoid())
            losses.append(sequence_balance_loss(logits_TE.view(*shape, -1), expert_TK.view(*shape, -1), mask_BQ))
        return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


class AxK1ForSequenceClassification(GenericForSequenceClassification, AxK1PreTrainedModel):
    """A score for each of `num_labels` classes, read at the last token that is not padding: logits [B, num_labels]."""

    def __init__(self, config: AxK1Config):
        begin_classifier(self, config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class AxK1ForTokenClassification(GenericForTokenClassification, AxK1PreTrainedModel):
    """A score for each of `num_labels` classes at every token: logits [B, S, num_labels].

    As in transformers, config.classifier_dropout, else hidden_dropout, else 0.1 falls on the hidden states, and
    token_classification_bias False drops the bias.
    """

    def __init__(self, config: AxK1Config):
        begin_classifier(self, config)
        given = (getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout"))
        self.dropout = nn.Dropout(next((rate for rate in given if rate is not None), 0.1))
        bias = getattr(config, "token_classification_bias", True)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=bias)
        self.post_init()


def begin_classifier(classifier: AxK1PreTrainedModel, config: AxK1Config) -> None:
    """What both classifiers' parents do, but for AutoModel, which knows nothing of us inside a Hub folder."""
    AxK1PreTrainedModel.__init__(classifier, config)
    classifier.num_labels = config.num_labels
    classifier.model = AxK1Model(config)
    # A class has no next token, and weights without a gradient would stop DDP.
    del classifier.model.layers[config.num_hidden_layers :]
    classifier._keys_to_ignore_on_load_unexpected = [
        *(classifier._keys_to_ignore_on_load_unexpected or []),
        *(rf"layers\.{config.num_hidden_layers + depth}\." for depth in range(config.num_nextn_predict_layers)),
    ]
