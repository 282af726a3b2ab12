"""Is a merged adapter the checkpoint that PEFT merges, and an exported one what vLLM's loader expects?"""

import json

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AXK1ForCausalLM

import axk1
from conversion.adapters import export_adapter, merge_adapter
from tests.folders import on_disk
from tests.random_models import ours, random_config
from trainers.adapters import lora_config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, an adapter on every part of it (rank 3, rsLoRA), and what PEFT merges of the two."""
    folder = tmp_path_factory.mktemp("adapters")
    model = ours(random_config(1, first_k_dense_replace=1))
    model.save_pretrained(folder / "model", max_shard_size="40KB")
    parts = ["attention", "shared", "routed", "dense"]
    tuned = get_peft_model(model, lora_config(model, parts, r=3, alpha=5, rslora=True, init_lora_weights=False))
    tuned.save_pretrained(folder / "adapter")
    tuned.merge_and_unload().save_pretrained(folder / "merged")
    return folder


def test_merged_as_a_stream_it_is_what_peft_merges(saved, tmp_path, capsys):
    target = tmp_path / "out"
    assert axk1.main(["adapter", "merge", *map(str, (saved / "model", saved / "adapter", target))]) == 0
    before, truth, found = on_disk(saved / "model"), on_disk(saved / "merged"), on_disk(target)
    assert found.keys() == truth.keys()
    moved = [name for name in truth if not torch.equal(truth[name], before[name])]
    assert sum(".mlp.experts." in name for name in moved) > 10 and any("self_attn.kv_b_proj" in name for name in moved)
    for name, tensor in truth.items():
        if name in moved:
            assert (found[name] - tensor).abs().max() <= 1e-6, name
        else:
            assert torch.equal(found[name], tensor), name
    assert "with" in capsys.readouterr().out
    assert AXK1ForCausalLM.from_pretrained(target).config.n_routed_experts


def test_half_precision_is_rounded_once(saved, tmp_path, monkeypatch):
    """And in blocks of a few rows, as larger matrices are."""
    half = tmp_path / "half"
    half.mkdir()
    save_file(
        {name: tensor.bfloat16() for name, tensor in on_disk(saved / "model").items()}, half / "model.safetensors"
    )
    (half / "config.json").write_text((saved / "model/config.json").read_text())
    whole = on_disk(merge_adapter(half, saved / "adapter", tmp_path / "whole", progress=False))
    monkeypatch.setattr("conversion.adapters.BLOCK_ELEMENTS", 100)
    blocks = on_disk(merge_adapter(half, saved / "adapter", tmp_path / "blocks", progress=False))
    before, full, merged = on_disk(half), on_disk(saved / "model"), on_disk(saved / "merged")
    for name, tensor in whole.items():
        assert torch.equal(blocks[name], tensor), name
        exact = before[name].double() + (merged[name].double() - full[name].double())
        assert (tensor.double() - exact).abs().max() <= exact.abs().max() * 2**-8


def test_exported_every_expert_is_named_as_vllm_names_it(saved, tmp_path, capsys):
    """`...mlp.experts.E.gate_proj.lora_A.weight` of one rank, nothing stacked; B A of each is what PEFT's stack adds."""
    target = tmp_path / "vllm"
    assert axk1.main(["adapter", "export", str(saved / "adapter"), str(target)]) == 0
    assert "vLLM ignores the adapters of model.layers.0.self_attn.kv_b_proj" in " ".join(
        capsys.readouterr().out.split()
    )
    adapter, config = on_disk(target), json.loads((target / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["use_rslora"] and config["target_parameters"] is None
    assert {"gate_proj", "up_proj", "down_proj", "q_a_proj"} <= set(config["target_modules"])
    modules = {name.removeprefix("base_model.model.").rpartition(".lora_")[0] for name in adapter}
    assert not [name for name in modules if name.endswith("experts") or "base_layer" in name]
    before, merged = on_disk(saved / "model"), on_disk(saved / "merged")
    moved = {name.removesuffix(".weight") for name in merged if not torch.equal(merged[name], before[name])}
    assert modules == moved
    for name in moved:
        lora_A, lora_B = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert len(lora_A) == 3 == lora_B.shape[1]
        delta = merged[f"{name}.weight"] - before[f"{name}.weight"]
        assert (5 / 3**0.5 * lora_B @ lora_A - delta).abs().max() <= 1e-6, name


def test_one_matrix_alone(tmp_path):
    """Adapted alone, gate_up_proj is no longer under a base_layer."""
    model = ours(random_config(3))
    tuned = get_peft_model(model, lora_config(model, ["routed"], r=2, init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "both")
    weights = {
        name.replace(".base_layer", ""): tensor
        for name, tensor in load_file(tmp_path / "both/adapter_model.safetensors").items()
        if ".base_layer" in name
    }
    config = json.loads((tmp_path / "both/adapter_config.json").read_text())
    (tmp_path / "one").mkdir()
    save_file(weights, tmp_path / "one/adapter_model.safetensors")
    (tmp_path / "one/adapter_config.json").write_text(
        json.dumps(config | {"target_parameters": ["mlp.experts.gate_up_proj"]})
    )
    export_adapter(tmp_path / "one", tmp_path / "out")
    export_adapter(tmp_path / "both", tmp_path / "out2")
    one, both = on_disk(tmp_path / "out"), on_disk(tmp_path / "out2")
    assert {name.split(".")[-3] for name in one} == {"gate_proj", "up_proj"}
    assert all(torch.equal(both[name], tensor) for name, tensor in one.items())


def edited(saved, tmp_path, **changes):
    folder = tmp_path / "edited"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes((saved / "adapter/adapter_model.safetensors").read_bytes())
    config = json.loads((saved / "adapter/adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"use_dora": True}, "is not plain LoRA (use_dora); merge it with PEFT"),
        ({"rank_pattern": {"x": 2}}, "is not plain LoRA (rank_pattern)"),
        ({"peft_type": "IA3"}, "is not plain LoRA (IA3)"),
        ({"init_lora_weights": "pissa"}, "is not plain LoRA (init_lora_weights='pissa')"),
        ({"layer_replication": [[0, 1], [0, 1]]}, "is not plain LoRA (layer_replication)"),
        ({"alora_invocation_tokens": [1]}, "is not plain LoRA (alora_invocation_tokens)"),
        ({"kasa_config": {"beta": 1.0}}, "is not plain LoRA (kasa_config)"),
        ({"r": None}, "says r=None and lora_alpha=5, no rank and number"),
        ({"r": 2}, "no pair of rank 2; save the adapter again"),
        ({"lora_alpha": "5"}, "says r=3 and lora_alpha='5'"),
        ({"target_parameters": None}, "does not say which matrices of the experts are adapted"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_more_than_lora_is_refused(saved, tmp_path, changes, says):
    with pytest.raises(ValueError) as error:
        export_adapter(edited(saved, tmp_path, **changes), tmp_path / "out")
    assert says in str(error.value) and not (tmp_path / "out").exists()


def test_another_models_adapter_is_refused(saved, tmp_path):
    ours(random_config(1, num_hidden_layers=2)).save_pretrained(tmp_path / "short")
    with pytest.raises(ValueError, match="give the model that the adapter was trained on"):
        merge_adapter(tmp_path / "short", saved / "adapter", tmp_path / "out")
    ours(random_config(1, first_k_dense_replace=1, q_lora_rank=30)).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match=r"is \[30, 48\] but its adapter \[22, 48\]; give the model"):
        merge_adapter(tmp_path / "wide", saved / "adapter", tmp_path / "out", progress=False)
    (tmp_path / "wide/config.json").unlink()
    with pytest.raises(ValueError, match="config.json is missing; give the folder of a model"):
        merge_adapter(tmp_path / "wide", saved / "adapter", tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="has no adapter_config.json"):
        merge_adapter(saved / "model", saved / "model", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_misfit_shows_before_the_first_byte(saved, tmp_path, monkeypatch):
    ours(random_config(1, first_k_dense_replace=1, q_lora_rank=30)).save_pretrained(tmp_path / "wide")
    monkeypatch.setattr("conversion.adapters.Job", lambda *args: pytest.fail("a job was begun"))
    with pytest.raises(ValueError, match=r"is \[30, 48\] but its adapter \[22, 48\]"):
        merge_adapter(tmp_path / "wide", saved / "adapter", tmp_path / "out", progress=False)


def test_a_damaged_adapter_is_refused_in_a_sentence(saved, tmp_path):
    folder = edited(saved, tmp_path)
    weights = folder / "adapter_model.safetensors"
    whole = load_file(weights)
    alone = next(name for name in whole if "lora_B" in name)
    save_file({name: tensor for name, tensor in whole.items() if name != alone}, weights)
    with pytest.raises(ValueError, match=r"lora_B \[\] of .*, no pair of rank 3"):
        export_adapter(folder, tmp_path / "out")
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match="adapter_model.safetensors is truncated"):
        export_adapter(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_an_export_takes_no_merge_away(saved, tmp_path, monkeypatch):
    """And of its own nothing is left when it fails."""
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/model.safetensors").write_text("hours of work")
    with pytest.raises(ValueError, match="out.partial exists already"):
        export_adapter(saved / "adapter", tmp_path / "out")
    assert (tmp_path / "out.partial/model.safetensors").read_text() == "hours of work"
    monkeypatch.setattr("conversion.adapters.save_file", lambda *args, **more: (tmp_path / "gone").read_bytes())
    with pytest.raises(FileNotFoundError):
        export_adapter(saved / "adapter", tmp_path / "other")
    assert not list(tmp_path.glob("other*"))
