"""Does the growing cache hold what the concatenating one holds, without copying it?"""

import copy
from unittest import mock

import pytest
import torch
import transformers
from packaging import version
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching import initialization

from modeling_axk1.cache_axk1 import GrowingLayer, grow_in_place
from modeling_axk1.modeling_axk1 import AxK1Attention
from tests.random_models import ours, padded_ids, random_config


def latents(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 1, tokens, 6), torch.randn(batch, 1, tokens, 4)


def same(a: DynamicLayer, b: DynamicLayer) -> bool:
    return a.get_seq_length() == b.get_seq_length() and torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)


def test_holds_what_the_concatenating_layer_holds_whatever_happens_to_it():
    ours_, stock = GrowingLayer(), DynamicLayer()
    events = [
        ("update", 5), ("update", 1), ("reorder", [1, 0, 1]), ("update", 1), ("crop", 2), ("update", 3),
        ("repeat", 2), ("update", 1), ("select", [0, 3]), ("update", 70), ("update", 1), ("crop", 60), ("update", 200),
    ]  # fmt: skip
    batch = 2
    for name, value in events:
        if name == "update":
            new = latents(batch, value)
            for layer in (ours_, stock):
                keys, values = layer.update(*new)
                assert keys.shape[-2] == layer.get_seq_length()
        else:
            for layer in (ours_, stock):
                {
                    "reorder": lambda x, layer=layer: layer.reorder_cache(torch.tensor(x)),
                    "crop": lambda x, layer=layer: layer.crop(-x),
                    "repeat": lambda x, layer=layer: layer.batch_repeat_interleave(x),
                    "select": lambda x, layer=layer: layer.batch_select_indices(torch.tensor(x)),
                }[name](value)
            batch = stock.keys.shape[0]
        assert same(ours_, stock), (name, value)
    for layer in (ours_, stock):
        layer.reset()
    assert ours_.get_seq_length() == stock.get_seq_length()
    new = latents(batch, 2)
    for layer in (ours_, stock):
        layer.update(*new)
    assert same(ours_, stock)


def test_appending_copies_nothing():
    layer = GrowingLayer()
    layer.update(*latents(1, 500))
    pointer = layer.keys.data_ptr()
    for _ in range(60):
        layer.update(*latents(1, 1))
    assert layer.keys.data_ptr() == pointer


def test_growth_is_bounded():
    layer = GrowingLayer()
    copies, pointer = 0, None
    for _ in range(4000):
        layer.update(*latents(1, 1))
        copies += layer.keys.data_ptr() != pointer
        pointer = layer.keys.data_ptr()
    assert copies < 45
    assert layer.key_room.shape[-2] <= 4000 * 1.125 + 64


def test_reordered_beams_keep_their_room():
    layer = GrowingLayer()
    layer.update(*latents(3, 10))
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    pointer = layer.keys.data_ptr()
    layer.update(*latents(3, 1))
    assert layer.keys.data_ptr() == pointer


def test_a_text_begun_in_inference_mode_goes_on_outside_of_it():
    layer, stock = GrowingLayer(), DynamicLayer()
    begun, new = latents(1, 3), latents(1, 1)
    for each in (layer, stock):
        with torch.inference_mode():
            each.update(*begun)
        with torch.no_grad():
            each.update(*new)
    assert same(layer, stock)


def test_gradients_flow_through_cached_latents():
    a, b = GrowingLayer(), DynamicLayer()
    prefix = [t.requires_grad_() for t in latents(1, 3)]
    gradients = []
    for layer in (a, b):
        layer.update(*prefix)
        keys, values = layer.update(*latents(1, 1))
        gradients.append(torch.autograd.grad((keys**2).sum() + (values**3).sum(), prefix, materialize_grads=True))
    assert all(g.abs().max() > 0 for g in gradients[0])
    assert all(torch.equal(x, y) for x, y in zip(*gradients))


