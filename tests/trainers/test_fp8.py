"""Does one call put into FP8 what it says, count its share of the FLOPs, keep fp32 weights, and let the model learn?"""

import builtins

import pytest
import torch
from peft import get_peft_model

from modeling_axk1 import AxK1Config, AxK1ForCausalLM, count_flops, count_parameters
from tests.folders import on_disk
from trainers.adapters import lora_config
from trainers.fp8 import enable_fp8

pytest.importorskip("torchao", reason="the extra axk1[fp8] is not installed")
from torchao.float8.float8_linear import Float8Linear  # noqa: E402


def nano(**overrides) -> AxK1ForCausalLM:
    torch.manual_seed(0)
    fields = {"vocab_size": 64, "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2} | overrides
    return AxK1ForCausalLM(AxK1Config.preset("nano", **fields))


def rows() -> torch.Tensor:
    """Counting modulo the vocabulary, in steps of 1 to 3."""
    return (torch.arange(16)[:, None] * 4 + (1 + torch.arange(16)[:, None] % 3) * torch.arange(24)) % 64


def losses(model, steps: int = 30, bf16: bool = False) -> list[float]:
    optimizer, seen = torch.optim.AdamW(model.parameters(), lr=5e-3), []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = model(rows(), labels=rows()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


def test_it_learns_as_bfloat16_does():
    in_fp8 = nano()
    enable_fp8(in_fp8, quiet=True)
    ours, theirs = losses(in_fp8), losses(nano(), bf16=True)
    assert theirs[-1] < 0.1 * theirs[0]
    # Measured: 0.09 nats at most, on a fall of 4; fp32's own curve is 0.15 from bf16's.
    assert max(abs(a - b) for a, b in zip(ours, theirs)) < 0.25
    assert ours != losses(nano())
    assert all(p.dtype == torch.float32 for p in in_fp8.parameters())


def test_what_is_in_fp8_and_what_is_not(capsys):
    model = nano(num_nextn_predict_layers=1)
    shares = enable_fp8(model, tokens=128)
    converted = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert linear - converted == {"lm_head"} and "model.layers.2.eh_proj" in converted
    assert model.config._experts_implementation == "axk1_fp8"
    printed = capsys.readouterr().out
    assert f"FP8 runs {shares['total']:.1%}" in printed and "emulated" in printed and "lm_head (the head)" in printed


def test_formats_and_scaling_are_the_papers():
    """Gradients' format by what comes out: a linear layer's weight gradient is that of E5M2 times E4M3 numbers."""
    model = nano()
    enable_fp8(model, quiet=True)
    layer = model.model.layers[0].self_attn.o_proj
    torch.manual_seed(1)
    x, gradient = torch.randn(40, layer.in_features), torch.randn(40, layer.out_features)

    def rounded(t, dtype):
        scale = torch.finfo(dtype).max / t.abs().max()
        return (t * scale).to(dtype).float() / scale

    layer(x).backward(gradient)
    expected = rounded(gradient, torch.float8_e5m2).T @ rounded(x, torch.float8_e4m3fn)
    assert (layer.weight.grad - expected).norm() / expected.norm() < 0.005
    other = rounded(gradient, torch.float8_e4m3fn).T @ rounded(x, torch.float8_e4m3fn)
    assert (layer.weight.grad - other).norm() / other.norm() > 0.01


def test_the_share_is_counted_from_the_parts():
    model = nano(vocab_size=96)
    flops = count_flops(model.config, queries=100)
    shares = enable_fp8(model, tokens=100, quiet=True)
    parts = ("attention_projections", "latent_expansion", "dense_mlp", "shared_experts")
    assert shares["linear layers"] == pytest.approx(sum(flops[part] for part in parts) / flops["total"])
    assert shares["routed experts"] == pytest.approx(flops["routed_experts"] / flops["total"])
    whole = nano(num_nextn_predict_layers=1)
    with_mtp = enable_fp8(whole, tokens=100, quiet=True)
    out = 2 * 100 * 64 * 64 * 2 + 2 * 100 * 64 * 8 * 2  # both heads, both routers
    core = 3 * count_flops(whole.config, queries=100)["attention_core"] // 2
    total = count_flops(whole.config, queries=100, mtp=True)["total"]
    assert with_mtp["total"] == pytest.approx(1 - (out + core) / total)


@pytest.mark.parametrize("dense", [1, 3])
def test_parameters_of_the_prediction_layer_are_counted(dense):
    model = nano(num_nextn_predict_layers=2, num_hidden_layers=3, first_k_dense_replace=dense)
    assert count_parameters(model.config)["total"] == sum(p.numel() for p in model.parameters())


def test_checkpoints_are_what_they_were(tmp_path):
    model = nano()
    model.save_pretrained(tmp_path / "before")
    enable_fp8(model, quiet=True)
    model.save_pretrained(tmp_path / "after")
    before, after = on_disk(tmp_path / "before"), on_disk(tmp_path / "after")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_does_not_fit_stays_out_by_name(capsys):
    model = nano(moe_intermediate_size=24)
    shares = enable_fp8(model)
    assert shares["routed experts"] == 0 and model.config._experts_implementation == "axk1"
    assert "routed experts (64 x 24 is no multiple of 16)" in capsys.readouterr().out


@pytest.mark.parametrize("wrapped", [True, False])
def test_an_adapter_takes_no_part_in_the_share(wrapped):
    model = nano()
    adapted = get_peft_model(model, lora_config(model, ["attention"]))
    assert enable_fp8(adapted if wrapped else model, tokens=64, quiet=True) == enable_fp8(nano(), tokens=64, quiet=True)


def test_experts_under_an_adapter_are_not_said_to_be_in_fp8(capsys, caplog):
    before, after = nano(), nano()
    adapted = get_peft_model(before, lora_config(before, ["routed"]))
    assert enable_fp8(before)["routed experts"] == 0
    assert "routed experts (an adapter's path has no FP8)" in capsys.readouterr().out
    enable_fp8(after, quiet=True)
    late = get_peft_model(after, lora_config(after, ["routed"]))
    assert "Routed experts leave FP8 under an adapter" in caplog.text
    torch.testing.assert_close(adapted(input_ids=rows()).logits, late(input_ids=rows()).logits, rtol=0, atol=0)


def test_low_precision_weights_are_refused():
    with pytest.raises(ValueError, match="fp32 master weights; load the model with dtype=torch.float32"):
        enable_fp8(nano().to(torch.bfloat16))


def test_a_missing_library_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("torchao"):
            raise ImportError("No module named 'torchao'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'axk1\[fp8\]'"):
        enable_fp8(nano())
