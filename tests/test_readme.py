"""Does every Python snippet of the README run, and does every path and command in it exist?"""

import re
import runpy
from pathlib import Path

import pytest

import axk1

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def test_there_are_three():
    assert len(SNIPPETS) == 3


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number, tmp_path, monkeypatch):
    script = tmp_path / "snippet.py"
    script.write_text(SNIPPETS[number])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))


def test_the_first_block_is_the_two_commands_and_the_tree_is_there():
    first, *_ = re.findall(r"^```\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    commands = [line.split("#")[0].strip() for line in first.splitlines()]
    assert commands == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{command.split()[1]}: " in makefile for command in commands)
    tree = re.search(r"## Where things are\n+```\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL).group(1)
    assert all((ROOT / line.split()[0]).exists() for line in tree.splitlines())


def test_every_command_shown_is_understood():
    shown = re.findall(r"^axk1 .*$", README, flags=re.MULTILINE)
    assert len(shown) == 5
    for line in shown:
        known, settings = axk1.build_parser().parse_known_args(line.split("#")[0].split()[1:])
        # The settings of a training command are those of its YAML files, which tests/trainers/test_rl.py reads.
        assert "settings" in known or not settings
