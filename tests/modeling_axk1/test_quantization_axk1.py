"""Are routed experts quantised like any linear layer: loaded as a stream, run, trained through, saved, taken back?"""

import gc
import json
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AXK1ForCausalLM, BitsAndBytesConfig, MixtralConfig, Qwen3MoeConfig
from transformers.distributed import DistributedConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

from modeling_axk1 import AxK1Config, AxK1ForCausalLM
from modeling_axk1 import quantization_axk1 as quantization
from modeling_axk1.modeling_axk1 import AxK1Attention, AxK1Experts
from modeling_axk1.moe_dispatch import axk1_experts_forward
from modeling_axk1.moe_reference import moe_reference
from modeling_axk1.quantization_axk1 import (
    FORMS,
    cards_needed,
    cards_table,
    expert_weights,
    is_packed,
    load_quantized,
    quantization_errors,
    quantized_bytes,
    quantized_share,
)
from tests.folders import on_disk
from tests.random_experts import outputs_and_gradients, relative_error
from tests.random_models import shake
from tests.tolerances import CACHED_STEP, EXPERTS, PREFILL

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
# Without outlier columns, which are those of a whole batch, a token's result does not depend on its neighbours.
INT8 = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
WAYS = pytest.mark.parametrize("way", [NF4, FP4, INT8], ids=["nf4-double", "fp4", "int8"])
STOCK = {
    "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "moe_intermediate_size": 32, "intermediate_size": 32, "num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    "head_dim": 32, "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def tiny_config(**overrides) -> AxK1Config:
    return AxK1Config.preset("nano", vocab_size=64, initializer_range=0.2, num_hidden_layers=2, **overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An fp32 checkpoint in two shards and more."""
    torch.manual_seed(0)
    model = AxK1ForCausalLM(tiny_config())
    shake(model)
    path = tmp_path_factory.mktemp("plain")
    model.save_pretrained(path, max_shard_size="500KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def load(folder: Path, way: dict = NF4, **kwargs) -> AxK1ForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**way), **kwargs)


@pytest.fixture(scope="module")
def nf4(folder) -> AxK1ForCausalLM:
    return load(folder)


def experts_of(model):
    return model.model.layers[-1].mlp.experts


def tokens(rows: int = 2, length: int = 13) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(3))


def logits(model, input_ids=None) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens() if input_ids is None else input_ids).logits


# -- what is stored ------------------------------------------------------------------------------------------------
@WAYS
def test_every_matrix_of_every_expert_is_bitsandbytes_own(folder, way):
    import bitsandbytes as bnb

    experts, plain = experts_of(load(folder, way)), on_disk(folder)
    assert is_packed(experts) and experts.num_experts == 8
    for number in range(8):
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(experts[number], name)
            weight = plain[f"model.layers.1.mlp.experts.{number}.{name}.weight"]
            if way is INT8:
                rows, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
                assert torch.equal(linear.weight.data, rows) and torch.equal(linear.weight.SCB, scales)
                continue
            bits, state = bnb.functional.quantize_4bit(
                weight, quant_type=way["bnb_4bit_quant_type"], compress_statistics="bnb_4bit_use_double_quant" in way
            )
            assert torch.equal(linear.weight.data, bits) and torch.equal(linear.weight.quant_state.absmax, state.absmax)


def test_expert_weights_are_views_of_fused_experts_and_copies_of_packed_ones(folder, nf4):
    fused = AxK1Experts(tiny_config())
    gate_up, down = expert_weights(fused, 3)
    assert gate_up.data_ptr() == fused.gate_up_proj[3].data_ptr() and down.data_ptr() == fused.down_proj[3].data_ptr()
    assert not is_packed(fused)
    plain = on_disk(folder)
    for number in (0, 5):
        gate_up, down = expert_weights(experts_of(nf4), number)
        prefix = f"model.layers.1.mlp.experts.{number}."
        both = torch.cat([plain[f"{prefix}gate_proj.weight"], plain[f"{prefix}up_proj.weight"]])
        # NF4's own error of normal weights: 0.09.
        for ours, truth in ((gate_up, both), (down, plain[f"{prefix}down_proj.weight"])):
            assert ours.shape == truth.shape and 0.01 < (ours - truth).norm() / truth.norm() < 0.12


# -- how it runs ---------------------------------------------------------------------------------------------------
@WAYS
def test_outputs_and_gradients_are_the_obvious_loops(folder, way):
    experts = experts_of(load(folder, way))
    pairs = [expert_weights(experts, expert) for expert in range(8)]
    gate_up, down = (torch.stack(weights) for weights in zip(*pairs))
    x, weights = torch.randn(17, 128), torch.rand(17, 3)
    # Ids of 8 and more are experts of another rank.
    ids = torch.rand(17, 10).topk(3, dim=1).indices
    inputs = [x, ids, weights, gate_up, down]
    expected = outputs_and_gradients(moe_reference, inputs, needed=(0, 2))
    for forward in (experts, lambda *args: axk1_experts_forward(experts, *args)):
        found = outputs_and_gradients(lambda x, ids, w, *_, f=forward: f(x, ids, w), inputs, needed=(0, 2))
        assert [relative_error(ours, truth) <= EXPERTS for ours, truth in zip(found, expected)] == [True] * 3
    with torch.no_grad():
        assert relative_error(experts(x, ids, weights), expected[0]) <= EXPERTS


def test_only_hit_experts_are_dequantised_and_nothing_of_them_is_kept(nf4, monkeypatch):
    experts, read = experts_of(nf4), []
    owner = {id(linear): number for number in range(8) for linear in experts[number].children()}

    def spy(linear, original=quantization.dequantized):
        read.append(owner[id(linear)])
        return original(linear)

    monkeypatch.setattr(quantization, "dequantized", spy)
    x = torch.randn(5, 128, requires_grad=True)
    ids = torch.tensor([[2, 6], [6, 2], [2, 6], [2, 6], [6, 2]])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        output = experts(x, ids, torch.full((5, 2), 0.5))
    assert sorted(read) == [2, 2, 2, 6, 6, 6]
    # Layer input [5, 128], ids, weights, gate/up output [10, 128]; a matrix has 8,192 entries.
    assert kept and max(kept) == 1280
    output.sum().backward()
    assert sorted(read) == [2] * 6 + [6] * 6 and x.grad.abs().sum() > 0


@pytest.mark.parametrize("way", [NF4, INT8], ids=["nf4", "int8"])
def test_cached_decoding_is_the_full_pass(folder, way, monkeypatch):
    model, input_ids = load(folder, way), tokens()

    def never(*args, **kwargs):
        raise AssertionError("the absorbed form reads kv_b_proj's packed bytes")

    monkeypatch.setattr(AxK1Attention, "attend_absorbed", never)
    full, cache, steps = logits(model, input_ids), None, []
    for place in range(input_ids.shape[1]):
        with torch.no_grad():
            step = model(input_ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        steps.append(step.logits)
    # An activation at the edge of two of 8-bit's 255 levels may fall to either side.
    tolerance = CACHED_STEP if way is NF4 else 0.02 * full.abs().max()
    assert (torch.cat(steps, dim=1) - full).abs().max() <= tolerance


def test_an_adapter_that_would_be_passed_over_is_an_error(folder):
    model = get_peft_model(load(folder), LoraConfig(target_modules=["gate_proj"]))
    with pytest.raises(ValueError, match="would run the base weight only; attach adapters to routed experts with"):
        logits(model)


# -- loading -------------------------------------------------------------------------------------------------------
def anonymous_bytes() -> int:
    """Memory that is this process's own, file mappings left out."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads memory from Linux's /proc")
def test_loading_holds_the_result_and_at_most_one_layers_experts(folder, tmp_path):
    sizes = {"hidden_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 32, "first_k_dense_replace": 0}
    model = AxK1ForCausalLM(AxK1Config.preset("nano", **sizes)).bfloat16()
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    load(folder)  # what bitsandbytes keeps once and for all
    gc.collect()
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous_bytes() - before)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load(tmp_path)
    done.set()
    watcher.join()
    held = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    layer = 2 * 32 * 3 * 512 * 256
    assert held + layer < 0.65 * whole, "vacuous: the bound allows the whole model"
    assert 0 < peak <= held + layer, (
        f"peak {peak / 1e6:.1f} MB, held {held / 1e6:.1f}, a layer's experts {layer / 1e6:.1f}"
    )


def test_the_share_is_printed(folder, capfd):
    model = load(folder)
    share = quantized_share(model)
    plain = sum(tensor.numel() for tensor in on_disk(folder).values())
    linears = [name for name in on_disk(folder) if "proj" in name]
    assert share == pytest.approx(sum(on_disk(folder)[name].numel() for name in linears) / (plain - 8), abs=1e-3)
    assert f"{share:.1%} of the parameters are quantised" in capfd.readouterr().err


def test_a_mixture_with_plain_experts_is_warned_of_with_the_reason(folder, caplog):
    model = load(folder, NF4 | {"llm_int8_skip_modules": ["mlp.experts", "lm_head", ".*self_attn"]})
    assert type(experts_of(model)) is AxK1Experts and quantized_share(model) < 0.5
    assert "The routed experts are not among them, because llm_int8_skip_modules names them." in caplog.text
    fused = experts_of(AxK1ForCausalLM.from_pretrained(folder))
    assert torch.equal(experts_of(model).gate_up_proj, fused.gate_up_proj)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.experts", "layers.1.mlp.experts", "model.layers.1", "layers.1"])
def test_experts_are_left_plain_by_either_full_name(folder, name, caplog):
    model = load(folder, NF4 | {"llm_int8_skip_modules": [name, "lm_head", ".*self_attn", ".*layers.0"]})
    fused = experts_of(AxK1ForCausalLM.from_pretrained(folder))
    assert torch.equal(experts_of(model).gate_up_proj, fused.gate_up_proj)
    assert "The routed experts are not among them, because llm_int8_skip_modules names them." in caplog.text


def test_one_layer_of_several_may_be_left_plain(tmp_path):
    plain = AxK1ForCausalLM(AxK1Config.preset("nano", vocab_size=64, num_hidden_layers=3, first_k_dense_replace=1))
    plain.save_pretrained(tmp_path)
    model = load(tmp_path, NF4 | {"llm_int8_skip_modules": ["model.layers.1.mlp.experts", "lm_head"]})
    layers = model.model.layers
    assert torch.equal(layers[1].mlp.experts.down_proj, plain.model.layers[1].mlp.experts.down_proj)
    assert is_packed(layers[2].mlp.experts)
    truth = plain.model.layers[2].mlp.experts.down_proj[3]
    # NF4's own error of normal weights: 0.09.
    down = expert_weights(layers[2].mlp.experts, 3)[1]
    assert 0.01 < (down - truth).norm() / truth.norm() < 0.12


def test_a_mixture_that_is_mostly_vocabulary_is_warned_of_too(tmp_path, caplog):
    AxK1ForCausalLM(AxK1Config.preset("nano", vocab_size=8192, num_hidden_layers=2)).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert is_packed(experts_of(model)) and quantized_share(model) < 0.5
    assert "The rest are embeddings, head, norms and routers" in caplog.text


def test_a_projection_left_plain_is_frozen_with_the_rest(folder):
    experts = experts_of(load(folder, NF4 | {"llm_int8_skip_modules": ["down_proj", "lm_head"]}))
    plain = on_disk(folder)["model.layers.1.mlp.experts.3.down_proj.weight"]
    assert is_packed(experts) and torch.equal(expert_weights(experts, 3)[1], plain)
    assert not any(parameter.requires_grad for parameter in experts.parameters())


@pytest.mark.parametrize("sizes", [{"tp_size": 2}, {"fsdp_size": 2, "ep_size": 2}, {"pp_size": 2}], ids=str)
def test_other_ways_to_split_quantised_experts_are_refused(sizes):
    with torch.device("meta"):
        model = AxK1ForCausalLM(tiny_config())
        quantization.separate_experts(model, [])
    with pytest.raises(ValueError, match="use the number of ranks for tp_size and ep_size, and nothing else"):
        model.maybe_distribute_model(model, DistributedConfig(**sizes), object())


def test_experts_that_do_not_divide_are_refused(folder):
    with pytest.raises(ValueError, match="ep_size=3 does not divide the 8 routed experts"):
        experts_of(load(folder)).keep(0, 3)


# -- saving, and back ----------------------------------------------------------------------------------------------
@WAYS
def test_saved_reloaded_and_dequantised_for_stock(folder, tmp_path, way):
    model = load(folder, way)
    expected = logits(model)  # before saving: a forward must not change what is stored
    model.save_pretrained(tmp_path / "bits")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "bits")
    assert torch.equal(logits(again), expected)
    # And once more: transformers 5.23 cannot save a reloaded model by itself.
    again.save_pretrained(tmp_path / "bits2")
    first, second = (on_disk(tmp_path / name) for name in ("bits", "bits2"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

    weights = [expert_weights(experts_of(again), expert) for expert in range(8)]
    again.dequantize()
    assert type(experts_of(again)) is AxK1Experts
    for expert, (gate_up, down) in enumerate(weights):
        assert torch.equal(experts_of(again).gate_up_proj[expert], gate_up)
        assert torch.equal(experts_of(again).down_proj[expert], down)
    again.save_pretrained(tmp_path / "plain")
    assert on_disk(tmp_path / "plain").keys() == on_disk(folder).keys()
    stock = AXK1ForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(stock).__module__.startswith("transformers.") and "quantization_config" not in stock.config.to_dict()
    if way is not INT8:  # which also rounds the activations
        assert (logits(stock) - expected).abs().max() <= PREFILL * max(1, expected.abs().max())
    assert (logits(stock) - logits(again)).abs().max() <= PREFILL * max(1, expected.abs().max())


@pytest.mark.parametrize(
    ("kind", "config"),
    [(Qwen3MoeForCausalLM, Qwen3MoeConfig), (MixtralForCausalLM, MixtralConfig), (AXK1ForCausalLM, None)],
    ids=["qwen3_moe", "mixtral", "stock-axk1"],
)
def test_one_call_does_it_for_any_mixture(kind, config, folder, tmp_path):
    if config is not None:
        folder = tmp_path / "plain"
        kind(config(**STOCK)).save_pretrained(folder)
    model = load_quantized(folder, BitsAndBytesConfig(**NF4))
    assert isinstance(model, kind) and is_packed(experts_of(model)) and quantized_share(model) > 0.8
    expected = logits(model)
    model.save_pretrained(tmp_path / "bits")
    again = load_quantized(tmp_path / "bits")
    with pytest.raises(ValueError, match="is not quantised; give a quantization_config"):
        load_quantized(folder)
    assert torch.equal(logits(again), expected)
    again.dequantize().save_pretrained(tmp_path / "back")
    back = kind.from_pretrained(tmp_path / "back")
    assert on_disk(tmp_path / "back").keys() >= on_disk(folder).keys() - {"model.layers.0.post_mlp_layernorm.weight"}
    assert (logits(back) - expected).abs().max() <= PREFILL * max(1, expected.abs().max())


def test_a_class_that_is_given_needs_no_model_type_that_transformers_knows(tmp_path):
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**STOCK)).save_pretrained(tmp_path / "plain")
    load_quantized(tmp_path / "plain", BitsAndBytesConfig(**NF4)).save_pretrained(tmp_path / "bits")
    path = tmp_path / "bits" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "own"}))
    assert quantized_share(load_quantized(tmp_path / "bits", model_class=Qwen3MoeForCausalLM)) > 0.8


