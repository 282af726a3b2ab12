"""How do routed experts live in 4 or 8 bits?  One bitsandbytes layer a matrix, dequantised only when a token visits its expert.

Transformers' bitsandbytes quantizer replaces `nn.Linear` and passes over fused experts, which are most of a mixture: of K1 it
reaches 1.8%. Here the fused experts of a model under construction become plain linear layers, named as on disk
(`experts.E.{gate,up,down}_proj`), and that same quantizer then quantises, loads, saves and dequantises them as any other. A
matrix goes from its shard to 4 bits by itself, so loading holds the result and one matrix in full precision.

Axes: T tokens, K experts a token, E experts, H hidden, I expert width.
"""

import ctypes
import dataclasses
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils import logging

from .configuration_axk1 import AxK1Config, in_units
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

    Under expert parallelism the rank's own ones: `num_experts` of them, from number `first` on.
    """

    def __init__(self, fused: nn.Module):
        """From transformers' fused layout, gate_up_proj [E, 2I, H] and down_proj [E, H, I]: its shapes, not its values."""
        super().__init__()
        self.config, self.act_fn = fused.config, fused.act_fn
        self.num_experts, self.hidden_dim, self.intermediate_dim = fused.down_proj.shape
        self.first, self.on_all_ranks = 0, self.num_experts
        self.dtype = fused.down_proj.dtype
        # In a tuple it is no submodule: its parameters stay on meta and are nobody's until `fuse_experts`.
        self.fused = (fused,)
        kind = {"device": fused.down_proj.device, "dtype": self.dtype}
        for expert in range(self.num_experts):
            self.add_module(str(expert), PackedExpert(self.hidden_dim, self.intermediate_dim, **kind))

    def __getitem__(self, expert: int) -> PackedExpert:
        return self._modules[str(self.first + expert)]

    def keep(self, rank: int, ranks: int) -> None:
        """Drop the experts of all ranks but `rank`, before any is loaded. ValueError if they do not divide."""
        if self.on_all_ranks % ranks:
            raise ValueError(f"ep_size={ranks} does not divide the {self.on_all_ranks} routed experts; use a divisor.")
        self.num_experts = self.on_all_ranks // ranks
        self.first = rank * self.num_experts
        for expert in set(range(self.on_all_ranks)) - set(range(self.first, self.first + self.num_experts)):
            del self._modules[str(expert)]

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
    return torch.cat([dequantized(one.gate_proj), dequantized(one.up_proj)]).to(experts.compute_dtype)


def down_of(experts: PackedExperts, expert: int) -> Tensor:
    return dequantized(experts[expert].down_proj).to(experts.compute_dtype)


def is_quantized(module: nn.Module) -> bool:
    """Whether it is a linear layer of bitsandbytes'. By name: without bitsandbytes there is no class to ask for."""
    kind = type(module)
    # PEFT's adapters have classes of the same names.
    return kind.__module__.startswith("bitsandbytes.") and kind.__name__ in ("Linear4bit", "Linear8bitLt")


