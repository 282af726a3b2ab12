"""Does a checkpoint get from Megatron to Hugging Face and back without losing a bit, whatever happens on the way?"""

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AXK1ForCausalLM

import axk1
from conversion import Reading, convert_to_hf, convert_to_megatron, inspect, to_hf, to_megatron, verify
from conversion.checkpoint import HashedFile, TensorSpec, plan_shards, shard_header, write_index
from conversion.convert import Conversion
from conversion.weight_map import rows_of
from modeling_axk1 import AxK1Config, AxK1ForCausalLM
from modeling_axk1.modeling_axk1 import AxK1DecoderLayer, AxK1RMSNorm
from tests.conversion.megatron_files import (
    FIXTURES,
    LAYOUTS,
    PLAIN,
    checkpoints,
    group_experts,
    load_rank_file,
    models_in,
    reference,
)
from tests.folders import assert_same_bits, contents, on_disk
from tests.random_models import ours, random_config, tiny_chat_config
from tests.tolerances import MEGATRON
from trainers.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
SOURCE = FIXTURES / "tp2_pp2_ep2_etp1" / "torch_dist"
# Every kind of parallelism, alone and together, in both formats.
TARGETS = [
    {"format": "torch_dist"},
    {"format": "torch_dist", "tp": 4, "transformer_engine": True},
    {"format": "legacy"},
    {"format": "legacy", "tp": 2},
    {"format": "legacy", "tp": 2, "etp": 1, "ep": 2},
    {"format": "legacy", "tp": 2, "ep": 4, "etp": 1},
    {"format": "legacy", "tp": 4, "ep": 2, "etp": 2, "transformer_engine": True},
    {"format": "legacy", "pp": 2, "vpp": 2, "ep": 2},
    {"format": "legacy", "pp": 3, "first_stage_layers": 1, "last_stage_layers": 1, "tp": 2},
]


def named(target):
    return "-".join(f"{key[:3]}{value}" if value is not True else "te" for key, value in target.items())


@pytest.mark.parametrize(("layout", "kind"), checkpoints(), ids="-".join)
def test_logits_are_megatrons(tmp_path, layout, kind):
    convert_to_hf(FIXTURES / layout / kind, tmp_path / "hf", progress=False)
    truth = reference(layout)
    for cls in (AxK1ForCausalLM, AXK1ForCausalLM):
        with torch.inference_mode():
            logits = cls.from_pretrained(tmp_path / "hf").eval()(truth["input_ids"]).logits
        torch.testing.assert_close(logits, truth["logits"], atol=MEGATRON, rtol=0)
    assert truth["logits"].abs().max() > 1


@pytest.mark.parametrize("kind", ["legacy", "torch_dist"])
def test_multi_token_prediction_is_megatrons(tmp_path, kind):
    """The layer behind the last: norms of the next token's embedding and of the hidden state, joined, one block, the head."""
    convert_to_hf(FIXTURES / "mtp_pp2" / kind, tmp_path / "hf", progress=False)
    tensors, truth = on_disk(tmp_path / "hf"), reference("mtp_pp2")
    model = AxK1ForCausalLM.from_pretrained(tmp_path / "hf").eval()
    config = model.config
    assert config.num_nextn_predict_layers == 1
    weights = {
        name.removeprefix("model.layers.4."): t for name, t in tensors.items() if name.startswith("model.layers.4.")
    }
    block = AxK1DecoderLayer(config, config.num_hidden_layers - 1).eval()
    experts = {
        part: torch.stack([weights.pop(f"mlp.experts.{e}.{part}_proj.weight") for e in range(config.n_routed_experts)])
        for part in ("gate", "up", "down")
    }
    weights["mlp.experts.gate_up_proj"] = torch.cat([experts["gate"], experts["up"]], dim=1)
    weights["mlp.experts.down_proj"] = experts["down"]
    weights["mlp.post_mlp_layernorm.weight"] = weights.pop("post_mlp_layernorm.weight")
    head = {
        name: weights.pop(name)
        for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight")
    }
    block.load_state_dict(weights)

    def norm(x, name):
        layer = AxK1RMSNorm(config.hidden_size, config.rms_norm_eps)
        layer.weight.data = head[name]
        return layer(x)

    input_ids = truth["input_ids"]
    with torch.inference_mode():
        hidden = model.model(input_ids).last_hidden_state
        # Megatron rolls the ids; the last position sees the first token, or nothing: it is left out below.
        following = model.model.embed_tokens(input_ids.roll(-1, 1))
        joined = (
            torch.cat([norm(following, "enorm.weight"), norm(hidden, "hnorm.weight")], -1) @ head["eh_proj.weight"].t()
        )
        positions = torch.arange(input_ids.shape[1])[None]
        mask = torch.full((1, 1, 24, 24), float("-inf")).triu(1)
        out = block(joined, attention_mask=mask, position_embeddings=model.model.rotary_emb(joined, positions))
        out = out[0] if isinstance(out, tuple) else out
        logits = model.lm_head(norm(out, "shared_head.norm.weight"))
    torch.testing.assert_close(logits[:, :-1], truth["mtp_logits"][0][:, :-1], atol=MEGATRON, rtol=0)