def test_experts_stacked_on_disk_are_an_error_and_no_random_weights(tmp_path):
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**STOCK)).save_pretrained(tmp_path, save_original_format=False)
    with pytest.raises(ValueError, match="lacks 48 expert matrices, model.layers.0.mlp.experts.0.down_proj.weight"):
        load_quantized(tmp_path, BitsAndBytesConfig(**NF4))


def test_prediction_layers_that_no_file_holds_are_dropped_and_counted_nowhere(folder, nf4, tmp_path, capfd):
    model = AxK1ForCausalLM.from_pretrained(folder)
    model.config.num_nextn_predict_layers = 1
    model.save_pretrained(tmp_path)
    capfd.readouterr()
    loaded = load(tmp_path)
    assert len(loaded.model.layers) == 2 and torch.equal(logits(loaded), logits(nf4))
    assert f"{quantized_share(nf4):.1%} of the parameters are quantised" in capfd.readouterr().err


def test_offloaded_experts_are_an_error_and_no_nan(folder):
    model = load(folder)
    cpu_offload(experts_of(model), execution_device="cpu")
    with pytest.raises(ValueError, match="is offloaded .* device_map without cpu and disk for layers with experts"):
        logits(model)


# -- training through it -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("way", [NF4, INT8], ids=["nf4", "int8"])
def test_preparing_for_training_leaves_experts_packed_and_lora_learns_below_them(folder, way):
    def bytes_of(model):
        return sum(p.numel() * p.element_size() for p in experts_of(model).parameters())

    model = load(folder, way, dtype=torch.bfloat16)
    before = bytes_of(model)
    gradients = []
    for checkpointing in (False, True):
        model = load(folder, way, dtype=torch.bfloat16)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=checkpointing)
        assert bytes_of(model) == before and is_packed(experts_of(model))
        torch.manual_seed(0)
        lora = get_peft_model(model, LoraConfig(target_modules=["q_b_proj"], init_lora_weights=False))
        lora.train()
        F.cross_entropy(lora(tokens()).logits.flatten(0, 1).float(), tokens().flatten()).backward()
        named = {name: p.grad for name, p in lora.named_parameters() if p.requires_grad}
        # The first layer's gradient comes through the second layer's frozen experts.
        assert all(grad is not None and grad.abs().sum() > 0 for grad in named.values()) and any(
            "layers.0." in name for name in named
        )
        assert not any(p.requires_grad for p in experts_of(lora.base_model.model).parameters())
        gradients.append(named)
    for name, grad in gradients[0].items():
        assert relative_error(gradients[1][name], grad) <= 1e-4


