"""How do routed experts live in 4 or 8 bits?  One bitsandbytes layer a matrix, dequantised only when a token visits its expert.

Transformers' bitsandbytes quantizer replaces `nn.Linear` and passes over fused experts, which are most of a mixture: of K1 it
reaches 1.8%. Here the fused experts of a model under construction become plain linear layers, named as on disk
(`experts.E.{gate,up,down}_proj`), and that same quantizer then quantises, loads, saves and dequantises them as any other. A
matrix goes from its shard to 4 bits by itself, so loading holds the result and one matrix in full precision.

Axes: T tokens, K experts a token, E experts, H hidden, I expert width.
"""

import dataclasses
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from .moe_dispatch import loop_backward, loop_forward, unlike_swiglu

logger = logging.get_logger(__name__)

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class PackedExpert(nn.Module):
    """The three matrices of one expert: gate_proj and up_proj [I, H], down_proj [H, I]."""

    def __init__(self, hidden: int, width: int, **kind):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False, **kind)
        self.up_proj = nn.Linear(hidden, width, bias=False, **kind)
        self.down_proj = nn.Linear(width, hidden, bias=False, **kind)


class PackedExperts(nn.Module):
    """The routed experts of one layer, each a `PackedExpert` under its number, as on disk. Frozen; whatever
    `experts_implementation` says, there is one way to run them.
    """

    def __init__(self, fused: nn.Module):
        """From transformers' fused layout, gate_up_proj [E, 2I, H] and down_proj [E, H, I]: its shapes, not its values."""
        super().__init__()
        self.config, self.act_fn = fused.config, fused.act_fn
        self.num_experts, self.hidden_dim, self.intermediate_dim = fused.down_proj.shape
        self.dtype = fused.down_proj.dtype
        # In a tuple it is no submodule: its parameters stay on meta and are nobody's until `fuse_experts`.
        self.fused = (fused,)
        kind = {"device": fused.down_proj.device, "dtype": self.dtype}
        for expert in range(self.num_experts):
            self.add_module(str(expert), PackedExpert(self.hidden_dim, self.intermediate_dim, **kind))

    def __getitem__(self, expert: int) -> PackedExpert:
        return self._modules[str(expert)]

    @property
    def compute_dtype(self) -> torch.dtype:
        """`bnb_4bit_compute_dtype` in 4 bits; in 8, and where that is None, the dtype that the model was loaded in."""
        return getattr(self[0].gate_proj, "compute_dtype", None) or self.dtype

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return packed_experts_forward(self, hidden_states, top_k_index, top_k_weights)


def is_packed(experts: nn.Module) -> bool:
    """Whether a layer's experts are stored one by one, quantised, and not fused in two tensors."""
    return isinstance(experts, PackedExperts)


def expert_weights(experts: nn.Module, expert: int) -> tuple[Tensor, Tensor]:
    """(gate_up [2I, H], down [H, I]) of one expert in the dtype that it computes in.

    Fused experts give views, through which gradients reach the stacked parameters; packed ones give fresh dequantised copies
    without gradient, to be dropped after their matmuls.
    """
    if not is_packed(experts):
        return experts.gate_up_proj[expert], experts.down_proj[expert]
    return gate_up_of(experts, expert), down_of(experts, expert)


def gate_up_of(experts: PackedExperts, expert: int) -> Tensor:
    one = experts[expert]
    return torch.cat([dequantised(one.gate_proj), dequantised(one.up_proj)]).to(experts.compute_dtype)


def down_of(experts: PackedExperts, expert: int) -> Tensor:
    return dequantised(experts[expert].down_proj).to(experts.compute_dtype)


def is_quantised(module: nn.Module) -> bool:
    """Whether it is a linear layer of bitsandbytes'. By name: without bitsandbytes there is no class to ask for."""
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt")


def dequantised(linear: nn.Module) -> Tensor:
    """The weight [out, in] of a linear layer of torch's or bitsandbytes', without gradient. ValueError for any other module."""
    if type(linear) is nn.Linear:
        return linear.weight.detach()
    if not is_quantised(linear):
        raise ValueError(
            f"A routed expert's matrix is a {type(linear).__name__}, of which quantised experts would run the base weight only; "
            "attach adapters to routed experts with trainers.adapters."
        )
    # Not at the top: it imports bitsandbytes, which need not be installed.
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    # Only an 8-bit layer has a state.
    return dequantize_bnb_weight(linear.weight, getattr(linear, "state", None))


class ExpertMatrices:
    """One projection of all packed experts, to be read like the stacked tensor [E, out, in]: `[e]` dequantises expert e's."""

    def __init__(self, read: Callable[[int], Tensor], shape: tuple[int, int, int]):
        self.read, self.shape = read, shape

    def __getitem__(self, expert: int) -> Tensor:
        return self.read(expert)

    @property
    def mT(self) -> "ExpertMatrices":
        experts, rows, columns = self.shape
        return ExpertMatrices(lambda expert: self.read(expert).mT, (experts, columns, rows))


