"""Does the configuration hold the released numbers, read what is in the wild and write what others need?"""

import json
import math

import pytest
import torch
from transformers import AutoConfig
from transformers.models.axk1.configuration_axk1 import AXK1Config

from modeling_axk1 import AxK1Config, AxK1ForCausalLM, count_parameters
from modeling_axk1.configuration_axk1 import compatibility_warnings
from tests.random_models import YARN, random_config

WRITTEN = (
    "topk_method scoring_func first_k_dense_replace moe_layer_freq mlp_layer_types num_nextn_predict_layers n_group topk_group"
).split()


def built_parameters(config: AxK1Config) -> int:
    with torch.device("meta"):
        model = AxK1ForCausalLM(config)
    return sum(p.numel() for p in model.parameters())


def test_k1_has_the_released_parameter_count():
    config = AxK1Config.preset("k1")
    assert built_parameters(config) == count_parameters(config)["total"] == 518_983_059_456
    assert round(count_parameters(config)["active"] / 1e9, 2) == 32.78


def test_light_is_20b_a3b_at_k1s_proportions():
    k1, light = AxK1Config.preset("k1"), AxK1Config.preset("light")
    counts = count_parameters(light)
    assert 19.5e9 < counts["total"] < 20.5e9 and 2.5e9 < counts["active"] < 3.5e9
    for field in ("intermediate_size", "moe_intermediate_size", "num_attention_heads", "q_lora_rank"):
        assert getattr(light, field) * k1.hidden_size == getattr(k1, field) * light.hidden_size
    assert built_parameters(light) == counts["total"]


@pytest.mark.parametrize("seed", range(20))
def test_parameters_are_exact(seed):
    config = random_config(seed, post_mlp_norm=seed % 4 != 0)
    counts = count_parameters(config)
    assert counts["total"] == built_parameters(config)
    assert counts["total"] == sum(v for k, v in counts.items() if k not in ("total", "active"))


def test_presets_do_not_share_state():
    AxK1Config.preset("k1").rope_parameters["factor"] = 99.0
    assert AxK1Config.preset("k1").rope_parameters["factor"] == 4.0
    with pytest.raises(ValueError, match="k1, light, nano"):
        AxK1Config.preset("huge")


def written(config: AxK1Config, tmp_path) -> dict:
    config.save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text())


def test_writes_what_stock_and_vllm_need(tmp_path):
    file = written(AxK1Config.preset("nano", n_group=None, topk_group=None), tmp_path)
    assert file["model_type"] == "axk1"
    assert set(WRITTEN) <= file.keys()
    assert (file["n_group"], file["topk_group"], file["topk_method"]) == (1, 1, "noaux_tc")
    assert (file["first_k_dense_replace"], file["moe_layer_freq"]) == (1, 1)
    stock = AXK1Config.from_pretrained(tmp_path)
    assert stock.mlp_layer_types == ["dense", "sparse", "sparse"] and stock.n_group == 1


def test_a_whole_number_is_written_as_stock_reads_it(tmp_path):
    AxK1Config.preset("nano", routed_scaling_factor=1, router_aux_loss_coef=0).save_pretrained(tmp_path)
    assert AXK1Config.from_pretrained(tmp_path).routed_scaling_factor == 1.0


def test_architectures_carry_the_name_that_others_look_up(tmp_path):
    config = AxK1Config.preset("nano", architectures=["AxK1ForCausalLM"])
    assert written(config, tmp_path)["architectures"] == ["AXK1ForCausalLM"]