# -- on paper, and how good ----------------------------------------------------------------------------------------
def held_bytes(model) -> int:
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in model.state_dict().items()
        # Names of sizes and types, as text; and a marker of the row format.
        if "quant_state.bitsandbytes" not in name and not name.endswith("weight_format")
    )


@pytest.mark.parametrize(
    ("form", "way"),
    [("nf4 double", NF4), ("nf4", NF4 | {"bnb_4bit_use_double_quant": False}), ("int8", INT8), ("bf16", None)],
    ids=FORMS[::-1],
)
def test_bytes_on_paper_are_bytes_in_memory(folder, form, way):
    model = AxK1ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    if way is not None:
        model = load(folder, way, dtype=torch.bfloat16)
    held = held_bytes(model)
    if form == "nf4 double":
        # The offset of a matrix's scales stands in that text.
        held += 4 * sum("nested_absmax" in name for name in model.state_dict())
    assert quantized_bytes(model.config, form) == held


@pytest.mark.parametrize(("form", "dense"), [("nf4", 1), ("bf16", 2)], ids=["sparse", "dense"])
def test_prediction_layers_are_on_paper_too(tmp_path, form, dense):
    model = AxK1ForCausalLM(tiny_config(num_nextn_predict_layers=2, first_k_dense_replace=dense)).bfloat16()
    if form == "nf4":
        model.save_pretrained(tmp_path)
        model = load(tmp_path, NF4 | {"bnb_4bit_use_double_quant": False}, dtype=torch.bfloat16)
    assert len(model.model.mtp_layers) == 2 and quantized_bytes(model.config, form) == held_bytes(model)


