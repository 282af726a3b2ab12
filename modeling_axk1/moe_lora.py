"""How do routed experts compute under LoRA?  Grouped by expert, the low-rank path beside the matrix, never W + BA.

A loop over the hit experts in torch's operators, on any device, with a backward of its own. It keeps the layer input and the
gate/up output, as the experts without an adapter do, and no weight: packed experts are dequantised again.

Axes: T tokens, K experts a token, P = T * K token-expert pairs sorted by expert, N pairs of one expert, E experts, H hidden,
I expert width, R rank, F in features, O out features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .moe_dispatch import sort_pairs
from .quantization_axk1 import expert_weights, is_packed

# One matrix's adapter as PEFT stores it for `target_parameters`: lora_A [E * R, F], expert after expert; lora_B [O, R * E],
# an expert's columns E apart; and the scale alpha / R (rsLoRA: alpha / sqrt(R)).
Lora = tuple[Tensor, Tensor, float]


def lora_experts_forward(
    experts: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    gate_up: Lora | None,
    down: Lora | None,
) -> Tensor:
    """The output [T, H] of frozen experts, fused or packed, with an adapter on either or both of their matrices.

    hidden_states [T, H]; top_k_index [T, K] int64, ids of E or more add nothing; top_k_weights [T, K]. Computes in the dtype of
    the weights, or that into which they are dequantised. ValueError where the weights want a gradient, which they never get.
    """
    if any(parameter.requires_grad for parameter in experts.parameters()):
        raise ValueError("The routed experts under an adapter are trainable but get no gradient; freeze them.")
    x_TH = hidden_states.to(experts.compute_dtype if is_packed(experts) else experts.gate_up_proj.dtype)
    sizes = experts.num_experts, experts.hidden_dim, experts.intermediate_dim
    gate_up = gate_up or no_lora(x_TH, sizes[1], 2 * sizes[2])
    down = down or no_lora(x_TH, sizes[2], sizes[1])
    # PEFT keeps the adapters of half-precision models in fp32.
    factors = [factor.to(x_TH.dtype) for factor in (*gate_up[:2], *down[:2])]
    scales = gate_up[2], down[2]
    floats = (x_TH, top_k_weights, *factors)
    with torch.autocast(x_TH.device.type, enabled=False):
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in floats):
            out_TH = LoraExperts.apply(x_TH, top_k_index, top_k_weights, *factors, scales, experts)
        else:
            out_TH, _ = lora_forward(x_TH, top_k_index, top_k_weights, *factors, scales, experts, keep=False)
    return out_TH.to(hidden_states.dtype)


def no_lora(x_TH: Tensor, in_features: int, out_features: int) -> Lora:
    """An adapter of rank 0: its matmuls add nothing."""
    return x_TH.new_empty(0, in_features), x_TH.new_empty(out_features, 0), 0.0


def by_expert(lora_A: Tensor, lora_B: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Views [E, R, F] and [E, R, O] of PEFT's two matrices (or of their gradients)."""
    rank = lora_A.shape[0] // experts
    a_ERF = lora_A.view(experts, rank, lora_A.shape[1])
    return a_ERF, lora_B.view(lora_B.shape[0], rank, experts).permute(2, 1, 0)


class LoraExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, expert_TK, weight_TK, gate_up_A, gate_up_B, down_A, down_B, scales, experts):
        factors = (gate_up_A, gate_up_B, down_A, down_B)
        out_TH, gate_up_P2I = lora_forward(x_TH, expert_TK, weight_TK, *factors, scales, experts, keep=True)
        ctx.save_for_backward(x_TH, expert_TK, weight_TK, *factors, gate_up_P2I)
        ctx.scales, ctx.experts = scales, experts
        return out_TH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TH):
        with torch.autocast(grad_TH.device.type, enabled=False):
            grads = lora_backward(grad_TH, *ctx.saved_tensors, ctx.scales, ctx.experts)
        grads = (grads[0], None, *grads[1:], None, None)
        return tuple(grad if want else None for grad, want in zip(grads, ctx.needs_input_grad))