def test_the_model_makes_empty_plain_layers_grow_and_leaves_the_rest():
    model = ours(random_config(1))
    input_ids, _ = padded_ids(model.config)
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        with torch.no_grad():
            model(input_ids, past_key_values=cache)
        assert all(type(layer) is GrowingLayer for layer in cache.layers)
        assert cache.get_seq_length() == input_ids.shape[1]
        copied = copy.deepcopy(cache)
        with torch.no_grad():
            model(input_ids[:, :1], past_key_values=copied)
        assert (cache.get_seq_length(), copied.get_seq_length()) == (13, 14)
    filled = DynamicLayer()
    filled.update(*latents(1, 2))
    cache.layers[0] = filled
    grow_in_place(cache)
    assert cache.layers[0] is filled


# Pages: transformers' continuous batching, under which stock's `axk1` fails.
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9], [10] * 20, [1, 2, 3, 4, 5]]


def batched(model, **options) -> list[list[int]]:
    """What `generate_batch` answers to PROMPTS; a page is 4 tokens, and 16 tokens a step cut the longest prompt in two."""
    settings = ContinuousBatchingConfig(page_size=4, num_blocks=40, max_batch_tokens=16)
    generation = GenerationConfig(max_new_tokens=6, eos_token_id=-1, **options)
    outputs = model.generate_batch(PROMPTS, generation_config=generation, continuous_batching_config=settings)
    errors = [output.error for output in outputs.values() if output.error]
    assert not errors, errors
    return [output.generated_tokens for output in outputs.values()]


def alone(model, prompt: list[int]) -> list[int]:
    return model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :].tolist()


continuous_batching = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"), reason="transformers older than 5.23"
)


@continuous_batching
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_continuous_batching_answers_each_prompt_as_if_it_were_alone(implementation):
    # 23 numbers a token, cut in two halves of 12
    model = ours(random_config(8, kv_lora_rank=15, qk_rope_head_dim=8))
    model.set_attn_implementation(implementation)
    expected = [alone(model, prompt) for prompt in PROMPTS]
    attend_absorbed = AxK1Attention.attend_absorbed
    with mock.patch.object(AxK1Attention, "attend_absorbed", autospec=True, side_effect=attend_absorbed) as used:
        assert batched(model) == expected
    assert used.called, "vacuous: no step was absorbed"
    assert model.config._attn_implementation == implementation
    # Two of each, which share the pages of their prompt.
    assert batched(model, num_return_sequences=2, do_sample=True, top_k=1) == [answer for answer in expected for _ in range(2)]


@continuous_batching
@pytest.mark.parametrize("absorbable", [True, False])
def test_decoding_out_of_block_tables(absorbable):
    """Which transformers does beside FlashAttention on a GPU only: here it is made to."""
    model = ours(random_config(8, kv_lora_rank=15, qk_rope_head_dim=8))
    if not absorbable:
        model.model.layers[-1].self_attn.kv_b_proj.register_forward_hook(lambda module, inputs, output: output * 1.5)
    expected = [alone(model, prompt) for prompt in PROMPTS]
    attend_pages = AxK1Attention.attend_pages
    with (
        mock.patch.object(initialization, "ensure_decode_fast_path_is_available"),
        mock.patch.object(AxK1Attention, "attend_pages", autospec=True, side_effect=attend_pages) as used,
    ):
        assert batched(model) == expected
    assert used.called == absorbable


@continuous_batching
def test_pages_hold_latents_and_nothing_else():
    model = ours(random_config(7))
    manager = model.init_continuous_batching(
        GenerationConfig(eos_token_id=-1), ContinuousBatchingConfig(page_size=4, num_blocks=40, max_batch_tokens=16)
    )
    cached = manager.batch_processor.cache
    numbers_a_token = cached.cache_tensor.numel() / 4 / (cached.num_blocks + 2) / 4 / model.config.num_hidden_layers
    assert numbers_a_token == pytest.approx(model.config.kv_lora_rank + model.config.qk_rope_head_dim, rel=0.1)
    assert model.config.head_dim == model.config.qk_rope_head_dim, "the model's own configuration stays"
