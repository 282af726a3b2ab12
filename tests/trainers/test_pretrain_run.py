"""Does `axk1 pretrain` train the paper's table at a billionth, go on when killed, hand over to Megatron, refuse in a line?"""

import json
import os
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoTokenizer

import axk1
from conversion import to_hf, to_megatron
from modeling_axk1 import AxK1Config, AxK1ForCausalLM
from tests.folders import full_disk
from tests.random_models import tiny_chat_config
from trainers.pretrain import PretrainTrainer
from trainers.pretrain_run import PretrainArguments, build_model, run_pretrain
from trainers.tokenizer import END_OF_TEXT, TURN_END, train_tokenizer

ROOT = Path(__file__).parents[2]
K1 = str(ROOT / "recipes/k1_stages.yaml")
DOMAINS = "web code encyclopedia qa books academic maths stem reasoning".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tokenizer, a tiny configuration and 400 documents of every domain."""
    folder = tmp_path_factory.mktemp("pretrain")
    rng = random.Random(0)
    words = "the of and to in is that for it as was with".split()
    with (folder / "curated.jsonl").open("w") as file:
        for number in range(3600):
            text = " ".join(rng.choices(words, k=rng.randint(3, 30)))
            row = {"text": text, "id": str(number), "domain": DOMAINS[number % 9], "difficulty": rng.random()}
            file.write(json.dumps(row) + "\n")
        file.write("{broken\n")
    tokenizer = train_tokenizer([" ".join(words)] * 3, 300)
    tokenizer.save_pretrained(folder / "tokenizer")
    tiny_chat_config(384).save_pretrained(folder / "config")
    return folder


def settings(files, out, *more):
    return [
        K1, "--data", str(files / "curated.jsonl"), "--tokenizer", str(files / "tokenizer"), "--model", str(files / "config"),
        "--scale", "1e-9", "--output_dir", str(out), "--prepared", str(files / "prepared"), "--use_cpu", "true",
        "--bf16", "false", "--logging_steps", "1", "--save_steps", "50", "--disable_tqdm", "true",
        "--learning_rate", "1e-2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    return run_pretrain(settings(files, out)), out


def test_the_papers_stages_at_a_billionth(trained):
    trainer, out = trained
    tokens = [sum(step.tokens for step in trainer.steps if step.stage == stage) for stage in range(3)]
    assert tokens == pytest.approx([7000, 1660, 600], rel=0.1)
    logs = [log for log in trainer.state.log_history if "tokens" in log]
    assert logs[-1]["tokens"] == sum(tokens) and logs[-1]["loss"] < logs[0]["loss"] - 1
    assert {log["context"] for log in logs if log["stage"] == 2} == {16, 64, 128}
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 4 + 2 + 3 and "http" not in page and "1 broken JSON" in page
    saved = AxK1ForCausalLM.from_pretrained(out)
    assert saved.config.rope_parameters["original_max_position_embeddings"] == 128
    assert (out / "tokenizer.json").is_file()
    ends = AutoTokenizer.from_pretrained(out).convert_tokens_to_ids([END_OF_TEXT, TURN_END])
    assert set(saved.generation_config.eos_token_id) == set(ends), "generation stops where a document ends"
    # Simple documents came first.
    reader = trainer.packer.readers["web"]
    read = reader.source.difficulty[reader.order[: reader.at]]
    assert (read[:-1] <= read[1:]).all() and len(read) > 5


def test_sigterm_saves_says_so_and_the_same_command_goes_on(trained, files, tmp_path, monkeypatch, capsys):
    truth, straight = trained
    step = PretrainTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 30:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PretrainTrainer, "training_step", interrupted)
        with pytest.raises(SystemExit) as stop:
            axk1.main(["pretrain", *settings(files, tmp_path / "run")])
    assert stop.value.code == 143
    assert f"stopped by SIGTERM at step 31 of {len(truth.steps)}; the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "run/model.safetensors").exists() and (tmp_path / "run/checkpoint-31").is_dir()
    resumed = run_pretrain(settings(files, tmp_path / "run"))
    ours, theirs = (load_file(out / "model.safetensors") for out in (tmp_path / "run", straight))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert resumed.packer.state() == truth.packer.state()


def test_a_full_disk_at_the_end_is_one_line(trained, files, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained[1], tmp_path / "run")
    save = PretrainTrainer.save_model

    def without_room(self, folder):
        with full_disk(10_000):
            save(self, folder)

    monkeypatch.setattr(PretrainTrainer, "save_model", without_room)
    assert axk1.main(["pretrain", *settings(files, tmp_path / "run")]) == 2
    assert "axk1: The model could not be written to" in (said := capsys.readouterr().err) and "make room" in said


def test_what_was_trained_goes_to_megatron_and_back(trained, tmp_path):
    _, out = trained
    to_megatron(out, tmp_path / "megatron", pp=2).run()
    to_hf(tmp_path / "megatron", tmp_path / "back").run()
    ours, theirs = (AxK1ForCausalLM.from_pretrained(path).state_dict() for path in (out, tmp_path / "back"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def refused(files, tmp_path, *more, table=None):
    given = settings(files, tmp_path / "run", *more)
    if table is not None:
        tmp_path.mkdir(exist_ok=True)
        (tmp_path / "stages.yaml").write_text(yaml.safe_dump(table))
        given[0] = str(tmp_path / "stages.yaml")
    return given


STAGE = {"name": "one", "tokens": 640, "context": 16, "batch_tokens": 64, "mixture": {"web": 1.0}}


@pytest.mark.parametrize(
    ("more", "table", "said"),
    [
        ((), {"stages": [STAGE | {"mixture": {"web": 0.5}}]}, "mixture of stage 'one' sums to 0.5, not 1"),
        (
            ("--scale", "1"),
            {"stages": [STAGE | {"tokens": 1e9}]},
            "Stage 'one' needs about 1,000,000,000 tokens of 'web'",
        ),
        (
            ("--scale", "1"),
            {"stages": [STAGE | {"mixture": {"law": 1.0}}]},
            "The source 'law' has no document in 1 files",
        ),
        (("--optimizer", "sgd"), None, "cannot be read; see axk1 pretrain --all-settings"),
        (("--nonsense", "1"), None, "--nonsense is no setting"),
        (("--scale", "1e-12"), None, "At scale=1e-12"),
        ((), {"stages": [STAGE], "settings": ["optimizer"]}, "is ['optimizer']; give null or a table"),
        ((), {"stages": [STAGE], "model": 3}, "is 3; give a text"),
        ((), {"stages": [STAGE | {"mixture": ["web"]}]}, "mixture of stage 'one' is ['web']"),
        ((), {"stages": [STAGE], "settings": {"learning_rate": "high"}}, "cannot be read; see axk1 pretrain --all-settings"),
    ],
)
def test_refusals_are_one_sentence(files, tmp_path, capsys, more, table, said):
    assert axk1.main(["pretrain", *refused(files, tmp_path, *more, table=table)]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("axk1: ") and said in last
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").glob("*.safetensors"))


def test_a_model_that_cannot_hold_the_vocabulary_is_refused(files, tmp_path):
    tiny_chat_config(128).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="128 embeddings and the tokenizer 300|128 embeddings and the tokenizer"):
        run_pretrain(settings(files, tmp_path / "run", "--model", str(tmp_path / "small")))


def test_what_the_folder_says_of_the_norm_holds_and_weights_are_never_left_out(files, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(files / "tokenizer")
    arguments = PretrainArguments(model=str(tmp_path / "folder"))
    config = tiny_chat_config(384)
    config.post_mlp_norm = False
    config.save_pretrained(arguments.model)
    model = build_model(arguments, tokenizer, 0)
    assert not model.config.post_mlp_norm
    assert build_model(replace(arguments, dual_norm=True), tokenizer, 0).config.post_mlp_norm
    torch.save(model.state_dict(), tmp_path / "folder/pytorch_model.bin")
    with pytest.raises(ValueError, match="has weights in pytorch_model.*, which are not read"):
        build_model(arguments, tokenizer, 0)
    model.save_pretrained(arguments.model)
    assert torch.equal(build_model(arguments, tokenizer, 1).lm_head.weight, model.lm_head.weight)
    with pytest.raises(ValueError, match="dual_norm=True is for new weights and .* has some; leave it out"):
        build_model(replace(arguments, dual_norm=True), tokenizer, 0)


def test_multi_token_prediction_and_the_fused_loss(files, tmp_path):
    config = tiny_chat_config(384)
    config.num_nextn_predict_layers = 1
    config.save_pretrained(tmp_path / "config")
    runs = []
    for fused in ("false", "true"):
        more = ("--scale", "1", "--save_strategy", "no")
        more += ("--model", str(tmp_path / "config"), "--fused_linear_loss", fused)
        trainer = run_pretrain(refused(files, tmp_path / fused, *more, table={"stages": [STAGE]}))
        assert trainer.model.config.fused_linear_loss == (fused == "true")
        runs.append([(log["loss"], log["mtp_loss"]) for log in trainer.state.log_history if "loss" in log])
    assert len(runs[0]) == 10 and runs[0][-1][1] < runs[0][0][1]
    assert sum(runs[1], ()) == pytest.approx(sum(runs[0], ()), abs=1e-3)


def test_settings_of_the_file_are_overridden_by_flags(files, tmp_path):
    table = {
        "model": str(files / "config"), "tokenizer": "nowhere", "stages": [STAGE],
        "settings": {"learning_rate": 0.5, "optimizer": "muon", "balance_rate": 0},
    }  # fmt: skip
    more = ("--scale", "1", "--dual_norm", "false", "--balance_loss", "1e-4", "--save_strategy", "no")
    trainer = run_pretrain(refused(files, tmp_path, *more, table=table))
    assert trainer.args.learning_rate == 1e-2 and trainer.args.optimizer == "muon" and trainer.args.balance_rate == 0
    config = AxK1Config.from_pretrained(tmp_path / "run")
    assert not config.post_mlp_norm and config.router_aux_loss_coef == 1e-4
