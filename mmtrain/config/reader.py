"""Reads, from the syntax trees of a config's files, where its values were written (see `mmtrain.source_lines`).

Nothing is run. The reader follows ``read_base`` imports, ``_base_`` lists, names, ``dict(...)``, literals, ``update``
and item assignment. Anything else that changes a value (a loop, a condition, a method) makes its line unknown: no line
is better than a wrong one.
"""

import ast
import importlib.util
import re
import sys
from pathlib import Path

from mmtrain.errors import ConfigError
from mmtrain.source_lines import OWN_VARIABLE, ConfigSource, SourceNode, short_name

_BASE_VARIABLE = re.compile(r"\{\{\s*_base_\.(\w+)")
_OWN_VARIABLE = re.compile(rf"^{OWN_VARIABLE}(\w+)", re.MULTILINE)


def read_source(file: Path, *, above: tuple[Path, ...] = ()) -> ConfigSource:
    """Read where the values of a config file and its bases were written.

    Raises ConfigError for a file that cannot be read, a syntax error, a base that does not exist, and a base that
    includes itself.
    """
    source = ConfigSource(str(file), files=[str(file)])
    if file.suffix != ".py":
        return source
    try:
        text = file.read_text(encoding="utf-8")
        tree = ast.parse(text, filename=str(file))
    except SyntaxError as error:
        shown = f": `{error.text.strip()}`" if error.text else ""
        raise ConfigError(f"config {short_name(str(file))}, line {error.lineno}: {error.msg}{shown}") from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"config {short_name(str(file))} cannot be read: {error}") from error
    source.read.update(_BASE_VARIABLE.findall(text), _OWN_VARIABLE.findall(text))
    source.pure_python = _is_pure_python(tree)
    _Reader(source, file, above=(*above, file.resolve())).read_module(tree)
    return source


def is_imported_for_real(module: str) -> bool:
    """Whether a config in pure Python style really imports ``module``: the standard library, and `mmengine.config`."""
    return module.partition(".")[0] in sys.stdlib_module_names or module.startswith("mmengine.config")


def _is_pure_python(tree: ast.Module) -> bool:
    if any(_is_base_list(statement) for statement in tree.body):
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.With) and _is_read_base(node):
            return True
        if isinstance(node, ast.ImportFrom) and (node.level or not is_imported_for_real(node.module or "")):
            return True
        if isinstance(node, ast.Import) and not all(is_imported_for_real(alias.name) for alias in node.names):
            return True
    return False


