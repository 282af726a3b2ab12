"""What in a page of documentation can be run?  Its fenced blocks, and the commands in them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "model_card.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
# What begins a command that starts several processes.
LAUNCHERS = ("torchrun", "accelerate", "sbatch", "recipes/launch/")
FENCE = re.compile(r"^```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    title: str  # the name of the file that it shows, empty if it shows none
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    written = page.read_text(encoding="utf-8")
    found = []
    for fence in FENCE.finditer(written):
        title = re.search(r'title="([^"]+)"', fence["info"])
        line = written.count("\n", 0, fence.start()) + 1
        found.append(Block(fence["language"], title[1] if title else "", fence["text"], line))
    return found


def commands_in(text: str) -> list[list[str]]:
    """Command lines as words, comments gone, lines that end in a backslash joined, settings before a command dropped."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            words.pop(0)
        if words:
            commands.append(words)
    return commands


def documented(part: str) -> list[str]:
    """The words of the one command of the documentation that holds `part`."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    shell = [block.text for page in pages for block in blocks_of(page) if block.language == "shell"]
    (words,) = (words for text in shell for words in commands_in(text) if part in " ".join(words))
    return words


def arguments_shown(module: str) -> list[str]:
    """What the documentation's one `python -m MODULE` has behind it."""
    words = documented(f"python -m {module}")
    return words[words.index(module) + 1 :]


def session_in(text: str) -> list[tuple[list[str], str]]:
    """A terminal session: the words behind each `$ `, and the output shown below."""
    steps = re.split(r"^\$ ", text.replace("\\\n", " "), flags=re.MULTILINE)
    assert not steps[0].strip(), f"a session begins with its first command: {text}"
    return [
        (shlex.split(command, comments=True), shown) for command, _, shown in (s.partition("\n") for s in steps[1:])
    ]
