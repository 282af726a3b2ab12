"""Does the command line reach each capability, teach, and say an error in one line?"""

import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import axk1
from conversion.merging import is_merge_of
from modeling_axk1 import AxK1Config

ROOT = Path(__file__).parents[1]


def models(tmp_path):
    for name, value in (("thinking", 1.0), ("nonthinking", 3.0)):
        (tmp_path / name).mkdir(parents=True)
        save_file({"w": torch.full((4,), value)}, tmp_path / name / "model.safetensors")
    return [str(tmp_path / name) for name in ("thinking", "nonthinking")]


def test_merge(tmp_path, capsys):
    out = tmp_path / "out"
    assert axk1.main(["merge", *models(tmp_path), str(out), "--alpha", "0.75"]) == 0
    assert load_file(out / "model.safetensors")["w"].tolist() == [1.5] * 4
    assert f"wrote {out}: 0.75 x" in capsys.readouterr().out


def test_merge_sweep_goes_on_behind_what_is_finished(tmp_path, capsys):
    arguments = ["merge", *models(tmp_path), str(tmp_path / "sweep"), "--alphas", "0.5", "1"]
    assert axk1.main(arguments) == 0
    merged = {
        path.name: load_file(path / "model.safetensors")["w"][0].item() for path in (tmp_path / "sweep").iterdir()
    }
    assert merged == {"alpha-0.5": 2.0, "alpha-1": 1.0}
    # Weights that six digits do not tell apart are two all the same.
    assert axk1.main([*arguments[:4], "--alphas", "0.5", "0.50000001"]) == 0
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {*merged, "alpha-0.50000001"}
    assert not is_merge_of(tmp_path / "sweep" / "alpha-0.5", *map(Path, arguments[1:3]), 0.50000001)
    shutil.rmtree(tmp_path / "sweep" / "alpha-0.50000001")
    shutil.rmtree(tmp_path / "sweep" / "alpha-1")
    capsys.readouterr()
    assert axk1.main(arguments) == 0
    out = capsys.readouterr().out
    assert "alpha-0.5 is there already" in out and "alpha-1: 1 x" in out
    # What is there of other models is not taken for a result.
    models(tmp_path / "other")
    (tmp_path / "other" / "thinking").rename(tmp_path / "other" / "better")
    arguments[1] = str(tmp_path / "other" / "better")
    assert axk1.main(arguments) == 2
    assert "alpha-0.5 is there already, but is not 0.5 x better + 0.5 x nonthinking" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("last", "complaint"), [("1.5", "alpha=1.5 is not a weight"), ("0.25", "alpha-0.25 is there already, but is not")]
)
def test_a_sweep_is_checked_whole_before_anything_is_written(tmp_path, capsys, last, complaint):
    (tmp_path / "sweep" / "alpha-0.25").mkdir(parents=True)
    arguments = ["merge", *models(tmp_path), str(tmp_path / "sweep"), "--alphas", "0.5", last]
    assert axk1.main(arguments) == 2
    assert complaint in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["alpha-0.25"]


@pytest.mark.parametrize("gigabytes", ["inf", "nan", "0"])
def test_a_size_of_files_that_is_none(tmp_path, capsys, gigabytes):
    assert axk1.main(["merge", *models(tmp_path), str(tmp_path / "out"), "--shard-gb", gigabytes]) == 2
    assert f"--shard-gb {float(gigabytes)} is no size of a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["info", "no/where"], "axk1: no/where/config.json is missing; give the folder of a model, or a preset."),
        (["info", "k2"], "axk1: preset='k2' does not exist; use one of k1, light, nano."),
        (["merge", "a", "b", "c"], "axk1: a holds neither"),
        (["merge", "a", "b", "c", "--alpha", "7"], "axk1: alpha=7.0 is not a weight between 0 and 1"),
    ],
)
def test_an_error_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AXK1_DEBUG", raising=False)
    assert axk1.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(complaint) and error.count("\n") == 1
    with pytest.raises(ValueError):
        axk1.main(["--debug", *arguments])
    monkeypatch.setenv("AXK1_DEBUG", "1")
    with pytest.raises(ValueError):
        axk1.main(arguments)


