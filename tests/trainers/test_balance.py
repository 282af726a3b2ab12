"""Does the bias move against the load, by the load of all micro-batches, and does that balance a skewed router?"""

import pytest
import torch

from modeling_axk1 import AxK1Config, AxK1ForCausalLM
from tests.random_models import tiny_chat_config
from trainers.balance import BalanceCallback, bias_step, dead_experts, max_violation, relative_load


def model_of(**changes):
    torch.manual_seed(0)
    config = tiny_chat_config(64)
    return AxK1ForCausalLM(AxK1Config(**{**config.to_dict(), "architectures": None, **changes}))


def test_step_and_measures_by_hand():
    assert bias_step(torch.tensor([4, 0, 2, 2]), 0.5).tolist() == [-0.5, 0.5, 0.0, 0.0]
    load = torch.tensor([[4, 0, 2, 2], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert max_violation(load).tolist() == [1.0, 0.0, 0.0]
    assert dead_experts(load).tolist() == [1, 0, 4]
    assert relative_load(load)[0] == [2.0, 0.0, 1.0, 1.0]


def run_step(model, callback, batches):
    model.train()
    callback.on_step_begin(None, None, None)
    for place, ids in enumerate(batches):
        model(ids)
        (callback.on_pre_optimizer_step if place == len(batches) - 1 else callback.on_substep_end)(None, None, None)
    callback.on_optimizer_step(None, None, None)


def test_micro_batches_count_as_one_batch():
    whole, split = model_of(), model_of()
    ids = torch.randint(0, 64, (4, 16))
    callbacks = [BalanceCallback(model, lambda: 0.01) for model in (whole, split)]
    run_step(whole, callbacks[0], [ids])
    run_step(split, callbacks[1], ids.chunk(4))
    assert callbacks[0].total.tolist() == callbacks[1].total.tolist()
    assert callbacks[0].total.sum(dim=-1).tolist() == [4 * 16 * 2], "top-2 of 64 tokens, one sparse layer"
    for router, twin in zip(callbacks[0].routers.values(), callbacks[1].routers.values()):
        assert torch.equal(router.e_score_correction_bias, twin.e_score_correction_bias)
        expected = bias_step(callbacks[0].total[0], 0.01)
        assert torch.equal(router.e_score_correction_bias, expected) and expected.abs().sum() > 0


def test_a_skewed_router_comes_into_balance():
    model = model_of()
    callback = BalanceCallback(model, lambda: 0.02)
    [router] = callback.routers.values()
    # Every token prefers expert 0, by far.
    router.e_score_correction_bias[0] = 1.0
    ids = torch.randint(0, 64, (8, 32))
    run_step(model, callback, [ids])
    begun = callback.metrics()
    assert begun["max_violation/layer_1"] == begun["max_violation"] == 1.0
    for _ in range(80):
        run_step(model, callback, [ids])
    callback.metrics()
    run_step(model, callback, [ids])
    assert callback.metrics()["max_violation"] < 0.15


def test_rate_zero_counts_and_leaves_the_bias():
    model = model_of()
    callback = BalanceCallback(model, lambda: 0.0)
    run_step(model, callback, [torch.randint(0, 64, (2, 16))])
    assert callback.routers["1"].e_score_correction_bias.abs().sum() == 0
    assert callback.window.sum() == 2 * 16 * 2
    state = callback.state()
    shares = callback.start_stage()
    assert sum(shares[0]) == pytest.approx(4) and callback.total.sum() == 0
    callback.load_state(state)
    assert callback.total.sum() == 2 * 16 * 2


def test_what_cannot_be_balanced_is_refused():
    with pytest.raises(ValueError, match="use topk_method='noaux_tc'"):
        BalanceCallback(model_of(topk_method="greedy"), lambda: 0.01)
    BalanceCallback(model_of(topk_method="greedy"), lambda: 0.0)
    with pytest.raises(ValueError, match="no sparse layer"):
        BalanceCallback(model_of(mlp_layer_types=["dense", "dense"], first_k_dense_replace=None), lambda: 0.0)
