"""Which folder may import which, what may load at import, and who may name a system."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FORBIDDEN = {
    "jaxmods": {"train", "configs", "data_pipelines", "tests"},
    "data_pipelines": {"train", "configs", "tests"},
    "train": {"configs", "tests"},
    "configs": {"tests"},
}
HEAVY = ("torch", "transformers", "PIL", "grain")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and absolute module of every import statement, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_dependencies_point_one_way(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in files
        for line, module in imports(path)
        if module.split(".")[0] in FORBIDDEN[folder]
    ]
    assert wrong == []


def test_the_loop_names_no_system() -> None:
    systems = [p.name for p in (ROOT / "jaxmods/systems").iterdir() if (p / "__init__.py").exists()]
    assert systems
    names = re.compile(r"\b(" + "|".join(map(re.escape, systems)) + r")\b", re.IGNORECASE)
    wrong = []
    for path in sorted((ROOT / "train").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        texts = {
            id(n.value)
            for n in ast.walk(tree)
            if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)
        }
        wrong += [
            f"{path.relative_to(ROOT)}:{line} imports {module}"
            for line, module in imports(path)
            if module.startswith("jaxmods.systems")
        ]
        # Names in code; examples in docstrings and in the help of the command line may say one.
        wrong += [
            f"{path.relative_to(ROOT)}:{node.lineno} names {node.value!r}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in texts
            and not node.value.startswith("jaxmods ")
            and not node.value.startswith("example")
            and names.search(node.value)
        ]
    assert wrong == []


def test_importing_the_library_loads_nothing_heavy() -> None:
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for p in sorted((ROOT / "jaxmods").rglob("*.py"))
        if "torch" not in p.stem  # references in PyTorch, imported only where they are compared
    ]
    code = (
        f"import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
