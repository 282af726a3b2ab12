"""How does one step move matrices by Muon and the rest by AdamW? Both are torch's own; here is who gets which parameter.

Muon orthogonalises the update of a matrix that maps hidden states to hidden states.  [Jordan et al. 2024; Liu et al. 2025]
It takes the 2-D weights of attention and MLPs as they are, and of stacked routed experts each expert's matrices one by one:
gate_up_proj [E, 2I, H] is 2 E matrices [I, H], down_proj [E, H, I] is E, as one map's update must not depend on its neighbour's.
Embedding, head, router and norms go to AdamW. Updates are scaled to AdamW's size, so that one learning rate serves both.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from modeling_axk1.modeling_axk1 import AxK1Experts, AxK1TopkRouter


def matrices_of(name: str, parameter: Tensor) -> list[Tensor]:
    """Views of the matrices that a stacked expert parameter holds, sharing its memory."""
    halves = 2 if name.endswith("gate_up_proj") else 1
    return [part for expert in parameter for part in expert.chunk(halves)]


def split_parameters(
    model: nn.Module,
) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """Trained parameters by name: plain matrices, stacked experts, all others."""
    stacked_ids = {id(p) for m in model.modules() if isinstance(m, AxK1Experts) for p in m.parameters()}
    other_modules = (nn.Embedding, AxK1TopkRouter)
    other_ids = {id(p) for m in model.modules() if isinstance(m, other_modules) for p in m.parameters()}
    matrices, stacked, others = {}, {}, {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in stacked_ids:
            stacked[name] = parameter
        elif parameter.ndim == 2 and id(parameter) not in other_ids and "lm_head" not in name:
            matrices[name] = parameter
        else:
            others[name] = parameter
    return matrices, stacked, others


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon and torch.optim.AdamW as one optimizer, for schedulers and trainers.

    ValueError for parameters that are sharded (FSDP2): a shard of a matrix has another orthogonalisation than the matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
    ):
        matrices, stacked, others = split_parameters(model)
        if any(isinstance(p, DTensor) for p in (*matrices.values(), *stacked.values())):
            raise ValueError("Muon needs whole matrices and these are sharded; use optimizer='adamw' with FSDP.")
        self.stacked = [(parameter, matrices_of(name, parameter.data)) for name, parameter in stacked.items()]
        views = [view for _, parts in self.stacked for view in parts]
        decayed = [p for p in others.values() if p.ndim >= 2]
        plain = [p for p in others.values() if p.ndim < 2]
        self.muon = torch.optim.Muon(
            [*matrices.values(), *views],
            lr=lr,
            weight_decay=weight_decay,
            momentum=momentum,
            adjust_lr_fn="match_rms_adamw",
        )
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)
        self.owners = [*matrices.values(), *stacked.values(), *others.values()]
        super().__init__(self.owners, {"lr": lr})
        # The two's own groups, so that a scheduler that sets their learning rate reaches both.
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    def _lend_gradients(self) -> Iterator[Tensor]:
        for parameter, parts in self.stacked:
            grads = [None] * len(parts)
            if parameter.grad is not None:
                halves = len(parts) // len(parameter)
                grads = [part for expert in parameter.grad for part in expert.chunk(halves)]
            for view, grad in zip(parts, grads):
                view.grad = grad
                yield view

    @torch.no_grad()
    def step(self, closure=None):
        lent = list(self._lend_gradients())
        self.muon.step()
        self.adamw.step()
        for view in lent:
            view.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self.owners:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
