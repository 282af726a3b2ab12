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
    "interop": [[*PYTEST, "-m", "interop", "-v", "tests/interop"]],
    "check": [["ruff", "check", "."], [*PYTEST, "-q", "tests/test_house.py"]],
    "docs": [["python", "-m", "mkdocs", "build", "--strict"]],
    "vllm": [],
    "bench": [["python", str(path.relative_to(ROOT))] for path in sorted((ROOT / "benchmarks").glob("bench_*.py"))],
}
RECORDER = '#!/bin/sh\nprintf "%s\\n" "$(basename "$0")" "$@" ---- >> "$RECORD"\n'
pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def calls_of(target: str, folder, installed: bool = True) -> list[list[str]]:
    """The commands that a target runs, where everything is installed or nothing is."""
    (folder / "record").touch()
    environments = {name: folder / name.lower() for name in ("VENV", "VLLM")}
    for environment in environments.values():
        (environment / "bin").mkdir(parents=True)
        for program in ("python", "ruff", "pip"):
            (environment / "bin" / program).write_text(RECORDER)
            (environment / "bin" / program).chmod(stat.S_IRWXU)
        if installed:
            (environment / ".installed").touch()
    command = ["make", target, *(f"{name}={path}" for name, path in environments.items())]
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
    torch, rest, *calls = calls_of("check", tmp_path, installed=False)
    assert torch[:2] == ["pip", "install"] and torch[2].startswith("torch==") and len(torch) == 3
    assert rest[0] == "pip" and rest[-2:] == ["--editable", ".[dev]"] and calls == TARGETS["check"]


def test_vllm_is_installed_beside(tmp_path):
    torch, vllm, without, name = calls_of("vllm", tmp_path, installed=False)
    assert torch[2].startswith("torch==") and vllm == ["pip", "install", "--quiet", "-r", "/dev/stdin"]
    assert without[:2] == ["pip", "uninstall"] and "torchvision" in without
    assert name[0] == "python" and (ROOT / name[1]).exists()


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


@pytest.mark.parametrize("target", ["test", "interop", "check"])
def test_pytest_takes_the_options(target):
    given = TARGETS[target][-1][len(PYTEST) :]
    # --markers ends behind the options; the tests themselves are what you are reading.
    asked = [sys.executable, "-m", "pytest", "--noconftest", *given, "--markers"]
    said = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert said.returncode == 0 and "@pytest.mark.interop" in said.stdout, said.stderr
