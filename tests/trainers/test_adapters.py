"""Does LoRA on routed experts train what stock PEFT trains, in less, and can each read what the other wrote?"""

import copy
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AXK1ForCausalLM, BitsAndBytesConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from modeling_axk1 import AxK1ForCausalLM
from modeling_axk1.moe_lora import lora_experts_forward
from modeling_axk1.quantization_axk1 import PackedExperts
from tests.random_models import adapt, ours, padded_ids, random_config, randomise, stock_twin
from tests.tolerances import CACHED_STEP, GRADIENT, PREFILL
from trainers import adapters
from trainers.adapters import group_experts, load_adapter, lora_config


def small(**overrides) -> AxK1ForCausalLM:
    return ours(random_config(1, **overrides))


def random_lora(model: nn.Module, **settings) -> PeftModel:
    return adapt(model, lora_config(model, r=4, **settings))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=padded_ids(model.config)[0]).logits


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    ids, _ = padded_ids(model.config)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert found.keys() == truth.keys() and any("experts.lora_A" in name for name in truth)
    largest = max(grad.abs().max() for grad in truth.values())
    for name, grad in truth.items():
        scale = max(grad.abs().max(), 1e-3 * largest)
        assert grad.abs().max() > 0, f"vacuous: {name}"
        assert (found[name] - grad).abs().max() <= GRADIENT * scale, name


def pack(model: nn.Module) -> nn.Module:
    """A copy of the model whose routed experts are stored one by one, as quantised ones are, with every digit kept."""
    packed = copy.deepcopy(model)
    for name, fused in adapters.routed_experts(model).items():
        experts = PackedExperts(fused)
        for number in range(fused.num_experts):
            one = experts[number]
            gate, up = fused.gate_up_proj.data[number].chunk(2)
            for layer, weight in (
                (one.gate_proj, gate),
                (one.up_proj, up),
                (one.down_proj, fused.down_proj.data[number]),
            ):
                layer.weight.data.copy_(weight)
        packed.set_submodule(name, experts.requires_grad_(False))
    return packed


# -- the mathematics ------------------------------------------------------------------------------------------------
class Experts(nn.Module):
    """Fused experts with A and B of every expert, materialised: the oracle."""

    def __init__(self, experts: int, hidden: int, width: int, rank: tuple[int, int], dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(experts)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) / 3

        self.num_experts, self.hidden_dim, self.intermediate_dim = experts, hidden, width
        self.gate_up_proj = nn.Parameter(draw(experts, 2 * width, hidden), requires_grad=False)
        self.down_proj = nn.Parameter(draw(experts, hidden, width), requires_grad=False)
        r1, r2 = rank
        shapes = ((r1 * experts, hidden), (2 * width, r1 * experts), (r2 * experts, width), (hidden, r2 * experts))
        self.factors = [draw(*shape).requires_grad_() for shape in shapes]

    def loras(self):
        gate_up, down = (*self.factors[:2], 0.5), (*self.factors[2:], 2.0)
        return [lora if lora[0].numel() else None for lora in (gate_up, down)]

    def obvious(self, x_TH: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        matrices = []
        for weight, (lora_A, lora_B, scale) in zip(
            (self.gate_up_proj, self.down_proj), ((*self.factors[:2], 0.5), (*self.factors[2:], 2.0))
        ):
            # Expert after expert in A's rows; in B's columns, rank after rank.
            a = lora_A.reshape(self.num_experts, -1, lora_A.shape[1])
            b = torch.stack([lora_B[:, expert :: self.num_experts] for expert in range(self.num_experts)])
            matrices.append(weight + scale * b @ a if lora_A.numel() else weight)
        rows = []
        for token in range(x_TH.shape[0]):
            row = torch.zeros_like(x_TH[token])
            for expert, weight in zip(expert_TK[token].tolist(), weight_TK[token]):
                if expert < self.num_experts:
                    gate, up = (matrices[0][expert] @ x_TH[token]).chunk(2)
                    row = row + weight * (matrices[1][expert] @ (nn.functional.silu(gate) * up))
            rows.append(row)
        return torch.stack(rows)


@pytest.mark.parametrize("rank", [(3, 2), (1, 0), (0, 2)], ids=str)
def test_output_and_every_gradient_are_those_of_the_materialised_matrices(rank):
    """An expert that nobody visits and one of another rank are among them."""
    experts = Experts(5, 6, 4, rank)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 6, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.rand(7, 2, generator=generator, dtype=torch.float64).requires_grad_()
    expert = torch.rand(7, 5, generator=generator).topk(2).indices
    expert[expert == 3] = 5
    leaves = [x, weight, *(factor for factor in experts.factors if factor.numel())]
    out = lora_experts_forward(experts, x, expert, weight, *experts.loras())
    truth = experts.obvious(x, expert, weight)
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-12)
    probe = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    for found, wanted in zip(torch.autograd.grad(out, leaves, probe), torch.autograd.grad(truth, leaves, probe)):
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(lora_experts_forward(experts, x, expert, weight, *experts.loras()), out)


