"""Which A.X K1 do Megatron's arguments describe, and which arguments describe an A.X K1?

Only what decides the function that the weights compute is read. A setting that A.X K1 does not have is refused by name: a
conversion that ignored it would be a model that answers wrongly.
"""

import ast
import math
import warnings
from collections.abc import Mapping
from typing import Any

from conversion.torch_file import shown
from modeling_axk1.configuration_axk1 import AxK1Config

# Megatron's argument and the config field that says the same.
FIELDS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "num_experts": "n_routed_experts",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_router_topk": "num_experts_per_tok",
    "max_position_embeddings": "max_position_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
    "init_method_std": "initializer_range",
}
# Older and other names, tried where the first is absent or None.
OTHER_NAMES = {
    "num_experts": ("num_moe_experts",),
    "layernorm_epsilon": ("norm_epsilon",),
    "max_position_embeddings": ("seq_length",),
}
OPTIONAL = {"init_method_std": 0.02, "layernorm_epsilon": 1e-5}
# Megatron's defaults for MLA: plain RoPE is *not* what an absent rope_type means.  [megatron-core, MLATransformerConfig]
ROPE_DEFAULTS = {
    "rope_type": "yarn",
    "rotary_base": 10000,
    "rotary_scaling_factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}
YARN_FIELDS = {
    "rotary_scaling_factor": "factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
    "mscale_all_dim": "mscale_all_dim",
}
# How many ranks there are of each kind.
LAYOUT_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
# What every A.X K1 has, and what none has: argument, the values that are right (absent and None count as the first), the reason.
REQUIRED: dict[str, tuple[tuple, str]] = {
    "multi_latent_attention": ((True,), "A.X K1 attends by multi-latent attention"),
    "normalization": (("RMSNorm",), "A.X K1's norms are RMSNorm"),
    "swiglu": ((True,), "A.X K1's experts are SwiGLU"),
    "qk_layernorm": ((True,), "A.X K1 normalises both latents"),
    "moe_router_score_function": (("sigmoid",), "A.X K1's router is a sigmoid"),
    "position_embedding_type": (("rope", None), "A.X K1's positions are RoPE"),
    "untie_embeddings_and_output_weights": ((True, False), "its head has weights of its own or the embedding's"),
}
REFUSED: dict[str, tuple[tuple, str]] = {
    "add_bias_linear": ((False,), "A.X K1's linear layers have no bias"),
    "add_qkv_bias": ((False,), "A.X K1's attention has no bias"),
    "rotary_interleaved": ((False,), "Megatron's own MLA is wrong with it (Megatron-LM issue 3900)"),
    "rotary_percent": ((1.0, 1), "A.X K1 rotates the whole of its RoPE part"),
    "use_rope_scaling": ((False,), "A.X K1 has no Llama-3 scaling"),
    "no_rope_freq": ((None, 0), "A.X K1 rotates in every layer"),
    "apply_layernorm_1p": ((False,), "A.X K1's norm weights are not zero-centred"),
    "layernorm_zero_centered_gamma": ((False,), "A.X K1's norm weights are not zero-centred"),
    "apply_residual_connection_post_layernorm": ((False,), "A.X K1's residual stream passes by its norms"),
    "attention_output_gate": ((False,), "A.X K1's attention has no output gate"),
    "moe_apply_probs_on_input": ((False,), "A.X K1 weights an expert's output"),
    "moe_shared_expert_gate": ((False,), "A.X K1's shared expert has no gate"),
    "moe_latent_size": ((None,), "A.X K1's experts read the hidden state itself"),
    "window_size": ((None,), "A.X K1 has no sliding window"),
    "heterogeneous_layers_config_path": ((None,), "A.X K1's layers are of two kinds only"),
    "activation_func_clamp_value": ((None,), "A.X K1's activation is not clamped"),
    "glu_linear_offset": ((0.0, 0), "A.X K1's SwiGLU has no offset"),
    "softmax_type": (("vanilla",), "A.X K1's softmax has no sink"),
    "squared_relu": ((False,), "A.X K1's experts are SwiGLU"),
    "qk_l2_norm": ((False,), "A.X K1 normalises its latents by RMSNorm"),
    "moe_router_topk_limited_devices": ((None,), "A.X K1 limits the choice by groups, not by devices"),
    "use_mup": ((False,), "A.X K1 scales no activation by its width"),
    "experimental_attention_variant": ((None,), "A.X K1's attention is plain MLA"),
    "mtp_use_repeated_layer": ((False,), "each of A.X K1's prediction layers has weights of its own"),
    # The same names hold rows in another order then, which nothing else shows.
    "moe_mlp_glu_interleave_size": ((None,), "its gate and up rows lie in alternating blocks"),
    "moe_shared_expert_glu_interleave_size": ((None,), "its gate and up rows lie in alternating blocks"),
    "moe_single_grouped_weight": ((False,), "its experts lie in one weight of an unknown order"),
}


# All that decides which function the weights compute: what every rank file has to say alike.
DESCRIBING = {
    *FIELDS,
    *(name for names in OTHER_NAMES.values() for name in names),
    *ROPE_DEFAULTS,
    *REQUIRED,
    *REFUSED,
    *("moe_layer_freq vocab_size padded_vocab_size moe_shared_expert_intermediate_size mtp_num_layers").split(),
    *(
        "moe_router_num_groups moe_router_group_topk moe_router_topk_scaling_factor moe_router_enable_expert_bias"
    ).split(),
}


# What is reckoned with, and what kind of number it is. A text in its place could grow to any size in a product or a remainder, a
# negative or infinite one would become a config that computes nothing.
WHOLE, COUNT = "a whole number above 0", "a whole number of 0 or more"
POSITIVE, NUMBER = "a number above 0", "a number of 0 or more"
NUMBERS = {
    **dict.fromkeys((*FIELDS, *(name for names in OTHER_NAMES.values() for name in names)), WHOLE),
    **dict.fromkeys("vocab_size padded_vocab_size make_vocab_size_divisible_by".split(), WHOLE),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", *LAYOUT_SIZES), WHOLE),
    **dict.fromkeys("mtp_num_layers moe_router_num_groups moe_router_group_topk".split(), COUNT),
    **dict.fromkeys("rotary_base rotary_scaling_factor original_max_position_embeddings".split(), POSITIVE),
    **dict.fromkeys("beta_fast beta_slow moe_router_topk_scaling_factor".split(), POSITIVE),
    **dict.fromkeys("layernorm_epsilon norm_epsilon init_method_std mscale mscale_all_dim".split(), NUMBER),
}


def check_numbers(args: Mapping[str, Any]) -> None:
    """ValueError for an argument that is to be a number and is none, or one that no model has."""
    for name, kind in sorted(NUMBERS.items()):
        value = args.get(name)
        if value is not None and not _is(kind, value):
            raise ValueError(
                f"Megatron's argument {name}={shown(value)} is not {kind}; the arguments are damaged, fetch or save the "
                "checkpoint again."
            )


def _is(kind: str, value: Any) -> bool:
    if type(value) is not int and (type(value) is not float or kind in (WHOLE, COUNT)):
        return False
    return (0 < value if kind in (WHOLE, POSITIVE) else 0 <= value) and value < 2**63


def argument(args: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """An argument under its first name that is there and not None."""
    for each in (name, *OTHER_NAMES.get(name, ())):
        if args.get(each) is not None:
            return args[each]
    return default


def check_arguments(args: Mapping[str, Any]) -> None:
    """ValueError for a setting that A.X K1 does not have."""
    for name, (right, reason) in REQUIRED.items():
        if argument(args, name, right[0]) not in right:
            raise ValueError(
                f"Megatron's {name}={shown(args[name])} is not A.X K1: {reason}; only checkpoints of A.X K1 are converted."
            )
    for name, (right, reason) in REFUSED.items():
        if argument(args, name, right[0]) not in right:
            raise ValueError(f"Megatron's {name}={shown(args[name])} cannot be converted: {reason}.")
    if "q_lora_rank" in args and args["q_lora_rank"] is None:
        raise ValueError(
            "Megatron's q_lora_rank=None is not A.X K1: its queries have a latent; such models are DeepSeek's."
        )


def config_from_arguments(
    args: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    layer_types: list[str],
    has_bias: bool,
    post_mlp_norm: bool,
    mtp_layers: int,
) -> AxK1Config:
    """The config of a Megatron checkpoint: its arguments, and what only its tensors say.

    vocab_size: the true one; `args.vocab_size` where None. layer_types: "dense" or "sparse" a layer, as found.
    ValueError names an argument that is missing, that A.X K1 does not have, or that contradicts the tensors.
    """
    check_arguments(args)
    fields = {field: _required(args, name) for name, field in FIELDS.items()}
    fields["vocab_size"] = _true_vocabulary(args, vocab_size)
    shared, expert = _required(args, "moe_shared_expert_intermediate_size"), fields["moe_intermediate_size"]
    if shared % expert:
        raise ValueError(
            f"moe_shared_expert_intermediate_size={shared} is not a multiple of moe_ffn_hidden_size={expert}; "
            "A.X K1's shared experts are as wide as its routed ones."
        )
    said = layer_types_said(args)
    if said is not None and said != layer_types:
        raise ValueError(
            f"moe_layer_freq says the layers are {said}, the tensors say {layer_types}; one of them is wrong."
        )
    untied = argument(args, "untie_embeddings_and_output_weights", True)
    return AxK1Config(
        **fields,
        **routing_fields(args, has_bias),
        num_key_value_heads=fields["num_attention_heads"],
        n_shared_experts=shared // expert,
        mlp_layer_types=layer_types,
        post_mlp_norm=post_mlp_norm,
        num_nextn_predict_layers=mtp_layers,
        rope_parameters=rope_from_arguments(args),
        rope_interleave=True,
        tie_word_embeddings=not untied,
    )


def _required(args: Mapping[str, Any], name: str) -> Any:
    value = argument(args, name, OPTIONAL.get(name))
    if value is None:
        raise ValueError(
            f"the checkpoint's arguments hold no {name}; A.X K1 cannot be described without it, save it with all arguments."
        )
    return value


def _true_vocabulary(args: Mapping[str, Any], given: int | None) -> int:
    """`given`, or the arguments' own; ValueError if padding it does not give the rows that the checkpoint has."""
    said, padded = args.get("vocab_size"), args.get("padded_vocab_size")
    if given is None and said is None:
        raise ValueError(
            f"the checkpoint does not hold its true vocabulary, only padded_vocab_size={padded}; "
            "give --vocab-size, --tokenizer or --config."
        )
    vocab = said if given is None else given
    divisor = args.get("make_vocab_size_divisible_by")
    if padded is not None and divisor is not None:
        multiple = divisor * (args.get("tensor_model_parallel_size") or 1)
        if vocab + -vocab % multiple != padded:
            raise ValueError(
                f"a vocabulary of {vocab} is padded to {vocab + -vocab % multiple} rows by multiples of {multiple}, the "
                f"checkpoint has {padded}; give the true --vocab-size ({padded} keeps every row)."
            )
    if given is None and args.get("tokenizer_type") == "NullTokenizer" and padded != vocab:
        warnings.warn(
            f"vocab_size={vocab} of a NullTokenizer: some versions of Megatron-LM (0.16) trained one row more, for "
            f"the end of a document, which is cut here; give --vocab-size {vocab + 1} to keep it.",
            stacklevel=2,
        )
    return vocab


def layer_types_said(args: Mapping[str, Any]) -> list[str] | None:
    """What moe_layer_freq says: a number n (every n-th layer from 0), a list of 0 and 1, or such a list as Python text."""
    freq, layers = args.get("moe_layer_freq"), args["num_layers"]
    if isinstance(freq, str):
        freq = _layer_list(freq)
    if freq is None:
        return None
    if type(freq) is int and freq > 0:
        freq = [int(layer % freq == 0) for layer in range(layers)]
    if not isinstance(freq, list | tuple) or not all(type(flag) is int and flag in (0, 1) for flag in freq):
        raise ValueError(
            f"moe_layer_freq={shown(freq)} is neither a number nor a list of 0 and 1; correct the arguments."
        )
    return ["sparse" if flag else "dense" for flag in freq]


def _layer_list(text: str) -> int | list[int]:
    """`([0]*1+[1]*60)` and the like, as Megatron's command line writes them, without evaluating anything."""

    def value(node: ast.AST):
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.List):
            return [value(entry) for entry in node.elts]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return value(node.left) + value(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            left, right = value(node.left), value(node.right)
            if isinstance(left, list) and isinstance(right, int) and 0 <= len(left) * right <= 4096:
                return left * right
        raise ValueError(f"moe_layer_freq={text!r} is neither a number nor a list of 0 and 1; correct the arguments.")

    try:
        # Python's own parser falls over a text that nests deeply enough.
        return value(ast.parse(text.strip() if len(text) <= 4096 else "", mode="eval"))
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"moe_layer_freq={text[:80]!r} is neither a number nor a list of 0 and 1; correct the arguments."
        ) from error


def routing_fields(args: Mapping[str, Any], has_bias: bool) -> dict[str, Any]:
    """Megatron scores a group by its best topk // group_topk experts, transformers by its best two, whatever K."""
    top_k = args["moe_router_topk"]
    groups, top_groups = args.get("moe_router_num_groups"), args.get("moe_router_group_topk")
    # Groups without a number of them to be chosen are no groups to Megatron.
    grouped = (groups or 1) > 1 and bool(top_groups)
    if grouped and top_k // top_groups != 2:
        raise ValueError(
            f"Megatron scores a group by the sum of its moe_router_topk // moe_router_group_topk = {top_k} // {top_groups} "
            "best experts, A.X K1 in transformers and vLLM by its two best; this checkpoint would route differently."
        )
    return {
        "n_group": groups if grouped else 1,
        "topk_group": top_groups if grouped else 1,
        # Without a bias and without groups the choice is the plain one; grouped, zeros stand for the missing bias.
        "topk_method": "noaux_tc" if has_bias or grouped else "greedy",
        "norm_topk_prob": top_k > 1,  # what Megatron does with sigmoid scores
        "routed_scaling_factor": argument(args, "moe_router_topk_scaling_factor", 1.0),
    }


def rope_from_arguments(args: Mapping[str, Any]) -> dict[str, Any]:
    said = {name: argument(args, name, default) for name, default in ROPE_DEFAULTS.items()}
    if "rope_type" not in args and "rotary_scaling_factor" in args and "max_position_embeddings" in args:
        # Up to megatron-core 0.13 there was neither argument, and YaRN started from the context length.
        said["original_max_position_embeddings"] = argument(
            args, "original_max_position_embeddings", args["max_position_embeddings"]
        )
    if said["rope_type"] == "yarn" and said["rotary_scaling_factor"] < 1:
        raise ValueError(
            f"rotary_scaling_factor={said['rotary_scaling_factor']} with rope_type='yarn' shortens the context, which "
            "transformers' YaRN does not; no config describes this checkpoint."
        )
    if said["rope_type"] == "yarn" and said["rotary_scaling_factor"] == 1:
        # A real run's arguments, without --rope-type: YaRN by a factor of 1 is plain RoPE, to the bit.
        return {"rope_type": "default", "rope_theta": float(said["rotary_base"])}
    if said["rope_type"] == "rope":
        if said["mscale_all_dim"] and said["rotary_scaling_factor"] > 1:
            raise ValueError(
                f"rope_type='rope' with mscale_all_dim={said['mscale_all_dim']} scales Megatron's softmax, which plain RoPE "
                "in transformers does not; no config describes this checkpoint."
            )
        return {"rope_type": "default", "rope_theta": float(said["rotary_base"])}
    if said["rope_type"] != "yarn":
        raise ValueError(f"rope_type={shown(said['rope_type'])} is not Megatron's for MLA; use 'rope' or 'yarn'.")
    yarn = {field: float(said[name]) for name, field in YARN_FIELDS.items()}
    yarn["original_max_position_embeddings"] = int(yarn["original_max_position_embeddings"])
    rope = {"rope_type": "yarn", "rope_theta": float(said["rotary_base"]), **yarn}
    # Transformers reads mscale only beside a non-zero mscale_all_dim; where the two would differ the factor is written out.
    if not (yarn["mscale"] and yarn["mscale_all_dim"]) and yarn["mscale"] != 1.0:
        rope["attention_factor"] = megatron_attention_factor(said)
    return rope


def megatron_attention_factor(said: Mapping[str, Any]) -> float:
    """What Megatron multiplies cos and sin by.  [megatron-core, _yarn_get_concentration_factor]"""
    factor = said["rotary_scaling_factor"]

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    return magnitude(said["mscale"]) / magnitude(said["mscale_all_dim"])


def arguments_from_config(config: AxK1Config) -> dict[str, Any]:
    """The inverse: what a Megatron run of this model is given. ValueError for what Megatron cannot compute."""
    check_config(config)
    grouped = config.n_group > 1
    return {
        **{name: getattr(config, field) for name, field in FIELDS.items()},
        **{name: right[0] for name, (right, _) in (REQUIRED | REFUSED).items() if right[0] is not None},
        **arguments_from_rope(config.rope_parameters),
        "norm_epsilon": config.rms_norm_eps,
        "num_moe_experts": config.n_routed_experts,
        "num_query_groups": config.num_attention_heads,
        "kv_channels": config.v_head_dim,
        "vocab_size": config.vocab_size,
        "moe_layer_freq": [int(kind == "sparse") for kind in config.mlp_layer_types],
        "moe_shared_expert_intermediate_size": config.n_shared_experts * config.moe_intermediate_size,
        "moe_router_num_groups": config.n_group if grouped else None,
        "moe_router_group_topk": config.topk_group if grouped else None,
        "moe_router_topk_scaling_factor": config.routed_scaling_factor,
        "moe_router_enable_expert_bias": config.has_router_bias,
        "moe_router_dtype": "fp32",
        "mtp_num_layers": config.num_nextn_predict_layers or None,
        "untie_embeddings_and_output_weights": not config.tie_word_embeddings,
        "add_position_embedding": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "seq_length": config.max_position_embeddings,
    }


def check_config(config: AxK1Config) -> None:
    """ValueError for an A.X K1 that Megatron cannot run."""
    top_k, grouped = config.num_experts_per_tok, config.n_group > 1
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act={config.hidden_act!r} is not what Megatron's swiglu computes; only 'silu' is.")
    if config.attention_bias:
        raise ValueError("attention_bias=True has no place in Megatron's MLA; only models without it can be converted.")
    if not config.rope_interleave:
        raise ValueError("rope_interleave=False is not how Megatron's MLA pairs the RoPE part; it always interleaves.")
    if config.norm_topk_prob != (top_k > 1):
        raise ValueError(
            f"norm_topk_prob={config.norm_topk_prob} with num_experts_per_tok={top_k}: Megatron normalises sigmoid scores "
            "exactly where more than one expert is chosen."
        )
    if grouped and (config.topk_method != "noaux_tc" or top_k // config.topk_group != 2):
        raise ValueError(
            f"topk_method={config.topk_method!r} with num_experts_per_tok // topk_group = {top_k} // {config.topk_group}: "
            "Megatron scores a group by the sum of so many best experts, the model by "
            f"{'its two' if config.topk_method == 'noaux_tc' else 'its one'} best; it would route differently."
        )


def arguments_from_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    if rope["rope_type"] == "default":
        # The factor 1 keeps Megatron's YaRN defaults out of its softmax scale.
        return {"rope_type": "rope", "rotary_base": rope["rope_theta"], "rotary_scaling_factor": 1.0}
    if rope["rope_type"] != "yarn":
        raise ValueError(f"rope_type={rope['rope_type']!r} is not in Megatron's MLA; only default and yarn are.")
    # In JSON, null is what is not said.
    rope = {name: value for name, value in rope.items() if value is not None}
    if rope.get("factor", 0) < 1:
        raise ValueError(
            f"YaRN's factor={rope.get('factor')} is none of Megatron's; use the one trained with, of 1 or more."
        )
    defaults = {field: ROPE_DEFAULTS[name] for name, field in YARN_FIELDS.items() if name != "rotary_scaling_factor"}
    yarn = {name: {**defaults, **rope}[field] for name, field in YARN_FIELDS.items()}
    said = {"rope_type": "yarn", "rotary_base": rope["rope_theta"], **yarn}
    read_back = rope_from_arguments(said)
    ours, megatrons = (each.get("attention_factor", _inferred_factor(each)) for each in (rope, read_back))
    if not math.isclose(ours, megatrons, rel_tol=1e-9) or not rope.get("truncate", True):
        raise ValueError(
            f"rope_parameters={dict(rope)} multiply cos and sin by {ours}, Megatron would by {megatrons} with a range cut to "
            "whole numbers; no arguments of Megatron's say this."
        )
    return said


def _inferred_factor(rope: Mapping[str, Any]) -> float:
    """The attention factor that transformers takes where none is given.  [modeling_rope_utils, YaRN]"""
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    both = (mscale, all_dim) if mscale and all_dim else (1.0, 0.0)
    said = {"rotary_scaling_factor": rope.get("factor", 1.0), "mscale": both[0], "mscale_all_dim": both[1]}
    return megatron_attention_factor(said)
