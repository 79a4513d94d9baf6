"""The import direction: spaces <- nas <- compress, and inside nas nobody reaches up. No cycles. Light start-up."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

FORBIDDEN = {
    "spaces": ("nas", "compress"),
    "nas.tasks": ("nas.controllers", "nas.executors", "nas.study", "nas.config", "nas.session", "nas.loop"),
    "nas.latency": (
        "nas.controllers",
        "nas.executors",
        "nas.study",
        "nas.config",
        "nas.tasks",
        "nas.training",
    ),
    "nas.profile": ("nas.controllers", "nas.executors", "nas.study", "nas.config", "nas.tasks"),
    "nas.training": ("nas.controllers", "nas.executors", "nas.study", "nas.config", "nas.session"),
    "nas.controllers": (
        "nas.tasks",
        "nas.executors",
        "nas.study",
        "nas.config",
        "nas.training",
        "nas.latency",
        "torch",
    ),
    "nas.executors": (
        "nas.tasks",
        "nas.controllers",
        "nas.study",
        "nas.config",
        "nas.training",
        "nas.latency",
        "torch",
    ),
    "nas.report": ("nas.controllers", "nas.executors", "nas.study", "nas.session", "nas.loop", "torch"),
    "compress": ("nas.controllers", "nas.executors", "nas.study", "nas.session", "nas.cli"),
}


def modules() -> dict[str, Path]:
    found = {}
    for package in ("spaces", "nas", "compress"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, *, run_time_only: bool) -> Iterator[str]:
    """Absolute names that a module imports; with ``run_time_only`` those at its top level when it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: Iterator[ast.AST] = _top_level(tree) if run_time_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _top_level(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _top_level(child)


@pytest.mark.parametrize("package", FORBIDDEN)
def test_nobody_reaches_up(package: str) -> None:
    found = []
    for name, path in modules().items():
        if name == package or name.startswith(f"{package}."):
            run_time_only = not package.startswith(("spaces", "compress"))
            for target in imported(path, run_time_only=run_time_only):
                found += [
                    f"{name} -> {target}"
                    for bad in FORBIDDEN[package]
                    if target == bad or target.startswith(f"{bad}.")
                ]
    assert not found


def test_only_the_compress_command_reaches_for_compress() -> None:
    for name, path in modules().items():
        if name.startswith("nas") and name != "nas.cli.compress":
            assert not [
                target for target in imported(path, run_time_only=False) if target.split(".")[0] == "compress"
            ], name


def test_no_cycles_at_run_time() -> None:
    known = modules()
    graph = {
        name: {target for target in imported(path, run_time_only=True) if target in known and target != name}
        for name, path in known.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        # A package's own __init__ may import from its modules; they may take names of it once it is complete.
        assert name not in trail or _is_package_edge(name, trail), " -> ".join([*trail, name])
        if name in done or name in trail:
            return
        for target in sorted(graph[name]):
            visit(target, (*trail, name))
        done.add(name)

    def _is_package_edge(name: str, trail: tuple[str, ...]) -> bool:
        cycle = trail[trail.index(name) :]
        return any(other.rpartition(".")[0] == name for other in cycle)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize(
    "module",
    [
        "spaces",
        "nas",
        "nas.controllers",
        "nas.executors",
        "nas.study",
        "nas.config",
        "nas.session",
        "nas.cli.main",
    ],
)
def test_imports_are_light(module: str) -> None:
    heavy = {"torch", "torchvision", "timm", "matplotlib", "plotly", "sklearn", "tokenizers", "ray", "nni"}
    code = f"import sys, {module}; print(sorted({heavy!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_all_modules_name_their_exports() -> None:
    for name, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not any(isinstance(node, (ast.FunctionDef, ast.ClassDef)) for node in tree.body):
            continue
        targets = [
            ast.unparse(target)
            for node in tree.body
            if isinstance(node, (ast.Assign, ast.AnnAssign))
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        ]
        assert "__all__" in targets, f"{name} has no __all__"
