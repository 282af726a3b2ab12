"""How is the loss of the head computed without its logits?  In chunks of tokens, gradients included.

For K1 a sequence of 4,096 tokens has 4,096 x 163,840 logits: 2.7 GB in fp32, which the plain loss holds several times over.
Here a chunk's logits live only until its gradients are taken, in the forward pass, so that no logit is computed twice. torch
2.13 has such a `linear_cross_entropy`; this one also runs on the older versions that are promised, and sums the head's gradient
in fp32. The tests and the benchmark compare the two.

Axes: T tokens, C tokens of a chunk, H hidden, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Of a chunk's logits in fp32: 409 tokens of K1's vocabulary. Every chunk reads the head's weight once; from 300 tokens on an H100
# takes longer to multiply by it (989 TFLOP/s in bf16) than to read it (3.35 TB/s).
CHUNK_BYTES = 256 * 2**20


def chunk_loss(logits_CV: Tensor, target_C: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy summed over a chunk and its gradient by the logits, both fp32; targets below 0 count nowhere.

    fp32 logits are overwritten by their gradient, which is None where nobody asks for it.
    """
    counted_C1 = (target_C >= 0)[:, None]
    target_C1 = target_C.clamp(min=0)[:, None]
    logits_CV = logits_CV.float()
    log_sum_C1 = logits_CV.logsumexp(dim=-1, keepdim=True)
    loss = ((log_sum_C1 - logits_CV.gather(1, target_C1)) * counted_C1).sum()
    if not with_gradient:
        return loss, None
    grad_CV = logits_CV.sub_(log_sum_C1).exp_()
    grad_CV.scatter_add_(1, target_C1, grad_CV.new_full(target_C1.shape, -1.0))
    return loss, grad_CV.masked_fill_(~counted_C1, 0.0)


class FusedLinearLoss(torch.autograd.Function):
    """Sum over tokens of the cross-entropy of `hidden @ weight.T`; keeps both gradients, never the logits."""

    @staticmethod
    def forward(ctx, hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, chunk_tokens: int) -> Tensor:
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        grad_TH = torch.empty_like(hidden_TH) if need_hidden else None
        grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if need_weight else None
        total = hidden_TH.new_zeros((), dtype=torch.float32)
        for start in range(0, len(hidden_TH), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            loss, grad_CV = chunk_loss(hidden_TH[chunk] @ weight_VH.T, target_T[chunk], need_hidden or need_weight)
            total += loss
            if grad_CV is None:
                continue
            grad_CV = grad_CV.to(weight_VH.dtype)
            if need_hidden:
                torch.mm(grad_CV, weight_VH, out=grad_TH[chunk])
            if need_weight:
                grad_VH += grad_CV.T @ hidden_TH[chunk]
        ctx.save_for_backward(grad_TH, None if grad_VH is None else grad_VH.to(weight_VH.dtype))
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        scaled = (None if g is None else g * grad for g in ctx.saved_tensors)
        return *scaled, None, None


def fused_linear_loss(
    hidden_TH: Tensor, weight_VH: Tensor, target_T: Tensor, chunk_tokens: int | None = None
) -> Tensor:
    """Sum of `cross_entropy(hidden_TH @ weight_VH.T, target_T)`, scalar fp32, at the memory of one chunk's logits.

    target_T int64, below 0 where a token counts nowhere. Under autocast the matmuls run in its dtype, as the head's own would.
    """
    if torch.is_autocast_enabled(hidden_TH.device.type):
        dtype = torch.get_autocast_dtype(hidden_TH.device.type)
        hidden_TH, weight_VH = hidden_TH.to(dtype), weight_VH.to(dtype)
    if not torch.is_grad_enabled():
        # needs_input_grad is true under no_grad as well.
        hidden_TH, weight_VH = hidden_TH.detach(), weight_VH.detach()
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_BYTES // (4 * len(weight_VH)))
    with torch.autocast(hidden_TH.device.type, enabled=False):
        return FusedLinearLoss.apply(hidden_TH, weight_VH, target_T, chunk_tokens)


def next_token_targets(labels_BQ: Tensor, ignore_index: int = -100) -> Tensor:
    """What position i predicts: label i + 1; the last position predicts nothing."""
    return F.pad(labels_BQ, (0, 1), value=ignore_index)[:, 1:]


def fused_causal_lm_loss(
    hidden_states: Tensor,
    weight_VH: Tensor,
    labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs,
) -> Tensor:
    """transformers' `ForCausalLMLoss`, argument by argument, from the head's input and weight instead of its logits."""
    targets = next_token_targets(labels, ignore_index) if shift_labels is None else shift_labels
    targets_T = targets.reshape(-1).to(hidden_states.device)
    counted_T = targets_T != ignore_index
    total = fused_linear_loss(hidden_states.flatten(0, -2), weight_VH, targets_T.where(counted_T, -1))
    # As there: the mean, unless gradients are accumulated over a batch whose size the caller knows.
    items = counted_T.sum() if num_items_in_batch is None else num_items_in_batch
    return total / (items.to(total.device) if isinstance(items, Tensor) else items)
