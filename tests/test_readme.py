"""Does every Python snippet of the README run, and is what it promises there: two commands, and the tree?"""

import re
import runpy

import pytest

from tests.documents import ROOT, blocks_of, commands_in

BLOCKS = blocks_of(ROOT / "README.md")
SNIPPETS = [block.text for block in BLOCKS if block.language == "python"]


def test_there_are_three():
    assert len(SNIPPETS) == 3


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number, tmp_path, monkeypatch):
    script = tmp_path / "snippet.py"
    script.write_text(SNIPPETS[number])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script))


def test_the_first_block_is_the_two_commands_and_the_tree_is_there():
    assert [" ".join(words) for words in commands_in(BLOCKS[0].text)] == ["make demo", "make test"]
    tree = re.search(
        r"## Where things are\n+```\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert all((ROOT / line.split()[0]).exists() for line in tree[1].splitlines())


def test_the_command_line_is_shown():
    commands = [words for block in BLOCKS if block.language == "shell" for words in commands_in(block.text)]
    assert sum(words[0] == "axk1" for words in commands) >= 6
