"""Do the fast experts compute what the obvious loop computes, outputs and every gradient?"""

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from modeling_axk1 import AxK1Config, moe_dispatch
from modeling_axk1.modeling_axk1 import AxK1Experts
from modeling_axk1.moe_dispatch import axk1_experts_forward, experts_op, missing_for_kernels, run_experts
from modeling_axk1.moe_reference import moe_reference
from tests.random_experts import outputs_and_gradients, poisoned_memory, problem, relative_error
from tests.random_models import ours, padded_ids, random_config, stock_twin
from tests.tolerances import EXPERTS, PREFILL, ROUTING


@pytest.fixture(autouse=True)
def without_interpreter(monkeypatch):
    """The CPU path is meant here, even if TRITON_INTERPRET is set."""
    monkeypatch.setattr(moe_dispatch, "INTERPRETED", False)


@pytest.mark.parametrize("tokens", [1, 2, 63, 257], ids="T{}".format)
@pytest.mark.parametrize(
    "experts, top_k, routing", [(6, 2, "random"), (6, 6, "random"), (40, 2, "random"), (6, 2, "one"), (6, 2, "foreign")]
)
def test_outputs_and_gradients_equal_the_reference(tokens, experts, top_k, routing):
    inputs = problem(tokens, experts, top_k, routing)
    expected = outputs_and_gradients(moe_reference, inputs)
    with poisoned_memory():
        results = outputs_and_gradients(run_experts, inputs)
    for ours_, truth in zip(results, expected):
        assert truth.abs().max() > 0, "vacuous comparison"
        assert relative_error(ours_, truth) <= EXPERTS


def test_no_tokens():
    inputs = problem(0, 4, 2, "random")
    output, *gradients = outputs_and_gradients(run_experts, inputs)
    assert output.shape == (0, 24) and all((g == 0).all() for g in gradients)


def test_gradients_by_finite_differences():
    inputs = [t.requires_grad_(t.is_floating_point()) for t in problem(5, 4, 2, "random", dtype=torch.float64, hidden=6, width=4)]
    assert torch.autograd.gradcheck(run_experts, inputs)


@pytest.mark.parametrize("needed", [(0,), (2,), (3,), (4,), (0, 4)])
def test_frozen_inputs_cost_and_change_nothing(needed):
    inputs = problem(17, 6, 2, "random")
    all_gradients = dict(zip((0, 2, 3, 4), outputs_and_gradients(run_experts, inputs)[1:]))
    for i, gradient in zip(needed, outputs_and_gradients(run_experts, inputs, needed)[1:]):
        assert torch.equal(gradient, all_gradients[i])


def test_bf16_is_no_less_accurate_than_the_reference():
    inputs = problem(65, 6, 2, "random", dtype=torch.bfloat16)
    truth = outputs_and_gradients(moe_reference, [t.float() if t.is_floating_point() else t for t in inputs])
    reference = outputs_and_gradients(lambda x, i, w, g, d: moe_reference(x, i, w.bfloat16(), g, d), inputs)
    for ours_, reference_, truth_ in zip(outputs_and_gradients(run_experts, inputs), reference, truth):
        assert relative_error(ours_, truth_) <= 1.5 * relative_error(reference_, truth_)


@pytest.mark.parametrize("kept", [False, True])
def test_operator_is_the_function(kept):
    inputs = problem(33, 6, 2, "foreign")
    if kept:
        for a, b in zip(outputs_and_gradients(experts_op, inputs), outputs_and_gradients(run_experts, inputs)):
            assert torch.equal(a, b)
    else:
        with torch.no_grad():
            assert torch.equal(experts_op(*inputs), run_experts(*inputs))


def test_operator_has_right_fakes_and_autograd():
    inputs = [t.requires_grad_(t.is_floating_point()) for t in problem(9, 4, 2, "random")]
    torch.library.opcheck(torch.ops.axk1.experts.default, (*inputs, True))


