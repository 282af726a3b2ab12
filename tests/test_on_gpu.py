"""Does what the CPU tests prove hold on a GPU too: generation, training, adapters, 4 bits, compilation, both trainers?

Each model runs on the CPU and on the GPU in fp32 without TF32; the GPU must give the same tokens, logits and gradients. What
the kernels compute one by one, tests/modeling_axk1/test_moe_kernels.py and test_mla_kernels.py ask.
"""

import copy
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from modeling_axk1 import AxK1ForCausalLM, mla_kernels, moe_dispatch, set_thinking_tokens
from tests.modeling_axk1 import test_cache_axk1, test_generation_axk1, test_mtp_axk1
from tests.random_models import ours, padded_ids, random_config, tiny_chat_config
from tests.tolerances import GRADIENT
from tests.trainers import test_adapters, test_dapo_gspo, test_think_fusion
from trainers.adapters import lora_config
from trainers.tokenizer import train_tokenizer

DEVICE = "cuda"
# fp32 logits beside the CPU's, absolute; the largest are 5.
ON_GPU = 5e-5
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: torch.cuda.is_available() is False"),
]
bitsandbytes = pytest.mark.skipif(not is_bitsandbytes_available(), reason="bitsandbytes is not installed")


def twins(model: torch.nn.Module) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The same weights on the CPU and on the GPU."""
    return model, copy.deepcopy(model).to(DEVICE)


def logits(model: torch.nn.Module, **options) -> torch.Tensor:
    input_ids, mask = (t.to(model.device) for t in padded_ids(model.config))
    with torch.no_grad():
        result = model(input_ids=input_ids, attention_mask=mask, **options).logits
    # What the padding tokens see is undefined.
    return result[mask.bool()].float().cpu()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    input_ids = padded_ids(model.config)[0].to(model.device)
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: torch.Tensor, truth: torch.Tensor, tolerance: float) -> None:
    assert truth.abs().max() > 0, "vacuous comparison"
    error = (found - truth).abs().max().item()
    assert error <= tolerance, f"{error:.1e}"


def assert_same_gradients(found: dict, truth: dict) -> None:
    assert found.keys() == truth.keys() and truth
    largest = max(grad.abs().max() for grad in truth.values())
    for name, grad in truth.items():
        error = (found[name] - grad).abs().max() / max(grad.abs().max(), 1e-3 * largest)
        assert error <= GRADIENT, f"{name}: {error:.1e}"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_logits(seed, attention):
    # flex_attention wants head sizes that are powers of two
    sizes = {"qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16} if attention == "flex_attention" else {}
    cpu, gpu = twins(ours(random_config(seed, **sizes)))
    gpu.set_attn_implementation(attention)
    assert gpu.config._experts_implementation == "axk1"
    assert_close(logits(gpu), logits(cpu), ON_GPU)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_gradients(seed, recompute):
    cpu, gpu = twins(ours(random_config(seed)).train())
    if recompute:
        gpu.gradient_checkpointing_enable()
    assert_same_gradients(gradients(gpu), gradients(cpu))


def test_compiled():
    cpu, gpu = twins(ours(random_config(3)).train())
    gpu.compile(fullgraph=True)
    assert_close(logits(gpu), logits(cpu), ON_GPU)
    assert_same_gradients(gradients(gpu), gradients(cpu))


@pytest.mark.parametrize("cache", [None, "static", "offloaded"])
def test_generation(cache):
    cpu, gpu = twins(ours(random_config(2)))
    input_ids, mask = padded_ids(cpu.config)
    options = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "eos_token_id": -1}
    expected = cpu.generate(input_ids, **options)
    options |= {"attention_mask": mask.to(DEVICE), "cache_implementation": cache}
    assert torch.equal(gpu.generate(input_ids.to(DEVICE), **options).cpu(), expected)


def test_generation_keeps_modes_and_budgets():
    tokenizer = train_tokenizer(test_generation_axk1.QUESTIONS * 20, 330)
    cpu, gpu = twins(test_generation_axk1.tiny_model(tokenizer))
    prompts = test_generation_axk1.prompts(tokenizer)
    options = {"enable_thinking": test_generation_axk1.MIXED, "thinking_budget": 5, "max_new_tokens": 24}
    expected = cpu.generate(**prompts, **options, do_sample=False)
    assert torch.equal(gpu.generate(**prompts.to(DEVICE), **options, do_sample=False).cpu(), expected)


@test_cache_axk1.continuous_batching
def test_continuous_batching():
    cpu, gpu = twins(ours(random_config(8, kv_lora_rank=15, qk_rope_head_dim=8)))
    expected = [test_cache_axk1.alone(cpu, prompt) for prompt in test_cache_axk1.PROMPTS]
    assert test_cache_axk1.batched(gpu) == expected


def test_drafts_change_no_token():
    cpu, gpu = twins(test_mtp_axk1.small())
    input_ids = padded_ids(cpu.config, rows=1)[0]
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": -1}
    expected = cpu.generate(input_ids, **options)
    drafted = gpu.generate(input_ids.to(DEVICE), use_mtp=True, **options)
    assert torch.equal(drafted.cpu(), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_adapters_on_routed_experts(packed):
    base = test_adapters.small()
    cpu = test_adapters.random_lora(test_adapters.pack(base) if packed else base)
    gpu = copy.deepcopy(cpu).to(DEVICE)
    assert_close(logits(gpu), logits(cpu), ON_GPU)
    assert_same_gradients(gradients(gpu), gradients(cpu))


@bitsandbytes
@pytest.mark.parametrize("form", ["nf4", "fp4", "int8"])
def test_quantised_experts(form, tmp_path):
    config = random_config(1, hidden_size=64, moe_intermediate_size=64, intermediate_size=64, attention_bias=False)
    ours(config).save_pretrained(tmp_path / "plain")
    settings = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    if form != "int8":
        settings = {"load_in_4bit": True, "bnb_4bit_quant_type": form, "bnb_4bit_use_double_quant": True}
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=BitsAndBytesConfig(**settings), device_map={"": DEVICE}
    ).eval()
    experts = quantised.model.layers[-1].mlp.experts
    assert type(experts).__name__ == "PackedExperts" and experts[0].gate_proj.weight.is_cuda
    input_ids = padded_ids(config, rows=1)[0].to(DEVICE)
    with torch.no_grad():
        full = quantised(input_ids).logits
        cache = quantised(input_ids[:, :-1]).past_key_values
        step = quantised(input_ids[:, -1:], past_key_values=cache).logits
    quantised.save_pretrained(tmp_path / "packed")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map={"": DEVICE}).eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids).logits, full)
    # int8 rounds each activation row too, of which the absorbed form has others.
    assert_close(step[:, 0].float().cpu(), full[:, -1].float().cpu(), ON_GPU if form != "int8" else 0.1)
    quantised.dequantize()
    quantised.save_pretrained(tmp_path / "whole")
    whole = AxK1ForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32).to(DEVICE).eval()
    with torch.no_grad():
        error = (whole(input_ids).logits - full).norm() / full.norm()
    assert 0 <= error < (0.1 if form == "int8" else 1e-2), f"{error:.1e}"


@bitsandbytes
def test_adapters_on_quantised_experts(tmp_path):
    config = random_config(1, hidden_size=64, moe_intermediate_size=64, intermediate_size=64)
    ours(config).save_pretrained(tmp_path)
    way = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=way, device_map={"": DEVICE})
    model = get_peft_model(prepare_model_for_kbit_training(model), lora_config(model, r=4))
    input_ids = padded_ids(config)[0].to(DEVICE)
    losses, optimizer = [], torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(8):
        loss = model(input_ids=input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


def losses(trainer, name: str) -> list[float]:
    trainer.train()
    return [row[name] for row in trainer.state.log_history if name in row]


def test_think_fusion_trains_the_same(tmp_path):
    tokenizer = train_tokenizer(["user assistant two four one six"], 300)
    results = [
        losses(
            test_think_fusion.trainer_of(
                test_think_fusion.axk1(), tokenizer, tmp_path / str(cpu), use_cpu=cpu, max_steps=6
            ),
            "loss_thinking",
        )
        for cpu in (True, False)
    ]
    assert results[0][-1] < results[0][0]
    assert results[1] == pytest.approx(results[0], rel=1e-3)


def test_reinforcement_runs_in_bf16(tmp_path):
    tokenizer = train_tokenizer(["user assistant 0 1 2 3 4 5 6 7 8 9 right wrong so"], 300)
    torch.manual_seed(0)
    model = AxK1ForCausalLM(tiny_chat_config(len(tokenizer)))
    set_thinking_tokens(model.generation_config, tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = test_dapo_gspo.really(tokenizer, tmp_path, model, use_cpu=False, bf16=True)
    assert trainer.model.device.type == DEVICE and trainer.state.global_step > 0
    assert any(not torch.equal(p.detach().float().cpu(), before[name]) for name, p in trainer.model.named_parameters())
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_gpu_gets_the_kernels_unasked():
    """Routing, experts and cached attention: none of them falls back."""
    gpu = ours(random_config(8)).to(DEVICE)
    wrapped = [
        mock.patch.object(module, name, wraps=getattr(module, name))
        for module, name in (
            (moe_dispatch, "kernels_route"), (moe_dispatch, "kernels_forward"), (mla_kernels, "kernels_attend_latents")
        )
    ]  # fmt: skip
    with ExitStack() as stack:
        used = [stack.enter_context(patch) for patch in wrapped]
        gpu.generate(padded_ids(gpu.config)[0].to(DEVICE), max_new_tokens=3, eos_token_id=-1)
    assert all(kernel.called for kernel in used), [kernel.call_count for kernel in used]
    assert not moe_dispatch.uncompiled
