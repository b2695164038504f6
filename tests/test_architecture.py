"""The structure of docs/architecture.md, checked by tests: layers, cycles, sizes, and who may import what."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mmtrain"
FILES = sorted(PACKAGE.rglob("*.py"))

LAYERS = {
    "errors": 0, "types": 0, "version": 0, "heartbeat": 0, "interruption": 0, "launchers": 0, "source_lines": 0, "suggest": 0,
    "printable": 0,
    "registry": 0, "config": 0,
    "dist": 1, "dtensor": 1, "files": 1, "model_state": 1, "modes": 1, "randomness": 1, "value_marks": 1, "progress": 1, "launch": 1,
    "data": 2, "optim": 2, "checkpoint": 2, "logging": 2, "evaluation": 2,
    "strategies": 3,
    "runner": 4, "compat": 4,
    "hooks": 5,
    "models": 6, "datasets": 6,
    "verify_resume": 7,
    "cli": 8,
    "__main__": 9, "__init__": 9,
}  # fmt: skip

# Packages that are optional or slow to import, and the folders that may import them at the top of a file ("top") or
# inside a function ("inside").
GUARDED = {
    "mmengine": {"top": {"registry", "config", "__init__"},  # in the last only for type checkers
                  "inside": {"registry", "config", "logging", "evaluation", "data"}},
    "deepspeed": {"top": set(), "inside": {"strategies"}},
    "tensorboard": {"top": set(), "inside": set()},
    "rich": {"top": {"logging"}, "inside": {"logging"}},  # at the top only for type checkers
    "transformers": {"top": set(), "inside": {"checkpoint"}},
    "fsspec": {"top": set(), "inside": {"checkpoint"}},
}  # fmt: skip


def unit(path: Path) -> str:
    """The folder or top-level file that a source file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST, *, top_only: bool = False) -> Iterator[str]:
    """Full names of what a file imports, ``from a import b`` as ``a.b``; ``top_only`` leaves out those in functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif not (top_only and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            yield from imports(node, top_only=top_only)


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_from_lower_layers_or_its_own_folder(path):
    own = unit(path)
    assert own in LAYERS, f"{own} has no layer: add it to docs/architecture.md and to this test"
    for name in imports(parsed(path)):
        parts = name.split(".")
        if parts[0] != "mmtrain" or len(parts) == 1:
            continue
        assert parts[1] in LAYERS, f"{path.relative_to(ROOT)} imports {name}, which has no layer"
        other = parts[1]
        if other == own:
            continue
        assert LAYERS[other] < LAYERS[own] or (LAYERS[own] in (0, 1) and LAYERS[other] <= LAYERS[own]), (
            f"{path.relative_to(ROOT)} (layer {LAYERS[own]}) imports {name} (layer {LAYERS[other]})"
        )


def test_no_import_cycles():
    """Of all imports: at the top, inside functions and for type checkers."""
    modules = {module_name(path) for path in FILES}

    def target(name: str) -> str:
        """The module that an imported name is, or is in."""
        while name not in modules and name:
            name = name.rpartition(".")[0]
        return name

    graph = {
        module_name(path): {target(name) for name in imports(parsed(path)) if name.startswith("mmtrain")}
        for path in FILES
    }
    done, stack = set(), []

    def visit(module):
        if module in stack:
            pytest.fail("import cycle: " + " -> ".join([*stack[stack.index(module) :], module]))
        if module in done:
            return
        stack.append(module)
        for other in sorted(graph[module] - {module}):
            visit(other)
        stack.pop()
        done.add(module)

    for module in sorted(graph):
        visit(module)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_guarded_packages_are_imported_where_they_may_be(path):
    tree = parsed(path)
    own = unit(path)
    top = {name.split(".")[0] for name in imports(tree, top_only=True)}
    everywhere = {name.split(".")[0] for name in imports(tree)}
    for package, allowed in GUARDED.items():
        if package in top:
            assert own in allowed["top"], f"{path.relative_to(ROOT)} imports {package} at its top"
        elif package in everywhere:
            assert own in allowed["inside"], f"{path.relative_to(ROOT)} imports {package}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_sizes(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{lines} lines; split the file"
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


def test_importing_the_package_imports_nothing_heavy():
    import subprocess

    code = "import sys, mmtrain; print(sorted({'torch', 'mmengine', 'deepspeed'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_the_package_shows_what_it_exports():
    import mmtrain

    assert {"FlexibleRunner", "Config", "Hook", "load_config", "load_weights", "__version__"} <= set(dir(mmtrain))
    for name in dir(mmtrain):
        assert getattr(mmtrain, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Flexible'"):
        mmtrain.Flexible  # noqa: B018
