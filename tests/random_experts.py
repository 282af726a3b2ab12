"""Inputs of one MoE layer to compare on, and how: outputs and every gradient."""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor

# Which of the inputs are differentiable: x, weights, gate_up, down. Expert ids are not.
FLOATS = (0, 2, 3, 4)


def problem(
    tokens: int,
    experts: int,
    top_k: int,
    routing: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    hidden: int = 24,
    width: int = 20,
) -> list[Tensor]:
    """x, expert ids, weights, gate_up, down. Routing "random"; "one", all on expert 1; "foreign", a third on other ranks;
    "absent", all on other ranks; "same", each token's choices all one expert.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    ids = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1).indices
    if routing == "one":
        ids = torch.full_like(ids[:, :1], 1)
    if routing == "same":
        ids = ids[:, :1].expand(-1, top_k).clone()
    if routing == "foreign":
        ids = ids.masked_fill(torch.arange(ids.numel()).view_as(ids) % 3 == 0, experts)
    if routing == "absent":
        ids = ids + experts
    weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
    weights = weights.to(torch.promote_types(dtype, torch.float32))
    return [normal(tokens, hidden), ids, weights, normal(experts, 2 * width, hidden), normal(experts, hidden, width)]


def outputs_and_gradients(function: Callable, inputs: list[Tensor], needed: tuple[int, ...] = FLOATS) -> list[Tensor]:
    inputs = [t.detach().clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
    output = function(*inputs)
    # Numbers that every dtype holds, so that each of them starts from the same gradient.
    gradient = torch.arange(output.numel(), dtype=torch.float64, device=output.device).sin().to(torch.bfloat16)
    output.backward(gradient.to(output.dtype).view_as(output))
    return [output.detach(), *(inputs[i].grad for i in needed)]


def relative_error(value: Tensor, truth: Tensor) -> float:
    value, truth = value.double().cpu(), truth.double().cpu()
    return ((value - truth).abs().max() / truth.abs().max().clamp(min=1e-30)).item()


@contextmanager
def poisoned_memory():
    """Fresh memory holds NaN (integers: their largest value) inside, so that an entry nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all(), "this torch does not fill fresh memory; the test would prove nothing"
        yield
    finally:
        torch.use_deterministic_algorithms(False)
