"""Does every block of the documentation run, is every command and path in it real, and does it build without a broken link?

Blocks of a page run in their order, in one folder. `python` blocks share their names. A block with a title is written as the file
it shows. The commands of a `console` block must say what stands below them (`...` is anything). Those of a `shell` block need
what this machine lacks: a checkpoint, data, time. They run as they are written, on tiny files of the names that they name
(tests/stand_ins.py), with SMALLER behind them. What is started on several GPUs runs in two processes, in
tests/recipes/test_launch.py. NOT_RUN is the rest, held against files and parsers.
"""

import argparse
import ast
import dataclasses
import doctest
import importlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import datasets
import pytest
import yaml
from datatrove.executor import LocalPipelineExecutor
from trl import TrlParser

import axk1
from tests.documents import LAUNCHERS, PAGES, ROOT, blocks_of, commands_in, session_in
from tests.ranks import free_port
from tests.servers import wait_for
from tests.stand_ins import make_stand_ins
from tests.test_makefile import TARGETS
from trainers import curation

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
RUN = {"python", "console", "shell"}
# Languages of blocks that are read, not run; "" is a tree.
READ = {"", "yaml", "json", "jsonl", "text"}
# What is put behind a command of a `shell` block, by its beginning: what comes last counts.
CPU = "--use_cpu true --bf16 false --disable_tqdm true --gradient_accumulation_steps 1"
SMALLER = {
    "axk1 pretrain": f"{CPU} --model PLANNED --scale 8e-10 --report_to none",
    "axk1 pretrain recipes/k1_stages.yaml --data CURATED.jsonl --model PLANNED": "--output_dir runs/planned",
    "axk1 sft": f"{CPU} --dtype float32 --max_steps 1 --per_device_train_batch_size 2 --probe_steps 0 --eval_strategy no",
    "axk1 rl": f"{CPU} --max_steps 1 --max_resample_rounds 1 --per_device_train_batch_size 8 --num_generations 2 "
    "--max_completion_length 4",
    "axk1 eval": "--limit 1 --max-new-tokens 2 --device-map cpu",
    "axk1 tokenizer train": "--vocab-size 384",
    "axk1 curate synthesize": "--max-tokens 4",
    "axk1 chat": "--max-new-tokens 4 --device-map cpu",
    "axk1 serve": "--device-map cpu",
    "axk1 push": "--dry-run",
}
# What a command that asks localhost:8000 is answered by.
SERVED = {"curl": "nano", "axk1": "NAME"}
HARNESS = ("axk1 eval MODEL --tasks lm-eval:", "axk1 eval MODEL --tasks paper")
# Beginnings of commands that do not run here, and why.
NOT_RUN = {
    "make": "installs; tests/test_makefile.py runs each target with recorders in the programs' place",
    "vllm": "tests/interop/test_vllm_runs.py serves with its options, in the environment that `make vllm` makes",
    "python -m recipes.": "minutes; tests/recipes/ runs each as it is written, with smaller options behind it",
}
if sys.version_info < (3, 11):
    lacking = ("axk1 rl", "axk1 serve", "axk1 curate synthesize made.jsonl --topics", "curl")
    NOT_RUN |= dict.fromkeys(lacking, "Python 3.10 gets a TRL and a transformers without it")
if not importlib.util.find_spec("langdetect"):
    NOT_RUN |= dict.fromkeys(HARNESS, "the eval extra is not installed")
# The folders of the tasks of lm-evaluation-harness that the pages name.
HARNESS_TASKS = ("aime", "click", "gpqa/cot_zeroshot", "hrm8k/default", "ifeval", "kmmlu/direct", "mmlu_pro")
# The rooms whose docstrings make the reference.
DOCUMENTED = ("modeling_axk1", "trainers", "conversion", "serving")
# The module that parses a training command's settings, where it is not named like the command.
MODULES = {"pretrain": "pretrain_run"}
ROOMS = "modeling_axk1|trainers|conversion|serving|recipes|benchmarks|tests|docs"


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stand_ins")
    make_stand_ins(folder)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if blocks_of(page)], ids=lambda page: page.stem)