def dequantized(linear: nn.Module) -> Tensor:
    """The weight [out, in] of a linear layer of torch's or bitsandbytes', without gradient.

    ValueError for any other module, and for an offloaded weight.
    """
    if type(linear) is not nn.Linear and not is_quantized(linear):
        raise ValueError(
            f"A routed expert's matrix is a {type(linear).__name__}, of which quantised experts would run the base weight only; "
            "attach adapters to routed experts with trainers.adapters."
        )
    if linear.weight.is_meta:
        # accelerate brings a weight in for its own layer's forward only; the matmuls here would read memory as it was.
        raise ValueError(
            f"A matrix {list(linear.weight.shape)} is offloaded and cannot be read outside its layer; "
            "give a device_map without cpu and disk for layers with experts."
        )
    if type(linear) is nn.Linear:
        return linear.weight.detach()
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
            mapping = separate_mapping(load_config.weight_mapping, model.state_dict())
            load_config = dataclasses.replace(load_config, weight_mapping=mapping)
        quantises = load_config.hf_quantizer is not None and not load_config.hf_quantizer.pre_quantized
        with mapped_blocks() if quantises else nullcontext():
            result = PreTrainedModel._load_pretrained_model(
                model, state_dict, checkpoint_files, load_config, *rest, **options
            )
        if isinstance(getattr(model.config, "quantization_config", None), BitsAndBytesConfig):
            settle(model, packed, result[0].missing_keys)
            elsewhere = tuple(place for name in packed for place in on_other_ranks(model.get_submodule(name), name))
            result[0].unexpected_keys -= {key for key in result[0].unexpected_keys if key.startswith(elsewhere)}
            # Reading packed bytes has no reverse, and needs none, but saving would look for it.
            model._weight_conversions = [c for c in model._weight_conversions if not deserialises(c)]
        return result

    def _resolve_parallel_plans(self, distributed_config):
        """As transformers', but a quantised matrix is whole on every rank, and with it what its layer would cut beside it."""
        packed = [module for module in self.modules() if is_packed(module)]
        if packed and not any(is_fused(module) for module in self.modules()):
            # They have no stacked tensors for these rules to name.
            self._ep_plan = {name: style for name, style in self._ep_plan.items() if style != "grouped_gemm"}
        tp_plan, *others = super()._resolve_parallel_plans(distributed_config)
        if packed:
            # The model's own as well: by it PEFT would cut an adapter whose matrix is whole.
            tp_plan, self._tp_plan = (
                {name: style for name, style in plan.items() if ".layers." not in f".{name}"}
                for plan in (tp_plan, self._tp_plan)
            )
        return tp_plan, *others

    @classmethod
    def maybe_distribute_model(cls, model, distributed_config, mesh_manager):
        """As transformers', but of quantised experts a rank keeps its own before any is read."""
        packed = [module for module in model.modules() if is_packed(module)]
        if mesh_manager is None or not packed:
            return super().maybe_distribute_model(model, distributed_config, mesh_manager)
        ranks = ranks_dealt_to(distributed_config)
        for experts in packed:
            experts.keep(mesh_manager.get_mesh("ep").get_local_rank(), ranks)
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)
        # What brings the experts their tokens replaces their forward.
        if not all("forward" in vars(experts) for experts in packed):
            raise ValueError(
                f"The expert-parallel plan of {type(model).__name__} does not reach its quantised experts; "
                "load it without ep_size, in transformers 5.21 or newer with it."
            )
        return model

    def save_pretrained(self, *args, **kwargs):
        refuse_parts(self, "save")
        return super().save_pretrained(*args, **kwargs)

    @staticmethod
    def _finalize_model_loading(model, *rest):
        result = PreTrainedModel._finalize_model_loading(model, *rest)
        # Only now are layers that no file holds gone.
        if isinstance(getattr(model.config, "quantization_config", None), BitsAndBytesConfig):
            say_share(model)
        return result

    def dequantize(self, dtype: torch.dtype | None = None):
        """Back to plain and fused weights, in place; `save_pretrained` then writes a checkpoint for stock transformers."""
        refuse_parts(self, "dequantise")
        # Not the config's own dtype: after a reload that is a string, which transformers 5.23 cannot cast to.
        model = super().dequantize(dtype or self.dtype)
        fuse_experts(model)
        return model


def separate_experts(model: nn.Module, skip: list[str]) -> None:
    """Replace every fused-experts module that is still on meta (a model inside `from_pretrained`) by separate linear layers.

    Left fused: what `skip` (`llm_int8_skip_modules`) names, and layouts that we do not run; `share_line` says so.
    """
    for name, module in list(model.named_modules()):
        if is_fused(module) and module.down_proj.is_meta and not left_fused(model, name, skip):
            model.set_submodule(name, PackedExperts(module))


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds a layer's routed experts in stacked tensors, gate_up_proj (or up_proj) and down_proj."""
    parameter = module._parameters.get("down_proj")
    return parameter is not None and parameter.dim() == 3


