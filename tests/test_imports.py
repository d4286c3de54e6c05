"""No module imports in a circle, not even by an import inside a function: what needs what can be read in one order."""

import ast
import re
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imported(folder: Path) -> dict[str, set[str]]:
    """Each module below `folder`, and those of them that it names in an import, wherever that stands."""
    files = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph = {}
    for module, path in files.items():
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        named = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join([*base, *([node.module] if node.module else [])])
                within = {f"{base}.{alias.name}" for alias in node.names}
                named |= within & files.keys() if within <= files.keys() else (within & files.keys()) | {base}
        graph[module] = (named & files.keys()) - {module}
    return graph


@pytest.mark.parametrize("package", ["rmsd", "rmsd_kernels"])
def test_no_module_imports_in_a_circle(package):
    graph = imported(ROOT / package)
    assert len(graph) > 20 and any(graph.values())
    TopologicalSorter(graph).prepare()


def test_what_is_imported_wherever_the_package_is_used_is_a_requirement_of_its_own():
    """Not one by accident, of another's newest version."""
    named = set()
    for path in (path for package in ("rmsd", "rmsd_kernels") for path in (ROOT / package).rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                named.add(node.module)
    named = {name.partition(".")[0] for name in named} - sys.stdlib_module_names - {"rmsd_kernels"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {re.match(r"[\w-]+", text).group() for text in project["dependencies"]}
    # What they bring has been theirs from the oldest version that is allowed.
    brought = {"markupsafe": "jinja2", "safetensors": "transformers", "yaml": "pyyaml"}
    assert "pydantic" in named and {brought.get(name, name) for name in named} <= required


def test_a_circle_is_found_though_a_function_hides_it(tmp_path):
    package = tmp_path / "house"
    (package / "room").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "room" / "__init__.py").write_text("from .door import key\n")
    (package / "room" / "door.py").write_text("from ..roof import tile\nkey = tile\n")
    (package / "roof.py").write_text("tile = 1\n")
    TopologicalSorter(imported(package)).prepare()
    (package / "roof.py").write_text("tile = 1\ndef late():\n    from .room import key\n    return key\n")
    with pytest.raises(CycleError):
        TopologicalSorter(imported(package)).prepare()