def matrices_of(experts: PackedExperts) -> tuple[ExpertMatrices, ExpertMatrices]:
    count, hidden, width = experts.num_experts, experts.hidden_dim, experts.intermediate_dim
    gate_up = ExpertMatrices(lambda expert: gate_up_of(experts, expert), (count, 2 * width, hidden))
    return gate_up, ExpertMatrices(lambda expert: down_of(experts, expert), (count, hidden, width))


def packed_experts_forward(
    experts: PackedExperts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """`axk1_experts_forward` for packed experts, on any device: the loop over hit experts, each dequantised for its matmuls.

    Gradients reach hidden_states and top_k_weights. Backward dequantises once more; nothing dequantised is kept.
    """
    x_TH = hidden_states.to(experts.compute_dtype)
    if torch.is_grad_enabled() and (x_TH.requires_grad or top_k_weights.requires_grad):
        out_TH = FrozenExperts.apply(x_TH, top_k_index, top_k_weights, experts)
    else:
        out_TH = loop_forward(x_TH, top_k_index, top_k_weights, *matrices_of(experts), keep=False)[0]
    return out_TH.to(hidden_states.dtype)


class FrozenExperts(torch.autograd.Function):
    """Keeps the layer input and the gate/up output, as for fused experts."""

    @staticmethod
    def forward(ctx, x_TH, expert_TK, weight_TK, experts):
        out_TH, gate_up_P2I = loop_forward(x_TH, expert_TK, weight_TK, *matrices_of(experts), keep=True)
        ctx.save_for_backward(x_TH, expert_TK, weight_TK, gate_up_P2I)
        ctx.experts = experts
        return out_TH

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_TH):
        x_TH, expert_TK, weight_TK, gate_up_P2I = ctx.saved_tensors
        inputs = (grad_TH, x_TH, expert_TK, weight_TK, *matrices_of(ctx.experts), gate_up_P2I)
        grad_x, grad_weight, _, _ = loop_backward(*inputs, need_gate_up=False, need_down=False)
        return grad_x, None, grad_weight, None


# -- loading, saving and back --------------------------------------------------------------------------------------
class QuantizesExperts:
    """To stand before PreTrainedModel: under a BitsAndBytesConfig, `from_pretrained` quantises routed experts as well."""

    def post_init(self):
        quantization = getattr(self.config, "quantization_config", None)
        if isinstance(quantization, BitsAndBytesConfig):
            separate_experts(self, quantization.llm_int8_skip_modules or [])
        super().post_init()

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *rest, **options):
        packed = [name for name, module in model.named_modules() if is_packed(module)]
        if packed:
            if load_config.device_mesh is not None:
                raise ValueError("Quantised experts are not split over ranks; load without a tensor or expert parallel plan.")
            mapping = separate_mapping(load_config.weight_mapping, model.state_dict())
            load_config = dataclasses.replace(load_config, weight_mapping=mapping)
        result = PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *rest, **options
        )
        if isinstance(getattr(model.config, "quantization_config", None), BitsAndBytesConfig):
            settle(model, packed, result[0].missing_keys)
            # Reading packed bytes has no reverse, and needs none, but saving would look for it.
            model._weight_conversions = [c for c in model._weight_conversions if not deserialises(c)]
        return result

    def dequantize(self, dtype: torch.dtype | None = None):
        """Back to plain and fused weights, in place; `save_pretrained` then writes a checkpoint for stock transformers."""
        # Not the config's own dtype: after a reload that is a string, which transformers 5.23 cannot cast to.
        model = super().dequantize(dtype or self.dtype)
        fuse_experts(model)
        return model


def separate_experts(model: nn.Module, skip: list[str]) -> None:
    """Replace every fused-experts module that is still on meta (a model inside `from_pretrained`) by separate linear layers.

    Left fused: what `skip` (`llm_int8_skip_modules`) names, and layouts that we do not run; `share_line` says so.
    """
    for name, module in list(model.named_modules()):
        if is_fused(module) and module.down_proj.is_meta and not left_fused(name, module, skip):
            model.set_submodule(name, PackedExperts(module))


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds a layer's routed experts in stacked tensors, gate_up_proj (or up_proj) and down_proj."""
    parameter = module._parameters.get("down_proj")
    return parameter is not None and parameter.dim() == 3


def left_fused(name: str, module: nn.Module, skip: list[str]) -> str:
    """Why a fused-experts module is not quantised; empty if nothing speaks against it."""
    if not should_convert_module(f"{name}.0.gate_proj", skip):
        return "llm_int8_skip_modules names them"
    difference = unlike_swiglu(module)
    return f"{type(module).__name__} {difference}" if difference else ""