def test_what_is_kept_for_backward_is_the_input_and_the_gate_up_output():
    """Not a weight, not a low-rank product, and of packed experts nothing that was dequantised."""
    experts = Experts(4, 8, 6, (2, 2), torch.float32)
    x, expert = torch.randn(9, 8).requires_grad_(), torch.rand(9, 4).topk(2).indices
    weight = torch.rand(9, 2)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        lora_experts_forward(experts, x, expert, weight, *experts.loras()).sum().backward()
    factors = [tuple(factor.shape) for factor in experts.factors]
    assert sorted(kept) == sorted([(9, 8), (9, 2), (9, 2), *factors, (9 * 2, 2 * 6)])


def test_half_precision_is_no_less_accurate_than_the_materialised_matrices():
    experts, wide = (Experts(4, 32, 16, (4, 4), dtype) for dtype in (torch.bfloat16, torch.float64))
    expert, weight = torch.rand(20, 4).topk(2).indices, torch.rand(20, 2)
    x = torch.randn(20, 32).bfloat16()
    for mine, exact in zip((experts.gate_up_proj, experts.down_proj), (wide.gate_up_proj, wide.down_proj)):
        exact.data.copy_(mine.data)
    # PEFT keeps adapters in fp32.
    experts.factors = [factor.detach().float().requires_grad_() for factor in experts.factors]
    wide.factors = [factor.detach().double() for factor in experts.factors]
    truth = wide.obvious(x.double(), expert, weight.double())
    rounded = copy.copy(experts)
    rounded.factors = [factor.bfloat16() for factor in experts.factors]
    out, peer = (
        lora_experts_forward(experts, x, expert, weight, *experts.loras()),
        rounded.obvious(x, expert, weight.bfloat16()),
    )
    assert out.dtype == torch.bfloat16
    error, peers = ((each.double() - truth).norm() / truth.norm() for each in (out, peer))
    assert 0 < error <= 1.5 * peers
    out.float().sum().backward()
    assert all(factor.grad.dtype == torch.float32 and factor.grad.abs().max() > 0 for factor in experts.factors)


def test_autocast_leaves_experts_their_own_dtype():
    """As stock PEFT does: whoever wants bf16 experts loads them so."""
    experts = Experts(4, 8, 6, (2, 2), torch.float32)
    x, weight, expert = torch.randn(9, 8).requires_grad_(), torch.rand(9, 2), torch.rand(9, 4).topk(2).indices
    leaves = [x, *experts.factors]

    def outcome() -> list[Tensor]:
        out = lora_experts_forward(experts, x, expert, weight, *experts.loras())
        return [out, *torch.autograd.grad(out.sum(), leaves)]

    truth = outcome()
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome()
    assert all(torch.equal(a, b) for a, b in zip(found, truth))