def test_layouts_of_one_model_give_the_same_bits(tmp_path):
    folders = [convert_to_hf(FIXTURES / layout / "legacy", tmp_path / layout, progress=False).path for layout in PLAIN]
    first, *others = [on_disk(folder) for folder in folders]
    for other in others:
        assert_same_bits(first, other)
    assert_same_bits(first, on_disk(convert_to_hf(SOURCE, tmp_path / "dist", progress=False).path))
    # And two models are told apart.
    assert len(verify(SOURCE, FIXTURES / "te_tp2_ep2_etp1" / "legacy", progress=False)) > 50


def saved_model(folder, seed=3, dtype=torch.float32, **overrides):
    """A random A.X K1 that every target can hold, as Hugging Face's folder; odd sizes, mixed dtypes."""
    fixed = {
        "attention_bias": False,
        "rope_interleave": True,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 12,
        "vocab_size": 67,
    }
    model = ours(random_config(seed, **fixed | overrides))
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("target", TARGETS, ids=named)
def test_hugging_face_to_megatron_and_back_loses_nothing(tmp_path, target):
    hf = saved_model(tmp_path / "hf", dtype=torch.bfloat16)
    convert_to_megatron(hf, tmp_path / "megatron", progress=False, **target)
    convert_to_hf(tmp_path / "megatron", tmp_path / "back", progress=False)
    assert_same_bits(on_disk(hf), on_disk(tmp_path / "back"))
    bias = on_disk(tmp_path / "back")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32 and bias.abs().sum() > 0
    before, after = (AxK1Config.from_pretrained(folder).to_dict() for folder in (hf, tmp_path / "back"))
    assert {key for key in before if before[key] != after[key]} <= {"transformers_version"}