class _Reader:
    """Reads the statements of one file in order and keeps the nodes of its top-level names."""

    def __init__(self, source: ConfigSource, file: Path, *, above: tuple[Path, ...]) -> None:
        self.source = source
        self.file = file
        self.above = above
        self.names: dict[str, SourceNode] = {}

    def read_module(self, tree: ast.Module) -> None:
        bases: dict[str, SourceNode] = {}
        for statement in tree.body:
            if _is_base_list(statement):
                bases.update(self._base_list(statement))
            else:
                self.statement(statement)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                self.source.read.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "_base_":
                self.source.read.add(node.attr)
        for name, own in self.names.items():
            bases[name] = bases[name].merged(own) if name in bases else own
        self.source.names = bases

    # -- bases

    def _base_list(self, statement: ast.stmt) -> dict[str, SourceNode]:
        assert isinstance(statement, ast.Assign)
        try:
            value = ast.literal_eval(statement.value)
        except ValueError:
            return {}
        found: dict[str, SourceNode] = {}
        for name in [value] if isinstance(value, str) else value:
            if "::" not in name:  # a config in another package, which MMEngine finds: its lines are unknown
                found.update(self._read_base(self.file.parent / name, statement).names)
        return found

    def _import_base(self, statement: ast.stmt) -> None:
        if not isinstance(statement, ast.ImportFrom) or not statement.module:
            raise ConfigError(f"{self._line(statement)}: expected an import such as `from .base import *` here")
        base = self._base_file(statement)
        if base is None:
            raise ConfigError(
                f"{self._line(statement)}: {statement.module} is not in an installed package; "
                "start the name of a file in this directory with a dot, as in `from .base import *`"
            )
        self.source.bases[str(self.file), "." * statement.level + statement.module] = base.resolve()
        names = self._read_base(base, statement).names
        for alias in statement.names:
            if alias.name == "*":
                self.names.update(names)
            elif alias.name in names:
                self.names[alias.asname or alias.name] = names[alias.name]

    def _base_file(self, statement: ast.ImportFrom) -> Path | None:
        parts = (statement.module or "").split(".")
        if statement.level:
            return self.file.parent.joinpath(*[".."] * (statement.level - 1), *parts).with_suffix(".py")
        spec = importlib.util.find_spec(parts[0])
        folders = list(spec.submodule_search_locations or []) if spec else []
        return Path(folders[0], *parts[1:]).with_suffix(".py") if folders else None

    def _line(self, statement: ast.stmt) -> str:
        return f"config {short_name(str(self.file))}, line {statement.lineno}"

    def _read_base(self, base: Path, statement: ast.stmt) -> ConfigSource:
        base = base.resolve()
        shown = short_name(str(base))
        if base in self.above:
            raise ConfigError(
                f"{self._line(statement)}: the base {shown} includes this file in turn; remove one of the two bases"
            )
        if not base.is_file():
            raise ConfigError(f"{self._line(statement)}: the base {shown} does not exist")
        read = read_source(base, above=self.above)
        if read.bases and not self.source.pure_python:
            raise ConfigError(
                f"{self._line(statement)}: the base {shown} has `with read_base():`; use it in this file too, "
                "instead of `_base_`"
            )
        self.source.bases |= read.bases
        self.source.read |= read.read
        self.source.imported |= read.imported
        self.source.files += read.files
        return read

    # -- statements

    def statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self.assign(target, node.value)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            self.assign(node.target, node.value)
        elif isinstance(node, ast.With) and _is_read_base(node):
            for inner in node.body:
                self._import_base(inner)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            self.source.imported.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            self.method(node.value)
        elif isinstance(node, ast.AugAssign):
            self.blur(node.target)
        elif not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            self.blur(node)

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            for element in target.elts:
                self.assign(element, ast.Constant(None, lineno=value.lineno))
            return
        names = _chain(target)
        if names is None:
            self.blur(target)
        elif len(names) == 1:
            self.names[names[0]] = self.node(value, target.lineno)
        else:
            parent = self._at(names[:-1])
            if parent is not None:
                parent.children[names[-1]] = self.node(value, target.lineno)

    def method(self, call: ast.Call) -> None:
        """``name.update(...)`` merges; any other method makes the lines of the members unknown."""
        if not isinstance(call.func, ast.Attribute):
            return
        names = _chain(call.func.value)
        node = self._at(names) if names else None
        if node is None or names is None:
            return
        if call.func.attr not in ("update", "merge"):
            node.children = {}
            return
        newer = self._dict_call(call, call.lineno)
        node.children = SourceNode("", None, node.children, is_dict=True).merged(newer).children

    def blur(self, statement: ast.AST) -> None:
        """Forget the lines of every name that a statement may change."""
        for node in ast.walk(statement):
            if isinstance(node, ast.Name):
                if node.id in self.names or isinstance(node.ctx, ast.Store):
                    self.names[node.id] = SourceNode(str(self.file), None)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                self.source.imported.update((alias.asname or alias.name).split(".")[0] for alias in node.names)

    # -- values

    def node(self, value: ast.expr, line: int) -> SourceNode:
        if isinstance(value, ast.Call):
            return self._dict_call(value, line) if _is_name(value.func, "dict") else self._copied(value, line)
        if isinstance(value, ast.Dict):
            return self._dict_literal(value, line)
        if isinstance(value, (ast.List, ast.Tuple)):
            children = {}
            for index, element in enumerate(value.elts):
                if isinstance(element, ast.Starred):
                    break
                children[str(index)] = self.node(element, element.lineno)
            return SourceNode(str(self.file), line, children)
        names = _chain(value)
        known = self._at(names) if names else None
        if known is None:
            return SourceNode(str(self.file), line)
        return SourceNode(str(self.file), line, dict(known.children), is_dict=known.is_dict)

    def _copied(self, call: ast.Call, line: int) -> SourceNode:
        """``copy.deepcopy(name)`` and ``name.copy()`` have the members of ``name``."""
        if isinstance(call.func, ast.Attribute) and call.func.attr == "copy" and not call.args:
            return self.node(call.func.value, line)
        if call.args and ast.unparse(call.func) in ("copy.deepcopy", "copy.copy", "deepcopy"):
            return self.node(call.args[0], line)
        return SourceNode(str(self.file), line)

    def _dict_call(self, call: ast.Call, line: int) -> SourceNode:
        result = SourceNode(str(self.file), line, is_dict=True)
        for argument in call.args:
            result = result.merged(_as_dict(self.node(argument, line)))
        for keyword in call.keywords:
            if keyword.arg is None:
                result.children.update(self.node(keyword.value, line).children)
            else:
                result.children[keyword.arg] = self.node(keyword.value, keyword.lineno)
        return result

    def _dict_literal(self, value: ast.Dict, line: int) -> SourceNode:
        result = SourceNode(str(self.file), line, is_dict=True)
        for key, member in zip(value.keys, value.values, strict=True):
            if key is None:
                result.children.update(self.node(member, line).children)
            elif isinstance(key, ast.Constant):
                result.children[str(key.value)] = self.node(member, key.lineno)
        return result

    def _at(self, names: list[str]) -> SourceNode | None:
        children = self.names
        for name in names[:-1]:
            if name not in children:
                return None
            children = children[name].children
        return children.get(names[-1])


def _is_base_list(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and len(node.targets) == 1 and _is_name(node.targets[0], "_base_")


def _is_read_base(node: ast.With) -> bool:
    call = node.items[0].context_expr
    return isinstance(call, ast.Call) and _is_name(call.func, "read_base")


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _as_dict(node: SourceNode) -> SourceNode:
    return SourceNode(node.file, node.line, node.children, is_dict=True)


def _chain(node: ast.expr) -> list[str] | None:
    """The names in ``a['b'].c[0]``, or None if an index is not a constant."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        parent = _chain(node.value)
        return None if parent is None else [*parent, node.attr]
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
        parent = _chain(node.value)
        return None if parent is None else [*parent, str(node.slice.value)]
    return None
