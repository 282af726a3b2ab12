"""Which modules are in the reference, and on which page?  A mkdocs hook: one page for each public module of each room.

Pages are made while the documentation is built, so that a new module needs no page of its own and none can be forgotten.
"""

import ast
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ROOMS = ("modeling_axk1", "trainers", "conversion", "serving")


def modules_of(room: str) -> list[Path]:
    return [path for path in sorted((ROOT / room).glob("*.py")) if not path.stem.startswith("_")]


def question(path: Path) -> str:
    """The first line of a file: the question that it answers."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]


def public_names(path: Path) -> list[str]:
    """`__all__` of a package, if it has one."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    return []


def origin(path: Path, name: str) -> str:
    """The module that a package takes a public name from, as a path to import."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return f"{path.parent.name}.{node.module}" if node.level else node.module
    raise ValueError(f"{path} does not import {name}, which it lists in __all__.")


def pages() -> dict[str, str]:
    """Markdown of each page of the reference by its path."""
    found = {}
    for room in ROOMS:
        package = ROOT / room / "__init__.py"
        lines = [f"# {room}", "", question(package), ""]
        if names := public_names(package):
            links = [f"[`{name}`][{origin(package, name)}.{name}]" for name in names]
            lines += [f"`from {room} import ...`: {', '.join(links)}.", ""]
        lines += ["| module | what it answers |", "|---|---|"]
        for path in modules_of(room):
            lines.append(f"| [`{path.stem}`]({path.stem}.md) | {question(path)} |")
            found[f"reference/{room}/{path.stem}.md"] = f"::: {room}.{path.stem}\n"
        found[f"reference/{room}/index.md"] = "\n".join(lines) + "\n"
    return found


def on_config(config):
    """The reference, behind the pages that mkdocs.yml orders."""
    made = pages()
    rooms = [{room: sorted((p for p in made if p.startswith(f"reference/{room}/")), key=index_first)} for room in ROOMS]
    config.nav.append({"Reference": rooms})
    return config


def index_first(page: str) -> tuple[bool, str]:
    return not page.endswith("index.md"), page


def on_files(files, config):
    for page, text in pages().items():
        files.append(File.generated(config, page, content=text))
    return files
