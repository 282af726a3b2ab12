"""Do the fast experts compute what the obvious loop computes, outputs and every gradient?"""

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from modeling_axk1.moe_dispatch import axk1_experts_forward, cpu_experts, cpu_experts_op
from modeling_axk1.moe_reference import moe_reference
from tests.random_models import ours, padded_ids, random_config
from tests.tolerances import EXPERTS, PREFILL

HIDDEN, WIDTH = 24, 20


def problem(tokens: int, experts: int, top_k: int, routing: str, dtype=torch.float32, seed: int = 0):
    """Inputs of one MoE layer: x, expert ids, weights, gate_up, down; routing "random", "one" (all on expert 1), "foreign"."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    ids = torch.rand(tokens, experts, generator=generator).topk(top_k, dim=1).indices
    if routing == "one":
        ids = torch.full_like(ids[:, :1], 1)
    if routing == "foreign":  # every third choice lies on another rank
        ids = ids.masked_fill(torch.arange(ids.numel()).view_as(ids) % 3 == 0, experts)
    weights = torch.rand(ids.shape, generator=generator, dtype=torch.float64).to(
        torch.promote_types(dtype, torch.float32)
    )
    return normal(tokens, HIDDEN), ids, weights, normal(experts, 2 * WIDTH, HIDDEN), normal(experts, HIDDEN, WIDTH)


def outputs_and_gradients(function, inputs, needed=(0, 2, 3, 4)):
    inputs = [t.clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
    output = function(*inputs)
    output.backward(torch.sin(torch.arange(output.numel(), dtype=output.dtype)).view_as(output))
    return [output.detach(), *(inputs[i].grad for i in needed)]


def relative_error(value, truth):
    return ((value.double() - truth.double()).abs().max() / truth.double().abs().max().clamp(min=1e-30)).item()


def poison_fresh_memory():
    """Leave NaN in freed memory, so that an entry nobody writes shows."""
    for size in (64, 512, 4096, 32768, 262144):
        [torch.full((size,), float("nan")) for _ in range(4)]


@pytest.mark.parametrize("tokens", [1, 2, 63, 257], ids="T{}".format)
@pytest.mark.parametrize(
    "experts, top_k, routing", [(6, 2, "random"), (6, 6, "random"), (40, 2, "random"), (6, 2, "one"), (6, 2, "foreign")]
)
def test_outputs_and_gradients_equal_the_reference(tokens, experts, top_k, routing):
    inputs = problem(tokens, experts, top_k, routing)
    expected = outputs_and_gradients(moe_reference, inputs)
    poison_fresh_memory()
    for ours_, truth in zip(outputs_and_gradients(cpu_experts, inputs), expected):
        assert truth.abs().max() > 0, "vacuous comparison"
        assert relative_error(ours_, truth) <= EXPERTS


def test_no_tokens():
    inputs = problem(0, 4, 2, "random")
    output, *gradients = outputs_and_gradients(cpu_experts, inputs)
    assert output.shape == (0, HIDDEN) and all((g == 0).all() for g in gradients)


def test_gradients_by_finite_differences():
    inputs = [t.requires_grad_(t.is_floating_point()) for t in problem(5, 4, 2, "random", dtype=torch.float64)]
    assert torch.autograd.gradcheck(cpu_experts, inputs)


@pytest.mark.parametrize("needed", [(0,), (2,), (3,), (4,), (0, 4)])
def test_frozen_inputs_cost_and_change_nothing(needed):
    inputs = problem(17, 6, 2, "random")
    all_gradients = dict(zip((0, 2, 3, 4), outputs_and_gradients(cpu_experts, inputs)[1:]))
    for i, gradient in zip(needed, outputs_and_gradients(cpu_experts, inputs, needed)[1:]):
        assert torch.equal(gradient, all_gradients[i])


def test_bf16_is_no_less_accurate_than_the_reference():
    inputs = problem(65, 6, 2, "random", dtype=torch.bfloat16)
    truth = outputs_and_gradients(moe_reference, [t.float() if t.is_floating_point() else t for t in inputs])
    reference = outputs_and_gradients(lambda x, i, w, g, d: moe_reference(x, i, w.bfloat16(), g, d), inputs)
    for ours_, reference_, truth_ in zip(outputs_and_gradients(cpu_experts, inputs), reference, truth):
        assert relative_error(ours_, truth_) <= 1.5 * relative_error(reference_, truth_)


@pytest.mark.parametrize("kept", [False, True])
def test_operator_is_the_function(kept):
    inputs = problem(33, 6, 2, "foreign")
    if kept:
        for a, b in zip(outputs_and_gradients(cpu_experts_op, inputs), outputs_and_gradients(cpu_experts, inputs)):
            assert torch.equal(a, b)
    else:
        with torch.no_grad():
            assert torch.equal(cpu_experts_op(*inputs), cpu_experts(*inputs))


def test_operator_has_right_fakes_and_autograd():
    inputs = [t.requires_grad_(t.is_floating_point()) for t in problem(9, 4, 2, "random")]
    torch.library.opcheck(torch.ops.axk1.cpu_experts.default, (*inputs, True))


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


def test_other_models_can_use_it():
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        moe_intermediate_size=24, num_experts=5, num_experts_per_tok=2, intermediate_size=40,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    input_ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        expected = model(input_ids).logits
        model.set_experts_implementation("axk1")
        assert (model(input_ids).logits - expected).abs().max() <= PREFILL


def test_other_layouts_are_refused():
    experts = ours(random_config(1)).model.layers[-1].mlp.experts
    experts.act_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match="computes SwiGLU but the activation is GELU"):
        axk1_experts_forward(experts, torch.randn(2, 4), torch.zeros(2, 1, dtype=torch.long), torch.ones(2, 1))
