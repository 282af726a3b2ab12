"""How do routed experts run fast?  The "axk1" implementation for transformers' experts seam, by the tensors' device.

On an NVIDIA GPU the kernels of moe_kernels.py, which run on CPU tensors too where Triton's interpreter is switched on.
Otherwise, on CPU, a loop over the hit experts with a backward of its own: token rows are gathered a few experts at a time, so
they stay in cache, and every matmul writes straight into its place in the result. For backward both keep the layer input and
the gate/up output only, in the same order. Autograd through the obvious loop would instead build one full-size zero gradient
of the stacked weights for each expert.

Axes: T tokens, K experts a token, P = T * K token-expert pairs sorted by expert, E experts, H hidden, I expert width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from .moe_kernels import (
    INTERPRETED,
    OLDEST_CAPABILITY,
    CompileError,
    kernels_backward,
    kernels_forward,
    kernels_route,
    kernels_route_backward,
    triton,
)

logger = logging.get_logger(__name__)

# An expert and the range of its rows among the sorted pairs.
Rows = tuple[int, int, int]
# Experts are taken in runs of about so many rows: enough that few tokens cost few operators, few enough that a run's rows
# stay in the second-level cache (512 rows of 512 fp32 numbers are a megabyte). 128 to 1024 differ by less than 5%.
CHUNK_ROWS = 512


def axk1_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Routed experts of `self`, any module of transformers' fused layout (gate_up_proj [E, 2I, H], down_proj [E, H, I]) or a
    PackedExperts of quantised ones.

    hidden_states [T, H]; top_k_index [T, K] int64, ids of E or more (experts of another rank) add nothing; top_k_weights [T, K].
    Returns [T, H] in the dtype of hidden_states. ValueError for experts with biases, other layouts or other activations.
    """
    from .quantization_axk1 import is_packed, packed_experts_forward  # which imports this module

    if is_packed(self):
        return packed_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    check_layout(self)
    missing = missing_for_kernels(hidden_states.device)
    if missing and hidden_states.device.type != "cpu":
        logger.warning_once(f"experts_implementation='axk1' runs transformers' 'grouped_mm' here, because {missing}.")
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](self, hidden_states, top_k_index, top_k_weights)
    x_TH = hidden_states.to(self.gate_up_proj.dtype)
    run = experts_op if torch.compiler.is_compiling() else run_experts
    return run(x_TH, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj).to(hidden_states.dtype)


def missing_for_kernels(device: torch.device) -> str:
    """What keeps the kernels of moe_kernels.py from running on a device, with the remedy; empty if nothing does."""
    if device.type == "cpu":
        return "" if INTERPRETED else "Triton's interpreter is off; set TRITON_INTERPRET=1"
    if device.type != "cuda" or torch.version.hip:
        return f"its kernels are for NVIDIA GPUs and this is {'an AMD one' if torch.version.hip else device.type}"
    if triton is None:
        return "Triton 3.6 or newer is not installed; pip install 'triton>=3.6'"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return (
            f"this GPU has compute capability {'.'.join(map(str, capability))} and the kernels need "
            f"{'.'.join(map(str, OLDEST_CAPABILITY))}; take an A100 or newer"
        )
    return ""


def check_layout(experts: nn.Module) -> None:
    difference = unlike_swiglu(experts)
    if difference:
        raise ValueError(
            "experts_implementation='axk1' runs unbiased [gate; up] experts stored as [E, 2I, H] and computes SwiGLU but "
            f"{type(experts).__name__} {difference}; use 'grouped_mm' or 'eager'."
        )


def unlike_swiglu(experts: nn.Module) -> str:
    """What sets a module apart from unbiased SwiGLU experts stored as [E, 2I, H] and [E, H, I]; empty if nothing does."""
    # Modules that are not at transformers' experts seam say nothing of their layout; older ones know no norm after an expert.
    if getattr(experts, "is_transposed", True) or not experts.is_concatenated:
        return "stores them otherwise than as [gate; up] rows"
    if experts.has_bias or not experts.has_gate or getattr(experts, "has_post_expert_norm", False):
        return "has biases, no gate, or a norm of its own"
    activation = type(experts.act_fn).__name__
    # Some models clamp or scale in a gate of their own.
    if type(experts)._apply_gate.__module__ != ALL_EXPERTS_FUNCTIONS.__module__:
        return f"has {activation} in a gate of its own"
    if not isinstance(experts.act_fn, nn.SiLU) and activation != "SiLUActivation":
        return f"has the activation {activation}"
    return ""


