"""Do Megatron's arguments and the config say the same model, and is each setting that A.X K1 lacks refused?"""

import math
import re

import pytest
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from conversion.config_map import (
    NUMBERS,
    REFUSED,
    REQUIRED,
    arguments_from_config,
    arguments_from_rope,
    check_numbers,
    config_from_arguments,
    layer_types_said,
    megatron_attention_factor,
    rope_from_arguments,
)
from modeling_axk1 import AxK1Config
from tests.random_models import YARN, random_config

# Python prints no whole number of more digits than 4,300.
DIGITS = 10**5000


def found(config):
    """What the tensors of a model say."""
    return {
        "layer_types": config.mlp_layer_types,
        "has_bias": config.has_router_bias,
        "post_mlp_norm": config.post_mlp_norm,
        "mtp_layers": config.num_nextn_predict_layers,
    }


def read_back(config, **changed):
    return config_from_arguments(arguments_from_config(config) | changed, **found(config))


def without_tokens(config):
    return {name: value for name, value in config.to_dict().items() if not name.endswith("token_id")}


@pytest.mark.parametrize("seed", range(40))
def test_there_and_back_is_the_identity(seed):
    config = random_config(seed, attention_bias=False, rope_interleave=True, norm_topk_prob=True)
    if config.num_experts_per_tok == 1:
        config.norm_topk_prob = False
    if config.n_group > 1 and config.num_experts_per_tok // config.topk_group != 2:
        with pytest.raises(ValueError, match="would route differently"):
            arguments_from_config(config)
        return
    assert without_tokens(read_back(config)) == without_tokens(config)


@pytest.mark.parametrize("preset", ["k1", "light"])
def test_presets(preset):
    config = AxK1Config.preset(preset, num_nextn_predict_layers=1)
    assert without_tokens(read_back(config)) == without_tokens(config)


def test_an_absent_rope_type_is_megatrons_yarn():
    """MLA's default in Megatron; taken for plain RoPE, the model would answer wrongly without a warning."""
    rope = rope_from_arguments({})
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 40.0, 4096)


def test_arguments_of_real_runs():
    """Parser defaults: no --rope-type is YaRN by a factor of 1, plain RoPE; up to 0.13 YaRN starts from the context length."""
    assert rope_from_arguments({"rope_type": None, "rotary_scaling_factor": 1.0})["rope_type"] == "default"
    old = {"rotary_scaling_factor": 4.0, "mscale_all_dim": 1.0, "max_position_embeddings": 32768}
    assert rope_from_arguments(old)["original_max_position_embeddings"] == 32768
    assert rope_from_arguments(old | {"rope_type": None})["original_max_position_embeddings"] == 4096


@pytest.mark.parametrize("mscale", [0.0, 0.707, 1.0])
@pytest.mark.parametrize("all_dim", [0.0, 0.707, 1.0])
def test_transformers_scales_cos_and_sin_as_megatron_does(mscale, all_dim):
    said = {"rope_type": "yarn", "rotary_scaling_factor": 4.0, "mscale": mscale, "mscale_all_dim": all_dim}
    config = AxK1Config.preset("nano", rope_parameters=rope_from_arguments(said))
    _, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
    magnitude = {value: 0.1 * value * math.log(4.0) + 1.0 for value in (mscale, all_dim)}
    assert (
        factor
        == pytest.approx(magnitude[mscale] / magnitude[all_dim])
        == pytest.approx(megatron_attention_factor(said))
    )
    again = arguments_from_config(config)
    assert (again["mscale"], again["mscale_all_dim"]) == (mscale, all_dim)


@pytest.mark.parametrize("name", [*REQUIRED, *REFUSED])
def test_settings_that_are_not_axk1s_are_refused_by_name(name):
    wrong = {
        "window_size": (128, 0),
        "moe_single_grouped_weight": True,
        "softmax_type": "learnable",
        "glu_linear_offset": 1.0,
        "no_rope_freq": 4,
        "untie_embeddings_and_output_weights": "yes",
    }
    config = AxK1Config.preset("nano")
    right = (REQUIRED | REFUSED)[name][0]
    value = wrong.get(
        name, not right[0] if isinstance(right[0], bool) else "other" if isinstance(right[0], str) else 0.5
    )
    with pytest.raises(ValueError, match=rf"Megatron's {name}="):
        read_back(config, **{name: value})
    read_back(config, **{name: right[-1]})


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"q_lora_rank": None}, "queries have a latent"),
        ({"kv_lora_rank": None}, "hold no kv_lora_rank"),
        ({"moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk": 6}, r"6 // 2 best experts"),
        ({"moe_router_num_groups": 4, "moe_router_group_topk": 2, "moe_router_topk": 2}, r"2 // 2 best experts"),
        ({"rope_type": "rope", "mscale_all_dim": 1.0, "rotary_scaling_factor": 40}, "scales Megatron's softmax"),
        ({"rope_type": "mrope"}, "use 'rope' or 'yarn'"),
        ({"vocab_size": None, "padded_vocab_size": 640}, "padded_vocab_size=640; give --vocab-size"),
        ({"moe_shared_expert_intermediate_size": 65}, "not a multiple of moe_ffn_hidden_size=64"),
        ({"moe_layer_freq": [0, 0, 1]}, "one of them is wrong"),
        ({"moe_layer_freq": "__import__('os')"}, "neither a number nor a list"),
    ],
)
def test_arguments_that_no_config_describes(changed, complaint):
    with pytest.raises(ValueError, match=complaint):
        read_back(AxK1Config.preset("nano"), **changed)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_interleave": False}, "always interleaves"),
        ({"norm_topk_prob": False}, "norm_topk_prob=False"),
        ({"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}, "its one best"),
        ({"n_group": 4, "topk_group": 2, "num_experts_per_tok": 2}, "its two best"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "only default and yarn"),
        ({"rope_parameters": YARN | {"attention_factor": 3.0}}, "multiply cos and sin by 3.0"),
    ],
)
def test_configs_that_no_arguments_describe(changed, complaint):
    with pytest.raises(ValueError, match=complaint):
        arguments_from_config(AxK1Config.preset("nano", **changed))


