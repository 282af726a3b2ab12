"""Does the growing cache hold what the concatenating one holds, without copying it?"""

import copy

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from modeling_axk1.cache_axk1 import GrowingLayer, grow_in_place
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
