"""How do routed experts live in 4 or 8 bits?  One bitsandbytes layer a matrix, dequantised when a token visits its expert.

Transformers' bitsandbytes quantizer replaces `nn.Linear` and passes over fused experts, which are most of a mixture: of K1 it
reaches 1.8%. Here a layer's fused experts become one module of plain linear layers, named as on disk
(`experts.E.{gate,up,down}_proj`), which that same quantizer then quantises, loads, saves and dequantises as any other.

Axes: T tokens, K experts a token, E experts, H hidden, I expert width.
"""

import torch
from torch import Tensor, nn


class PackedExpert(nn.Module):
    """The three matrices of one expert: gate_proj and up_proj [I, H], down_proj [H, I]."""

    def __init__(self, hidden: int, width: int, **kind):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False, **kind)
        self.up_proj = nn.Linear(hidden, width, bias=False, **kind)
        self.down_proj = nn.Linear(width, hidden, bias=False, **kind)


class PackedExperts(nn.Module):
    """The routed experts of one layer, each a `PackedExpert` under its number, as on disk; quantised or not."""

    def __init__(self, fused: nn.Module):
        """From transformers' fused layout, gate_up_proj [E, 2I, H] and down_proj [E, H, I]: its shapes, not its values."""
        super().__init__()
        self.config, self.act_fn = fused.config, fused.act_fn
        self.num_experts, self.hidden_dim, self.intermediate_dim = fused.down_proj.shape
        kind = {"device": fused.down_proj.device, "dtype": fused.down_proj.dtype}
        for expert in range(self.num_experts):
            self.add_module(str(expert), PackedExpert(self.hidden_dim, self.intermediate_dim, **kind))

    def __getitem__(self, expert: int) -> PackedExpert:
        return self._modules[str(expert)]


def is_packed(experts: nn.Module) -> bool:
    """Whether a layer's experts are stored one by one (and so may be quantised), not fused in two tensors."""
    return isinstance(experts, PackedExperts)


def expert_weights(experts: nn.Module, expert: int) -> tuple[Tensor, Tensor]:
    """(gate_up [2I, H], down [H, I]) of one expert in the dtype that it computes in, detached from nothing but packed bytes.

    Fused experts give views, through which gradients reach the stacked parameters; packed ones fresh dequantised copies,
    which should be dropped after their matmuls.
    """
    if not is_packed(experts):
        return experts.gate_up_proj[expert], experts.down_proj[expert]
    one = experts[expert]
    return torch.cat([dequantised(one.gate_proj), dequantised(one.up_proj)]), dequantised(one.down_proj)


def dequantised(linear: nn.Module) -> Tensor:
    """The weight [out, in] of a linear layer of torch's or bitsandbytes', in the dtype that the layer computes in."""
    if type(linear) is nn.Linear:
        return linear.weight
    # Imports bitsandbytes.
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    # The state is that of 8-bit layers.
    weight = dequantize_bnb_weight(linear.weight, getattr(linear, "state", None))
    return weight.to(linear.compute_dtype) if getattr(linear, "compute_dtype", None) else weight
