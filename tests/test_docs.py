"""Does every block of the documentation run, is every command and path in it real, and does it build without a broken link?

Blocks of a page run in their order, in one folder. `python` blocks share their names; one that is to run under torchrun is only
compiled. A block with a title is written as the file it shows. The commands of a `console` block run, and must say what
stands below them (`...` is anything). `shell` blocks are what this machine cannot run, for want of GPUs or of a real
checkpoint: they are held against the parsers.
"""

import argparse
import ast
import dataclasses
import doctest
import importlib
import os
import re
import subprocess
import sys

import pytest
import yaml
from trl import TrlParser

import axk1
from tests.documents import ROOT, blocks_of, commands_in, session_in

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
RUN = {"python", "console"}
# Languages of blocks that are read, not run; "" is a drawing, a tree or what another program prints.
READ = {"", "shell", "yaml", "json", "jsonl", "text"}
# Programs that are not ours: a line of theirs is shown and nothing of it can be checked here.
OTHERS = {"curl", "vllm", "pip", "sbatch", "lm_eval"}
# The rooms whose docstrings make the reference.
DOCUMENTED = ("modeling_axk1", "trainers", "conversion", "serving")
# The module that parses a training command's settings, where it is not named like the command.
MODULES = {"pretrain": "pretrain_run"}
ROOMS = "modeling_axk1|trainers|conversion|serving|recipes|benchmarks|tests|docs"


def runs_together(page) -> bool:
    """The README's snippets stand alone, and tests/test_readme.py runs them."""
    return page.name != "README.md" and bool({block.language for block in blocks_of(page)} & RUN)


@pytest.mark.parametrize("page", [page for page in PAGES if runs_together(page)], ids=lambda page: page.stem)
def test_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": f"docs_{page.stem}"}
    for block in blocks_of(page):
        if block.title:
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python":
            # Line numbers of an error are those of the page.
            code = compile("\n" * block.line + block.text, str(page), "exec")
            if "under torchrun" not in block.text:
                exec(code, names)
        elif block.language == "console":
            run_session(block.text, capsys)


