"""Do bitsandbytes and torchao quantise our model on the way in, and does it still decode as it reads?"""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from modeling_axk1 import AxK1ForCausalLM
from tests.random_models import padded_ids


def four_bits():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def eight_bits():
    ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    return TorchAoConfig(ao.Int8WeightOnlyConfig())


# Relative error of the logits, on random weights: measured 0.40 with 4 bits (routed experts not among them), 0.028 with 8. What
# reads packed bytes for weights is off by more than 1.
@pytest.mark.parametrize("make, error", [(four_bits, 0.8), (eight_bits, 0.06)], ids=["bitsandbytes", "torchao"])
def test_quantised_on_the_way_in(make, error, checkpoint):
    settings = make()
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=settings, device_map="cpu", dtype=torch.float32
    )
    plain = AxK1ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert type(model) is AxK1ForCausalLM
    ids, _ = padded_ids(plain.config)
    with torch.no_grad():
        exact, logits = plain(ids).logits, model(ids).logits
        assert 0 < (logits - exact).norm() / exact.norm() < error
        # A decoded step reads what the full pass reads; measured 4e-6.
        first = model(ids[:, :-1], use_cache=True)
        step = model(ids[:, -1:], past_key_values=first.past_key_values).logits[:, -1]
        torch.testing.assert_close(step, logits[:, -1], atol=1e-4, rtol=1e-4)
        assert model.generate(ids, max_new_tokens=4, do_sample=False).shape == (2, ids.shape[1] + 4)
