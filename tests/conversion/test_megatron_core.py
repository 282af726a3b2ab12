"""Does megatron-core itself load what `conversion` writes, and compute our logits from it?

Optional: `pip install -e '.[megatron-test]'`. Every rank is a process of megatron_oracle.py, which replaces CUDA by the CPU.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conversion.convert import convert_to_megatron
from modeling_axk1 import AxK1Config, AxK1ForCausalLM
from tests.random_models import shake
from tests.tolerances import MEGATRON

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is missing: pip install -e '.[megatron-test]'"
)
ORACLE = Path(__file__).with_name("megatron_oracle.py")
ROPES = {
    "plain": {"rope_type": "default", "rope_theta": 10000.0},
    # The released values, with a shorter original context so that 24 tokens meet the ramp.
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.0,
    },
}


def layout(tp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1, vpp: int | None = None) -> dict:
    return {"tp": tp, "pp": pp, "ep": ep, "etp": etp, "vpp": vpp}


# Format, layout that we write, layout that megatron-core runs, RoPE. torch_dist may be loaded in any layout.
CASES = {
    "torch_dist": ("torch_dist", layout(), layout(), "plain"),
    "torch_dist-yarn": ("torch_dist", layout(), layout(), "yarn"),
    "torch_dist-sharded": ("torch_dist", layout(), layout(tp=2, ep=2), "plain"),
    "torch_dist-gathered": ("torch_dist", layout(tp=2, pp=2, ep=2), layout(), "plain"),
    "legacy": ("legacy", layout(), layout(), "yarn"),
    "legacy-tp2ep2": ("legacy", layout(tp=2, ep=2), layout(tp=2, ep=2), "plain"),
    "legacy-tp2pp2etp2": ("legacy", layout(tp=2, pp=2, etp=2), layout(tp=2, pp=2, etp=2), "plain"),
    "legacy-pp2vpp2": ("legacy", layout(pp=2, vpp=2), layout(pp=2, vpp=2), "plain"),
}


def model_of(rope: str) -> AxK1ForCausalLM:
    """A small A.X K1, every size different, that each layout above divides."""
    config = AxK1Config(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=20,
        first_k_dense_replace=1,
        rope_parameters=ROPES[rope],
        max_position_embeddings=64,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = AxK1ForCausalLM(config).eval()
    shake(model)
    return model


def megatron_logits(checkpoint: Path, form: str, run: dict, input_ids, folder: Path):
    """Logits [batch, tokens, padded vocabulary] of megatron-core, one process a rank; its errors if a rank fails."""
    world = max(run["tp"], run["ep"] * run["etp"]) * run["pp"]
    job = folder / "job.json"
    asked = {
        "checkpoint": str(checkpoint),
        "format": form,
        "layout": run,
        "world": world,
        "input_ids": input_ids.tolist(),
    }
    job.write_text(json.dumps(asked))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(ORACLE), str(job)],
            env=os.environ | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert not any(rank.returncode for rank in ranks), "\n".join(text[-3000:] for text in said)
    return torch.load(folder / "logits.pt")


@pytest.mark.parametrize("case", CASES)
def test_megatron_core_loads_what_we_write_and_gives_our_logits(case, tmp_path):
    form, written, run, rope = CASES[case]
    model = model_of(rope)
    model.save_pretrained(tmp_path / "hf")
    convert_to_megatron(tmp_path / "hf", tmp_path / "megatron", format=form, **written)
    (iteration,) = [path for path in (tmp_path / "megatron").iterdir() if path.is_dir()]
    input_ids = torch.randint(0, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))
    logits = megatron_logits(iteration, form, run, input_ids, tmp_path)[..., : model.config.vocab_size]
    with torch.no_grad():
        truth = model(input_ids).logits
    assert truth.abs().max() > 1, "vacuous comparison"
    torch.testing.assert_close(logits, truth, rtol=0, atol=MEGATRON)
