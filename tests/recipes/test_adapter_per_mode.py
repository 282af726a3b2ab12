"""Does one base take an adapter a mode, trained one after the other and apart from each other?"""

import pytest
import torch
from safetensors.torch import load_file

from modeling_axk1 import AxK1ForCausalLM
from tests.random_models import tiny_chat_config
from tests.tolerances import PREFILL
from trainers.adapters import load_adapter
from trainers.tokenizer import train_tokenizer

pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install axk1[demo]")


def test_each_mode_gets_its_own_adapter_and_the_base_stays(tmp_path):
    from recipes import adapter_per_mode

    tokenizer = train_tokenizer(["user assistant cube matrix 0123456789"], vocab_size=300)
    model = AxK1ForCausalLM(tiny_chat_config(len(tokenizer)))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    given = ["--model", str(tmp_path / "base"), "--out", str(tmp_path / "out"), "--problems", "8", "--steps", "2"]
    trained = adapter_per_mode.main([*given, "--rank", "2"])

    before = dict(model.named_parameters())
    after = {
        n.replace(".base_layer", ""): p for n, p in trained.get_base_model().named_parameters() if "lora_" not in n
    }
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    adapters = [load_file(tmp_path / f"out/{mode}/adapter_model.safetensors") for mode in ("thinking", "non-thinking")]
    moved = [[name for name in adapter if "lora_B" in name and adapter[name].abs().sum() > 0] for adapter in adapters]
    assert moved[0] == moved[1] and any("mlp.experts.lora_B" in name for name in moved[0])
    assert all(not torch.equal(adapters[0][name], adapters[1][name]) for name in moved[0])

    ids = torch.arange(12)[None]
    with torch.no_grad():
        trained.eval().set_adapter("thinking")
        wanted = trained(input_ids=ids).logits
        again = load_adapter(model, tmp_path / "out/thinking").eval()(input_ids=ids).logits
        trained.set_adapter("non-thinking")
        assert not torch.equal(trained(input_ids=ids).logits, wanted)
    torch.testing.assert_close(again, wanted, rtol=0, atol=PREFILL)