# -- beside stock PEFT ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("settings", [{}, {"rslora": True, "alpha": 8}], ids=["lora", "rslora"])
def test_stock_peft_on_the_stock_model_reads_ours_and_ours_reads_its(tmp_path, settings):
    """The same logits and gradients both ways, all targets, attached by get_peft_model alone."""
    model = small()
    stock = stock_twin(model)
    assert type(stock) is AXK1ForCausalLM
    tuned = random_lora(model, **settings)
    base = logits(stock)
    tuned.save_pretrained(tmp_path / "ours")
    peer = PeftModel.from_pretrained(stock, tmp_path / "ours", is_trainable=True)
    assert type(peer.get_submodule("base_model.model.model.layers.1.mlp.experts")).__module__.startswith("peft.")
    assert (logits(tuned) - base).abs().max() > 1
    torch.testing.assert_close(logits(tuned), logits(peer), rtol=0, atol=PREFILL)
    assert_same_gradients(gradients(tuned), gradients(peer))

    peer.save_pretrained(tmp_path / "stock")
    again = load_adapter(small(), tmp_path / "stock")
    wrapper = again.get_submodule("base_model.model.model.layers.1.mlp.experts")
    assert type(wrapper) is adapters.ParamWrapper and type(wrapper.base_layer) is adapters.ParamWrapper
    torch.testing.assert_close(logits(again), logits(tuned), rtol=0, atol=0)
    assert not [name for name, parameter in again.named_parameters() if parameter.requires_grad]
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "stock")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_merged_it_is_a_stock_checkpoint(tmp_path):
    tuned = random_lora(small())
    wanted, exact = logits(tuned), {}
    experts = tuned.get_submodule("base_model.model.model.layers.1.mlp.experts")
    for wrapper in (experts, experts.base_layer):
        lora_A, lora_B, scale = (value.double() if torch.is_tensor(value) else value for value in wrapper.active_lora())
        delta = torch.einsum("ore,eri->eoi", lora_B.unflatten(1, (4, -1)), lora_A.unflatten(0, (-1, 4)))
        exact[wrapper.parameter_name] = wrapper.get_param().double() + scale * delta
    merged = tuned.merge_and_unload()
    assert type(merged) is AxK1ForCausalLM
    merged.save_pretrained(tmp_path)
    stock = AXK1ForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    for name, weight in exact.items():
        assert (getattr(stock.model.layers[1].mlp.experts, name) - weight).abs().max() <= 1e-6
    torch.testing.assert_close(logits(stock), wanted, rtol=0, atol=PREFILL)


def test_gradient_checkpointing_gives_the_same_gradients():
    tuned = random_lora(small()).train()
    truth = gradients(tuned)
    tuned.gradient_checkpointing_enable({"use_reentrant": False})
    tuned.enable_input_require_grads()
    again = gradients(tuned)
    assert again.keys() == truth.keys() and all(torch.equal(again[name], truth[name]) for name in truth)


@pytest.mark.parametrize("packed", [False, True], ids=["fused", "packed"])
def test_cached_generation_is_the_full_forward(packed):
    model = small()
    tuned = random_lora(pack(model) if packed else model)
    ids, _ = padded_ids(tuned.config)
    with torch.no_grad():
        whole = tuned(input_ids=ids).logits
        cache, steps = None, []
        for token in ids.split(1, dim=1):
            step = tuned(input_ids=token, past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            steps.append(step.logits)
        with tuned.disable_adapter():
            assert (tuned(input_ids=ids).logits - whole).abs().max() > 1, "vacuous: the adapter changes nothing"
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=0, atol=CACHED_STEP)