def left_fused(model: nn.Module, name: str, skip: list[str]) -> str:
    """Why a fused-experts module is not quantised; empty if nothing speaks against it."""
    # Under construction the base model is asked first, which does not know that it will stand below a head.
    bare = name.removeprefix(f"{model.base_model_prefix}.")
    for spelling in (bare, f"{model.base_model_prefix}.{bare}"):
        if not (should_convert_module(spelling, skip) and should_convert_module(f"{spelling}.0.gate_proj", skip)):
            return "llm_int8_skip_modules names them"
    module = model.get_submodule(name)
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


@contextmanager
def mapped_blocks():
    """On Linux, blocks of 128 KB and more go back to the system as soon as they are freed.

    glibc raises that size as it goes, and then what stays of each matrix (its scales) pins what it was made with to the heap:
    quantising 0.4 GB on a CPU took 1.65 GB, and takes 0.13 so. Afterwards the size is the 32 MB at which glibc stops raising it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        yield
        return
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    mallopt(mmap_threshold, 128 * 1024)
    try:
        yield
    finally:
        mallopt(mmap_threshold, 32 * 1024**2)
        mallopt(trim_threshold, 64 * 1024**2)


def deserialises(conversion) -> bool:
    return any(getattr(operation, "hf_quantizer", None) for operation in getattr(conversion, "operations", []))


def settle(model: nn.Module, packed: list[str], missing: set[str]) -> None:
    """After loading: nothing of an expert may be missing; freeze, steer clear of bitsandbytes' CPU repacking.

    Multi-token-prediction layers are not asked for: where no file holds them, they are dropped later.
    """
    needed = tuple(f"{prefix}." for prefix in packed if not predicts(model, prefix))
    lost = sorted(name for name in missing if name.startswith(needed))
    if lost:
        raise ValueError(
            f"The checkpoint lacks {len(lost)} expert matrices, {lost[0]} the first; give one that stores each expert's "
            "gate, up and down projection by itself, as stock transformers saves them."
        )
    for module in model.modules():
        if is_packed(module):
            module.requires_grad_(False)
        if is_quantized(module):
            # On CPUs with AVX512-BF16 the first forward would rewrite the weight in place: it rounds the scales to bf16, which
            # a later save writes down, and refuses outputs that 32 does not divide.
            module.support_avx512bf16_for_cpu = False


def ranks_dealt_to(distributed_config) -> int:
    """The number of ranks over which a layout deals quantised experts. ValueError for a layout that splits them otherwise."""
    sizes = {name: n for name, n in distributed_config.to_dict().items() if name.endswith("_size") and n != 1}
    if sizes.keys() != {"tp_size", "ep_size"} or sizes["tp_size"] != sizes["ep_size"]:
        raise ValueError(
            f"Quantised experts are dealt by number to ranks that share a batch, and got {sizes}; "
            "use the number of ranks for tp_size and ep_size, and nothing else."
        )
    return sizes["ep_size"]


def on_other_ranks(experts: PackedExperts, name: str) -> list[str]:
    """Beginnings of the names that expert parallelism leaves to other ranks."""
    return [f"{name}.{expert}." for expert in range(experts.on_all_ranks) if str(expert) not in experts._modules]


def refuse_parts(model: nn.Module, doing: str) -> None:
    """ValueError where a rank holds some of the experts only."""
    for module in model.modules():
        if is_packed(module) and module.num_experts < module.on_all_ranks:
            raise ValueError(
                f"This rank holds {module.num_experts} of {module.on_all_ranks} quantised experts a layer and cannot {doing} "
                "the model; load it in one process for that."
            )


def predicts(model: nn.Module, name: str) -> bool:
    """Whether a module belongs to a multi-token-prediction layer, which stands behind the decoder layers."""
    layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return layer is not None and int(layer.group(1)) >= model.config.get_text_config().num_hidden_layers


def say_share(model: nn.Module) -> None:
    """Print how much is quantised; a warning for a mixture that is mostly not."""
    share, line = quantized_share(model), share_line(model)
    mixture = any(is_packed(module) or is_fused(module) for module in model.modules())
    if mixture and share < 0.5:
        logger.warning(line)
    else:
        print(line, file=sys.stderr)


def quantized_share(model: nn.Module) -> float:
    """The share of a model's parameters that are quantised."""
    quantised = sum(m.in_features * m.out_features for m in model.modules() if is_quantized(m))
    plain = sum(p.numel() for p in model.parameters() if type(p).__name__ not in ("Params4bit", "Int8Params"))
    return quantised / max(1, quantised + plain)