def run_experts(x_TH: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor) -> Tensor:
    """Outside torch.compile: no operator overhead, and nothing is kept where nothing needs a gradient."""
    floats = (x_TH, weight_TK, gate_up_E2IH, down_EHI)
    if torch.is_grad_enabled() and any(t.requires_grad for t in floats):
        return Experts.apply(x_TH, expert_TK, weight_TK, gate_up_E2IH, down_EHI)
    return forward_here(x_TH, expert_TK, weight_TK, gate_up_E2IH, down_EHI, keep=False)[0]


class Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TH, expert_TK, weight_TK, gate_up_E2IH, down_EHI):
        out_TH, gate_up_P2I = forward_here(x_TH, expert_TK, weight_TK, gate_up_E2IH, down_EHI, keep=True)
        ctx.save_for_backward(x_TH, expert_TK, weight_TK, gate_up_E2IH, down_EHI, gate_up_P2I)
        return out_TH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TH):
        need_x, _, need_weight, need_gate_up, need_down = ctx.needs_input_grad
        grads = backward_here(grad_TH, *ctx.saved_tensors, need_gate_up=need_gate_up, need_down=need_down)
        wanted = (need_x, False, need_weight, need_gate_up, need_down)
        grads = (grads[0], None, *grads[1:])
        return tuple(grad if want else None for grad, want in zip(grads, wanted))


# Devices on which a kernel has failed to compile: it is tried, and warned of, once.
uncompiled: set[torch.device] = set()


def here(kernels: Callable, otherwise: Callable, tensor: Tensor, *arguments):
    """The kernels where they run, else torch: one signature, one result, whichever of them did the other direction."""
    if tensor.device not in uncompiled and not missing_for_kernels(tensor.device):
        try:
            return kernels(tensor, *arguments)
        except CompileError as error:
            uncompiled.add(tensor.device)
            logger.warning(
                f"experts_implementation='axk1' runs in torch's operators on {tensor.device}, slower and not in CUDA graphs, "
                f"because a kernel did not compile ({error}); mend that or use 'grouped_mm'."
            )
    return otherwise(tensor, *arguments)