def run_session(text: str, capsys) -> None:
    for (program, *arguments), shown in session_in(text):
        assert program == "axk1", f"a console block runs axk1 alone, not {program}; use a shell block"
        capsys.readouterr()
        status = axk1.main(arguments)
        said = capsys.readouterr()
        assert status == 0, said.err
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        if shown.strip():
            assert doctest.OutputChecker().check_output(shown, said.out, flags), f"{arguments} said:\n{said.out}"


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_block_is_of_a_kind_that_is_tested(page):
    assert {block.language for block in blocks_of(page)} <= RUN | READ
    # An indented block would be shown and never run.
    assert not re.search(r"^ +```", page.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_shown_is_understood(page):
    titles = {block.title for block in blocks_of(page)}
    for block in blocks_of(page):
        if block.language == "shell" or (block.language == "" and block.text.startswith(("axk1 ", "make ", "python "))):
            for words in commands_in(block.text):
                check_command(words, titles)
        elif block.language == "console":
            for words, _ in session_in(block.text):
                check_command(words, titles)


def check_command(words: list[str], titles: set[str]) -> None:
    program = words[0]
    if program in ("accelerate", "torchrun", "srun", "python") and "-m" in words:
        module = words[words.index("-m") + 1]
        assert any((ROOT / (module.replace(".", "/") + end)).exists() for end in (".py", "/__init__.py")), words
        for path in (word for word in words if word.startswith("recipes/")):
            assert (ROOT / path).exists(), path
        if module == "axk1":
            check_axk1(words[words.index("-m") + 2 :], titles)
    elif program == "axk1":
        check_axk1(words[1:], titles)
    elif program == "make":
        assert f"\n{words[1]}: " in (ROOT / "Makefile").read_text(), words
    elif program == "python":
        assert (ROOT / words[1]).exists(), words
    else:
        assert program in OTHERS, f"nobody has said how {program} is checked"


def check_axk1(arguments: list[str], titles: set[str]) -> None:
    options, settings = axk1.build_parser().parse_known_args(arguments)
    if "settings" not in options:
        assert not settings, f"axk1 {' '.join(arguments)}"
    elif settings:
        check_settings(arguments[0], settings, titles)


def check_settings(command: str, settings: list[str], titles: set[str]) -> None:
    """A training command's flags, and the keys of its YAML file where it is one of ours, are settings that it has."""
    module = importlib.import_module(f"trainers.{MODULES.get(command, command)}")
    kinds = module.parse.__annotations__["return"].__args__
    parser = TrlParser([kind for kind in kinds if dataclasses.is_dataclass(kind)])
    known = {action.dest for action in parser._actions}
    for action in parser._actions:
        action.required = False
    if "--config" in settings:
        place = settings.index("--config")
        path = settings[place + 1]
        settings = settings[:place] + settings[place + 2 :]
        if path not in titles:
            assert set(yaml.safe_load((ROOT / path).read_text())) <= known, path
    _, unknown = argparse.ArgumentParser.parse_known_args(parser, settings)
    # A table of stages comes first, as a file.
    unknown = [word for word in unknown if not (word.endswith(".yaml") and (word in titles or (ROOT / word).exists()))]
    assert not unknown, f"axk1 {command} has no {unknown}"


def test_every_command_is_shown_on_some_page():
    commands = next(a for a in axk1.build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    written = "\n".join(page.read_text() for page in PAGES if page.name != "README.md")
    assert commands and not [name for name in commands if f"axk1 {name}" not in written]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_path_named_is_there(page):
    for path in re.findall(rf"`((?:{ROOMS})/[\w./-]*)`", page.read_text()):
        assert (ROOT / path).exists(), path


# -- the build ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocstrings", reason="the docs extra is not installed (Python 3.11 or later)")
    folder = tmp_path_factory.mktemp("site")
    built = build(["--site-dir", str(folder)])
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def build(options: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", *options]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_site_has_every_page_and_fetches_nothing(site):
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs")).with_suffix(".html").exists(), page
    pages = list(site.rglob("*.html"))
    assert len(pages) > 50
    for page in pages:
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text(encoding="utf-8")):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), f"{page}: {tag}"


def test_the_reference_holds_every_public_name(site):
    from mkdocstrings import Inventory

    with open(site / "objects.inv", "rb") as file:
        documented = set(Inventory.parse_sphinx(file))
    for room in ("modeling_axk1", "conversion"):
        package = importlib.import_module(room)
        for name in package.__all__:
            assert f"{getattr(package, name).__module__}.{name}" in documented, f"{name} has no docstring"
    for path in (path for room in DOCUMENTED for path in (ROOT / room).glob("[!_]*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            public = isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and ast.get_docstring(node):
                assert f"{path.parent.name}.{path.stem}.{node.name}" in documented


@pytest.mark.parametrize(
    "complaints",
    [
        {
            "[there](nowhere.md)": "nowhere.md",
            "[there](index.md#below)": "#below",
            "[there][trainers.gone]": "trainers.gone",
        },
        {"::: trainers.lost": "trainers.lost"},
    ],
    ids=["links", "module"],
)
def test_what_leads_nowhere_fails_the_build(tmp_path, complaints):
    pytest.importorskip("mkdocstrings", reason="the docs extra is not installed (Python 3.11 or later)")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/index.md").write_text("# Page\n\n" + "\n\n".join(complaints))
    config |= {"docs_dir": "docs", "nav": ["index.md"], "hooks": [], "exclude_docs": ""}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
    built = build(["--config-file", str(tmp_path / "mkdocs.yml"), "--site-dir", str(tmp_path / "site")])
    assert built.returncode != 0
    assert all(complaint in built.stderr for complaint in complaints.values()), built.stderr
