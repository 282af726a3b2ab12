"""Is a pre-training run its plan: resumed bit for bit, alike on two ranks, safe from spikes, NaN and SIGTERM?"""

import json
import logging
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from modeling_axk1 import AxK1Config, AxK1ForCausalLM
from modeling_axk1.modeling_axk1 import AxK1TopkRouter
from tests.random_models import tiny_chat_config
from tests.ranks import run_on_ranks
from trainers.curriculum import read_curriculum
from trainers.muon import MuonAdamW, matrices_of, split_parameters
from trainers.packing import Packer
from trainers.pretrain import STATE_FILE, PretrainConfig, PretrainTrainer
from trainers.safeguards import CHECKSUMS, SpikeDetector, checkpoints_in, damage, seal, sound_checkpoint
from trainers.token_store import Source

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 16}
STAGES = {
    "warmup_tokens": 128,
    "stages": [
        {"name": "first", "tokens": 512, "context": 16, "batch_tokens": 64, "mixture": {"web": 0.7, "code": 0.3}},
        {
            "name": "second", "tokens": 256, "phase": "decay", "batch_tokens": 64, "mixture": {"web": 1.0},
            "context": [16, {"length": 32, "rope": YARN}],
        },
    ],
}  # fmt: skip
STEPS = 12
model_config = tiny_chat_config


def text(documents, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 60, documents)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    return Source(
        "", rng.integers(0, 32, lengths.sum()).astype(np.uint32), starts, rng.random(documents, np.float32), {}
    )


def trainer_of(out, table=STAGES, **changes):
    torch.manual_seed(0)
    model = AxK1ForCausalLM(model_config(32))
    settings = {
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_steps": 5,
        "learning_rate": 3e-3,
        "disable_tqdm": True,
    }
    args = PretrainConfig(output_dir=str(out), **settings | changes)
    return PretrainTrainer(model, args, read_curriculum(table), {"web": text(60, 0), "code": text(40, 1)})


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def everything(trainer):
    """The weights, and what the optimizer holds of each."""
    held = trainer.optimizer.state_dict()["state"]
    moments = {f"{number} {name}": t.clone() for number, of in held.items() for name, t in of.items()}
    return weights(trainer) | moments


class At(TrainerCallback):
    """Does something once, before a step."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            self.what()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run from the first step to the last, with AdamW."""
    out = tmp_path_factory.mktemp("straight")
    trainer = trainer_of(out)
    trainer.train()
    return trainer, out


