"""How is a model trained in FP8?  By one call: torchao's linear layers, and our grouped path for the routed experts.  [paper]

Weights stay fp32 parameters and are rounded at each use, so optimizer and checkpoints are what they were. Embedding, head,
router, norms and the attention core stay out.
"""

import torch
from peft import PeftModel
from torch import nn

from modeling_axk1 import AxK1ForCausalLM, count_flops
from modeling_axk1.fp8_axk1 import ALIGNMENT, multiplies_fp8
from trainers.adapters import ParamWrapper


def stays_out(module: nn.Module, name: str) -> str | None:
    """Why a linear layer is not computed in FP8; None if it is."""
    if name.endswith("lm_head"):
        return "the head"
    if module.in_features % ALIGNMENT or module.out_features % ALIGNMENT:
        return f"{module.in_features} x {module.out_features} is no multiple of {ALIGNMENT}"
    return None


def experts_stay_out(model: AxK1ForCausalLM) -> str | None:
    """Why the routed experts are not computed in FP8; None if they are."""
    sizes = model.config.hidden_size, model.config.moe_intermediate_size
    if any(size % ALIGNMENT for size in sizes):
        return f"{sizes[0]} x {sizes[1]} is no multiple of {ALIGNMENT}"
    if any(isinstance(module, ParamWrapper) for module in model.modules()):
        return "an adapter's path has no FP8"
    return None


def check_trainable(model: AxK1ForCausalLM) -> None:
    low = [name for name, p in model.named_parameters() if p.dtype != torch.float32]
    if low:
        raise ValueError(
            f"{len(low)} parameters, {low[0]} the first, are {model.get_parameter(low[0]).dtype} but FP8 training rounds "
            "fp32 master weights; load the model with dtype=torch.float32."
        )
    if getattr(model, "is_quantized", False):
        raise ValueError("the model is quantised already; load it without quantization_config to train it in FP8.")


def enable_fp8(model: AxK1ForCausalLM, tokens: int = 4096, quiet: bool = False) -> dict[str, float]:
    """Let `model` compute in FP8 from now on, E4M3 forward and E5M2 gradients, scaled per tensor; prints the share of FLOPs.

    Returns {part: share of a training step's FLOPs that runs in FP8}, with `total`, for sequences of so many tokens. Without a
    GPU that multiplies FP8 (compute capability 8.9) the numerics are emulated, slowly. ValueError for parameters that are not
    fp32, for a quantised model, and without torchao.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ValueError(f"FP8 needs torchao ({error}); pip install 'axk1[fp8]'.") from error
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    check_trainable(model)
    emulated = not multiplies_fp8(model.device)
    left_out = {
        name: why for name, m in model.named_modules() if isinstance(m, nn.Linear) and (why := stays_out(m, name))
    }
    convert_to_float8_training(
        model,
        module_filter_fn=lambda module, name: name not in left_out,
        # Its defaults are the paper's formats: per-tensor E4M3 inputs and weights, E5M2 gradients.
        config=Float8LinearConfig(emulate=emulated),
    )
    if why := experts_stay_out(model):
        left_out["routed experts"] = why
    else:
        model.set_experts_implementation("axk1_fp8")
    shares = flop_shares(model, left_out, tokens)
    if not quiet:
        print_shares(shares, left_out, emulated)
    return shares


def flop_shares(model: AxK1ForCausalLM, left_out: dict[str, str], tokens: int) -> dict[str, float]:
    """Share of all FLOPs of a forward and backward pass, by the kind of layer that runs in FP8; an adapter's count nowhere."""
    flops = count_flops(model.config, queries=tokens, mtp=True)
    routed = 0 if "routed experts" in left_out else flops["routed_experts"]
    if routed and model.config.mlp_layer_types[-1] == "sparse":
        routed += len(model.model.mtp_layers) * routed // model.config.mlp_layer_types.count("sparse")
    linear = sum(
        2 * tokens * module.in_features * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in left_out and ".lora_" not in name
    )
    # Backward doubles every part alike.
    parts = {"linear layers": linear / flops["total"], "routed experts": routed / flops["total"]}
    return {**parts, "total": sum(parts.values())}


def print_shares(shares: dict[str, float], left_out: dict[str, str], emulated: bool) -> None:
    parts = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if name != "total")
    where = "emulated: these numerics, not this speed" if emulated else "on the GPU's FP8 units"
    print(f"FP8 runs {shares['total']:.1%} of a training step's FLOPs ({parts}), {where}.")
    for name, why in left_out.items():
        print(f"  not in FP8: {name} ({why})")