def test_implementations_are_one_model():
    model = ours(random_config(2))
    input_ids, _ = padded_ids(model.config)
    assert model.config._experts_implementation == "axk1"
    results = {}
    for name in ("axk1", "eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(name)
        model.zero_grad()
        output = model(input_ids, labels=input_ids)
        output.loss.backward()
        results[name] = (output.logits.detach(), model.model.layers[-1].mlp.experts.down_proj.grad)
    for name, (logits, gradient) in results.items():
        assert (logits - results["axk1"][0]).abs().max() <= PREFILL, name
        assert relative_error(gradient, results["axk1"][1]) <= 1e-5, name


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "glm4_moe"])
def test_other_models_can_use_it(name):
    sizes = dict(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        moe_intermediate_size=24, num_experts=5, n_routed_experts=5, num_experts_per_tok=2, intermediate_size=40,
        first_k_dense_replace=0, n_group=1, topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config = CONFIG_MAPPING[name](**sizes)
    assert_same_logits_with_axk1(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._from_config(config).eval())


def test_stock_axk1_can_use_it():
    assert_same_logits_with_axk1(stock_twin(ours(random_config(8))))


def assert_same_logits_with_axk1(model):
    assert type(model).__module__.startswith("transformers.models"), "ours is no stranger"
    input_ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        expected = model(input_ids).logits
        model.set_experts_implementation("axk1")
        assert (model(input_ids).logits - expected).abs().max() <= PREFILL


def test_other_layouts_are_refused():
    experts = ours(random_config(1)).model.layers[-1].mlp.experts
    experts.act_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match="computes SwiGLU but .* has the activation GELU"):
        axk1_experts_forward(experts, torch.randn(2, 4), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))


def test_a_gate_of_its_own_is_refused():
    class Clamped(AxK1Experts):
        def _apply_gate(self, gate_up):
            return gate_up.clamp(max=1)

    experts = Clamped(random_config(1))
    with pytest.raises(ValueError, match="has SiLUActivation in a gate of its own; use"):
        axk1_experts_forward(experts, torch.randn(2, 4), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))


def test_a_failed_compile_falls_back_with_one_warning(monkeypatch):
    inputs = problem(9, 4, 2, "foreign")
    expected = outputs_and_gradients(run_experts, inputs)
    warnings = []

    def does_not_compile(*args):
        raise moe_dispatch.CompileError("up: no C compiler")

    for name in ("kernels_forward", "kernels_backward", "kernels_route"):
        monkeypatch.setattr(moe_dispatch, name, does_not_compile)
    monkeypatch.setattr(moe_dispatch, "missing_for_kernels", lambda device: "")
    monkeypatch.setattr(moe_dispatch, "uncompiled", set())
    monkeypatch.setattr(moe_dispatch.logger, "warning", warnings.append)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(outputs_and_gradients(run_experts, inputs), expected))
    logits_TE, options = torch.randn(5, 6, requires_grad=True), (None, "noaux_tc", 3, 2, 2, True, 2.5)
    weight_TK, expert_TK = moe_dispatch.route_op(logits_TE, *options)
    assert torch.equal(expert_TK, moe_dispatch.torch_route(logits_TE, *options)[1])
    (weight_TK.sin().sum() + 0 * logits_TE.sum()).backward()
    assert len(warnings) == 1 and "because a kernel did not compile (up: no C compiler); mend that" in warnings[0]


def test_torch_routing_gradient_is_autograds():
    logits_TE, grad_TK = torch.randn(5, 6, requires_grad=True), torch.randn(5, 2)
    for normalise in (False, True):
        weight_TK, expert_TK = moe_dispatch.torch_route(logits_TE, None, "noaux_tc", 3, 2, 2, normalise, 2.5)
        (expected,) = torch.autograd.grad(weight_TK, logits_TE, grad_TK)
        grad_TE = moe_dispatch.torch_route_backward(grad_TK, logits_TE.detach(), expert_TK, normalise, 2.5)
        assert (grad_TE - expected).abs().max() <= ROUTING


def test_what_the_kernels_miss_is_named(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "interpreter is off; set TRITON_INTERPRET=1" in missing_for_kernels(torch.device("cpu"))
    assert "for NVIDIA GPUs and this is mps" in missing_for_kernels(torch.device("mps"))
    monkeypatch.setattr(moe_dispatch, "triton", None)
    assert "pip install 'triton>=3.6'" in missing_for_kernels(gpu)
    monkeypatch.setattr(moe_dispatch, "triton", "there")
    assert "compute capability 7.5 and the kernels need 8.0; take" in missing_for_kernels(gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert missing_for_kernels(gpu) == ""


def test_where_kernels_do_not_run_grouped_mm_does_and_says_so(monkeypatch):
    warnings = []
    monkeypatch.setattr(moe_dispatch.logger, "warning_once", warnings.append)
    config = AxK1Config.preset("nano")
    experts = AxK1Experts(config).to("meta", torch.bfloat16)
    x_TH = torch.empty(2, experts.hidden_dim, device="meta", dtype=torch.bfloat16)
    ids = torch.zeros(2, 1, dtype=torch.long, device="meta")
    assert axk1_experts_forward(experts, x_TH, ids, torch.ones(2, 1, device="meta")).shape == x_TH.shape
    assert "runs transformers' 'grouped_mm' here, because its kernels are for NVIDIA GPUs" in warnings[0]
