"""Which parts of a mixture does LoRA train?  Attention, shared and routed experts by name, attached and saved as PEFT does.

PEFT's own `target_parameters` adds B A to every expert's matrix, in full size, at each forward. Here PEFT still attaches, names,
saves, switches and merges; only the forward of its wrapper is ours (modeling_axk1/moe_lora.py). What is saved is what stock PEFT
saves, and each loads the other's.
"""

import copy
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields
from os import PathLike

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import layer as peft_lora
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn

from modeling_axk1.moe_dispatch import unlike_swiglu
from modeling_axk1.moe_lora import Lora, lora_experts_forward
from modeling_axk1.quantization_axk1 import PackedExperts, expert_weights, is_fused, is_packed, refuse_parts

logger = logging.getLogger(__name__)

MATRICES = ("gate_up_proj", "down_proj")
# Of PEFT's beginnings those that look at no weight.
INITS = (True, False, "gaussian")
# Parts of a model by the names on a linear layer's path; the first that fits counts.
LINEAR_PARTS = {
    "attention": re.compile(r"\.(self_attn|self_attention|attention|attn)\.\w+$"),
    "shared": re.compile(r"\.shared_(experts?|mlp)\.\w+$"),
    "dense": re.compile(r"\.(mlp|feed_forward)\.(gate_proj|up_proj|down_proj|w1|w2|w3)$"),
}
PARTS = (*LINEAR_PARTS, "routed")


def lora_config(
    model: nn.Module,
    targets: Sequence[str] | str = ("attention", "shared", "routed"),
    *,
    r: int = 16,
    alpha: float = 32,
    rslora: bool = False,
    **more,
) -> LoraConfig:
    """A PEFT config for `get_peft_model(model, ...)` or a trainer's `peft_config`: LoRA on whole parts of a mixture.

    targets   attention, shared (experts that see every token), routed, dense (layers without experts); or "all-linear", PEFT's
              own, which misses routed experts and warns of it. ValueError for a part that the model lacks.
    r, alpha  rank and scale: every adapted matrix adds alpha / r * B A, and with `rslora` alpha / sqrt(r) * B A. Of an expert,
              gate and up are one matrix.
    more      further fields of LoraConfig, such as `exclude_modules=["kv_b_proj"]`, which keeps A.X K1's absorbed decode.
              ValueError for `lora_dropout` on routed experts.
    """
    everywhere = targets == INCLUDE_LINEAR_LAYERS_SHORTHAND
    names = {"target_modules": targets} if everywhere else target_names(model, targets)
    config = LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, task_type="CAUSAL_LM", **names, **more)
    return group_experts(config, model)


def target_names(model: nn.Module, targets: Sequence[str]) -> dict[str, list[str]]:
    """`target_modules` and `target_parameters` of PEFT for parts of a model, as short as holds in every layer."""
    if unknown := set(targets) - set(PARTS):
        raise ValueError(f"targets has {', '.join(sorted(unknown))}, which is no part; choose of {', '.join(PARTS)}.")
    parts: dict[str, set[str]] = {part: set() for part in PARTS}
    routed = routed_experts(model)
    for name, module in own_modules(model):
        if isinstance(module, nn.Linear) and not name.startswith(tuple(f"{each}." for each in routed)):
            for part in [part for part, pattern in LINEAR_PARTS.items() if pattern.search(f".{name}")][:1]:
                parts[part].add(ending(name))
    parts["routed"] = {f"{ending(name)}.{matrix}" for name in routed for matrix in MATRICES}
    for part in targets:
        if not parts[part]:
            raise ValueError(f"{type(model).__name__} has no {part} layers for LoRA; leave {part} out of targets.")
    modules = sorted(name for part in targets if part != "routed" for name in parts[part])
    check_that_peft_keeps(modules, model)
    return {"target_modules": modules, "target_parameters": sorted(parts["routed"]) if "routed" in targets else None}


def ending(name: str) -> str:
    """The last two parts of a module's name: the same in every layer."""
    return ".".join(name.split(".")[-2:])


def check_that_peft_keeps(modules: list[str], model: nn.Module) -> None:
    """ValueError where PEFT would take names for those of routed experts before these were fused, as it does for some models."""
    config = LoraConfig(target_modules=modules)
    convert_peft_config_for_transformers(config, model, None)
    if taken := sorted(set(modules) - set(config.target_modules)):
        raise ValueError(
            f"PEFT takes {', '.join(taken)} of a {model.config.model_type} for its routed experts; leave them out of targets."
        )