def test_a_run_is_its_plan(straight):
    trainer, out = straight
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["tokens"] for log in logs] == [64 * (i + 1) for i in range(STEPS)]
    assert [log["stage"] for log in logs] == [0] * 8 + [1] * 4 and [log["context"] for log in logs] == [16] * 10 + [
        32
    ] * 2
    rates = [log["learning_rate"] / 3e-3 for log in logs]
    assert rates[:3] == pytest.approx([0.25, 0.75, 1.0]) and rates[-1] == pytest.approx(0.125)
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert (
        trainer.model.config.rope_parameters["rope_type"] == "yarn"
        and trainer.model.config.max_position_embeddings >= 32
    )
    assert len(trainer.stage_loads) == 2 and sum(trainer.stage_loads[0][0]) == pytest.approx(4)
    assert {path.name for path in out.iterdir()} == {"checkpoint-10", "checkpoint-12"}
    saved = AutoModelForCausalLM.from_pretrained(out / "checkpoint-12")
    assert saved.config.use_cache and type(saved) is AxK1ForCausalLM
    ids = torch.randint(0, 32, (1, 32))
    torch.testing.assert_close(saved(ids).logits, trainer.model.eval()(ids).logits, atol=0, rtol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_by_sigterm_and_resumed_it_is_the_same_run(straight, tmp_path, optimizer, caplog, monkeypatch):
    truth, _ = straight
    if optimizer == "muon":
        adamw, truth = truth, trainer_of(tmp_path / "truth", optimizer=optimizer, save_strategy="no")
        truth.train()
        assert losses(truth)[0] == losses(adamw)[0] and losses(truth)[2] != losses(adamw)[2]
    killed = trainer_of(tmp_path, optimizer=optimizer)
    killed.add_callback(At(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    before = signal.getsignal(signal.SIGTERM)
    killed.train()
    assert killed.stopped and killed.state.global_step == 7 and signal.getsignal(signal.SIGTERM) is before
    resumed = trainer_of(tmp_path, optimizer=optimizer)
    resumed.train("latest")
    assert not resumed.stopped and losses(resumed) == losses(truth)
    assert same(weights(resumed), weights(truth))
    assert resumed.stage_loads == truth.stage_loads and resumed.packer.state() == truth.packer.state()
    # Finished: once more changes nothing.
    again = trainer_of(tmp_path, optimizer=optimizer)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    again.train("latest")
    assert "single sample" not in caplog.text, "Trainer takes it for a run without data"
    assert again.state.global_step == STEPS and same(weights(again), weights(truth))
    assert losses(again) == losses(truth) and again.packer.state() == truth.packer.state()


def test_a_request_to_stop_that_comes_with_the_last_step_stops_nothing(tmp_path):
    trainer = trainer_of(tmp_path, {"stages": [STAGES["stages"][0] | {"tokens": 128}]})
    trainer.add_callback(At(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train()
    assert trainer.state.global_step == 2 and not trainer.stopped


def test_accumulation_gives_the_same_numbers(straight, tmp_path):
    truth, _ = straight
    parts = trainer_of(tmp_path, gradient_accumulation_steps=2, save_strategy="no")
    parts.train()
    assert losses(parts) == pytest.approx(losses(truth), abs=2e-5)


def test_the_balance_loss_counts_once_a_step_however_it_is_split(straight, tmp_path):
    table = {"stages": [STAGES["stages"][0] | {"tokens": 128}]}
    runs = []
    for accumulation in (1, 4):
        trainer = trainer_of(tmp_path, table, gradient_accumulation_steps=accumulation, save_strategy="no")
        trainer.model.config.router_aux_loss_coef = 0.5
        trainer.train()
        runs.append(losses(trainer))
        assert trainer.model.config.router_aux_loss_coef == 0.5
    assert runs[1] == pytest.approx(runs[0], abs=1e-5)
    # Near balance it adds about its weight.
    assert runs[0][0] - losses(straight[0])[0] == pytest.approx(0.5, abs=0.1)


def test_recomputation_gives_the_same_numbers(straight, tmp_path):
    truth, _ = straight
    for kind in ("selective", "full"):
        trainer = trainer_of(tmp_path / kind, recompute=kind, save_strategy="no")
        trainer.train()
        assert losses(trainer) == pytest.approx(losses(truth), abs=1e-6)


# -- two ranks ----------------------------------------------------------------------------------------------------
def one_rank(out):
    trainer = trainer_of(out, ddp_backend="gloo")
    if trainer.args.process_index == 1:
        # One rank hears the request: both stop, with one checkpoint.
        trainer.add_callback(At(9, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train()
    stopped = trainer.state.global_step
    trainer = trainer_of(out, ddp_backend="gloo")
    trainer.train("latest")
    return {"stopped": stopped, "losses": losses(trainer), "loads": trainer.stage_loads}


def test_two_ranks_give_the_numbers_of_one(straight, tmp_path):
    truth, out = straight
    facts, _ = run_on_ranks(2, tmp_path, one_rank, str(tmp_path))
    assert facts["stopped"] == 9
    assert facts["losses"] == pytest.approx(losses(truth), abs=2e-5)
    assert facts["loads"] == truth.stage_loads, "loads are summed over ranks"
    ours, theirs = (load_file(path / "checkpoint-12/model.safetensors") for path in (tmp_path, out))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-3, rtol=0)
    assert damage(tmp_path / "checkpoint-12") == ""
    assert len(list((tmp_path / "checkpoint-12").glob("rng_state_*.pth"))) == 2


# -- safeguards ---------------------------------------------------------------------------------------------------
def poison(trainer):
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = float("nan")


def heal(trainer, weight):
    with torch.no_grad():
        trainer.model.lm_head.weight.copy_(weight)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_nan_skips_the_update_saves_the_batch_and_is_logged(tmp_path, parts):
    trainer = trainer_of(tmp_path, save_strategy="no", gradient_accumulation_steps=parts)
    kept = {}

    def before():
        kept.update(weights(trainer))
        poison(trainer)

    trainer.add_callback(At(4, before))
    trainer.add_callback(At(5, lambda: heal(trainer, kept["lm_head.weight"])))
    after = []
    trainer.add_callback(At(5, lambda: after.append(weights(trainer))))
    trainer.train()
    names = [name for name in kept if "lm_head" not in name]
    assert all(torch.equal(after[0][name], kept[name]) for name in names), "weights, biases: none moved in step 4"
    assert [(e["step"], e["problem"], e["action"]) for e in trainer.events] == [(4, "a loss of nan", "skipped")]
    names = [f"step-4-rank-0-{part}.safetensors" for part in range(parts)]
    assert sorted(path.name for path in (tmp_path / "bad_batches").iterdir()) == names
    saved = [load_file(tmp_path / "bad_batches" / name) for name in names]
    batch = {name: torch.cat([part[name] for part in saved]) for name in saved[0]}
    packer = Packer(trainer.curriculum, {"web": text(60, 0), "code": text(40, 1)}, trainer.args.seed)
    fourth = [packer.batch(step) for step in trainer.steps[:4]][-1]
    assert batch.keys() == fourth.keys() and all(torch.equal(batch[name], fourth[name]) for name in fourth)
    assert [log["skipped_steps"] for log in trainer.state.log_history if "loss" in log] == [0] * 3 + [1] * 9


def test_endless_nan_stops_the_run(tmp_path):
    trainer = trainer_of(tmp_path, save_strategy="no", most_bad_steps=3)
    trainer.add_callback(At(4, lambda: poison(trainer)))
    with pytest.raises(
        ValueError, match="3 updates in a row were bad, the last by a loss of nan at step 6; lower learning_rate"
    ):
        trainer.train()


@pytest.mark.parametrize("action", ["skip", "rollback", "ignore"])
def test_a_spike_is_skipped_rolled_back_or_ignored(tmp_path, action):
    # Warming up all along: each step has a learning rate of its own.
    trainer = trainer_of(tmp_path, STAGES | {"warmup_tokens": 512}, on_spike=action, save_steps=3)
    trainer.spikes.losses.extend([4.5] * 20)
    begun, seen = {}, {}
    trainer.add_callback(At(4, lambda: begun.update(everything(trainer))))

    def spike():
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(-20)
        seen.update(everything(trainer))

    trainer.add_callback(At(6, spike))
    after = {}
    trainer.add_callback(At(7, lambda: after.update(everything(trainer))))
    used = []
    trainer.add_callback(At(7, lambda: used.extend(group["lr"] for group in trainer.optimizer.param_groups)))
    trainer.train()
    planned = [3e-3 * step.learning for step in trainer.steps]
    assert [log["learning_rate"] for log in trainer.state.log_history if "loss" in log] == pytest.approx(planned)
    assert planned[6] > planned[3] and used == pytest.approx([planned[6]] * len(used))
    if action == "ignore":
        assert not trainer.events and not same(after, seen)
        return
    event = trainer.events[0]
    assert event["step"] == 6 and event["problem"] == "a loss spike"
    expected, said = (seen, "skipped") if action == "skip" else (begun, "rolled back to checkpoint-3")
    assert same(after, expected) and event["action"] == said


def test_rolling_back_passes_a_damaged_checkpoint_over(tmp_path):
    trainer = trainer_of(tmp_path, on_spike="rollback", save_steps=2)
    trainer.spikes.losses.extend([4.5] * 20)

    def spike():
        (tmp_path / "checkpoint-4/model.safetensors").write_bytes(b"damaged")
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(-20)

    trainer.add_callback(At(6, spike))
    trainer.train()
    assert trainer.events[0]["action"] == "rolled back to checkpoint-2"


def test_spike_detector_by_hand():
    quiet = SpikeDetector(window=32, sigmas=5, least=0.1)
    assert all(quiet.accepts(2.0) for _ in range(40))
    assert not quiet.accepts(2.6) and quiet.accepts(2.4), "five times at least 0.1 above the mean"
    assert not quiet.accepts(float("nan")) and not quiet.accepts(float("inf"))
    young = SpikeDetector()
    assert young.accepts(5.0) and young.accepts(500.0), "too few losses to judge by"


def test_damaged_checkpoints_are_passed_over(tmp_path, caplog):
    for step in (5, 10, 15):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights" * 100)
        if step < 15:
            seal(folder)
    changed = bytearray(b"weights" * 100)
    changed[50] ^= 1
    (tmp_path / "checkpoint-10/model.safetensors").write_bytes(changed)
    assert sound_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-5"
    assert "checkpoint-15 has no checksums.json: its saving was interrupted; passed over." in caplog.text
    assert "checkpoint-10 has another model.safetensors than was saved; passed over." in caplog.text
    with pytest.raises(ValueError, match="checkpoint-10 has another model.safetensors"):
        sound_checkpoint(tmp_path, str(tmp_path / "checkpoint-10"))
    with pytest.raises(ValueError, match="checkpoint-7 is no folder; go on from another checkpoint"):
        sound_checkpoint(tmp_path, str(tmp_path / "checkpoint-7"))
    assert sound_checkpoint(tmp_path, None) is None and sound_checkpoint(tmp_path / "none", "latest") is None


def test_a_checkpoint_kept_under_a_name_of_ones_own_is_none_of_the_runs(tmp_path):
    for name in ("checkpoint-5", "checkpoint-10", "checkpoint-5-good", "checkpoint-10.bak", "checkpoint-best"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-5", "checkpoint-10"]


def test_checksums_are_written_when_what_they_vouch_for_is_on_the_disk(tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    for name in ("a.bin", "inner/b.bin"):
        (tmp_path / name).write_bytes(name.encode())
    flushed, begun = [], []
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append(os.fstat(file).st_ino), begun.append(marker.exists())))
    marker = tmp_path / CHECKSUMS
    seal(tmp_path)
    order = [tmp_path / "a.bin", tmp_path / "inner/b.bin", marker]
    assert flushed == [path.stat().st_ino for path in order] and begun == [False, False, True]


def test_a_checkpoint_is_named_when_it_is_sealed_and_only_then_does_the_one_before_go(tmp_path, monkeypatch):
    replace, standing = os.replace, {}

    def named(whole, place):
        if (place := Path(place)).name.startswith("checkpoint-"):
            files = {str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file()}
            assert damage(whole) == "" and json.loads((whole / CHECKSUMS).read_text()).keys() == files - {CHECKSUMS}
            standing[place.name] = [path.name for path in checkpoints_in(tmp_path)]
        replace(whole, place)

    monkeypatch.setattr(os, "replace", named)
    trainer_of(tmp_path, {"stages": [STAGES["stages"][0] | {"tokens": 256}]}, save_steps=2, save_total_limit=1).train()
    assert standing == {"checkpoint-2": [], "checkpoint-4": ["checkpoint-2"]}
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-4"]


@pytest.mark.parametrize("begin", [None, "checkpoint-5", "checkpoint-5-good"])
def test_a_run_that_begins_before_saved_steps_is_refused(tmp_path, begin):
    for name, step in {"checkpoint-5": 5, "checkpoint-5-good": 5, "checkpoint-10": 10}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE_FILE).write_text(json.dumps({"step": step}))
        seal(tmp_path / name)
    with pytest.raises(ValueError, match=f"holds checkpoint-10 and this run begins at step {5 if begin else 0}: what both saved"):
        trainer_of(tmp_path).train(begin and str(tmp_path / begin))


def test_a_damaged_later_checkpoint_does_not_cost_what_is_saved_before_it(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    trainer = trainer_of(tmp_path, save_steps=2, save_total_limit=1)
    trainer.add_callback(At(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    trainer.train("latest")
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-4", "checkpoint-10"]


@pytest.mark.parametrize("room", [0.5, 1.2], ids=["no weights", "no optimizer"])
def test_a_full_disk_is_said_and_costs_no_earlier_checkpoint(straight, tmp_path, room):
    weights_bytes = (straight[1] / "checkpoint-12/model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = trainer_of(tmp_path, save_steps=2)
    trainer.add_callback(
        At(4, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (int(room * weights_bytes), before[1])))
    )
    try:
        with pytest.raises(OSError, match="The checkpoint of step 4 could not be written to .*where the disk is full, make room"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sound_checkpoint(tmp_path, "latest") == tmp_path / "checkpoint-2"


def test_another_plan_does_not_go_on_from_this_checkpoint(straight):
    _, out = straight
    table = json.loads(json.dumps(STAGES))
    table["stages"][1]["tokens"] = 128
    with pytest.raises(ValueError, match="belongs to another plan"):
        trainer_of(out, table).train("latest")


def test_stages_of_another_rope_do_not_go_on(straight):
    _, out = straight
    table = json.loads(json.dumps(STAGES))
    table["stages"][1]["context"][1]["rope"]["factor"] = 4.0
    with pytest.raises(ValueError, match="belongs to stages of another RoPE"):
        trainer_of(out, table).train("latest")


# The first has another shape, the others would be trained on as if nothing were.
@pytest.mark.parametrize(
    ("name", "value"), [("n_routed_experts", 8), ("post_mlp_norm", False), ("routed_scaling_factor", 1.5), ("rms_norm_eps", 1e-3)]
)
def test_another_model_does_not_go_on_from_this_checkpoint(straight, monkeypatch, name, value):
    def other(vocab_size):
        return AxK1Config(**{**tiny_chat_config(vocab_size).to_dict(), name: value})

    _, out = straight
    monkeypatch.setitem(globals(), "model_config", other)
    with pytest.raises(ValueError, match=f"is of a model with {name}=.* and this run's has {value}; go on with that one"):
        trainer_of(out).train("latest")


def test_another_optimizer_does_not_go_on_from_this_checkpoint(straight):
    _, out = straight
    with pytest.raises(ValueError, match="was trained with optimizer=adamw and this run has muon; go on with that one"):
        trainer_of(out, optimizer="muon").train("latest")


@pytest.mark.parametrize(
    ("name", "value"), [("weight_decay", 0.0), ("adam_beta2", 0.9), ("muon_momentum", 0.5), ("optim", "adamw_anyprecision")]
)
def test_what_the_optimizers_state_brings_along_is_never_changed_in_silence(straight, name, value):
    _, out = straight
    with pytest.raises(ValueError, match=f"was trained with {name}=.* and this run has {value}; go on with"):
        trainer_of(out, **{name: value}).train("latest")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_lower_learning_rate_holds_from_where_it_goes_on(tmp_path, optimizer):
    killed = trainer_of(tmp_path, optimizer=optimizer)
    killed.add_callback(At(7, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    killed.train()
    resumed = trainer_of(tmp_path, optimizer=optimizer, learning_rate=1e-3)
    used = []
    resumed.add_callback(At(8, lambda: used.extend(group["lr"] for group in resumed.optimizer.param_groups)))
    resumed.train("latest")
    assert used and used == [pytest.approx(1e-3)] * len(used)
    rates = [log["learning_rate"] for log in resumed.state.log_history if "loss" in log]
    assert rates[6] == pytest.approx(3e-3) and rates[7] == pytest.approx(1e-3)
    assert rates[-1] == pytest.approx(1e-3 * 0.125)


def test_what_went_wrong_is_remembered_by_a_run_that_goes_on(tmp_path):
    one, two = trainer_of(tmp_path), trainer_of(tmp_path)
    one.spikes.losses.extend([2.0, 3.0])
    one.events.append({"step": 3, "problem": "a loss spike"})
    one._skips, one._bad_in_a_row = 4, 2
    two._load_state(json.loads(json.dumps(one._state())))
    assert two._state() == one._state() and two.events and two.spikes.losses and two._bad_in_a_row == 2


def test_settings_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="optimizer='sgd' does not exist; use one of adamw, muon"):
        PretrainConfig(output_dir=str(tmp_path), use_cpu=True, optimizer="sgd")
    too_small = {"weight_decay": -1.0, "spike_window": 0, "most_bad_steps": 0, "gradient_accumulation_steps": 0}
    for name, value in (too_small | {"balance_until": 2.0}).items():
        with pytest.raises(ValueError, match=f"{name} of the settings is {value}; give a .*number from"):
            PretrainConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    with pytest.raises(ValueError, match="optim=adafactor is no AdamW"):
        PretrainConfig(output_dir=str(tmp_path), use_cpu=True, optim="adafactor")
    with pytest.raises(ValueError, match="optim=adamw_bnb_8bit says which AdamW and optimizer='muon' has torch's"):
        PretrainConfig(output_dir=str(tmp_path), use_cpu=True, optim="adamw_bnb_8bit", optimizer="muon")
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 would leave out the balance and"):
        PretrainConfig(output_dir=str(tmp_path), use_cpu=True, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="save_only_model leaves optimizer and schedule out of checkpoints"):
        PretrainConfig(output_dir=str(tmp_path), use_cpu=True, save_only_model=True)
    for name, value in (("max_steps", 10), ("warmup_steps", 5), ("lr_scheduler_type", "cosine")):
        with pytest.raises(ValueError, match=f"{name}={value} is the plan's to decide; use --scale"):
            PretrainConfig(output_dir=str(tmp_path), use_cpu=True, **{name: value})
    for name in ("num_train_epochs", "per_device_train_batch_size"):
        with pytest.raises(ValueError, match=f"{name}=2 is the plan's to decide; use --scale"):
            PretrainConfig(output_dir=str(tmp_path), use_cpu=True, **{name: 2})
    with pytest.raises(ValueError, match="3 of them, one a rank|not enough for 300 of them"):
        trainer_of(tmp_path, gradient_accumulation_steps=300)
    model = AxK1ForCausalLM(tiny_chat_config(32)).to(torch.bfloat16)
    args = PretrainConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="bfloat16 weights and training needs fp32 masters"):
        PretrainTrainer(model, args, read_curriculum(STAGES), {"web": text(60, 0), "code": text(40, 1)})


def test_a_rope_that_cannot_be_made_is_refused_before_the_first_step(tmp_path):
    table = json.loads(json.dumps(STAGES))
    for rope, problem in (({"rope_type": "yarn"}, "KeyError.'factor'"), ({"rope_type": "yarm"}, "KeyError.'yarm'")):
        table["stages"][1]["context"][1]["rope"] = rope | {"rope_theta": 1e4}
        with pytest.raises(ValueError, match=f"of stage 'second' cannot be made .{problem}"):
            trainer_of(tmp_path, table)


# -- parts --------------------------------------------------------------------------------------------------------
def test_muon_moves_each_experts_matrices_as_torch_moves_one(tmp_path):
    torch.manual_seed(0)
    model = AxK1ForCausalLM(tiny_chat_config(32))
    matrices, stacked, others = split_parameters(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(matrices) | set(stacked) | set(others) == trained
    assert {name for name in others if others[name].ndim == 2} == {
        "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight",
    }  # fmt: skip
    name = "model.layers.1.mlp.experts.gate_up_proj"
    views = matrices_of(name, stacked[name])
    assert len(views) == 8 and torch.equal(views[3], stacked[name][1, 16:]), "second expert's up half"
    optimizer = MuonAdamW(model, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, momentum=0.95)
    alone = torch.nn.Parameter(views[3].detach().clone())
    oracle = torch.optim.Muon([alone], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        model(torch.randint(0, 32, (4, 16)), labels=torch.randint(0, 32, (4, 16))).loss.backward()
        alone.grad = stacked[name].grad[1, 16:].clone()
        optimizer.step()
        oracle.step()
        optimizer.zero_grad()
    assert torch.equal(stacked[name][1, 16:], alone)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_router_stays_fp32_under_autocast():
    torch.manual_seed(0)
    router = AxK1TopkRouter(tiny_chat_config(32))
    torch.nn.init.normal_(router.weight)
    hidden = torch.randn(64, 32)
    plain = router(hidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = router(hidden)
    assert cast[0].dtype == torch.float32 and torch.equal(plain[0], cast[0]) and torch.equal(plain[2], cast[2])