def share_line(model: nn.Module) -> str:
    """One sentence: how much of the model is quantised and, where experts are not, why."""
    held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    line = f"{quantized_share(model):.1%} of the parameters are quantised; the weights take {in_units(held)}."
    skip = getattr(model.config.quantization_config, "llm_int8_skip_modules", None) or []
    reasons = {left_fused(model, name, skip) for name, module in model.named_modules() if is_fused(module)}
    if reasons:
        line += f" The routed experts are not among them, because {' and '.join(sorted(reasons))}."
    elif quantized_share(model) < 0.5:
        line += (
            " The rest are embeddings, head, norms and routers, which bitsandbytes leaves, and llm_int8_skip_modules."
        )
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
    path: str | Path,
    quantization_config: BitsAndBytesConfig | None = None,
    *,
    model_class: type | None = None,
    **kwargs,
) -> PreTrainedModel:
    """`from_pretrained` of any mixture that transformers knows, its fused experts quantised as well.

    model_class defaults to the one of transformers that the checkpoint's `architectures` names. quantization_config may be left
    out for a checkpoint that is quantised already (ValueError for another); what else is given goes to `from_pretrained`. An
    A.X K1 of ours needs no call: `AutoModelForCausalLM.from_pretrained(path, quantization_config=...)` does the same.
    """
    if quantization_config is None or model_class is None:
        names = ("revision", "token", "cache_dir", "local_files_only")
        # As a table: a class that is given may be of a model type that transformers does not know.
        said, _ = PreTrainedConfig.get_config_dict(path, **{name: kwargs[name] for name in names if name in kwargs})
        if quantization_config is None and not said.get("quantization_config"):
            raise ValueError(f"{path} is not quantised; give a quantization_config, or load it with from_pretrained.")
    if model_class is None:
        names = said.get("architectures")
        if not names or not hasattr(transformers, names[0]):
            raise ValueError(f"{path} names the architectures {names}, none of transformers'; pass model_class.")
        model_class = getattr(transformers, names[0])
    if not issubclass(model_class, QuantizesExperts):
        # The same name and module, by which transformers finds a class's checkpoint conversions and writes `architectures`.
        place = {"__module__": model_class.__module__}
        model_class = type(model_class.__name__, (QuantizesExperts, model_class), place)
    return model_class.from_pretrained(path, quantization_config=quantization_config, **kwargs)


# -- on paper, and how good ----------------------------------------------------------------------------------------
# Bytes of a quantised matrix as bitsandbytes 0.50 stores it: a code book of 16 fp32 numbers, a scale for 64 weights; under
# double quantisation the scales are bytes with a code book of 256, an offset, and a scale for 256 of them.
FORMS = ("bf16", "int8", "nf4", "nf4 double")
# Left free on a card for activations and a dequantised expert; transformers keeps as much back for bitsandbytes.
RESERVE = 0.10


