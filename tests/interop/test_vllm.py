"""Does what we write fit vLLM's loader?  Its published rules, applied to names, shapes and config without vLLM.

The rules are those of its `models/AXK1.py` and `model_loader/default_loader.py`, written here once more and in another way than
in conversion/doctor.py: which parameters its model has, which of them each tensor of a file fills, and what it stops at.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.axk1.modeling_axk1 import AXK1ForCausalLM

from conversion.doctor import diagnose
from modeling_axk1 import AxK1ForCausalLM
from tests.folders import on_disk
from tests.random_models import ours, random_config

# A tensor's name, the parameter that holds it, and which part of that parameter it is.
STACKED = {
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
    "q_a_proj": ("fused_qkv_a_proj", 0),
    "kv_a_proj_with_mqa": ("fused_qkv_a_proj", 1),
}
EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
EXPERT_PARTS = {"gate": ("w13_weight", 0), "up": ("w13_weight", 1), "down": ("w2_weight", 0)}


def parameters(said: dict) -> dict[str, dict[tuple, tuple[int, ...]]]:
    """vLLM's parameters, each with its parts and their shapes, from config.json alone."""
    hidden, heads, width = said["hidden_size"], said["num_attention_heads"], said["moe_intermediate_size"]
    queries = heads * (said["qk_nope_head_dim"] + said["qk_rope_head_dim"])
    keys_values = heads * (said["qk_nope_head_dim"] + said["v_head_dim"])
    latent = said["kv_lora_rank"]
    found = {
        "model.embed_tokens.weight": {(): (said["vocab_size"], hidden)},
        "model.norm.weight": {(): (hidden,)},
        "lm_head.weight": {(): (said["vocab_size"], hidden)},
    }
    for index in range(said["num_hidden_layers"]):
        layer = {
            "self_attn.fused_qkv_a_proj.weight": {
                (0,): (said["q_lora_rank"], hidden),
                (1,): (latent + said["qk_rope_head_dim"], hidden),
            },
            "self_attn.q_a_layernorm.weight": {(): (said["q_lora_rank"],)},
            "self_attn.q_b_proj.weight": {(): (queries, said["q_lora_rank"])},
            "self_attn.kv_a_layernorm.weight": {(): (latent,)},
            "self_attn.kv_b_proj.weight": {(): (keys_values, latent)},
            "self_attn.o_proj.weight": {(): (hidden, heads * said["v_head_dim"])},
            "input_layernorm.weight": {(): (hidden,)},
            "post_attention_layernorm.weight": {(): (hidden,)},
            "post_mlp_layernorm.weight": {(): (hidden,)},
        }
        sparse = index >= said["first_k_dense_replace"] and index % said["moe_layer_freq"] == 0
        mlp, inner = (
            ("mlp.shared_experts", said["n_shared_experts"] * width) if sparse else ("mlp", said["intermediate_size"])
        )
        layer[f"{mlp}.gate_up_proj.weight"] = {(half,): (inner, hidden) for half in (0, 1)}
        layer[f"{mlp}.down_proj.weight"] = {(): (hidden, inner)}
        if sparse:
            experts = range(said["n_routed_experts"])
            layer["mlp.gate.weight"] = {(): (len(experts), hidden)}
            layer["mlp.experts.w13_weight"] = {(e, half): (width, hidden) for e in experts for half in (0, 1)}
            layer["mlp.experts.w2_weight"] = {(e, 0): (hidden, width) for e in experts}
            if said["topk_method"] == "noaux_tc":
                layer["mlp.gate.e_score_correction_bias"] = {(): (len(experts),)}
        found |= {f"model.layers.{index}.{name}": parts for name, parts in layer.items()}
    return found


def place_of(name: str) -> tuple[str, tuple]:
    if match := EXPERT.fullmatch(name):
        parameter, half = EXPERT_PARTS[match[3]]
        return f"{match[1]}.{parameter}", (int(match[2]), half)
    for part, (parameter, half) in STACKED.items():
        if f".{part}." in name:
            return name.replace(part, parameter), (half,)
    return name, ()


def vllm_loads(folder: Path) -> list[str]:
    """What vLLM would stop at: tensors without a place or of another size, parameters that nothing fills."""
    said = json.loads((folder / "config.json").read_text())
    waiting, stops = parameters(said), []
    later = range(said["num_hidden_layers"], said["num_hidden_layers"] + (said["num_nextn_predict_layers"] or 0))
    for name, tensor in on_disk(folder).items():
        if any(name.startswith(f"model.layers.{layer}.") for layer in later):
            continue
        parameter, part = place_of(name)
        if part not in waiting.get(parameter, {}):
            stops.append(f"{name} has no place")
        elif waiting[parameter].pop(part) != tuple(tensor.shape):
            stops.append(f"{name} is {tuple(tensor.shape)}")
    return stops + [f"{name} is not filled" for name, parts in waiting.items() if parts]


FITTING = {"attention_bias": False, "tie_word_embeddings": False, "rope_interleave": True}


@pytest.mark.parametrize("seed, method", [(1, "noaux_tc"), (2, "noaux_tc"), (4, "group_limited_greedy"), (3, "greedy")])
def test_what_we_write_fits(seed, method, tmp_path):
    ours(random_config(seed, topk_method=method, **FITTING)).save_pretrained(tmp_path)
    assert vllm_loads(tmp_path) == []
    assert diagnose(tmp_path).errors("vLLM") == []
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["architectures"] == ["AXK1ForCausalLM"] and "auto_map" not in said


def test_a_resave_by_transformers_does_not_fit_and_ours_mends_it(tmp_path):
    ours(random_config(1, first_k_dense_replace=1, **FITTING)).save_pretrained(tmp_path / "ours")
    AXK1ForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "stock")
    # The files and the doctor agree on the one tensor.
    assert vllm_loads(tmp_path / "stock") == ["model.layers.0.post_mlp_layernorm.weight is not filled"]
    [error] = diagnose(tmp_path / "stock").errors("vLLM")
    assert "model.layers.0.post_mlp_layernorm.weight" in error.fact
    AxK1ForCausalLM.from_pretrained(tmp_path / "stock").save_pretrained(tmp_path / "mended")
    assert vllm_loads(tmp_path / "mended") == []
    mended, before = (load_file(tmp_path / name / "model.safetensors") for name in ("mended", "ours"))
    unused = "model.layers.0.post_mlp_layernorm.weight"
    assert torch.equal(mended.pop(unused), torch.ones_like(before.pop(unused)))
    assert all(torch.equal(mended[name], before[name]) for name in before | mended)