def test_an_error_of_the_program_is_not_hidden(monkeypatch):
    monkeypatch.setattr(axk1.planning, "info", lambda **options: {}["bug"])
    with pytest.raises(KeyError):
        axk1.main(["info", "k1"])


def test_interrupted(monkeypatch, capsys):
    def interrupt(**options):
        raise KeyboardInterrupt

    monkeypatch.setattr(axk1.planning, "info", interrupt)
    assert axk1.main(["info", "k1"]) == 130
    assert capsys.readouterr().err == "axk1: interrupted\n"


@pytest.mark.parametrize("error", [ValueError("the reason"), KeyboardInterrupt()], ids=lambda error: type(error).__name__)
def test_an_error_is_said_below_the_bar_it_ended(monkeypatch, capsys, error):
    bars = []

    def train(**options):
        bars.append(tqdm(total=3))
        raise error

    monkeypatch.setattr(axk1.training, "sft", train)
    axk1.main(["sft"])
    said = capsys.readouterr().err
    bars.clear()
    gc.collect()
    assert said.splitlines()[-1].startswith("axk1: ") and "0/3" in said and not capsys.readouterr().err


def test_info_of_a_preset_and_of_a_folder(tmp_path, capsys):
    assert axk1.main(["info", "k1"]) == 0
    preset = capsys.readouterr().out
    assert "518,983,059,456" in preset and "61 layers (60 MoE)" in preset
    AxK1Config.preset("k1").save_pretrained(tmp_path)
    assert axk1.main(["info", str(tmp_path)]) == 0
    assert capsys.readouterr().out.replace(str(tmp_path), "k1") == preset


def test_a_laptops_model_is_shown_in_its_own_units(capsys):
    assert axk1.main(["info", "nano"]) == 0
    assert "bf16           1.7 MB " in (said := capsys.readouterr().out) and "nf4            685.5 kB " in said
    assert axk1.main(["plan", "serve", "nano", "--gpu", "h100"]) == 0
    said = capsys.readouterr().out
    assert "bf16 1.7 MB" in said and "tokens = 491.5 kB." in said and " GB " not in said


@pytest.mark.parametrize(
    ("command", "module", "function", "given", "expected"),
    [
        ("chat", "serving.chat", "run_chat", ["--think", "--budget", "9"], {"think": True, "budget": 9}),
        ("chat", "serving.chat", "run_chat", ["--no-think"], {"think": False, "budget": None, "system": None}),
        ("serve", "serving.server", "run_server", ["--port", "1"], {"port": 1, "host": "127.0.0.1", "think": False}),
    ],
)
def test_chat_and_serve_are_called_as_they_want(monkeypatch, command, module, function, given, expected):
    if command == "serve":
        pytest.importorskip("fastapi", reason="the serve extra is not installed")
    target = pytest.importorskip(module)
    real, calls = getattr(target, function), []
    monkeypatch.setattr(target, function, lambda model_path, **options: calls.append((model_path, options)))
    assert axk1.main([command, "MODEL", *given]) == 0
    [(model_path, options)] = calls
    assert model_path == "MODEL" and options.items() >= expected.items()
    # Each option is one that the real function takes.
    assert options.keys() == {name for name in real.__kwdefaults__}


def test_sft_hands_its_settings_on(monkeypatch, capsys):
    import trainers.sft

    calls = []
    monkeypatch.setattr(trainers.sft, "run_sft", calls.append)
    assert axk1.main(["sft", "--config", "a.yaml", "--max_steps", "3"]) == 0
    assert axk1.main(["sft", "--all-settings"]) == 0
    assert calls == [["--config", "a.yaml", "--max_steps", "3"], ["--help"]]
    with pytest.raises(SystemExit):
        axk1.main(["info", "k1", "--max_steps", "3"])
    assert "unrecognized arguments: --max_steps 3" in capsys.readouterr().err


def test_help_teaches_and_the_command_works_from_elsewhere(tmp_path):
    def run(*arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "axk1", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert "axk1 merge THINKING NONTHINKING MERGED --alpha 0.8" in run("--help").stdout
    assert run().returncode == 2
    failed = run("info", "nothing")
    # Libraries may complain of themselves before; torchao does, of torch's CPU build.
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr.splitlines()[-1].startswith("axk1: preset='nothing'")
