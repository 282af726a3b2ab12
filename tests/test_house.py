"""Does every room keep to its own: who imports whom, nothing heavy at import, no oracle in the product?"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports

ROOT = Path(__file__).parent.parent
ROOMS = ("modeling_axk1", "trainers", "conversion", "serving", "recipes", "benchmarks", "tests", "axk1")
# What of ours a room may import; a dotted name allows that module only.
MAY_IMPORT = {
    "modeling_axk1": [],
    "trainers": ["modeling_axk1", "trainers"],
    # The second writes the ids of the thinking tokens, where a tokenizer is converted along.
    "conversion": ["modeling_axk1.configuration_axk1", "modeling_axk1.generation_axk1", "conversion"],
    "serving": ["modeling_axk1", "serving"],
    "axk1": ["modeling_axk1", "trainers", "conversion", "serving", "axk1"],
}
HUB_LIBRARIES = {"torch", "transformers", "safetensors"}  # transformers itself needs the last


def imported_names(path: Path) -> list[str]:
    """Absolute names that a file imports anywhere, functions included; relative ones start with a dot."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names.append("." * node.level + (node.module or ""))
    return names


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def within(name: str, allowed: str) -> bool:
    return name == allowed or name.startswith(allowed + ".")


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_they_may(room):
    assert files_of(room), f"{room} is gone"
    for path in files_of(room):
        for name in imported_names(path):
            if name.split(".")[0] in ROOMS:
                assert any(within(name, allowed) for allowed in MAY_IMPORT[room]), f"{path.name} imports {name}"


def test_modeling_is_flat_and_ships_to_the_hub_as_it_is():
    assert not [p for p in (ROOT / "modeling_axk1").iterdir() if p.is_dir() and p.name != "__pycache__"]
    for path in files_of("modeling_axk1"):
        for name in imported_names(path):
            outside = name.split(".")[0]
            allowed = outside == "" or outside in HUB_LIBRARIES or outside in sys.stdlib_module_names
            # In a `try` of one file: the Hub then does not ask for it.
            guarded = outside == "triton" and path.name == "moe_kernels.py" and "triton" not in get_imports(path)
            assert allowed or guarded, f"{path.name} imports {name}"


def test_the_oracle_is_never_part_of_the_product():
    for room in MAY_IMPORT:
        for path in files_of(room):
            assert "AXK1For" not in path.read_text().replace('"AXK1ForCausalLM"', ""), path
            assert not [n for n in imported_names(path) if n.startswith("transformers.models")], path


def test_the_command_line_imports_when_called():
    code = "import sys, axk1; print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_no_script_takes_half_an_option_for_the_whole():
    calls = [
        (path.name, {keyword.arg: keyword.value for keyword in node.keywords})
        for room in ("axk1", "recipes", "benchmarks")
        for path in files_of(room)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in ("ArgumentParser", "add_parser")
    ]
    assert len(calls) > 10
    assert not [name for name, said in calls if ast.unparse(said.get("allow_abbrev", ast.Constant(True))) != "False"]
