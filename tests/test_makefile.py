"""Does each `make` target that the documentation names run what it should?

make and its shell run as they are; in the place of the environment's programs stand recorders, so that nothing is installed.
"""

import os
import shutil
import stat
import subprocess
import sys

import pytest

from recipes import nano_think_fusion
from tests.documents import ROOT

PYTEST = ["python", "-m", "pytest"]
# What each calls, one list a call.
TARGETS = {
    "demo": [["python", "-m", "recipes.nano_think_fusion", "--out", "runs/nano"]],
    "test": [[*PYTEST, "--numprocesses", "3", "--dist", "worksteal"]],
    "interop": [[*PYTEST, "-m", "interop and not vllm", "-v", "tests/interop"]],
    "vllm": [[*PYTEST, "-m", "vllm", "-v", "--numprocesses", "2", "tests/interop"]],
    "check": [["ruff", "check", "."], [*PYTEST, "-q", "tests/test_house.py"]],
    "docs": [["python", "-m", "mkdocs", "build", "--strict"]],
    "bench": [["python", str(path.relative_to(ROOT))] for path in sorted((ROOT / "benchmarks").glob("bench_*.py"))],
}
RECORDER = '#!/bin/sh\nprintf "%s\\n" "$(basename "$0")" "$@" ---- >> "$RECORD"\n'
pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def calls_of(target: str, folder, installed: tuple[str, ...] = ("VENV", "VLLM"), **settings) -> list[list[str]]:
    """The commands that a target runs, where these environments are there."""
    (folder / "record").touch()
    environments = {name: folder / name.lower() for name in ("VENV", "VLLM")}
    for name, environment in environments.items():
        (environment / "bin").mkdir(parents=True)
        for program in ("python", "ruff", "pip"):
            (environment / "bin" / program).write_text(RECORDER)
            (environment / "bin" / program).chmod(stat.S_IRWXU)
        if name in installed:
            (environment / ".installed").touch()
    command = ["make", target, *(f"{name}={value}" for name, value in (environments | settings).items())]
    recorded = os.environ | {"RECORD": str(folder / "record")}
    subprocess.run(command, cwd=ROOT, env=recorded, check=True, capture_output=True, timeout=60)
    return [call.splitlines() for call in (folder / "record").read_text().split("----\n") if call]


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_calls_what_is_there(target, tmp_path):
    calls = calls_of(target, tmp_path)
    assert calls == TARGETS[target]
    for word in (word for call in calls for word in call if word.startswith(("tests/", "benchmarks/"))):
        assert (ROOT / word).exists(), word


def test_what_is_missing_is_installed_first(tmp_path):
    torch, rest, *calls = calls_of("check", tmp_path, installed=())
    assert torch[:2] == ["pip", "install"] and torch[2].startswith("torch==") and len(torch) == 3
    assert rest[0] == "pip" and rest[-2:] == ["--editable", ".[dev]"] and calls == TARGETS["check"]


def test_vllm_is_installed_beside(tmp_path):
    """The same recorder stands for the Python that makes the environment."""
    python = tmp_path / "vllm/bin/python"
    able, made, torch, rest, without, named, *calls = calls_of("vllm", tmp_path, ("VENV",), PYTHON=python)
    assert able[:2] == ["python", "-c"] and made[:4] == ["python", "-m", "venv", "--clear"]
    assert torch[:2] == ["pip", "install"] and torch[2].startswith("torch==") and torch[2].endswith("+cpu")
    assert rest == ["pip", "install", "--quiet", "-r", "/dev/stdin"] and without[:2] == ["pip", "uninstall"]
    assert (ROOT / named[1]).exists() and calls == TARGETS["vllm"]


def test_the_demo_is_the_recipe_at_its_own_size(tmp_path, monkeypatch):
    """tests/recipes/test_nano_think_fusion.py runs it at a hundredth."""
    asked = []

    def stop(out, settings):
        asked.append((str(out), settings))
        raise InterruptedError

    monkeypatch.setattr(nano_think_fusion, "run", stop)
    with pytest.raises(InterruptedError):
        nano_think_fusion.main(TARGETS["demo"][0][3:])
    assert asked == [("runs/nano", nano_think_fusion.Settings())]


@pytest.mark.parametrize("target", ["test", "vllm", "interop", "check"])
def test_pytest_takes_the_options(target):
    given = TARGETS[target][-1][len(PYTEST) :]
    # --markers ends behind the options; the tests themselves are what you are reading.
    asked = [sys.executable, "-m", "pytest", "--noconftest", *given, "--markers"]
    said = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert said.returncode == 0 and "@pytest.mark.interop" in said.stdout, said.stderr