def separate_mapping(conversions: list, names: dict) -> list:
    """A model's checkpoint conversions without those that stack experts: separate ones are stored as they are.

    Experts under other names on disk (w1, w3, w2) are renamed, in both directions.
    """
    kept = []
    for conversion in conversions:
        sources, targets = conversion._original_source_patterns, conversion._original_target_patterns
        leaf = targets[0].rpartition(".")[2]
        stacks = isinstance(conversion, WeightConverter) and leaf in ("gate_up_proj", "down_proj")
        if not stacks or any(targets[0] in name for name in names):
            kept.append(conversion)
            continue
        for source, projection in zip(sources, PROJECTIONS[:2] if leaf == "gate_up_proj" else PROJECTIONS[2:]):
            on_disk = source.split(".")[-2]
            if on_disk != projection:
                kept.append(WeightRenaming(rf"\.experts\.(\d+)\.{on_disk}\.", rf".experts.\1.{projection}."))
    return kept


def deserialises(conversion) -> bool:
    return any(getattr(operation, "hf_quantizer", None) for operation in getattr(conversion, "operations", []))


def settle(model: nn.Module, packed: list[str], missing: set[str]) -> None:
    """After loading: nothing of an expert may be missing; freeze, steer clear of bitsandbytes' CPU repacking, say the share."""
    lost = sorted(name for name in missing if any(name.startswith(f"{prefix}.") for prefix in packed))
    if lost:
        raise ValueError(
            f"The checkpoint lacks {len(lost)} expert matrices, {lost[0]} the first; give one that stores each expert's "
            "gate, up and down projection by itself, as stock transformers saves them."
        )
    for module in model.modules():
        if is_packed(module):
            module.requires_grad_(False)
        if is_quantised(module):
            # On CPUs with AVX512-BF16 the first forward would rewrite the weight in place: it rounds the scales to bf16, which
            # a later save writes down, and refuses outputs that 32 does not divide.
            module.support_avx512bf16_for_cpu = False
    share, line = quantised_share(model), share_line(model)
    unquantised = [module for module in model.modules() if is_fused(module)]
    if unquantised and share < 0.5:
        logger.warning(line)
    else:
        print(line, file=sys.stderr)


def quantised_share(model: nn.Module) -> float:
    """The share of a model's parameters that are quantised."""
    quantised = sum(m.in_features * m.out_features for m in model.modules() if is_quantised(m))
    plain = sum(p.numel() for p in model.parameters() if type(p).__name__ not in ("Params4bit", "Int8Params"))
    return quantised / max(1, quantised + plain)


def share_line(model: nn.Module) -> str:
    """One sentence: how much of the model is quantised and, where experts are not, why."""
    held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    line = f"{quantised_share(model):.1%} of the parameters are quantised; the weights take {held / 1e9:.3g} GB."
    skip = getattr(model.config.quantization_config, "llm_int8_skip_modules", None) or []
    reasons = {left_fused(name, module, skip) for name, module in model.named_modules() if is_fused(module)}
    if reasons:
        line += f" The routed experts are not among them, because {' and '.join(sorted(reasons))}."
    return line


@torch.no_grad()
def fuse_experts(model: nn.Module) -> None:
    """Stack separate experts, by now plain linear layers, into the fused modules that they came from; a layer at a time."""
    for name, packed in list(model.named_modules()):
        if not is_packed(packed):
            continue
        (fused,) = packed.fused
        experts = [packed[expert] for expert in range(packed.num_experts)]
        gate_up = [torch.cat([expert.gate_proj.weight, expert.up_proj.weight]) for expert in experts]
        fused.gate_up_proj = nn.Parameter(torch.stack(gate_up))
        fused.down_proj = nn.Parameter(torch.stack([expert.down_proj.weight for expert in experts]))
        model.set_submodule(name, fused)
    # Saving then goes by the model type's own conversions, which take stacked experts apart.
    model._weight_conversions = None


def load_quantized(
    path: str | Path, quantization_config: BitsAndBytesConfig | None = None, *, model_class: type | None = None, **kwargs
) -> PreTrainedModel:
    """`from_pretrained` of any mixture that transformers knows, its fused experts quantised as well.

    model_class defaults to the one of transformers that the checkpoint's `architectures` names. quantization_config may be left
    out for a checkpoint that is quantised already; what else is given goes to `from_pretrained`. An A.X K1 of ours needs no call:
    `AutoModelForCausalLM.from_pretrained(path, quantization_config=...)` does the same.
    """
    if model_class is None:
        names = AutoConfig.from_pretrained(path).architectures
        if not names or not hasattr(transformers, names[0]):
            raise ValueError(f"{path} names the architectures {names}, none of transformers'; pass model_class.")
        model_class = getattr(transformers, names[0])
    if not issubclass(model_class, QuantizesExperts):
        # The same name and module, by which transformers finds a class's checkpoint conversions and writes `architectures`.
        place = {"__module__": model_class.__module__}
        model_class = type(model_class.__name__, (QuantizesExperts, model_class), place)
    return model_class.from_pretrained(path, quantization_config=quantization_config, **kwargs)


# -- on paper, and how good ----------------------------------------------------------------------------------------