def test_k1_on_paper():
    k1 = AxK1Config.preset("k1")
    assert quantized_bytes(k1, "nf4") <= 300e9 and quantized_bytes(k1, "nf4 double") <= 300e9
    assert quantized_bytes(k1, "bf16") == pytest.approx(2 * 518_983_059_456, rel=1e-6)
    rows = {row["linear layers"]: row for row in cards_table(k1)}
    assert list(rows) == list(FORMS) and list(rows["nf4"])[2:] == [
        "cards of 24 GB",
        "cards of 80 GB",
        "cards of 141 GB",
    ]
    assert rows["nf4 double"]["cards of 80 GB"].startswith("4 (")
    # An NF4 layer is 4.4 GB: four of them in 21.6 GB, so 15 cards for 60 layers and more.
    assert cards_needed(k1, "nf4 double", 24 * 10**9)[0] == 15
    assert cards_needed(k1, "nf4 double", 4 * 10**9) is None


def test_error_of_each_layer_and_part(folder, nf4, tmp_path):
    rows = quantization_errors(nf4, folder)
    assert [row["layer"] for row in rows] == [0, 1]
    assert set(rows[0]) == {"layer", "attention", "mlp"} and set(rows[1]) == {
        "layer",
        "attention",
        "mlp",
        "routed experts",
    }
    errors = [error for row in rows for part, error in row.items() if part != "layer"]
    # NF4 of normal weights in blocks of 64: 0.09; FP4: 0.13; 8 bits: under 0.01.
    assert all(0.07 < error < 0.11 for error in errors)
    coarse, fine = (quantization_errors(load(folder, way), folder)[1]["routed experts"] for way in (FP4, INT8))
    assert fine < 0.012 < 0.11 < coarse
    with pytest.raises(ValueError, match="holds neither model.safetensors nor its index"):
        quantization_errors(nf4, tmp_path)


def test_an_index_that_leads_out_of_its_folder_is_refused(tmp_path):
    for name in ("../elsewhere.safetensors", "/etc/elsewhere.safetensors"):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(ValueError, match="index.json names the file .*; give a folder whose index names files"):
            quantization.files_of(tmp_path)