@pytest.mark.parametrize("said", [[0, 1, 1, 1], "([0]*1+[1]*3)", "[0, 1, 1, 1]"])
def test_layer_lists(said):
    assert layer_types_said({"moe_layer_freq": said, "num_layers": 4}) == ["dense", "sparse", "sparse", "sparse"]
    assert layer_types_said({"moe_layer_freq": 2, "num_layers": 3}) == ["sparse", "dense", "sparse"]
    assert layer_types_said({"num_layers": 3}) is None


def test_a_null_tokenizer_may_hide_a_row():
    config = AxK1Config.preset("nano")
    args = {"tokenizer_type": "NullTokenizer", "padded_vocab_size": 640}
    with pytest.warns(UserWarning, match="give --vocab-size 513"):
        assert read_back(config, **args).vocab_size == 512


def test_names_of_other_versions():
    config = AxK1Config.preset("nano")
    args = arguments_from_config(config) | {"layernorm_epsilon": None, "norm_epsilon": 1e-6, "num_experts": None}
    assert without_tokens(config_from_arguments(args, **found(config))) == without_tokens(config)


def test_the_choice_without_a_bias():
    """Ungrouped it is the plain one; grouped, zeros stand for the bias, since Megatron sums a group's best two."""
    config = AxK1Config.preset("nano")
    args = arguments_from_config(config) | {"moe_router_topk": 4}
    assert config_from_arguments(args, **found(config) | {"has_bias": False}).topk_method == "greedy"
    grouped = args | {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
    assert config_from_arguments(grouped, **found(config) | {"has_bias": False}).topk_method == "noaux_tc"


@pytest.mark.parametrize(
    "value", ["x", "8", True, [], {}, 1j, math.nan, math.inf, -1, 2**80, DIGITS], ids=lambda value: type(value).__name__
)
def test_what_is_reckoned_with_is_a_number(value):
    """`"%9999999999d" % 8` is a text of ten gigabytes, `[0] * 10**10` a list of eighty; a negative number is no model's."""
    shown = "a .*" if isinstance(value, dict | complex) or value is DIGITS else re.escape(repr(value))
    for name in NUMBERS:
        with pytest.raises(
            ValueError, match=f"argument {name}={shown} is not a .*number .*; the arguments are damaged"
        ):
            check_numbers({name: value})


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("num_layers", 61, 0),
        ("num_layers", 61, 2.5),
        ("tensor_model_parallel_size", 8, 0),
        ("mtp_num_layers", 0, 0.0),
        ("moe_router_group_topk", 0, 4.0),
        ("rotary_base", 10000.0, 0),
        ("original_max_position_embeddings", 4096.0, 0.0),
        ("mscale_all_dim", 0.0, -0.5),
        ("layernorm_epsilon", 0, -1e-5),
    ],
)
def test_the_kinds_of_numbers(name, right, wrong):
    check_numbers({name: right} | dict.fromkeys(NUMBERS.keys() - {name}))
    with pytest.raises(ValueError, match=f"{name}={wrong} is not"):
        check_numbers({name: wrong})


@pytest.mark.parametrize("freq", [0, -1, True, 2.5, {}, [0, 2], [0, "1"], [0, True]], ids=str)
def test_a_layer_frequency_is_a_rule(freq):
    with pytest.raises(ValueError, match="neither a number nor a list of 0 and 1; correct the arguments"):
        layer_types_said({"num_layers": 2, "moe_layer_freq": freq})


def test_groups_of_which_none_are_chosen_are_none():
    """Megatron's router looks at moe_router_group_topk alone.  [megatron-core 0.16.1, topk_routing_with_score_function]"""
    for top_groups in (None, 0):
        assert (
            read_back(AxK1Config.preset("nano"), moe_router_num_groups=4, moe_router_group_topk=top_groups).n_group == 1
        )


def test_what_json_leaves_out_is_transformers_default():
    """YaRN with nulls is YaRN without these fields; its factor has to be there, and 1 is plain RoPE."""
    nulls = dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"))
    bare = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    assert arguments_from_rope(bare | nulls) == arguments_from_rope(bare)
    assert rope_from_arguments(arguments_from_rope(bare | {"factor": 1.0}))["rope_type"] == "default"
    for factor in (None, 0.5):
        with pytest.raises(ValueError, match=f"factor={factor} is none of Megatron's; use the one trained with"):
            arguments_from_rope(bare | {"factor": factor})
    with pytest.raises(ValueError, match="rotary_scaling_factor=0.5 with rope_type='yarn' shortens the context"):
        rope_from_arguments({"rotary_scaling_factor": 0.5})


def test_a_layer_list_is_of_reasonable_length():
    with pytest.raises(ValueError, match="neither a number nor a list"):
        layer_types_said({"num_layers": 4, "moe_layer_freq": "[1]" + "+[1]" * 10**6})