@pytest.mark.parametrize("model_type", ["axk1", "AXK1"])
@pytest.mark.parametrize("load", [AutoConfig, AxK1Config])
def test_reads_configs_in_the_wild(model_type, load, tmp_path):
    """A remote-code style file: old RoPE name, null groups, frequency rule, auto_map, a wrong head_dim."""
    raw = {
        "model_type": model_type,
        "architectures": ["AXK1ForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_AXK1.AXK1Config"},
        "num_hidden_layers": 5,
        "first_k_dense_replace": 2,
        "moe_layer_freq": 2,
        "n_group": None,
        "topk_group": None,
        "rope_theta": 5000.0,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        "max_position_embeddings": 131072,
        "head_dim": 112,
        "torch_dtype": "bfloat16",
        "ep_size": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = load.from_pretrained(tmp_path)
    assert type(config) is AxK1Config and config.model_type == "axk1"
    assert config.mlp_layer_types == ["dense", "dense", "sparse", "dense", "sparse"]
    assert (config.n_group, config.topk_group, config.topk_method) == (1, 1, "noaux_tc")
    assert config.rope_parameters["rope_type"] == "yarn" and config.rope_parameters["rope_theta"] == 5000.0
    assert config.head_dim == config.qk_rope_head_dim
    assert config.dtype == torch.bfloat16
    file = written(config, tmp_path)
    assert file["model_type"] == "axk1" and "auto_map" not in file
    assert (file["first_k_dense_replace"], file["moe_layer_freq"]) == (2, 2)
    assert AxK1Config.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()


def test_greedy_is_ungrouped_for_everyone(tmp_path):
    file = written(AxK1Config.preset("k1", topk_method="greedy"), tmp_path)
    assert (file["n_group"], file["topk_group"]) == (1, 1)


def test_k1_yarn_scales_cos_and_sin_but_not_the_softmax():
    from modeling_axk1.modeling_axk1 import AxK1Attention, AxK1RotaryEmbedding

    config = AxK1Config.preset("k1")
    with torch.device("meta"):
        attention = AxK1Attention(config, 0)
    assert attention.scaling == pytest.approx(192**-0.5)
    assert AxK1RotaryEmbedding(config).attention_scaling == pytest.approx(1.1386, abs=1e-4)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"n_group": 5}, "use a divisor of 192"),
        ({"topk_group": 9}, r"outside 1..n_group=8"),
        ({"n_group": 192, "topk_group": 8}, "two best experts"),
        ({"num_experts_per_tok": 97}, r"outside 1..96"),
        ({"num_experts_per_tok": 0}, r"outside 1..96"),
        ({"qk_rope_head_dim": 63}, "use an even size"),
        ({"topk_method": "best"}, "noaux_tc, group_limited_greedy, greedy"),
        ({"scoring_func": "softmax"}, "use 'sigmoid'"),
        ({"mlp_layer_types": ["dense"] * 3}, "names 3 layers but num_hidden_layers=61"),
        ({"mlp_layer_types": ["moe"] * 61}, "use 'dense' and 'sparse' only"),
        ({"q_lora_rank": None}, "q_lora_rank=None is not a positive whole number"),
        ({"hidden_size": "7168"}, "hidden_size='7168' is not a positive whole number"),
        ({"first_k_dense_replace": -1}, "use 0 or more"),
        ({"moe_layer_freq": "x"}, "use a number or a list"),
        ({"n_group": -1}, "use 1 for ungrouped"),
        ({"n_group": 0}, "use 1 for ungrouped"),
        ({"n_group": "8"}, "use 1 for ungrouped"),
        ({"topk_group": 0}, "topk_group=0 is not a positive whole number"),
        ({"num_experts_per_tok": None}, r"outside 1..96"),
        ({"moe_layer_freq": 0}, "1 for all layers"),
        ({"moe_layer_freq": True}, "1 for all layers"),
        ({"first_k_dense_replace": 1.5}, "use 0 or more"),
        ({"num_nextn_predict_layers": -1}, "use 0 or more"),
        ({"rms_norm_eps": -1e-6}, "outside 0 to 1"),
        ({"attention_dropout": 2.0}, "outside 0 to 1"),
        ({"router_aux_loss_coef": -0.1}, "outside 0 to inf"),
        ({"routed_scaling_factor": "2.5"}, "outside 0 to inf"),
        ({"hidden_act": "swiglu"}, "no activation of transformers"),
        ({"moe_layer_freq": [0, 1]}, "names 2 layers but num_hidden_layers=61"),
        ({"mlp_layer_types": 5}, "mlp_layer_types=5 is no list"),
        ({"mlp_layer_types": [["dense"]] * 61}, "use 'dense' and 'sparse' only"),
        ({"topk_method": []}, "noaux_tc, group_limited_greedy, greedy"),
        ({"hidden_act": ["silu"]}, "no activation of transformers"),
        ({"routed_scaling_factor": math.inf}, "outside 0 to inf"),
        ({"attention_bias": "false"}, "attention_bias='false' is neither true nor false"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings=0 is neither true nor false"),
        ({"eos_token_id": [1, "2"]}, r"eos_token_id=\[1, '2'\] is no token's number"),
        ({"bos_token_id": 2.5}, "bos_token_id=2.5 is no token's number"),
        ({"rope_parameters": 5}, "rope_parameters=5 has no fields"),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn' has no fields"),
        ({"rope_theta": "x"}, "has rope_theta='x', not a number above 0"),
        (YARN | {"rope_type": "yarns"}, "rope_type='yarns' is none of transformers'"),
        (YARN | {"rope_type": ["yarn"]}, r"rope_type=\['yarn'\] is none of transformers'"),
        (YARN | {"truncate": 1}, "truncate=1, neither true nor false"),
        (YARN | {"factor": "x"}, "has factor='x', not a number above 0"),
        (YARN | {"factor": True}, "has factor=True, not a number above 0"),
        (YARN | {"factor": -4.0}, "has factor=-4.0, not a number above 0"),
        (YARN | {"original_max_position_embeddings": None}, "has original_max_position_embeddings=None, not a number"),
        (YARN | {"beta_fast": math.nan}, "has beta_fast=nan, not a number above 0"),
        (YARN | {"beta_slow": 0}, "has beta_slow=0, not a number above 0"),
        (YARN | {"attention_factor": math.inf}, "has attention_factor=inf, not a number above 0"),
        (YARN | {"mscale": -0.1}, "has mscale=-0.1, not a number of 0 or more"),
        (YARN | {"mscale_all_dim": [1]}, r"has mscale_all_dim=\[1\], not a number of 0 or more"),
    ],
)
def test_bad_values_are_refused_in_one_sentence(fields, message):
    fields = {"rope_parameters": fields} if "rope_type" in fields else fields
    with pytest.raises(ValueError, match=message) as error:
        AxK1Config(**fields)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"post_mlp_norm": False}, "cannot run"),
        ({"num_key_value_heads": 8}, "write 64"),
        ({"topk_method": "group_limited_greedy"}, "routes differently"),
        ({"mlp_layer_types": ["dense", "sparse", "dense", "dense"], "num_hidden_layers": 4}, "vLLM cannot"),
    ],
)
def test_what_others_would_run_differently_warns_on_save(fields, message, tmp_path, caplog):
    config = AxK1Config(**fields)
    (warning,) = compatibility_warnings(config)
    assert message in warning
    from transformers.utils import logging

    logging.enable_propagation()
    config.save_pretrained(tmp_path)
    logging.disable_propagation()
    assert message in caplog.text
    assert compatibility_warnings(AxK1Config()) == []