def routed_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The routed experts of each layer by name, fused in [E, 2I, H] and [E, H, I] or packed one by one; of any model."""
    return {
        name: module
        for name, module in own_modules(model)
        if is_packed(module) or (is_fused(module) and "gate_up_proj" in module._parameters)
    }


def own_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules by the names that they have in the bare model, where adapters already wrap some of them as well."""
    for name, module in model.named_modules():
        yield name.replace(".base_layer", ""), module


def group_experts(config: PeftConfig | None, model: nn.Module) -> PeftConfig | None:
    """The config with which PEFT puts what it targets of routed experts under our wrapper; warns where "all-linear" misses them.

    For packed experts a new config, otherwise the same one, as any that is not LoRA's. ValueError for dropout on routed experts.
    """
    if not isinstance(config, LoraConfig):
        return config
    experts = routed_experts(model)
    targeted = targeted_matrices(config, model, experts)
    if not targeted:
        warn_of_missed_experts(config, experts)
    else:
        refuse_parts(model, "adapt the routed experts of")
    if targeted and model.config._experts_implementation == "axk1_fp8":
        logger.warning("Routed experts leave FP8 under an adapter, whose path computes in their weights' dtype.")
    if targeted and config.lora_dropout:
        # It would need a mask of its own for every token-expert pair; PEFT refuses it, too.
        raise ValueError(
            f"lora_dropout={config.lora_dropout} is not available on routed experts; set it to 0 or leave them out."
        )
    if targeted and config.init_lora_weights not in INITS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} begins from a linear layer's weight, which routed experts have not; "
            f"use one of {', '.join(map(str, INITS))}."
        )
    if packed := [name for name, module in experts.items() if is_packed(module)]:
        return for_packed(config, model, packed, targeted)
    for kind, module in {type(module): module for module in experts.values()}.items() if targeted else ():
        if difference := unlike_swiglu(module):
            logger.warning("%s %s: PEFT's own wrapper adapts them, which builds W + B A.", kind.__name__, difference)
        else:
            config._register_custom_module({kind: ParamWrapper})
    return config


def targeted_matrices(config: LoraConfig, model: nn.Module, experts: dict[str, nn.Module]) -> set[str]:
    """Which of MATRICES the config targets in any layer, PEFT's own renaming for some models included."""
    seen = copy.deepcopy(config)
    convert_peft_config_for_transformers(seen, model, None)
    endings = tuple(f".{target}" for target in seen.target_parameters or ())
    return {matrix for name in experts for matrix in MATRICES if f".{name}.{matrix}".endswith(endings)}


def warn_of_missed_experts(config: LoraConfig, experts: dict[str, nn.Module]) -> None:
    if experts and config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        missed = sum(parameters_of(each) for each in experts.values())
        names = " ".join(sorted({f"{ending(name)}.{matrix}" for name in experts for matrix in MATRICES}))
        logger.warning(
            "LoRA on all-linear layers misses the routed experts of %d layers, %.4g million parameters, which are no linear "
            "layers; name their part (targets, lora_targets: routed) or %s in target_parameters.",
            len(experts), missed / 1e6, names,
        )  # fmt: skip


def parameters_of(experts: nn.Module) -> int:
    """Counted as numbers, however many of them a packed byte holds."""
    if is_packed(experts):
        return 3 * experts.num_experts * experts.hidden_dim * experts.intermediate_dim
    return sum(parameter.numel() for parameter in experts.parameters())