@pytest.mark.parametrize("packed", [False, True], ids=["fused", "packed"])
def test_several_adapters_switch_add_and_rest_as_stock_peft_does(tmp_path, packed):
    """One base, an adapter a mode: each alone, both at once, none."""
    model = small()
    stock = stock_twin(model)
    base = logits(stock)
    for seed, name in enumerate(("thinking", "non-thinking")):
        one = get_peft_model(copy.deepcopy(model), lora_config(model, r=2 + seed))
        randomise(one, seed)
        one.save_pretrained(tmp_path / name)
    peer = PeftModel.from_pretrained(stock, tmp_path / "thinking", "thinking")
    peer.load_adapter(tmp_path / "non-thinking", "non-thinking")
    tuned = load_adapter(pack(model) if packed else model, tmp_path / "thinking", "thinking").eval()
    tuned = load_adapter(tuned, tmp_path / "non-thinking", "non-thinking")
    seen = [logits(tuned)]
    for active in ("non-thinking", "thinking", ["thinking", "non-thinking"]):
        tuned.base_model.set_adapter(active)
        peer.base_model.set_adapter(active)
        seen.append(logits(tuned))
        torch.testing.assert_close(seen[-1], logits(peer), rtol=0, atol=PREFILL)
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
    assert min((seen[i] - seen[j]).abs().max() for i, j in ((1, 2), (2, 3), (1, 3))) > 0.1
    with tuned.disable_adapter():
        torch.testing.assert_close(logits(tuned), base, rtol=0, atol=PREFILL)


def test_merged_and_unmerged_in_place():
    tuned = random_lora(small())
    wanted = logits(tuned)
    tuned.merge_adapter()
    torch.testing.assert_close(logits(tuned), wanted, rtol=0, atol=PREFILL)
    with tuned.disable_adapter():
        base = logits(tuned)
    assert (base - wanted).abs().max() > 1
    torch.testing.assert_close(base, logits(small()), rtol=0, atol=PREFILL)


# -- packed experts -------------------------------------------------------------------------------------------------
def test_packed_experts_train_as_fused_ones_and_are_saved_as_they_would_be(tmp_path):
    model = small()
    fused, packed = random_lora(copy.deepcopy(model)), random_lora(pack(model))
    torch.testing.assert_close(logits(packed), logits(fused), rtol=0, atol=PREFILL)
    assert_same_gradients(gradients(packed), gradients(fused))
    packed.save_pretrained(tmp_path)
    peer = PeftModel.from_pretrained(stock_twin(model), tmp_path)
    torch.testing.assert_close(logits(peer), logits(fused), rtol=0, atol=PREFILL)
    again = load_adapter(pack(model), tmp_path)
    torch.testing.assert_close(logits(again), logits(fused), rtol=0, atol=PREFILL)


