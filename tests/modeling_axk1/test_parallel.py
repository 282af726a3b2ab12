"""Does a model on several ranks compute, learn, hold and read what it should? Against one process, over gloo on a CPU."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig
from transformers.distributed import DistributedConfig
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

pytest.importorskip("transformers.distributed.expert_parallel", reason="sharding by plans needs transformers 5.21")

from modeling_axk1 import AxK1Config, AxK1ForCausalLM
from modeling_axk1.quantization_axk1 import load_quantized
from tests.modeling_axk1.parallel_checks import (
    NF4,
    check_layouts,
    check_pair,
    ids_of_16,
    infer_and_train,
    infer_quantized,
)
from tests.random_models import YARN, ours, padded_ids
from tests.ranks import run_on_ranks
from tests.tolerances import CACHED_STEP, GRADIENT, PREFILL
from trainers.adapters import load_adapter
from trainers.pipeline import pipeline_schedule
from trainers.serve_plan import PRECISIONS, SERVING_GPUS, layouts
from trainers.sharding import four_bit_bytes, held_parameters, held_shapes

# Expert parallelism of four beside tensor parallelism of two needs FSDP for the other factor of two.
LAYOUTS = {
    "tp2": {"tp_size": 2},
    "ep2": {"fsdp_size": 2, "ep_size": 2},
    "tp2_ep2": {"tp_size": 2, "ep_size": 2},
    "fsdp2": {"fsdp_size": 2},
    "pp2": {"pp_size": 2},
    "tp4_ep4": {"tp_size": 4, "ep_size": 4},
    "tp2_fsdp2_ep4": {"tp_size": 2, "fsdp_size": 2, "ep_size": 4},
}
MIXTURES = ["axk1", "qwen3_moe"]
QWEN3_MOE = {
    "vocab_size": 67, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
    "moe_intermediate_size": 32, "intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 32,
    "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
TRAINED = [name for name, sizes in LAYOUTS.items() if "pp_size" not in sizes]


def config(**overrides) -> AxK1Config:
    """Heads and experts that four ranks can share; a vocabulary and a dense width that they cannot share evenly."""
    fields = dict(
        vocab_size=67,
        hidden_size=48,
        intermediate_size=46,
        moe_intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=2,
        topk_group=1,
        q_lora_rank=22,
        kv_lora_rank=24,
        qk_nope_head_dim=10,
        qk_rope_head_dim=4,
        v_head_dim=6,
        attention_bias=True,
        rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return AxK1Config(**fields | overrides)


def equal_heads() -> AxK1Config:
    """What the CPU's flash kernel takes: values as wide as keys."""
    return config(v_head_dim=14)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, token ids, padding mask, what one process gets)."""
    folder = tmp_path_factory.mktemp("model")
    model = ours(config())
    model.save_pretrained(folder)
    ids, mask = padded_ids(model.config, rows=4)
    return folder, ids, mask, infer_and_train(model, ids, mask, ids)


@pytest.fixture(scope="module")
def pair(saved, tmp_path_factory):
    """What each of two ranks got: by layout, in a pipelined step, and with every row cut over the ranks; they start once."""
    folder, ids, mask, _ = saved
    out = tmp_path_factory.mktemp("two")
    ours(equal_heads()).save_pretrained(out / "equal_heads")
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN3_MOE)).save_pretrained(out / "qwen3_moe")
    unlike = sparse_copy(folder, out / "sparse"), copy_with(folder, out / "other", kv_lora_rank=23)
    paths = str(folder), str(out / "equal_heads"), str(out / "pipelined"), unlike
    return out, run_on_ranks(2, out, check_pair, *paths, mixtures_of(saved, out), layouts_of(2), ids, mask)


def copy_with(folder: Path, copy: Path, **fields) -> str:
    """The folder with other values in its config.json."""
    shutil.copytree(folder, copy)
    file = copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return str(copy)


def sparse_copy(folder: Path, copy: Path) -> str:
    """As stock transformers saves it, without the dense layer's norm, and as the release is, without the routers' biases."""
    copy_with(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    lacking = [name for name in tensors if "layers.0.post_mlp" in name or "correction_bias" in name]
    assert len(lacking) == 3
    kept = {name: tensor for name, tensor in tensors.items() if name not in lacking}
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    return str(copy)


def mixtures_of(saved, out: Path) -> list[tuple[str, type, str]]:
    """Folder, class, and where its adapter is saved, ours and another: MIXTURES."""
    of = (str(saved[0]), AxK1ForCausalLM), (str(out / "qwen3_moe"), Qwen3MoeForCausalLM)
    return [(*each, str(out / f"adapter-{name}")) for each, name in zip(of, MIXTURES, strict=True)]


@pytest.fixture(scope="module")
def ranks(saved, pair, tmp_path_factory):
    """By layout, what each of its ranks got."""
    folder, ids, mask, _ = saved
    out = tmp_path_factory.mktemp("four")
    by_rank = run_on_ranks(4, out, check_layouts, str(folder), layouts_of(4), ids, mask)
    results = {name: [results[name] for results in by_rank] for name in layouts_of(4)}
    return results | {name: [results[name] for results, *_ in pair[1]] for name in layouts_of(2)}


def world_of(sizes: dict[str, int]) -> int:
    layout = DistributedConfig(**sizes)
    return layout.pp_size * layout.dp_size * layout.tp_size


def layouts_of(world: int) -> dict[str, dict]:
    return {name: sizes for name, sizes in LAYOUTS.items() if world_of(sizes) == world}


def assert_gradients_equal(gradients: dict, truth: dict) -> None:
    largest = max(gradient.abs().max() for gradient in truth.values())
    assert gradients.keys() == truth.keys()
    for name, gradient in truth.items():
        near = GRADIENT * max(gradient.abs().max(), largest / 1000)
        torch.testing.assert_close(gradients[name], gradient, atol=near.item(), rtol=0, msg=name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_cached_steps_and_generation_equal_one_process(saved, ranks, layout):
    ids, truth = saved[1], saved[3]
    for result in ranks[layout]:
        torch.testing.assert_close(result["logits"], truth["logits"], atol=PREFILL, rtol=0)
        torch.testing.assert_close(result["steps"], truth["steps"], atol=CACHED_STEP, rtol=0)
        assert torch.equal(result["tokens"], truth["tokens"]) and truth["tokens"].shape[1] > ids.shape[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_decodes_absorbed_on_its_own_heads(saved, ranks, layout):
    """One call a layer and step, of the layers that the rank holds."""
    steps = saved[1].shape[1] - 6
    assert saved[3]["absorbed"] == 3 * steps
    layers = [1, 2] if layout == "pp2" else [3] * world_of(LAYOUTS[layout])
    assert [result["absorbed"] for result in ranks[layout]] == [n * steps for n in layers]


@pytest.mark.parametrize("layout", TRAINED)
def test_a_training_step_equals_one_process(saved, ranks, layout):
    truth, results = saved[3], ranks[layout]
    # Each share of the rows has as many tokens, so the mean of the losses is the loss.
    loss = torch.stack([result["loss"] for result in results]).mean()
    torch.testing.assert_close(loss, truth["loss"], atol=PREFILL, rtol=0)
    for result in results:
        assert_gradients_equal(result["gradients"], truth["gradients"])
        for name, weight in truth["updated"].items():
            torch.testing.assert_close(result["updated"][name], weight, atol=PREFILL, rtol=0, msg=name)


def test_a_pipelined_step_equals_one_process_and_its_checkpoint_loads_anywhere(saved, pair):
    truth, (out, results) = saved[3], pair
    (no_loss, first), (loss, last) = (step for _, step, *_ in results)
    assert no_loss is None and not first.keys() & last.keys()
    torch.testing.assert_close(loss, truth["loss"], atol=PREFILL, rtol=0)
    assert_gradients_equal(first | last, truth["gradients"])
    names = load_file(saved[0] / "model.safetensors").keys()
    assert json.loads((out / "pipelined/model.safetensors.index.json").read_text())["weight_map"].keys() == names
    model = AxK1ForCausalLM.from_pretrained(out / "pipelined")
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, truth["updated"][name], atol=PREFILL, rtol=0, msg=name)


def test_rows_cut_over_ranks_learn_as_one_process_does(saved, pair):
    """Context parallelism: torch's ring attention, its balanced cutting of rows and accelerate's dropping of masks."""
    ids, (_, results) = ids_of_16(saved[1]), pair
    model = ours(equal_heads()).train()
    truth = model(ids, labels=ids).loss
    truth.backward()
    for _, _, (loss, gradients), *_ in results:
        torch.testing.assert_close(loss, truth.detach(), atol=PREFILL, rtol=0)
        assert_gradients_equal(gradients, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [("tie_word_embeddings", True, "two copies"), ("num_nextn_predict_layers", 1, "do not train on a pipeline")],
)
def test_what_cannot_train_on_a_pipeline_is_refused(field, value, reason):
    model = ours(config(**{field: value}))
    with pytest.raises(ValueError, match="on no pipeline"):
        pipeline_schedule(model, micro_batches=2)
    model.config.distributed_config = DistributedConfig(pp_size=2)
    with pytest.raises(ValueError, match=reason):
        pipeline_schedule(model, micro_batches=2)


@pytest.mark.parametrize("place", [0, 1], ids=MIXTURES)
def test_quantised_experts_dealt_to_ranks_infer_and_learn_as_in_one_process(saved, pair, place):
    """Each rank reads, quantises and runs half of them; what stands beside them is whole on both."""
    out, results = pair
    path, kind, adapter = mixtures_of(saved, out)[place]
    model = load_quantized(path, BitsAndBytesConfig(**NF4), model_class=kind)
    truth = infer_quantized(model, saved[1])
    for *_, found in results:
        torch.testing.assert_close(found[place]["logits"], truth["logits"], atol=PREFILL, rtol=0)
        assert torch.equal(found[place]["tokens"], truth["tokens"])
        torch.testing.assert_close(found[place]["loss"], truth["loss"], atol=PREFILL, rtol=0)
        assert_gradients_equal(found[place]["gradients"], truth["gradients"])
    first, second = (set(found[place]["experts"]) for *_, found in results)
    assert len(first) == len(second) and not first & second
    assert first | second == {name for name in model.state_dict() if ".experts." in name}
    # LoRA on what stands beside them is whole on every rank, and saved from any.
    tuned = infer_quantized(load_adapter(model.eval(), adapter, trainable=True).eval(), saved[1])
    assert (tuned["logits"] - truth["logits"]).abs().max() > 100 * PREFILL, "the adapter does nothing"
    for *_, found in results:
        adapted = found[place]["adapted"]
        torch.testing.assert_close(adapted["logits"], tuned["logits"], atol=PREFILL, rtol=0)
        assert torch.equal(adapted["tokens"], tuned["tokens"])
        assert_gradients_equal(adapted["gradients"], tuned["gradients"])


def test_ranks_hold_the_predicted_bytes_in_4_bits(pair):
    # A vocabulary of 67 is cut into 34 and 33.
    held = sum(found[0]["held"] for *_, found in pair[1])
    assert held == 2 * four_bit_bytes(config(), 2)
    nf4 = next(precision for precision in PRECISIONS if precision.name == "nf4 double")
    [(layout, [card], *_)] = layouts(config(), nf4, "experts", SERVING_GPUS[0], 2)
    # Both cache every layer: heads share the latents.
    assert layout == "experts over 2" and 2 * card.weight_bytes == held and card.layers == config().num_hidden_layers


def test_a_rank_of_quantised_experts_does_not_take_its_own_for_all(pair):
    """What it saved or adapted would lack the other ranks' experts."""
    for *_, found in pair[1]:
        saving, dequantising, adapting = found[0]["refused"]
        assert "This rank holds 4 of 8 quantised experts a layer and cannot save the model" in saving
        assert "cannot dequantise the model" in dequantising and "cannot adapt the routed experts" in adapting


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_holds_what_was_predicted(ranks, layout):
    sizes = DistributedConfig(**LAYOUTS[layout])
    for rank, result in enumerate(ranks[layout]):
        assert result["held"] == 4 * held_parameters(config(), sizes, rank)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_read_each_byte_once(saved, ranks, layout):
    # The routers' biases are buffers, of 4 bytes an expert: in the file, and not among the parameters.
    stored = sum(tensor.nbytes for tensor in load_file(saved[0] / "model.safetensors").values())
    assert stored == sum(p.nbytes for p in AxK1ForCausalLM(config()).parameters()) + 2 * 4 * config().n_routed_experts
    assert sum(result["read"] for result in ranks[layout]) == stored
    # None reads for the others.
    assert all(0 < result["read"] <= result["held"] + 2 * 4 * config().n_routed_experts for result in ranks[layout])


