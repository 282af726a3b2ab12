"""Is the table whole, does it read the same in both directions, and does it list what does not fit?"""

import zlib

import pytest
import torch
from safetensors.torch import load_file

from conversion.ops import cat, cat_halves, filled, read, stored
from conversion.weight_map import (
    COLUMNS,
    HALVES,
    POST_NORM_NAMES,
    add_absent,
    hf_to_megatron,
    local_name,
    megatron_to_hf,
    modules_with_state,
    rows_of,
    shards_of,
    te_name,
)
from modeling_axk1 import AxK1Config, count_parameters
from tests.random_models import ours, random_config


def numbers(rows):
    return sum(torch.Size(row.shape).numel() for row in rows if not row.megatron.endswith("expert_bias"))


@pytest.mark.parametrize("preset", ["k1", "light", "nano"])
def test_the_table_holds_every_parameter_once(preset):
    config = AxK1Config.preset(preset)
    rows = rows_of(config)
    assert numbers(rows) == count_parameters(config)["total"]
    for names in ([row.megatron for row in rows], [name for row in rows for name in row.hf]):
        assert len(names) == len(set(names))


@pytest.mark.parametrize("seed", range(12))
def test_hugging_face_names_are_those_of_the_saved_model(tmp_path, seed):
    overrides = {"post_mlp_norm": False} if seed == 3 else {"topk_method": "greedy"} if seed == 4 else {}
    config = random_config(seed, attention_bias=False, **overrides)
    model = ours(config)
    model.save_pretrained(tmp_path)
    saved = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    table = {name: (row.shape[0] // len(row.hf), *row.shape[1:]) for row in rows_of(config) for name in row.hf}
    assert table == saved


def on_disk(folder, rows):
    """A random tensor for each Hugging Face name, in one file each."""
    tensors = {}
    for row in rows:
        for name in row.hf:
            shape = (row.shape[0] // len(row.hf), *row.shape[1:])
            path = folder / name
            numbers = torch.rand(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            path.write_bytes(numbers.numpy().tobytes())
            tensors[name] = stored(path, 0, torch.float32, shape)
    return tensors


def test_there_and_back_is_the_identity(tmp_path):
    config = AxK1Config.preset("nano", num_nextn_predict_layers=2)
    rows = rows_of(config)
    tensors = on_disk(tmp_path, rows)
    megatron = hf_to_megatron(rows, tensors)
    assert "mtp.layers.1.transformer_layer.mlp.experts.local_experts.7.linear_fc1.weight" in megatron
    back = megatron_to_hf(rows, megatron)
    assert list(back) == [name for row in rows for name in row.hf]
    for name in tensors:
        assert torch.equal(read(back[name]), read(tensors[name]))
    fused = read(megatron["decoder.layers.1.mlp.shared_experts.linear_fc1.weight"])
    gate, up = (read(tensors[f"model.layers.1.mlp.shared_experts.{half}_proj.weight"]) for half in ("gate", "up"))
    assert torch.equal(fused, torch.cat([gate, up]))


def test_shards_join_to_the_whole(tmp_path):
    rows = rows_of(AxK1Config.preset("nano"))
    tensors = hf_to_megatron(rows, on_disk(tmp_path, rows))
    for row in rows:
        whole = tensors[row.megatron]
        parts = shards_of(row, whole, 2, replicate_down=False)
        if parts[0] == whole:
            assert row.split == "replicated"
            continue
        joined = cat_halves(parts) if row.split == HALVES else cat(parts, 1 if row.split == COLUMNS else 0)
        assert torch.equal(read(joined), read(whole)), row
    down = next(row for row in rows if row.split == "down")
    assert shards_of(down, tensors[down.megatron], 2, replicate_down=True) == [tensors[down.megatron]] * 2
    with pytest.raises(ValueError, match="does not split over 3 tensor-parallel ranks"):
        shards_of(down, tensors[down.megatron], 3, replicate_down=False)


def test_what_does_not_fit_is_listed(tmp_path):
    rows = rows_of(AxK1Config.preset("nano"))
    tensors = on_disk(tmp_path, rows)
    left = tensors | {"model.layers.9.surprise.weight": tensors["model.norm.weight"]}
    del left["lm_head.weight"]
    with pytest.raises(ValueError, match=r"missing \[lm_head.weight\], left over \[model.layers.9.surprise.weight\]"):
        hf_to_megatron(rows, left)
    wrong = tensors | {"model.norm.weight": filled(torch.float32, (5,), 0)}
    with pytest.raises(ValueError, match=r"model.norm.weight \[5\] instead of \[128\]"):
        hf_to_megatron(rows, wrong)


def test_constants_only_where_they_mean_nothing():
    config = AxK1Config.preset("nano")
    rows = rows_of(config)
    tensors = {row.hf[0]: filled(torch.bfloat16, row.shape, 0.5) for row in rows if len(row.hf) == 1}
    absent = ["model.layers.0.post_mlp_layernorm.weight", "model.layers.2.mlp.gate.e_score_correction_bias"]
    for name in [*absent, "model.layers.1.post_mlp_layernorm.weight"]:
        del tensors[name]
    assert sorted(add_absent(config, rows, tensors, lambda row: row.hf[0])) == absent
    assert read(tensors[absent[0]]).tolist() == [1.0] * 128 and tensors[absent[0]].dtype == torch.bfloat16
    assert read(tensors[absent[1]]).tolist() == [0.0] * 8 and tensors[absent[1]].dtype == torch.float32
    # A norm that is applied has no neutral value.
    assert "model.layers.1.post_mlp_layernorm.weight" not in tensors


@pytest.mark.parametrize(
    ("name", "local"),
    [
        (
            "decoder.layers.3.mlp.experts.linear_fc1.weight11",
            "decoder.layers.3.mlp.experts.local_experts.11.linear_fc1.weight",
        ),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", "decoder.layers.0.pre_mlp_layernorm.weight"),
        ("module.decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
        ("mtp.layers.0.mtp_model_layer.mlp.router.weight", "mtp.layers.0.transformer_layer.mlp.router.weight"),
        *(
            (f"decoder.layers.2.{norm}.weight", "decoder.layers.2.post_mlp_layernorm.weight")
            for norm in POST_NORM_NAMES
        ),
        ("decoder.layers.2.mlp.linear_fc1.weight", "decoder.layers.2.mlp.linear_fc1.weight"),
    ],
)
def test_aliases(name, local):
    assert local_name(name) == local


def test_transformer_engines_names_and_back():
    config = AxK1Config.preset("nano", num_nextn_predict_layers=1)
    renamed = 0
    for row in rows_of(config):
        dense = row.megatron.startswith("decoder.layers.0.")
        there = te_name(row.megatron, dense)
        renamed += there != row.megatron
        assert local_name(there) == row.megatron
    assert renamed > 20


def test_state_is_kept_by_linear_layers_and_in_transformer_engine_by_norms():
    names = ["a.linear_proj.weight", "a.linear_proj.layer_norm_weight", "a.q_layernorm.weight", "a.router.weight"]
    names.append("mtp.eh_proj.weight")
    assert modules_with_state(names, transformer_engine=False) == ["a.linear_proj", "mtp.eh_proj"]
    assert modules_with_state(names, transformer_engine=True) == ["a.linear_proj", "a.q_layernorm", "mtp.eh_proj"]