def test_page_runs(page, tmp_path, stand_ins, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    monkeypatch.setattr(curation, "LocalPipelineExecutor", in_this_process)
    # In the user's cache is what an earlier run had under the same names, and it would be read whatever the files say now.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    if any(begin in page.read_text() and begin not in NOT_RUN for begin in HARNESS):
        narrow_harness(monkeypatch, tmp_path)
    names = {"__name__": f"docs_{page.stem}"}
    for block in blocks_of(page):
        if block.title:
            (tmp_path / block.title).write_text(block.text, encoding="utf-8")
        elif block.language == "python" and is_run_here(page, block.text):
            # Line numbers of an error are those of the page.
            exec(compile("\n" * block.line + block.text, str(page), "exec"), names)
        elif block.language == "console":
            run_session(block.text, capsys)
        elif block.language == "shell":
            lay_out(stand_ins, tmp_path)
            run_commands(block.text, monkeypatch, capsys)


def in_this_process(**settings) -> LocalPipelineExecutor:
    """Each worker would import torch at every stage; tests/trainers/test_curation.py runs two."""
    return LocalPipelineExecutor(**settings | {"workers": 1})


def narrow_harness(monkeypatch, folder) -> None:
    """lm-evaluation-harness reads some of its own tasks, as all take seconds, and no facts of the machine, which takes some more.

    What IFEval would download is there. A data set is read once: its stand-in is the same for every subset and mode.
    """
    from trainers import harness

    tasks = Path(importlib.util.find_spec("lm_eval").origin).parent / "tasks"
    paths = [str(tasks / name) for name in HARNESS_TASKS]
    manager = harness.TaskManager
    monkeypatch.setattr(harness, "TaskManager", lambda include_path: manager(include_path=paths, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("nltk.data.path", [str(folder / "nltk_data")])
    read = lru_cache(datasets.load_dataset)
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name: read(path))


def is_run_here(page, code: str) -> bool:
    """The README's snippets stand alone, and tests/test_readme.py runs them; tests/recipes/test_launch.py what needs torchrun."""
    # The serve extra, which Python 3.10 has not.
    lacking = "uvicorn" in code and not importlib.util.find_spec("uvicorn")
    return page.name != "README.md" and "under torchrun" not in code and not lacking


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


# -- commands on stand-ins ----------------------------------------------------------------------------------------
def lay_out(stand_ins, folder) -> None:
    """Copies of what the page has not made itself."""
    for path in stand_ins.iterdir():
        if path.is_symlink() and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.readlink())
        elif path.is_dir():
            if not (folder / path.name).exists():
                shutil.copytree(path, folder / path.name)
        elif not (folder / path.name).exists():
            shutil.copy(path, folder / path.name)


def run_commands(text: str, monkeypatch, capsys) -> None:
    for words in commands_in(text):
        line = " ".join(words)
        if line.startswith(tuple(NOT_RUN)) or words[0].startswith(LAUNCHERS):
            continue
        words += shlex.split(" ".join(more for begin, more in SMALLER.items() if line.startswith(begin)))
        if "localhost:8000" in line:
            port = str(free_port())
            asked = [word.replace("localhost:8000", f"localhost:{port}") for word in words]
            serve([SERVED[words[0]], "--port", port, "--device-map", "cpu"], port, partial(run_command, asked, capsys))
        elif line.startswith("axk1 serve"):
            port = str(free_port())
            serve([*words[2:], "--port", port], port, lambda: None)
        else:
            monkeypatch.setattr("sys.stdin", io.StringIO("one\n/quit\n"))
            run_command(words, capsys)


def run_command(words: list[str], capsys) -> None:
    if words[0] == "axk1":
        status = axk1.main(words[1:])
        assert status == 0, (words, capsys.readouterr().err)
    elif words[0] == "curl" and not shutil.which("curl"):
        warnings.warn("curl is not installed: a block that calls it was not run", stacklevel=2)
    elif words[0] == "curl":
        said = subprocess.run([*words, "--silent", "--fail"], capture_output=True, text=True, timeout=60)
        assert said.returncode == 0 and '"reasoning_content"' in said.stdout, said
    else:
        raise AssertionError(f"nobody has said how {words[0]} is run")


def serve(arguments: list[str], port: str, visit: Callable[[], None]) -> None:
    """Run `axk1 serve` until `visit()` has come and gone, then stop it as Ctrl-C does."""
    ended = threading.Event()

    def come_and_go() -> None:
        try:
            wait_for(f"http://localhost:{port}/health", lambda: not ended.is_set())
            visit()
        finally:
            if not ended.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as visitors:
        visited = visitors.submit(come_and_go)
        status = axk1.main(["serve", *arguments])
        ended.set()
        visited.result()
    assert status in (0, 130)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_block_is_of_a_kind_that_is_tested(page):
    assert {block.language for block in blocks_of(page)} <= RUN | READ
    # An indented block would be shown and never run.
    assert not re.search(r"^ +```", page.read_text(), flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_shown_is_understood(page):
    titles = {block.title for block in blocks_of(page)}
    for block in blocks_of(page):
        if block.language == "shell":
            for words in commands_in(block.text):
                check_command(words, titles)
        elif block.language == "console":
            for words, _ in session_in(block.text):
                check_command(words, titles)
        else:
            begun = block.text.split(maxsplit=1)[0]
            assert block.language or begun.endswith("/"), f"{begun}... is no tree: name the language of the block"


def check_command(words: list[str], titles: set[str]) -> None:
    # What sbatch submits is a script.
    program = words[1] if words[0] == "sbatch" else words[0]
    if program in ("accelerate", "torchrun", "python") and "-m" in words:
        module = words[words.index("-m") + 1]
        assert any((ROOT / (module.replace(".", "/") + end)).exists() for end in (".py", "/__init__.py")), words
        for path in (word for word in words if word.startswith("recipes/")):
            assert (ROOT / path).exists(), path
        if module == "axk1":
            check_axk1(words[words.index("-m") + 2 :], titles)
        elif program == "python":
            run = f'{module.split(".")[1]}.main([*arguments_shown("{module}"), '
            assert any(run in test.read_text() for test in (ROOT / "tests/recipes").glob("*.py")), run
    elif program == "axk1":
        check_axk1(words[1:], titles)
    elif program == "make":
        assert words[1] in TARGETS, words
    else:
        assert program in SERVED | NOT_RUN or (ROOT / program).exists(), f"nobody has said how {program} is checked"


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
    written = "\n".join(page.read_text() for page in PAGES if page.is_relative_to(ROOT / "docs"))
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