# -- attached to experts ------------------------------------------------------------------------------------------
# Named as its parent: PEFT knows by this name which wrapper a further adapter joins.
class ParamWrapper(peft_lora.ParamWrapper):
    """PEFT's LoRA on one matrix of all routed experts of a layer; the outer of two wrappers computes with both.

    Not compiled as one graph: the loop depends on the routing.
    """

    def get_param(self) -> Tensor:
        """The adapted matrices [E, out, in]; of packed experts a stand-in of their shape, dtype and device, without values."""
        experts = self.get_base_layer()
        if not is_packed(experts):
            return super().get_param()
        weight = expert_weights(experts, 0)[MATRICES.index(self.parameter_name)]
        return weight.detach().new_empty(1).expand(experts.num_experts, *weight.shape)

    def update_layer(self, adapter_name: str, *args, **kwargs) -> None:
        inner = self.base_layer
        # PEFT hands a further adapter for packed experts, a module to it, to the outer wrapper only.
        if isinstance(inner, ParamWrapper) and is_packed(self.get_base_layer()) and adapter_name not in inner.lora_A:
            inner.update_layer(adapter_name, *args, **kwargs)
        super().update_layer(adapter_name, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if is_packed(self.get_base_layer()):
            raise ValueError(
                "An adapter does not merge into quantised experts without loss, and this model may be partly merged by now: "
                "load the unquantised model, load the adapter into it and merge there."
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, **kwargs) -> Tensor:
        self._check_forward_args(hidden_states, **kwargs)
        experts, active = self.get_base_layer(), {}
        wrapper = self
        while wrapper is not experts:
            active[wrapper.parameter_name] = wrapper.active_lora()
            wrapper = wrapper.base_layer
        if not any(active.values()):
            return experts(hidden_states, top_k_index, top_k_weights)
        factors = (active.get(matrix) for matrix in MATRICES)
        return lora_experts_forward(experts, hidden_states, top_k_index, top_k_weights, *factors)

    def active_lora(self) -> Lora | None:
        """The factors that apply now, of several active adapters joined; none where they are merged or disabled."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or not names:
            return None
        loras = [(self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]) for name in names]
        return loras[0] if len(loras) == 1 else join_loras(loras, self.num_experts)


def join_loras(loras: Sequence[Lora], experts: int) -> Lora:
    """One adapter that adds what all of them add: their ranks side by side, their scales in B."""
    a_ERF = torch.cat([lora_A.view(experts, -1, lora_A.shape[1]) for lora_A, _, _ in loras], dim=1)
    b_ORE = torch.cat([scale * lora_B.view(lora_B.shape[0], -1, experts) for _, lora_B, scale in loras], dim=1)
    return a_ERF.flatten(0, 1), b_ORE.flatten(1, 2), 1.0


class PackedLoraConfig(LoraConfig):
    """LoRA on packed experts, which PEFT reaches as modules. Saved as if they were fused, so that it loads there as well."""

    written: dict

    def to_dict(self) -> dict:
        return super().to_dict() | self.written


def for_packed(config: LoraConfig, model: nn.Module, packed: list[str], targeted: set[str]) -> PackedLoraConfig:
    """Target packed experts as modules, if at all, and none of the linear layers in them: nothing would run their adapters."""
    if targeted and targeted != set(MATRICES):
        raise ValueError(
            f"Packed experts take adapters on both matrices, not on {', '.join(targeted)} alone; target both."
        )
    settings = {field.name: getattr(config, field.name) for field in fields(config) if field.init}
    written = {key: settings[key] for key in ("target_modules", "target_parameters", "exclude_modules")}
    names = [re.escape(name) for name in packed]
    modules = patterns(_maybe_include_all_linear_layers(copy.copy(config), model).target_modules)
    settings["target_modules"] = "|".join(modules + (names if targeted else []))
    # PEFT stays out of modules that it has wrapped, and warns of names that exclude nothing.
    wrapped = any(isinstance(module, ParamWrapper) for module in model.modules())
    inside = [] if wrapped else [rf"{name}\..*" for name in names]
    settings["exclude_modules"] = "|".join(patterns(config.exclude_modules) + inside) or None
    settings["target_parameters"] = None
    result = PackedLoraConfig(**settings)
    result.written = written
    result._register_custom_module({PackedExperts: wrap_packed})
    return result


def patterns(names: str | Sequence[str] | None) -> list[str]:
    """Patterns of whole module names for what PEFT takes as one, or as a list of endings."""
    if isinstance(names, str):
        return [f"(?:{names})"]
    return [rf"(?:.*\.)?{re.escape(name)}" for name in sorted(names or ())]


def wrap_packed(target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs) -> ParamWrapper:
    """The wrappers that PEFT itself nests around fused experts, in its order, around packed ones."""
    for matrix in MATRICES:
        target = ParamWrapper(target, adapter_name, config=config, **kwargs | {"parameter_name": matrix})
    return target


def load_adapter(
    model: nn.Module, path: str | PathLike, name: str = "default", *, trainable: bool = False
) -> PeftModel:
    """The model under a saved adapter, PEFT's or ours: a bare model's first, or one more of a PeftModel, which becomes active."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config = LoraConfig.from_pretrained(path)
    config.inference_mode = not trainable
    config = group_experts(config, base)
    if not isinstance(model, PeftModel):
        return PeftModel.from_pretrained(model, path, adapter_name=name, is_trainable=trainable, config=config)
    model.add_adapter(name, config)
    model.load_adapter(path, name, is_trainable=trainable)
    model.set_adapter(name, inference_mode=not trainable)
    return model