def matrix_bytes(rows: int, columns: int, form: str) -> int:
    """Bytes of one linear layer's weight [rows, columns] in one of FORMS, or in fp8: E4M3, an fp32 scale a block of 128 x 128
    [DeepSeek-V3, 2412.19437, 3.3.2].
    """
    count = rows * columns
    scales = -(-count // 64)
    return {
        "bf16": 2 * count,
        "fp8": count + 4 * -(-rows // 128) * -(-columns // 128),
        "int8": count + 4 * rows,
        "nf4": -(-count // 2) + 4 * scales + 4 * 16,
        "nf4 double": -(-count // 2) + scales + 4 * -(-scales // 256) + 4 * 16 + 4 * 256 + 4,
    }[form]


def block_bytes(config: AxK1Config, form: str, *, tensor: int = 1, expert: int = 1) -> list[int]:
    """Bytes of what may stand on different cards, in order: embedding, each decoder layer, each multi-token-prediction layer,
    final norm and head.

    Linear layers are in `form`, all else in bf16 as the quantizer leaves it: embedding, head, norms, routers and their biases.
    tensor, expert: cards over which what has heads, a width or the vocabulary is cut, and over which experts are dealt; the
    bytes are then those of one card.
    """
    hidden, heads, experts = config.hidden_size, config.num_attention_heads, config.n_routed_experts
    latent_rope = config.kv_lora_rank + config.qk_rope_head_dim
    whole = [(config.q_lora_rank, hidden), (latent_rope, hidden)]
    by_heads = [
        (heads * config.qk_head_dim, config.q_lora_rank),
        (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        (hidden, heads * config.v_head_dim),
    ]

    def over(cards: int, shapes: list[tuple[int, int]]) -> int:
        return -(-sum(matrix_bytes(*shape, form) for shape in shapes) // cards)

    def mlp(width: int) -> list[tuple[int, int]]:
        return [(width, hidden), (width, hidden), (hidden, width)]

    biases = config.q_lora_rank + latent_rope + hidden if config.attention_bias else 0
    plain = 2 * (biases + (2 + config.post_mlp_norm) * hidden + config.q_lora_rank + config.kv_lora_rank)
    attention = plain + over(1, whole) + over(tensor, by_heads)
    router = 2 * experts * hidden + 4 * experts * config.has_router_bias
    shared = over(tensor, mlp(config.moe_intermediate_size * config.n_shared_experts))
    sparse = over(expert, experts * mlp(config.moe_intermediate_size)) + shared + router
    dense = over(tensor, mlp(config.intermediate_size))
    layers = [attention + (sparse if kind == "sparse" else dense) for kind in config.mlp_layer_types]
    # One more block of the last layer's kind, the joining projection, three norms.
    predicting = layers[-1] + matrix_bytes(hidden, 2 * hidden, form) + 2 * 3 * hidden
    layers += [predicting] * config.num_nextn_predict_layers
    table = -(-2 * config.vocab_size * hidden // tensor)
    return [table, *layers, 2 * hidden + (0 if config.tie_word_embeddings else table)]


def quantized_bytes(config: AxK1Config, form: str = "nf4 double") -> int:
    """Bytes of a model's weights with its linear layers in one of FORMS or fp8, the routed experts included."""
    return sum(block_bytes(config, form))


class Card(NamedTuple):
    """What one card holds: bytes of weights, and decoder layers, each of which caches every token."""

    weight_bytes: int
    layers: int

    def tokens(self, config: AxK1Config, usable_bytes: float) -> int:
        """How many cached tokens, of all requests together, it has room for."""
        return max(0, int((usable_bytes - self.weight_bytes) // max(token_bytes(config, self.layers), 1)))


def token_bytes(config: AxK1Config, layers: int) -> int:
    """A token's cache in so many layers, bf16: latent and rotated key of each."""
    return 2 * layers * (config.kv_lora_rank + config.qk_rope_head_dim)


def with_layers(sizes: list[int]) -> list[tuple[int, int]]:
    """What `block_bytes` gives as (bytes, layers): all are layers but the first, the embedding, and the last, the head."""
    return [(size, int(0 < place < len(sizes) - 1)) for place, size in enumerate(sizes)]


def in_order(blocks: list[tuple[int, int]], capacity: int) -> list[Card]:
    """Blocks of (bytes, layers) onto as few cards of that capacity as hold them, each block behind the one before."""
    cards: list[Card] = []
    for size, layers in blocks:
        if cards and cards[-1].weight_bytes + size <= capacity:
            cards[-1] = Card(cards[-1].weight_bytes + size, cards[-1].layers + layers)
        else:
            cards.append(Card(size, layers))
    return cards


def deal(config: AxK1Config, form: str, cards: int, *, tensor: int = 1, expert: int = 1) -> list[Card]:
    """A model on so many cards, no layer on two, the fullest as empty as it can be; tensor, expert: see `block_bytes`."""
    blocks = with_layers(block_bytes(config, form, tensor=tensor, expert=expert))
    low, high = max(blocks)[0], sum(size for size, _ in blocks)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(in_order(blocks, middle)) <= cards else (middle + 1, high)
    return in_order(blocks, low)


def cards_needed(config: AxK1Config, form: str, card_bytes: int, activation_bytes: float = 0) -> tuple[int, int] | None:
    """(cards, tokens): how many cards hold the weights, no layer on two, RESERVE left free; and how many cached tokens the first
    card to fill up then has room for beside `activation_bytes`. None if a layer fits no card.
    """
    usable, sizes = int((1 - RESERVE) * card_bytes), block_bytes(config, form)
    if max(sizes) > usable:
        return None
    dealt = deal(config, form, len(in_order(with_layers(sizes), usable)))
    return len(dealt), min(card.tokens(config, usable - activation_bytes) for card in dealt)


def cards_table(
    config: AxK1Config, cards_gb: tuple[int, ...] = (24, 80, 141), activation_bytes: float = 0
) -> list[dict[str, str]]:
    """What fits, a row for each of FORMS: the weights (1 GB is 1e9 bytes), cards of each size and the tokens that they cache."""
    rows = []
    for form in FORMS:
        row = {"linear layers": form, "weights": in_units(quantized_bytes(config, form))}
        for card_gb in cards_gb:
            fit = cards_needed(config, form, card_gb * 10**9, activation_bytes)
            said = "no layer fits" if fit is None else f"{fit[0]} ({fit[1]:,} tokens)" if fit[1] else f"{fit[0]} (weights alone)"
            row[f"cards of {card_gb} GB"] = said
        rows.append(row)
    return rows


@torch.no_grad()
def quantization_errors(model: nn.Module, checkpoint_dir: str | Path) -> list[dict[str, float | int]]:
    """Each layer's relative weight error, |W_quantised - W| / |W|, by part; a row for each decoder layer.

    checkpoint_dir: the folder with the weights that were quantised, read a matrix at a time. Nothing is calibrated and
    no data seen. ValueError where the folder lacks a weight.
    """
    where = files_of(Path(checkpoint_dir))
    errors, norms = defaultdict(float), defaultdict(float)
    for name, module in model.named_modules():
        if not is_quantized(module):
            continue
        layer = re.search(r"layers\.(\d+)\.", name)
        part = "attention" if "attn." in name else "routed experts" if re.search(r"experts\.\d+\.", name) else "mlp"
        key = (int(layer.group(1)) if layer else -1, part)
        if f"{name}.weight" not in where:
            raise ValueError(
                f"{checkpoint_dir} lacks {name}.weight; give the folder that the model was quantised from."
            )
        with safe_open(where[f"{name}.weight"], framework="pt") as shard:
            weight = shard.get_tensor(f"{name}.weight").float()
        errors[key] += (dequantized(module).cpu().float() - weight).square().sum().item()
        norms[key] += weight.square().sum().item()
    layers = sorted({layer for layer, _ in errors})
    ratio = {key: (errors[key] / max(norms[key], 1e-30)) ** 0.5 for key in errors}
    return [{"layer": layer} | {part: e for (place, part), e in ratio.items() if place == layer} for layer in layers]


def files_of(folder: Path) -> dict[str, Path]:
    """The file of each tensor of a safetensors checkpoint, sharded or not."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = json.loads(index.read_text())["weight_map"]
        for file in files.values():
            if file != Path(file).name:
                raise ValueError(
                    f"{index} names the file {file!r}, which is not beside it; give a folder whose index names files of its own."
                )
        return {name: folder / file for name, file in files.items()}
    whole = folder / "model.safetensors"
    if not whole.exists():
        raise ValueError(
            f"{folder} holds neither model.safetensors nor its index; give a folder of unquantised weights."
        )
    with safe_open(whole, framework="pt") as file:
        return {name: whole for name in file.keys()}  # noqa: SIM118  (it is no mapping)