def forward_here(
    x_TH: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    return here(kernels_forward, loop_forward, x_TH, expert_TK, weight_TK, gate_up_E2IH, down_EHI, keep)


def backward_here(
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
    inputs = (x_TH, expert_TK, weight_TK, gate_up_E2IH, down_EHI, gate_up_P2I)
    return here(kernels_backward, loop_backward, grad_TH, *inputs, need_gate_up, need_down)


def sort_pairs(
    expert_TK: Tensor, weight_TK: Tensor, experts: int
) -> tuple[Tensor, Tensor, Tensor, list[Rows]]:
    """Sort token-expert pairs by expert, stably.

    Returns pair_P (index into the flattened [T, K]), token_P, routing weights weight_P1 in fp32 or wider, and the hit experts
    as (expert, start, end) of their rows.
    """
    expert_P = expert_TK.reshape(-1)
    pair_P = expert_P.argsort(stable=True)
    ends = expert_P.bincount(minlength=experts)[:experts].cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    hits = [(e, s, t) for e, (s, t) in enumerate(zip(starts, ends)) if t > s]
    weight_P1 = weight_TK.reshape(-1, 1)[pair_P].to(torch.promote_types(weight_TK.dtype, torch.float32))
    return pair_P, pair_P // expert_TK.shape[1], weight_P1, hits


def chunks(hits: list[Rows]) -> list[list[Rows]]:
    """Split the hit experts into runs of at most CHUNK_ROWS rows (an expert with more is a run of its own)."""
    runs: list[list[Rows]] = []
    for hit in hits:
        if runs and hit[2] - runs[-1][0][1] <= CHUNK_ROWS:
            runs[-1].append(hit)
        else:
            runs.append([hit])
    return runs


def grouped_mm(x_ND: Tensor, weight_EDF: Tensor, run: list[Rows], out_NF: Tensor) -> Tensor:
    """The rows of each expert of a run times that expert's matrix."""
    sizes = [end - start for _, start, end in run]
    for (expert, _, _), x, out in zip(run, x_ND.split(sizes), out_NF.split(sizes)):
        torch.mm(x, weight_EDF[expert], out=out)
    return out_NF


def grouped_outer(a_NF: Tensor, b_ND: Tensor, run: list[Rows], out_EFD: Tensor) -> None:
    """Each expert's weight gradient, the sum over its rows of a b^T, written into its place."""
    sizes = [end - start for _, start, end in run]
    for (expert, _, _), a, b in zip(run, a_NF.split(sizes), b_ND.split(sizes)):
        torch.mm(a.t(), b, out=out_EFD[expert])


def loop_forward(
    x_TH: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor, keep: bool
) -> tuple[Tensor, Tensor]:
    """Returns the output [T, H] in x's dtype, summed in fp32, and the gate/up output [P, 2I] (no rows unless `keep`)."""
    (tokens, hidden), width = x_TH.shape, down_EHI.shape[2]
    pair_P, token_P, weight_P1, hits = sort_pairs(expert_TK, weight_TK, gate_up_E2IH.shape[0])
    gate_up_P2I = x_TH.new_empty(pair_P.numel() if keep else 0, 2 * width)
    out_TH = torch.zeros(tokens, hidden, dtype=torch.promote_types(x_TH.dtype, torch.float32), device=x_TH.device)
    for run in chunks(hits):
        start, end = run[0][1], run[-1][2]
        x_NH = x_TH.index_select(0, token_P[start:end])
        gate_up_N2I = gate_up_P2I[start:end] if keep else x_TH.new_empty(end - start, 2 * width)
        grouped_mm(x_NH, gate_up_E2IH.mT, run, gate_up_N2I)
        # Weighting here instead of after the down projection touches I numbers a row instead of H.
        act_NI = F.silu(gate_up_N2I[:, :width], inplace=not keep).mul_(gate_up_N2I[:, width:]).mul_(weight_P1[start:end])
        rows_NH = grouped_mm(act_NI, down_EHI.mT, run, x_NH)
        out_TH.index_add_(0, token_P[start:end], rows_NH.to(out_TH.dtype))
    return out_TH.to(x_TH.dtype), gate_up_P2I


def loop_backward(
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
    width = down_EHI.shape[2]
    pair_P, token_P, weight_P1, hits = sort_pairs(expert_TK, weight_TK, gate_up_E2IH.shape[0])
    grad_x_TH = torch.zeros(x_TH.shape, dtype=torch.promote_types(x_TH.dtype, torch.float32), device=x_TH.device)
    grad_weight_P = torch.zeros(pair_P.numel(), dtype=weight_P1.dtype, device=x_TH.device)
    grad_gate_up = empty_with_zero_rows(gate_up_E2IH, hits) if need_gate_up else x_TH.new_empty(0)
    grad_down = empty_with_zero_rows(down_EHI, hits) if need_down else x_TH.new_empty(0)
    for run in chunks(hits):
        start, end = run[0][1], run[-1][2]
        token_N, weight_N1 = token_P[start:end], weight_P1[start:end]
        gate_NI, up_NI = gate_up_P2I[start:end].split(width, dim=1)
        grad_NH = grad_TH.index_select(0, token_N)
        silu_NI = F.silu(gate_NI)
        act_NI = silu_NI * up_NI
        # <grad, down @ act> = <grad @ down, act>: the routing weight's gradient needs no stored expert output.
        grad_act_NI = grouped_mm(grad_NH, down_EHI, run, torch.empty_like(act_NI))
        torch.sum(grad_act_NI * act_NI, dim=1, dtype=grad_weight_P.dtype, out=grad_weight_P[start:end])
        if need_down:
            grouped_outer(grad_NH, act_NI.mul_(weight_N1), run, grad_down)
        grad_act_NI.mul_(weight_N1)
        grad_N2I = torch.empty_like(gate_up_P2I[start:end])
        torch.ops.aten.silu_backward.grad_input(grad_act_NI * up_NI, gate_NI, grad_input=grad_N2I[:, :width])
        torch.mul(grad_act_NI, silu_NI, out=grad_N2I[:, width:])
        if need_gate_up:
            grouped_outer(grad_N2I, x_TH.index_select(0, token_N), run, grad_gate_up)
        rows_NH = grouped_mm(grad_N2I, gate_up_E2IH, run, grad_NH)
        grad_x_TH.index_add_(0, token_N, rows_NH.to(grad_x_TH.dtype))
    grad_weight_TK = torch.zeros_like(grad_weight_P).scatter_(0, pair_P, grad_weight_P).view(weight_TK.shape)
    return grad_x_TH.to(x_TH.dtype), grad_weight_TK.to(weight_TK.dtype), grad_gate_up, grad_down


def empty_with_zero_rows(weight: Tensor, hits: list[Rows]) -> Tensor:
    """Like `weight`, zero only where no matmul will write."""
    grad = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for expert in set(range(weight.shape[0])) - {e for e, _, _ in hits}:
        grad[expert].zero_()
    return grad


# Under torch.compile(fullgraph=True) the same two functions are opaque operators: the loops depend on the routing, and Triton
# is launched as it is outside.
forward_op = torch.library.custom_op("axk1::experts", forward_here, mutates_args=())
backward_op = torch.library.custom_op("axk1::experts_backward", backward_here, mutates_args=())


@forward_op.register_fake
def _(x_TH, expert_TK, weight_TK, gate_up_E2IH, down_EHI, keep):
    rows = expert_TK.numel() if keep else 0
    return x_TH.new_empty(x_TH.shape), x_TH.new_empty(rows, gate_up_E2IH.shape[1])


@backward_op.register_fake
def _(grad_TH, x_TH, expert_TK, weight_TK, gate_up_E2IH, down_EHI, gate_up_P2I, need_gate_up, need_down):
    grad_gate_up = gate_up_E2IH.new_empty(gate_up_E2IH.shape if need_gate_up else 0)
    grad_down = down_EHI.new_empty(down_EHI.shape if need_down else 0)
    return x_TH.new_empty(x_TH.shape), weight_TK.new_empty(weight_TK.shape), grad_gate_up, grad_down


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], output[1])


def _backward(ctx, grad_TH, _):
    need_x, _, need_weight, need_gate_up, need_down = ctx.needs_input_grad[:5]
    grad_x, grad_weight, grad_gate_up, grad_down = backward_op(
        grad_TH.contiguous(), *ctx.saved_tensors, need_gate_up, need_down
    )
    return grad_x, None, grad_weight, grad_gate_up if need_gate_up else None, grad_down if need_down else None, None


forward_op.register_autograd(_backward, setup_context=_save_for_backward)


def experts_op(x_TH: Tensor, expert_TK: Tensor, weight_TK: Tensor, gate_up_E2IH: Tensor, down_EHI: Tensor) -> Tensor:
    keep = torch.is_grad_enabled()
    return forward_op(x_TH, expert_TK, weight_TK, gate_up_E2IH, down_EHI, keep)[0]


def torch_route(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    method: str,
    groups: int,
    top_groups: int,
    top_k: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from .modeling_axk1 import choose_experts, weigh_experts  # which imports this module

    score_TE = logits_TE.sigmoid()
    choice = dict(method=method, groups=groups, top_groups=top_groups, top_k=top_k)
    expert_TK = choose_experts(score_TE.detach(), bias_E, **choice)
    return weigh_experts(score_TE, expert_TK, normalise, scale), expert_TK


def torch_route_backward(
    grad_TK: Tensor, logits_TE: Tensor, expert_TK: Tensor, normalise: bool, scale: float
) -> Tensor:
    score_TK = logits_TE.gather(1, expert_TK).sigmoid()
    grad_TK = grad_TK * scale
    if normalise:
        total_T1 = score_TK.sum(dim=-1, keepdim=True) + 1e-20
        grad_TK = (grad_TK - (grad_TK * score_TK).sum(dim=-1, keepdim=True) / total_T1) / total_T1
    return torch.zeros_like(logits_TE).scatter_(1, expert_TK, grad_TK * score_TK * (1 - score_TK))


def route_here(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    method: str,
    groups: int,
    top_groups: int,
    top_k: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    return here(kernels_route, torch_route, logits_TE, bias_E, method, groups, top_groups, top_k, normalise, scale)


def route_backward_here(grad_TK: Tensor, logits_TE: Tensor, expert_TK: Tensor, normalise: bool, scale: float) -> Tensor:
    return here(kernels_route_backward, torch_route_backward, grad_TK, logits_TE, expert_TK, normalise, scale)


# Routing weights and expert ids from logits, AxK1TopkRouter's, by one kernel. An operator outside torch.compile too:
# gradient checkpointing keeps its results (`keep_routing`).
route_op = torch.library.custom_op("axk1::route", route_here, mutates_args=())
route_backward_op = torch.library.custom_op("axk1::route_backward", route_backward_here, mutates_args=())


@route_op.register_fake
def _(logits_TE, bias_E, method, groups, top_groups, top_k, normalise, scale):
    shape = (logits_TE.shape[0], top_k)
    return logits_TE.new_empty(shape), logits_TE.new_empty(shape, dtype=torch.int64)


@route_backward_op.register_fake
def _(grad_TK, logits_TE, expert_TK, normalise, scale):
    return logits_TE.new_empty(logits_TE.shape)


def _save_routing(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1])
    ctx.normalise, ctx.scale = inputs[-2:]
    ctx.mark_non_differentiable(output[1])


def _route_backward(ctx, grad_TK, _):
    return route_backward_op(grad_TK, *ctx.saved_tensors, ctx.normalise, ctx.scale), *[None] * 7


route_op.register_autograd(_route_backward, setup_context=_save_routing)


def route(logits_TE: Tensor, *options) -> tuple[Tensor, Tensor]:
    """`route_op`, without what an operator costs (a tenth of a millisecond) where nothing needs it to be one."""
    run = route_op if torch.is_grad_enabled() or torch.compiler.is_compiling() else route_here
    return run(logits_TE, *options)