def lora_forward(
    x_TH: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    gate_up_A: Tensor,
    gate_up_B: Tensor,
    down_A: Tensor,
    down_B: Tensor,
    scales: tuple[float, float],
    experts: nn.Module,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the output [T, H] in x's dtype, summed in fp32, and the gate/up output [P, 2I] (no rows unless `keep`)."""
    E, width = experts.num_experts, experts.intermediate_dim
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    pair_P, token_P, weight_P1, hits = sort_pairs(expert_TK, weight_TK, E)
    (a1_ERH, b1_ER2I), (a2_ERI, b2_ERH) = by_expert(gate_up_A, gate_up_B, E), by_expert(down_A, down_B, E)
    gate_up_P2I = x_TH.new_empty(pair_P.numel() if keep else 0, 2 * width)
    out_TH = torch.zeros(x_TH.shape, dtype=wide, device=x_TH.device)
    for e, start, end in hits:
        token_N = token_P[start:end]
        gate_up_2IH, down_HI = expert_weights(experts, e)
        x_NH = x_TH.index_select(0, token_N)
        gate_up_N2I = gate_up_P2I[start:end] if keep else x_TH.new_empty(end - start, 2 * width)
        torch.mm(x_NH, gate_up_2IH.mT, out=gate_up_N2I)
        gate_up_N2I.addmm_(x_NH @ a1_ERH[e].mT, b1_ER2I[e], alpha=scales[0])
        act_NI = F.silu(gate_up_N2I[:, :width]).mul_(gate_up_N2I[:, width:]).mul_(weight_P1[start:end])
        rows_NH = torch.mm(act_NI, down_HI.mT, out=x_NH)
        rows_NH.addmm_(act_NI @ a2_ERI[e].mT, b2_ERH[e], alpha=scales[1])
        out_TH.index_add_(0, token_N, rows_NH.to(wide))
    return out_TH.to(x_TH.dtype), gate_up_P2I


def lora_backward(
    grad_TH: Tensor,
    x_TH: Tensor,
    expert_TK: Tensor,
    weight_TK: Tensor,
    gate_up_A: Tensor,
    gate_up_B: Tensor,
    down_A: Tensor,
    down_B: Tensor,
    gate_up_P2I: Tensor,
    scales: tuple[float, float],
    experts: nn.Module,
) -> tuple[Tensor, ...]:
    """Gradients of x, weight, and the four factors; those of experts that no token visited are zero."""
    E, width = experts.num_experts, experts.intermediate_dim
    wide = torch.promote_types(x_TH.dtype, torch.float32)
    pair_P, token_P, weight_P1, hits = sort_pairs(expert_TK, weight_TK, E)
    (a1_ERH, b1_ER2I), (a2_ERI, b2_ERH) = by_expert(gate_up_A, gate_up_B, E), by_expert(down_A, down_B, E)
    grads = [torch.zeros_like(factor) for factor in (gate_up_A, gate_up_B, down_A, down_B)]
    (grad_a1_ERH, grad_b1_ER2I), (grad_a2_ERI, grad_b2_ERH) = by_expert(*grads[:2], E), by_expert(*grads[2:], E)
    grad_x_TH = torch.zeros(x_TH.shape, dtype=wide, device=x_TH.device)
    grad_weight_P = torch.zeros(pair_P.numel(), dtype=wide, device=x_TH.device)
    for e, start, end in hits:
        token_N, weight_N1 = token_P[start:end], weight_P1[start:end]
        gate_up_2IH, down_HI = expert_weights(experts, e)
        gate_NI, up_NI = gate_up_P2I[start:end].split(width, dim=1)
        grad_NH = grad_TH.index_select(0, token_N)
        silu_NI = F.silu(gate_NI)
        act_NI = silu_NI * up_NI
        low_NR = (grad_NH @ b2_ERH[e].mT).mul_(scales[1])
        grad_act_NI = torch.addmm(grad_NH @ down_HI, low_NR, a2_ERI[e])
        # As without an adapter: <grad, rows of act> = <grad of act, act>, so no expert output is stored.
        torch.sum(grad_act_NI * act_NI, dim=1, dtype=wide, out=grad_weight_P[start:end])
        grad_act_NI.mul_(weight_N1)
        act_NI.mul_(weight_N1)
        grad_a2_ERI[e] = low_NR.mT @ act_NI
        grad_b2_ERH[e] = (act_NI @ a2_ERI[e].mT).mul_(scales[1]).mT @ grad_NH
        grad_N2I = torch.empty_like(gate_up_P2I[start:end])
        torch.ops.aten.silu_backward.grad_input(grad_act_NI * up_NI, gate_NI, grad_input=grad_N2I[:, :width])
        torch.mul(grad_act_NI, silu_NI, out=grad_N2I[:, width:])
        x_NH = x_TH.index_select(0, token_N)
        low_NR = (grad_N2I @ b1_ER2I[e].mT).mul_(scales[0])
        grad_a1_ERH[e] = low_NR.mT @ x_NH
        grad_b1_ER2I[e] = (x_NH @ a1_ERH[e].mT).mul_(scales[0]).mT @ grad_N2I
        rows_NH = torch.mm(grad_N2I, gate_up_2IH, out=grad_NH).addmm_(low_NR, a1_ERH[e])
        grad_x_TH.index_add_(0, token_N, rows_NH.to(wide))
    grad_weight_TK = torch.zeros_like(grad_weight_P).scatter_(0, pair_P, grad_weight_P).view(weight_TK.shape)
    return grad_x_TH.to(x_TH.dtype), grad_weight_TK.to(weight_TK.dtype), *grads
