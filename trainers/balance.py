"""How does a router stay balanced without an auxiliary loss? After every step each expert's bias moves against its load.

The bias steers which experts are chosen, never their weight, so no gradient is bent.  [Wang et al. 2024, arXiv 2408.15664;
DeepSeek-V3, section 2.1.2; A.X K1 report, routing]. The sequence-wise loss beside it is the model's own, `router_aux_loss_coef`.

Axes: L sparse layers, E routed experts.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from modeling_axk1.modeling_axk1 import AxK1TopkRouter


def bias_step(load_E: Tensor, rate: float) -> Tensor:
    """What a step adds to the bias: +rate for an expert below the mean load, -rate above, 0 at it; fp32."""
    load_E = load_E.to(torch.float32)
    return rate * torch.sign(load_E.mean() - load_E)


def max_violation(load_LE: Tensor) -> Tensor:
    """MaxVio of each layer: how far the busiest expert lies above the mean load, in units of the mean; 0 is balanced.  [Wang
    et al. 2024, eq. 4]. 0 where no token was routed."""
    load_LE = load_LE.to(torch.float64)
    mean_L = load_LE.mean(dim=-1)
    return torch.where(mean_L > 0, load_LE.amax(dim=-1) / mean_L.clamp(min=1e-30) - 1, torch.zeros_like(mean_L))


def dead_experts(load_LE: Tensor) -> Tensor:
    """How many experts of each layer were never chosen."""
    return (load_LE == 0).sum(dim=-1)


def routers_of(model: nn.Module) -> dict[str, AxK1TopkRouter]:
    """Every router by its layer's number, in order."""
    return {
        name.split("layers.")[1].split(".")[0]: module
        for name, module in model.named_modules()
        if isinstance(module, AxK1TopkRouter)
    }


class BalanceCallback(TrainerCallback):
    """Counts each expert's tokens, and after every optimizer step moves the biases; for any Trainer of an A.X K1 model.

    rate_now() is the step's size at this moment; 0 leaves the biases alone and still counts. Loads are summed over micro-
    batches and over ranks, so that every rank moves its biases alike; padding counts as tokens, for the routers see no mask.
    `window` is the load since the last `metrics()`, `total` since the last `start_stage()`, both [L, E] int64.

    ValueError for a positive rate and a router without a bias (`topk_method` other than noaux_tc).
    """

    def __init__(self, model: nn.Module, rate_now: Callable[[], float]):
        self.routers = routers_of(model)
        self.rate_now = rate_now
        if not self.routers:
            raise ValueError("The model has no router to balance; it has no sparse layer.")
        if rate_now() > 0 and any(router.e_score_correction_bias is None for router in self.routers.values()):
            raise ValueError("The routers have no bias to balance by; use topk_method='noaux_tc', or a bias rate of 0.")
        self.step_load = torch.zeros(
            len(self.routers), next(iter(self.routers.values())).expert_load.numel(), dtype=torch.int64
        )
        self.window, self.total = self.step_load.clone(), self.step_load.clone()

    def count(self) -> None:
        """Add the micro-batch that has just run. The routers overwrite their load at each pass."""
        self.step_load += torch.stack([router.expert_load.cpu() for router in self.routers.values()])

    def on_step_begin(self, args, state, control, **kwargs):
        self.step_load.zero_()

    def on_substep_end(self, args, state, control, **kwargs):
        self.count()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.count()

    def on_optimizer_step(self, args, state, control, **kwargs):
        load_LE = self.summed_over_ranks()
        rate = self.rate_now()
        if rate:
            for router, load_E in zip(self.routers.values(), load_LE):
                router.e_score_correction_bias += bias_step(load_E, rate).to(router.e_score_correction_bias.device)
        self.window += load_LE
        self.total += load_LE

    def summed_over_ranks(self) -> Tensor:
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self.step_load.clone()
        # NCCL sums on the GPU only.
        load_LE = self.step_load.to(next(iter(self.routers.values())).expert_load.device)
        dist.all_reduce(load_LE)
        return load_LE.cpu()

    def metrics(self) -> dict[str, float]:
        """Since the last call: `max_violation` and `dead_experts` of each layer, the worst and the sum."""
        violation_L, dead_L = max_violation(self.window), dead_experts(self.window)
        measured = {"max_violation": violation_L.max().item(), "dead_experts": int(dead_L.sum())}
        for name, violation, dead in zip(self.routers, violation_L.tolist(), dead_L.tolist()):
            measured |= {f"max_violation/layer_{name}": violation, f"dead_experts/layer_{name}": dead}
        self.window.zero_()
        return measured

    def start_stage(self) -> list[list[float]]:
        """Begin a stage; returns each layer's share of tokens an expert in the one before, E x share, so that 1 is balanced."""
        shares_LE = relative_load(self.total)
        self.total.zero_()
        return shares_LE

    def state(self) -> dict[str, Sequence]:
        """What a checkpoint has to keep; the biases are the model's."""
        return {"window": self.window.tolist(), "total": self.total.tolist()}

    def load_state(self, state: dict[str, Sequence]) -> None:
        self.window, self.total = (torch.tensor(state[name], dtype=torch.int64) for name in ("window", "total"))


def relative_load(load_LE: Tensor) -> list[list[float]]:
    """Loads over their layer's mean: 1 is balanced, 0 a dead expert."""
    mean_L1 = load_LE.to(torch.float64).mean(dim=-1, keepdim=True).clamp(min=1e-30)
    return (load_LE / mean_L1).tolist()
