"""Does the one-page RL script train, and does its judge read GSM8K?"""

import json

import pytest
import torch
import trl
from packaging.version import Version

if Version(trl.__version__) < Version("1.16"):
    pytest.skip(f"the RL script needs TRL 1.16, found {trl.__version__}", allow_module_level=True)

from modeling_axk1 import AxK1ForCausalLM
from recipes import rl
from tests.random_models import tiny_chat_config
from trainers.tokenizer import train_tokenizer

ROW = {"question": "1,000 and 2?", "answer": "1,000 and 2 is <<1000+2=1002>>1,002.\n#### 1,002"}


def test_the_judge_reads_the_last_word():
    for right in ("1002", "1,002", "It is 1,002."):
        assert rl.is_right(right, ROW)
    for wrong in ("", "1,002 apples", "1003", "."):
        assert not rl.is_right(wrong, ROW)


def test_it_trains_and_saves(tmp_path, monkeypatch):
    tokenizer = train_tokenizer(["user assistant 0 1 2"], 300)
    torch.manual_seed(0)
    start = AxK1ForCausalLM(tiny_chat_config(len(tokenizer)))
    start.save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    (tmp_path / "problems.jsonl").write_text("\n".join(json.dumps(ROW) for _ in range(4)))
    # An untrained model is never right, so that all groups would be dead: here every other length is.
    monkeypatch.setattr(rl, "is_right", lambda answer, row: len(answer) % 2 == 1)
    settings = {
        "max_steps": 1, "warmup_steps": 0, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1,
        "num_generations": 4, "max_completion_length": 6, "mask_truncated_completions": False, "learning_rate": 1e-2,
        "max_resample_rounds": 1, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no",
        "generation_kwargs": {"suppress_tokens": [*range(3), *range(4, 250)]},
    }  # fmt: skip
    rl.train(str(tmp_path / "start"), str(tmp_path / "problems.jsonl"), str(tmp_path / "out"), **settings)
    trained = AxK1ForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert any(not torch.equal(trained[name], value) for name, value in start.state_dict().items())