def test_ranks_load_a_file_that_lacks_what_may_be_lacking(saved, pair):
    with torch.no_grad():
        truth = AxK1ForCausalLM.from_pretrained(pair[0] / "sparse")(saved[1]).logits
    assert not torch.equal(truth, saved[3]["logits"]), "the biases do nothing"
    for *_, found, _ in pair[1]:
        torch.testing.assert_close(found["logits"], truth, atol=PREFILL, rtol=0)


def test_ranks_say_alike_that_a_file_is_of_other_sizes(pair):
    """Of 28 rows for 27 one rank finds the part that it expects, and would wait for the other."""
    for *_, found, _ in pair[1]:
        assert "model.layers.0.self_attn.kv_a_proj_with_mqa.weight is not [27, 48], as the config" in found["refused"]


def test_the_attention_and_the_experts_of_k1_are_split():
    """Against hand counts: stock transformers' plan for axk1 leaves the attention whole."""
    shapes = held_shapes(AxK1Config.preset("k1"), DistributedConfig(tp_size=8, ep_size=8), rank=3)
    layer = "model.layers.1."
    assert shapes[layer + "self_attn.q_b_proj.weight"] == (8 * 192, 1536)
    assert shapes[layer + "self_attn.kv_b_proj.weight"] == (8 * 256, 512)
    assert shapes[layer + "self_attn.o_proj.weight"] == (7168, 8 * 128)
    assert shapes[layer + "mlp.experts.gate_up_proj"] == (24, 4096, 7168)
    assert shapes[layer + "mlp.shared_experts.down_proj.weight"] == (7168, 256)
    assert shapes["lm_head.weight"] == shapes["model.embed_tokens.weight"] == (20480, 7168)
    # Without expert parallelism every rank holds an eighth of each expert instead.
    shapes = held_shapes(AxK1Config.preset("k1"), DistributedConfig(tp_size=8), rank=3)
    assert shapes[layer + "mlp.experts.gate_up_proj"] == (192, 512, 7168)
    assert shapes[layer + "mlp.experts.down_proj"] == (192, 7168, 256)


def test_tensor_parallelism_that_cuts_a_head_is_refused():
    model = ours(config())
    with pytest.raises(ValueError, match="tp_size=3 does not divide num_attention_heads=4"):
        model._resolve_parallel_plans(DistributedConfig(tp_size=3))
    # Experts alone may be split by any number of ranks.
    model._resolve_parallel_plans(DistributedConfig(fsdp_size=3, ep_size=3))