@pytest.mark.parametrize(
    "overrides",
    [
        {"tie_word_embeddings": True},
        {"post_mlp_norm": False},
        {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 4},
        {"first_k_dense_replace": 2, "n_shared_experts": 2},
        {"n_group": 1, "topk_group": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("target", [TARGETS[1], TARGETS[4], TARGETS[7]], ids=named)
def test_every_variety_of_model(tmp_path, overrides, target):
    hf = saved_model(tmp_path / "hf", **overrides)
    convert_to_megatron(hf, tmp_path / "megatron", progress=False, **target)
    convert_to_hf(tmp_path / "megatron", tmp_path / "back", progress=False)
    assert_same_bits(on_disk(hf), on_disk(tmp_path / "back"))
    tokens = torch.randint(0, 67, (1, 9))
    with torch.inference_mode():
        logits = [AxK1ForCausalLM.from_pretrained(folder).eval()(tokens).logits for folder in (hf, tmp_path / "back")]
    assert torch.equal(*logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resharding_from_megatron_to_megatron(tmp_path, layout):
    source = FIXTURES / layout / "legacy"
    convert_to_megatron(source, tmp_path / "a", format="legacy", tp=4, pp=2, progress=False)
    convert_to_megatron(tmp_path / "a", tmp_path / "b", format="legacy", tp=2, ep=4, etp=1, progress=False)
    assert verify(source, tmp_path / "b", progress=False) == []


def test_without_a_post_norm_it_says_who_cannot_run_it(tmp_path, caplog):
    hf = saved_model(tmp_path / "hf", post_mlp_norm=False)
    convert_to_megatron(hf, tmp_path / "megatron", progress=False)
    with caplog.at_level("WARNING"):
        transformers.utils.logging.enable_propagation()
        convert_to_hf(tmp_path / "megatron", tmp_path / "back", progress=False)
    assert "stock transformers and vLLM cannot run this model" in caplog.text
    assert AxK1Config.from_pretrained(tmp_path / "back").post_mlp_norm is False


def test_what_stock_transformers_loses_is_put_back(tmp_path):
    """Stock saves no norm for the dense layer: ones stand for it, are named, and vLLM loads the result."""
    AXK1ForCausalLM.from_pretrained(saved_model(tmp_path / "hf")).save_pretrained(tmp_path / "stock")
    name = "model.layers.0.post_mlp_layernorm.weight"
    assert name not in on_disk(tmp_path / "stock")
    done = convert_to_megatron(tmp_path / "stock", tmp_path / "megatron", progress=False)
    assert done.added == (name,)
    convert_to_hf(tmp_path / "megatron", tmp_path / "back", progress=False)
    assert on_disk(tmp_path / "back")[name].eq(1).all()
    assert verify(tmp_path / "megatron", tmp_path / "stock", progress=False) == []


def test_tokenizer_vocabulary_and_thinking_ids(tmp_path):
    tokenizer = train_tokenizer(["user assistant 1 2 3"], vocab_size=280)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    AxK1ForCausalLM(tiny_chat_config(len(tokenizer))).save_pretrained(tmp_path / "hf")
    convert_to_megatron(tmp_path / "hf", tmp_path / "megatron", format="legacy", progress=False)
    path = next((tmp_path / "megatron").rglob("*.pt"))
    file = torch.load(path, weights_only=False)
    file["args"].vocab_size = None
    torch.save(file, path)
    with pytest.raises(ValueError, match="padded_vocab_size=384; give --vocab-size"):
        to_hf(tmp_path / "megatron", tmp_path / "back")
    reading = Reading(tokenizer=tmp_path / "tokenizer")
    convert_to_hf(tmp_path / "megatron", tmp_path / "back", reading=reading, progress=False)
    assert_same_bits(on_disk(tmp_path / "hf"), on_disk(tmp_path / "back"))
    model = AxK1ForCausalLM.from_pretrained(tmp_path / "back")
    assert model.generation_config.think_token_id == tokenizer.convert_tokens_to_ids("<think>")
    assert (tmp_path / "back" / "tokenizer.json").exists()
    with pytest.raises(ValueError, match="400 is padded to 512 rows by multiples of 128, the checkpoint has 384"):
        to_hf(tmp_path / "megatron", tmp_path / "x", reading=Reading(vocab_size=400))


def test_a_tied_head_has_to_be_the_embedding(tmp_path):
    hf = saved_model(tmp_path / "hf", tie_word_embeddings=True)
    tensors = on_disk(hf)
    head = tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, hf / "model.safetensors")
    convert_to_megatron(hf, tmp_path / "same", progress=False)
    head.view(torch.int32)[7, 7] ^= 1
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(ValueError, match="hold different copies of lm_head.weight"):
        convert_to_megatron(hf, tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


def test_the_arguments_say_how_uneven_the_stages_are(tmp_path):
    sizes = {"first_stage_layers": 1, "last_stage_layers": 2}
    convert_to_megatron(SOURCE, tmp_path / "out", format="legacy", pp=3, progress=False, **sizes)
    args = load_rank_file(next((tmp_path / "out").rglob("*.pt")))["args"]
    assert args.decoder_first_pipeline_num_layers == 1 and args.decoder_last_pipeline_num_layers == 2


def test_a_config_is_agreed_with(tmp_path):
    hf = saved_model(tmp_path / "hf", bos_token_id=5, eos_token_id=[6, 7])
    convert_to_megatron(hf, tmp_path / "megatron", progress=False)
    convert_to_hf(tmp_path / "megatron", tmp_path / "back", reading=Reading(config=hf), progress=False)
    config = AxK1Config.from_pretrained(tmp_path / "back")
    assert config.bos_token_id == 5 and config.eos_token_id == [6, 7]
    saved_model(tmp_path / "other", routed_scaling_factor=1.0)
    with pytest.raises(ValueError, match=r"another model than the checkpoint: routed_scaling_factor \(2.5 and 1.0\)"):
        to_hf(tmp_path / "megatron", tmp_path / "x", reading=Reading(config=tmp_path / "other"))


def test_shards_are_bounded_and_the_manifest_is_right(tmp_path):
    done = convert_to_hf(SOURCE, tmp_path / "hf", shard_bytes=200_000, progress=False)
    manifest = json.loads((tmp_path / "hf" / "manifest.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert len(shards) > 4 and sorted(manifest["files"]) == shards and done.files == len(shards)
    for name, facts in manifest["files"].items():
        path = tmp_path / "hf" / name
        line = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout
        assert line.split()[0] == facts["sha256"] and path.stat().st_size == facts["bytes"] <= 250_000
    AxK1ForCausalLM.from_pretrained(tmp_path / "hf")


def test_inspect_says_what_it_is(tmp_path):
    facts = inspect(FIXTURES / "mtp_pp2" / "legacy")
    expected = {"format": "legacy", "iteration": 10, "mtp_layers": 1, "layers": 4, "vocab_size": 131, "missing": []}
    assert facts.items() >= expected.items() and facts["layout"] == "TP1 PP2 VPP1 EP1 ETP1"
    broken = inspect(FIXTURES / "incomplete_tp2_ep1_etp1" / "legacy")
    assert "lacks the rank files mp_rank_01" in broken["problem"] and broken["layout"].startswith("TP2")
    convert_to_hf(SOURCE, tmp_path / "hf", progress=False)
    assert inspect(tmp_path / "hf")["parameters"] == inspect(SOURCE)["parameters"] == 252_256


def test_inspect_prints_no_more_of_a_hostile_text_than_a_line(tmp_path):
    source = FIXTURES / "tp1_pp1_ep1" / "legacy"
    shutil.copytree(source, tmp_path / "source")
    (path,) = (tmp_path / "source").rglob("*.pt")
    file = load_rank_file(path)
    file["args"] = argparse.Namespace(
        **{name: value for name, value in vars(file["args"]).items() if name not in ("attention_backend", "model_type")}
    )
    file["args"].transformer_impl = "\x1b[2J" + "x" * 10**5
    torch.save(file, path)
    assert inspect(tmp_path / "source")["spec"] == repr("\x1b[2J" + "x" * 10**5)[:40]
    assert inspect(source)["spec"] == "local"


@pytest.mark.parametrize("dtype", [torch.int64, torch.float8_e4m3fn, torch.bool], ids=str)
def test_what_is_no_weights_dtype_is_refused_both_ways(tmp_path, dtype):
    """A norm of whole numbers would be loaded as such, and scale by them."""
    hf = saved_model(tmp_path / "hf")
    name = "model.layers.1.input_layernorm.weight"
    save_file(on_disk(hf) | {name: torch.ones(56).to(dtype)}, hf / "model.safetensors")
    with pytest.raises(ValueError, match=rf"Face checkpoint holds {name} \({dtype}\) where the model has weights"):
        to_megatron(hf, tmp_path / "out")


def test_verify_finds_one_bit(tmp_path):
    convert_to_hf(SOURCE, tmp_path / "hf", progress=False)
    tensors = on_disk(tmp_path / "hf")
    name = "model.layers.3.mlp.experts.5.up_proj.weight"
    tensors[name].view(torch.int32)[7, 7] ^= 1
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert verify(SOURCE, tmp_path / "hf", progress=False) == [f"{name} (its numbers)"]


@pytest.mark.parametrize("field", ["rms_norm_eps", "num_experts_per_tok", "rope_parameters"])
def test_verify_compares_what_the_weights_compute(tmp_path, field):
    convert_to_hf(SOURCE, tmp_path / "hf", progress=False)
    config = AxK1Config.from_pretrained(tmp_path / "hf")
    changed = {
        "rms_norm_eps": 1e-3,
        "num_experts_per_tok": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
    }
    setattr(config, field, changed[field])
    config.save_pretrained(tmp_path / "hf")
    (difference,) = verify(SOURCE, tmp_path / "hf", progress=False)
    assert difference.startswith(f"config.{field} (")


def test_a_source_that_changes_is_not_continued_nor_published(tmp_path, monkeypatch):
    """Its numbers, or what describes them: a vocabulary that shrinks would leave an embedding of another size."""
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    options = {"shard_bytes": 150_000, "workers": 1, "progress": False, "verify": False}
    with monkeypatch.context() as patch:
        patch.setattr("conversion.convert.Conversion._write_manifest", lambda self, job: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert_to_hf(source, tmp_path / "hf", **options)
    common = next(source.rglob("common.pt"))
    os.utime(common, (1, 1))
    with pytest.raises(ValueError, match="left by another job .its sources differ"):
        convert_to_hf(source, tmp_path / "hf", **options)
    real = Conversion._write_manifest

    def touch_and_write(self, job):
        os.utime(common, (2, 2))
        real(self, job)

    monkeypatch.setattr(Conversion, "_write_manifest", touch_and_write)
    with pytest.raises(ValueError, match="has changed while it was converted"):
        convert_to_hf(source, tmp_path / "other", **options)
    assert not (tmp_path / "other").exists()


def test_a_source_that_changes_between_plan_and_run_is_not_converted(tmp_path):
    """Another model of the same sizes: its numbers would be taken for the planned one's, and agree with themselves."""
    source = saved_model(tmp_path / "source")
    conversion = to_hf(source, tmp_path / "hf")
    saved_model(source, seed=3, routed_scaling_factor=1.25)
    with pytest.raises(ValueError, match=f"{source} has changed while it was converted; convert it again"):
        conversion.run(progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_source_that_is_cut_short_is_not_published(tmp_path, monkeypatch):
    source = saved_model(tmp_path / "source")
    real = HashedFile.__enter__
    opened = []

    def cut_and_enter(self):
        opened.append(self.path)
        if len(opened) == 3:
            os.truncate(source / "model.safetensors", 200_000)
        return real(self)

    monkeypatch.setattr(HashedFile, "__enter__", cut_and_enter)
    for workers in (1, 4):
        saved_model(source)
        opened.clear()
        with pytest.raises(ValueError, match="ended inside a tensor; it has changed since it was opened"):
            convert_to_hf(source, tmp_path / "hf", workers=workers, shard_bytes=150_000, progress=False)
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_source_file_that_is_removed_meanwhile_is_named_and_put_back(tmp_path, monkeypatch, name, workers):
    source = saved_model(tmp_path / "source")
    train_tokenizer(["1 2 3"], vocab_size=280).save_pretrained(source)
    options = {"shard_bytes": 150_000, "workers": workers, "progress": False}
    truth = contents(convert_to_hf(source, tmp_path / "truth", **options).path)
    real, aside, opened = HashedFile.__enter__, tmp_path / "aside", []

    def remove_and_enter(self):
        opened.append(self.path)
        if len(opened) == 5:
            (source / name).rename(aside)
        return real(self)

    said = (
        f"No such file or directory, but it was there before; put it back .* and run the same again: '{source / name}'"
    )
    with monkeypatch.context() as patch:
        patch.setattr(HashedFile, "__enter__", remove_and_enter)
        with pytest.raises(FileNotFoundError, match=said):
            convert_to_hf(source, tmp_path / "hf", **options)
    assert not (tmp_path / "hf").exists() and (tmp_path / "hf.partial.jsonl").exists()
    aside.rename(source / name)
    assert contents(convert_to_hf(source, tmp_path / "hf", **options).path) == truth


def test_a_source_file_that_is_removed_between_plan_and_run(tmp_path):
    conversion = to_hf(saved_model(tmp_path / "source"), tmp_path / "hf")
    (tmp_path / "source" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="it was there before; put it back"):
        conversion.run(progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("place", ["/proc/out", "/dev/null/out"])
def test_a_place_that_takes_no_folder_is_one_sentence(place):
    with pytest.raises(OSError, match=f"nothing can be written there, choose another place: '{place}'"):
        convert_to_hf(SOURCE, place, progress=False)


@pytest.mark.parametrize("name", ["link", "iter_0000010", "iter_0000010/", "relative/"])
def test_a_source_by_whatever_path(tmp_path, monkeypatch, name):
    """A link, a trailing slash, a relative path; an iteration itself, though the tracker beside it names another."""
    shutil.copytree(SOURCE, tmp_path / "relative")
    (tmp_path / "link").symlink_to(tmp_path / "relative")
    monkeypatch.chdir(tmp_path)
    if name.startswith("iter"):
        monkeypatch.chdir("relative")
        Path("latest_checkpointed_iteration.txt").write_text("20")
        with pytest.raises(ValueError, match="names iter_0000020, which is not there"):
            to_hf(".", tmp_path / "hf")
    before = contents(tmp_path / "relative")
    convert_to_hf(name, tmp_path / "hf", progress=False)
    assert verify(SOURCE, tmp_path / "hf", progress=False) == [] and contents(tmp_path / "relative") == before


def test_a_folder_that_somebody_else_made_is_not_the_result(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("conversion.convert.Conversion._write_manifest", lambda self, job: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert_to_hf(SOURCE, tmp_path / "hf", progress=False)
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "diary.txt").write_text("dear diary")
    with pytest.raises(ValueError, match="has appeared meanwhile"):
        convert_to_hf(SOURCE, tmp_path / "hf", progress=False)
    shutil.rmtree(tmp_path / "hf.partial")
    with pytest.raises(ValueError, match="has appeared meanwhile"):
        convert_to_hf(SOURCE, tmp_path / "hf", progress=False)
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["diary.txt"]


def test_a_tokenizer_runs_no_code_and_is_read_before_anything_is_written(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    with pytest.raises((ValueError, OSError)):
        to_hf(SOURCE, tmp_path / "hf", reading=Reading(tokenizer=folder))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer"]
    with pytest.raises(ValueError, match="is not a folder"):
        Reading(tokenizer=tmp_path / "nowhere")


def test_a_hugging_face_source_keeps_its_companions(tmp_path):
    hf = saved_model(tmp_path / "hf")
    train_tokenizer(["1 2 3"], vocab_size=280).save_pretrained(hf)
    generation = transformers.GenerationConfig(temperature=0.33, do_sample=True)
    generation.save_pretrained(hf)
    convert_to_hf(hf, tmp_path / "again", shard_bytes=100_000, progress=False)
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "again").temperature == 0.33
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "content", ["[1]", "{", "[" * 100_000, '{"model_type": "axk1", "n_routed_experts": 1000000000}']
)
def test_a_config_that_is_none_is_one_sentence(tmp_path, content):
    hf = saved_model(tmp_path / "hf")
    (hf / "config.json").write_text(content)
    with pytest.raises(ValueError, match=str(hf)):
        to_hf(hf, tmp_path / "out")


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("num_hidden_layers", 10**6, "num_hidden_layers is above 4,096"),
        ("num_hidden_layers", 10**400, "num_hidden_layers is above 4,096"),
        ("num_hidden_layers", -1, "num_hidden_layers=-1 is not a positive whole number"),
        ("num_hidden_layers", "9", "num_hidden_layers='9' is not a positive whole number"),
        ("num_nextn_predict_layers", 10**6, "num_nextn_predict_layers is above 4,096"),
        ("moe_layer_freq", [1] * 10**5, "moe_layer_freq names more than 4,096 layers"),
        ("mlp_layer_types", ["dense", "sparse"] * 10**4, "mlp_layer_types names more than 4,096 layers"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_config_cannot_ask_for_layers_without_end(tmp_path, field, value, complaint):
    hf = saved_model(tmp_path / "hf")
    said = json.loads((hf / "config.json").read_text())
    if field != "mlp_layer_types":
        del said["mlp_layer_types"]
    (hf / "config.json").write_text(json.dumps({**said, field: value}))
    with pytest.raises(ValueError, match=f"{hf}.*{complaint}"):
        to_hf(hf, tmp_path / "out")


def test_the_name_of_prediction_layers_is_the_readers(tmp_path):
    source = FIXTURES / "mtp_pp2" / "legacy"
    convert_to_megatron(source, tmp_path / "new", format="legacy", mtp_layer_name="mtp_model_layer", progress=False)
    names = {name for _, _, name in models_in(tmp_path / "new" / "release")}
    assert "mtp.layers.0.mtp_model_layer.mlp.router.weight" in names
    assert not [name for name in names if ".transformer_layer." in name]


def test_nan_is_found_on_request(tmp_path):
    hf = saved_model(tmp_path / "hf")
    tensors = on_disk(hf)
    tensors["model.layers.2.mlp.gate.weight"][1, 1] = torch.nan
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(ValueError, match="holds NaN in model.layers.2.mlp.gate.weight"):
        convert_to_megatron(hf, tmp_path / "a", check_nan=True, progress=False)
    assert not (tmp_path / "a").exists()
    convert_to_megatron(hf, tmp_path / "a", progress=False)


def test_a_dry_run_writes_nothing_and_foretells_the_files(tmp_path):
    conversion = to_hf(SOURCE, tmp_path / "hf", shard_bytes=200_000)
    plan = conversion.plan()
    assert not list(tmp_path.iterdir()) and plan.seconds > 0 and plan.memory_bytes > 0
    conversion.run(progress=False)
    written = {path.name: path.stat().st_size for path in (tmp_path / "hf").glob("*.safetensors")}
    assert written.keys() == dict(plan.files).keys() and plan.nbytes <= sum(written.values()) < plan.nbytes * 1.1


def test_the_whole_of_k1_is_planned_in_seconds(tmp_path, capsys):
    """A terabyte of sparse files; nothing is written but the plan on the screen."""
    config = AxK1Config.preset("k1")
    (tmp_path / "k1").mkdir()
    config.save_pretrained(tmp_path / "k1")
    specs = [
        TensorSpec(name, torch.bfloat16, (row.shape[0] // len(row.hf), *row.shape[1:]))
        for row in rows_of(config)
        for name in row.hf
    ]
    shards = plan_shards(specs, 5 * 10**9)
    for shard in shards:
        header = shard_header(shard)
        with (tmp_path / "k1" / shard.filename).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + shard.nbytes)
    write_index(tmp_path / "k1", shards)
    target = ["--format", "legacy", "--tp", "8", "--pp", "16", "--ep", "8", "--etp", "1"]
    uneven = ["--first-stage-layers", "3", "--last-stage-layers", "2", "--dry-run"]
    assert axk1.main(["convert", "to-megatron", str(tmp_path / "k1"), str(tmp_path / "out"), *target, *uneven]) == 0
    said = capsys.readouterr().out
    assert "release/mp_rank_07_015_007/model_optim_rng.pt" in said and "128 files, 1,0" in said and "MB; about" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("nowhere", "is not a folder"),
        ("empty", "holds neither latest_checkpointed_iteration.txt nor a checkpoint"),
        ("lost", "names iter_0000020, which is not there"),
        ("odd", "neither an iteration nor 'release'"),
    ],
)
def test_sources_that_are_none(tmp_path, source, complaint):
    for name, said in {"empty": None, "lost": "20", "odd": "../../etc"}.items():
        (tmp_path / name).mkdir()
        if said:
            (tmp_path / name / "latest_checkpointed_iteration.txt").write_text(said)
    with pytest.raises(ValueError, match=complaint):
        to_hf(tmp_path / source, tmp_path / "out")


def end_of_child(action):
    """The exit code of a forked process that does it; minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(
    ("arguments", "kills"), [({}, 12), ({"format": "torch_dist"}, 9), ({"format": "legacy", "pp": 2, "tp": 2}, 9)], ids=str
)
def test_killed_at_thirty_random_points_it_ends_in_the_same_bytes(tmp_path, monkeypatch, arguments, kills):
    """By SIGKILL, in the middle of a write, before a flush, a rename, a line of the journal: nothing is cleaned up then."""
    convert = convert_to_megatron if arguments else convert_to_hf
    options = {"progress": False, "shard_bytes": 150_000, **arguments}
    calls = [(os, "fsync"), (Path, "rename"), (Path, "unlink"), (Path, "write_text"), (HashedFile, "write")]
    counter = itertools.count()

    def stepping(call, at):
        def step(*args, **kwargs):
            if next(counter) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return step

    def convert_killed(target, at, workers):
        for owner, name in calls:
            setattr(owner, name, stepping(getattr(owner, name), at))
        convert(SOURCE, target, workers=workers, **options)
        os._exit(0)

    with monkeypatch.context() as patch:
        for owner, name in calls:
            patch.setattr(owner, name, stepping(getattr(owner, name), None))
        convert(SOURCE, tmp_path / "truth", workers=1, **options)
    truth, steps = contents(tmp_path / "truth"), next(counter)
    assert steps > 30
    counter = itertools.count()
    points = [*random.Random(1).sample(range(steps), kills - 2), steps - 2, steps - 1]
    for number, point in enumerate(points):
        target, workers = tmp_path / f"out{point}", (1, 2, 4)[number % 3]
        assert end_of_child(lambda: convert_killed(target, point, workers)) == -signal.SIGKILL, point  # noqa: B023
        if not target.exists() or list(tmp_path.glob("*.partial.jsonl")):
            convert(SOURCE, target, workers=workers, **options)
        assert contents(target) == truth, point
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["truth", target.name])
        shutil.rmtree(target)


def test_another_job_is_not_continued(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError):
            convert_to_hf(SOURCE, tmp_path / "hf", progress=False)
    with pytest.raises(ValueError, match="left by another job"):
        convert_to_megatron(SOURCE, tmp_path / "hf", progress=False)
    convert_to_hf(SOURCE, tmp_path / "hf", progress=False)
    with pytest.raises(ValueError, match="exists already"):
        convert_to_hf(SOURCE, tmp_path / "hf", progress=False)


@pytest.mark.parametrize("arguments", [{}, {"format": "torch_dist"}, {"format": "legacy"}], ids=str)
def test_a_full_disk_is_an_error_and_then_it_goes_on(tmp_path, arguments):
    """A process may write no file beyond 100 KB: as the disk would say it, in the middle of one."""
    source, convert = contents(SOURCE), convert_to_megatron if arguments else convert_to_hf

    def convert_on_a_full_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(OSError, match="run the same again"):
            convert(SOURCE, tmp_path / "out", progress=False, **arguments)
        os._exit(0)

    assert end_of_child(convert_on_a_full_disk) == 0
    assert contents(SOURCE) == source and not (tmp_path / "out").exists()
    convert(SOURCE, tmp_path / "out", progress=False, **arguments)
    assert verify(SOURCE, tmp_path / "out", progress=False) == []


# In a process that has converted before: what torch brings along at its first use (2 MB, measured) is not the checkpoint's.
WATCHED = """
import itertools, json, os, shutil, sys, threading
from pathlib import Path
import torch
from conversion import convert_to_hf, convert_to_megatron
from conversion.checkpoint import Shard, TensorSpec, shard_header
from conversion.weight_map import rows_of
from modeling_axk1 import AxK1Config
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
def peak_of(convert, *args, **options):
    start, peak, done = anonymous(), [0], threading.Event()
    def watch():
        while not done.wait(0.001):
            peak[0] = max(peak[0], anonymous() - start)
    watcher = threading.Thread(target=watch)
    watcher.start()
    convert(*args, verify=True, progress=False, **options)
    done.set()
    watcher.join()
    return peak[0]
source, folder, targets = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
for number, target in enumerate(targets):
    convert_to_megatron(source, folder / f"warm{number}", progress=False, **target)
    convert_to_hf(folder / f"warm{number}", folder / f"warm{number}-back", progress=False)
for workers in (1, 16):
    back = peak_of(convert_to_hf, folder / "grouped", folder / "back", workers=workers, shard_bytes=7_000_000)
    print(json.dumps(["grouped", workers, 2**21, back]))
    shutil.rmtree(folder / "back")
for name in ("small", "large"):
    config = AxK1Config.from_pretrained(folder / name)
    specs = [TensorSpec(n, torch.float32, (r.shape[0] // len(r.hf), *r.shape[1:])) for r in rows_of(config) for n in r.hf]
    shard = Shard("model.safetensors", tuple(specs))
    with (folder / name / shard.filename).open("wb") as file:
        file.write(shard_header(shard))
        file.truncate(len(shard_header(shard)) + shard.nbytes)
    for target, workers in itertools.product(targets, (1, 16)):
        options = {"workers": workers, "shard_bytes": shard.nbytes // 6}
        there = peak_of(convert_to_megatron, folder / name, folder / "there", **target, **options)
        back = peak_of(convert_to_hf, folder / "there", folder / "back", **options)
        largest = max(spec.nbytes for spec in specs)
        print(json.dumps([name, workers, largest, there, back]))
        shutil.rmtree(folder / "there")
        shutil.rmtree(folder / "back")
"""


def test_memory_is_twice_the_largest_tensor_however_many_workers(tmp_path):
    """Of a small and of a large sparse file, there and back, verified, and of GroupedMLP's experts, which lie transposed."""
    sizes = {"vocab_size": 64, "hidden_size": 256, "moe_intermediate_size": 2048, "num_hidden_layers": 2}
    saved_model(tmp_path / "experts", **sizes)
    convert_to_megatron(tmp_path / "experts", tmp_path / "grouped", format="legacy", progress=False)
    (path,) = (tmp_path / "grouped").rglob("*.pt")
    file = load_rank_file(path)
    group_experts(file["model"], 256)
    torch.save(file, path)
    for name, vocab, hidden, width in (("small", 2048, 128, 256), ("large", 4096, 512, 1024)):
        sizes = {"vocab_size": vocab, "hidden_size": hidden, "moe_intermediate_size": width, "n_routed_experts": 8}
        AxK1Config.preset("nano", **sizes).save_pretrained(tmp_path / name)
    targets = [{"format": "torch_dist"}, {"format": "legacy", "tp": 4, "ep": 4, "etp": 1}]
    command = [sys.executable, "-c", WATCHED, str(SOURCE), str(tmp_path), json.dumps(targets)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    results = [json.loads(line) for line in run.stdout.splitlines()]
    small, large = ("small", 2**20), ("large", 2**23)
    cases = [("grouped", 2**21), *(case for case in (small, large) for _ in targets)]
    assert [(name, workers, size) for name, workers, size, *_ in results] == [
        (name, workers, size) for name, size in cases for workers in (1, 16)
    ]
    for _, workers, largest, *peaks in results:
        assert largest / 4 <= max(peaks) <= 2 * largest, results
        # One worker's blocks, and what the C library keeps.
        assert workers > 1 or max(peaks) < largest, results
