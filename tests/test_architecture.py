"""The packages of the bundle: imports between them run one way."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.conftest import ROOT

SCRIPTS = ROOT / "scripts"
ORDER = [
    "layers",
    "autoencoderkl",
    "bundle",
    "slabs",
    "data",
    "training",
    "diffusion",
    "planning",
    "inference",
    "evaluation",
    "sharing",
]


def imported(path: Path) -> set[str]:
    """The packages of the bundle that a module imports, at its top or within a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("scripts."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and (node.module == "scripts" or node.level):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("scripts.")}
    return found


def test_imports_between_packages_run_one_way():
    upward = []
    for path in sorted(SCRIPTS.rglob("*.py")):
        package = path.relative_to(SCRIPTS).parts[0].removesuffix(".py")
        if package not in ORDER:  # scripts/__init__.py and the command line may import every package
            continue
        upward += [
            f"{path.relative_to(ROOT)} imports {name}" for name in imported(path) if ORDER.index(name) > ORDER.index(package)
        ]
    assert upward == []


def test_every_module_has_a_package():
    beside = {path.name for path in SCRIPTS.iterdir() if path.suffix == ".py"}
    assert beside == {"__init__.py", "__main__.py", "autoencoderkl.py", "slabs.py"}
    packages = {path.name for path in SCRIPTS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert packages == set(ORDER) - {"autoencoderkl", "slabs"}