def test_quantised_experts_train_and_refuse_to_be_merged(tmp_path):
    """QLoRA: the same numbers as LoRA on the matrices that NF4 stands for, attention and shared experts quantised, too."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    small(hidden_size=64, moe_intermediate_size=32).save_pretrained(tmp_path)
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}

    def load() -> AxK1ForCausalLM:
        settled = AxK1ForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**settings))
        return settled.eval()

    quantised, stands_for = load(), load().dequantize()
    packed = adapters.routed_experts(quantised).values()
    assert packed and all(type(experts[0].gate_proj).__name__ == "Linear4bit" for experts in packed)
    tuned, truth = random_lora(quantised), random_lora(stands_for)
    torch.testing.assert_close(logits(tuned), logits(truth), rtol=0, atol=PREFILL)
    assert_same_gradients(gradients(tuned), gradients(truth))
    with pytest.raises(ValueError, match="load the unquantised model"):
        tuned.merge_and_unload()


def test_all_linear_reaches_no_layer_inside_packed_experts():
    """Adapters there would be trained by nobody: the experts run as a whole."""
    packed = pack(small())
    tuned = get_peft_model(packed, group_experts(LoraConfig(r=2, target_modules="all-linear"), packed))
    names = [name for name, _ in tuned.named_parameters() if "lora_" in name]
    assert names and not [name for name in names if ".experts." in name]
    assert any("shared_experts.gate_proj" in name for name in names)


# -- what is targeted -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("part", adapters.PARTS)
def test_a_part_is_all_of_itself_and_nothing_else(part):
    tuned = get_peft_model(model := small(first_k_dense_replace=1), lora_config(model, [part], r=2))
    wrapped = {name.split(".lora_")[0] for name, p in tuned.named_parameters() if p.requires_grad}
    wrapped = {name.removeprefix("base_model.model.model.layers.") for name in wrapped}
    sparse, layers = range(1, len(model.model.layers)), range(len(model.model.layers))
    swiglu = ("gate_proj", "up_proj", "down_proj")
    attention = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    wanted = {
        "attention": {f"{n}.self_attn.{name}" for n in layers for name in attention},
        "shared": {f"{n}.mlp.shared_experts.{name}" for n in sparse for name in swiglu},
        "dense": {f"0.mlp.{name}" for name in swiglu},
        "routed": {f"{n}.mlp.experts{inner}" for n in sparse for inner in ("", ".base_layer")},
    }
    assert wrapped == wanted[part]


def test_all_linear_says_what_it_misses(caplog):
    model = small()
    with caplog.at_level(logging.WARNING):
        assert lora_config(model, "all-linear").target_modules == "all-linear"
    sparse = [layer.mlp.experts for layer in model.model.layers if hasattr(layer.mlp, "experts")]
    missed = sum(parameter.numel() for experts in sparse for parameter in experts.parameters())
    assert f"{len(sparse)} layers, {missed / 1e6:.4g} million parameters" in caplog.text
    assert "mlp.experts.down_proj mlp.experts.gate_up_proj" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        group_experts(LoraConfig(target_modules="all-linear", target_parameters=["experts.down_proj"]), model)
        lora_config(model, ["attention"])
    assert not caplog.text


def test_wrong_targets_are_one_sentence():
    model = small(first_k_dense_replace=0)
    with pytest.raises(ValueError, match="has router, which is no part; choose of attention, shared, dense, routed"):
        lora_config(model, ["router"])
    with pytest.raises(ValueError, match="has no dense layers for LoRA; leave dense out"):
        lora_config(model, ["dense"])
    with pytest.raises(ValueError, match="lora_dropout=0.1 is not available on routed experts; set it to 0"):
        lora_config(model, lora_dropout=0.1)
    assert lora_config(model, ["attention"], lora_dropout=0.1).lora_dropout == 0.1
    with pytest.raises(ValueError, match="init_lora_weights='pissa' begins from a linear layer's weight"):
        lora_config(model, init_lora_weights="pissa")
    assert lora_config(model, ["attention"], init_lora_weights="pissa").init_lora_weights == "pissa"
    tuned = random_lora(model)
    tuned.get_submodule("base_model.model.model.layers.0.mlp.experts").get_base_layer().requires_grad_(True)
    with pytest.raises(ValueError, match="trainable but get no gradient; freeze them"):
        logits(tuned)


def test_qwen3_moe_too(tmp_path):
    """Another model's fused experts: the same numbers as under stock PEFT, by our spec and by PEFT's own renaming of names."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=67, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    with pytest.raises(ValueError, match="has no shared layers"):
        lora_config(model)
    twin = copy.deepcopy(model)
    tuned = random_lora(model, targets=["attention", "routed"])
    assert type(tuned.get_submodule("base_model.model.model.layers.1.mlp.experts")) is adapters.ParamWrapper
    tuned.save_pretrained(tmp_path)
    peer = PeftModel.from_pretrained(twin, tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(tuned), logits(peer), rtol=0, atol=PREFILL)
    assert_same_gradients(gradients(tuned), gradients(peer))
    named = LoraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    bare = peer.unload()
    tuned = get_peft_model(bare, group_experts(named, bare))
    assert type(tuned.get_submodule("base_model.model.model.layers.1.mlp.experts")) is adapters.ParamWrapper
