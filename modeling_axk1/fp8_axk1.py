"""How do routed experts train in FP8?  "axk1_fp8": E4M3 forward, E5M2 gradients, fp32 master weights.  [paper, pre-training]

One scale for each expert's rows and one for each expert's matrix (per tensor), because a scalar leaves the matmul whichever
axis is summed over: one E4M3 copy of the rows serves forward and weight gradient, is all that is kept for backward, and E5M2
gradients can meet it. torch's grouped FP8 matmul takes scales by row, and E4M3 only. Scales by row would keep more of a row
that is small beside its expert's others.

A GPU from compute capability 8.9 on multiplies FP8 itself, an expert at a time; elsewhere the same FP8 numbers are multiplied
in fp32: the numerics of FP8, not its speed.

Axes: T tokens, K experts a token, P token-expert pairs sorted by expert, N rows of one expert, E experts, H hidden, I expert
width, D in, F out features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .moe_dispatch import Rows, check_layout, sort_pairs

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
# What the tensor cores want of the two axes of an FP8 matrix on the right.
ALIGNMENT = 16


def quantise(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x as `dtype` times one fp32 scalar: the largest magnitude becomes the largest number of `dtype`."""
    largest = x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    limit = torch.finfo(dtype).max
    scale = torch.where(largest > 0, largest / limit, 1.0)
    return (x.float() / scale).clamp(-limit, limit).to(dtype), scale


def multiplies_fp8(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 9)


def scaled_matmul(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """a b^T for quantised a [N, D] and b [F, D], summed in fp32, as `dtype` [N, F]."""
    (left_ND, left_scale), (right_FD, right_scale) = a, b
    if multiplies_fp8(left_ND.device):
        room = -left_ND.shape[1] % ALIGNMENT
        left_ND, right_FD = (padded(q, room).contiguous() for q in (left_ND, right_FD))
        return torch._scaled_mm(left_ND, right_FD.t(), scale_a=left_scale, scale_b=right_scale, out_dtype=dtype)
    with torch.autocast(left_ND.device.type, enabled=False):
        return ((left_ND.float() @ right_FD.float().T) * (left_scale * right_scale)).to(dtype)


def padded(q: Tensor, room: int) -> Tensor:
    """Zeros behind the last axis; F.pad knows no FP8."""
    return torch.cat([q, q.new_zeros(len(q), room)], dim=1) if room else q


class GroupedLinear(torch.autograd.Function):
    """Each expert's rows of x [P, D] times its matrix of weight [E, F, D], in FP8; keeps x in FP8."""

    @staticmethod
    def forward(ctx, x_PD: Tensor, weight_EFD: Tensor, hits: list[Rows]) -> Tensor:
        out_PF = x_PD.new_empty(len(x_PD), weight_EFD.shape[1])
        kept_PD, scales = torch.empty_like(x_PD, dtype=FORWARD), []
        for expert, start, end in hits:
            kept_PD[start:end], scale = quantise(x_PD[start:end], FORWARD)
            scales.append(scale)
            weight = quantise(weight_EFD[expert], FORWARD)
            out_PF[start:end] = scaled_matmul((kept_PD[start:end], scale), weight, x_PD.dtype)
        ctx.save_for_backward(kept_PD, weight_EFD, *scales)
        ctx.hits = hits
        return out_PF

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_PF: Tensor):
        kept_PD, weight_EFD, *scales = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        grad_x = torch.empty_like(kept_PD, dtype=grad_PF.dtype) if need_x else None
        grad_weight = torch.zeros_like(weight_EFD) if need_weight else None
        for (expert, start, end), scale in zip(ctx.hits, scales):
            gradient, gradient_scale = quantise(grad_PF[start:end], BACKWARD)
            if need_x:
                weight, weight_scale = quantise(weight_EFD[expert], FORWARD)
                grad_x[start:end] = scaled_matmul((gradient, gradient_scale), (weight.t(), weight_scale), grad_PF.dtype)
            if need_weight:
                rows = (kept_PD[start:end].t(), scale)
                grad_weight[expert] = scaled_matmul((gradient.t(), gradient_scale), rows, weight_EFD.dtype)
        return grad_x, grad_weight, None


def fp8_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As `axk1_experts_forward`, in FP8: hidden_states [T, H]; top_k_index, top_k_weights [T, K]; returns [T, H] in x's dtype."""
    check_layout(self)
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    pair_P, token_P, weight_P1, hits = sort_pairs(top_k_index, top_k_weights, self.num_experts)
    # Behind the last hit stand the pairs of other ranks' experts.
    here = slice(hits[-1][2] if hits else 0)
    gate_PI, up_PI = GroupedLinear.apply(hidden_states[token_P[here]].to(dtype), self.gate_up_proj, hits).chunk(
        2, dim=-1
    )
    # Weighted before the down projection, as in moe_dispatch.py: I numbers a row instead of H, and none kept of the output.
    act_PI = F.silu(gate_PI) * up_PI * weight_P1[here].to(dtype)
    rows_PH = GroupedLinear.apply(act_PI, self.down_proj, hits)
    # Put back and summed, where index_add would keep the rows for its backward.
    rows_PH = F.pad(rows_PH, (0, 0, 0, len(pair_P) - len(rows_PH)))[pair_P.argsort()]
    out_TH = rows_PH.view(*top_k_index.shape, rows_PH.shape[1]).sum(dim=1, dtype=torch.float32)
    return out_TH.to(hidden_states.dtype)
