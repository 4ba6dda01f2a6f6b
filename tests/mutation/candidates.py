"""Which nodes of a file are mutated, and the mutants that makes."""

from __future__ import annotations

import ast
import re

from .operators import address_sums, call_name, claimed_literals, edits, is_impossible_address
from .source import Mutant, Source

_LAUNCH_HINT = re.compile(r"num_warps|num_stages|num_ctas|maxnreg", re.IGNORECASE)
_FAKE_NAME = re.compile(r"(^|_)(fake|abstract|meta)(_|$)")
_FAKE_REGISTRARS = {"register_fake", "register_abstract", "impl_abstract"}
_FAKE_KEYWORDS = {"fake", "fake_fn", "fake_impl", "abstract", "meta"}
# multiple_of(x, 16) is x with a promise that only a compiler reads.
_PROMISES = {"multiple_of", "max_contiguous", "max_constancy"}
_MESSAGE_CALLS = {"warn", "warn_once", "warning", "debug", "info", "log_once", "print", "static_print", "device_print"}
_TYPING_CALLS = {"TypeVar", "NewType", "ParamSpec", "cast"}
_TYPING_SUBSCRIPTS = {
    "Any", "Annotated", "Callable", "ClassVar", "Dict", "Final", "Generic", "Iterable", "Iterator", "List", "Literal",
    "Mapping", "Optional", "Sequence", "Tuple", "Type", "Union", "dict", "frozenset", "list", "set", "tuple", "type",
}  # fmt: skip


def mutants(source: Source) -> list[Mutant]:
    """Every mutant of a file, in source order, each making a text of its own."""
    walker = _Walker(source)
    walker.visit(source.tree)
    unique = {mutant.mutated: mutant for mutant in reversed(walker.found)}
    return sorted(unique.values(), key=lambda mutant: (mutant.edit.anchor, mutant.edit.operator, mutant.edit.variant))


class _Walker(ast.NodeVisitor):
    def __init__(self, source: Source) -> None:
        self.source = source
        self.found: list[Mutant] = []
        self._scopes: list[str] = []
        self._statement: ast.stmt | None = None
        self._claimed: set[ast.AST] = set()
        self._addresses: set[ast.AST] = set()
        self._fakes = _fake_functions(source.tree)
        self._hint_fields = _hint_fields(source.tree)

    def visit(self, node: ast.AST) -> None:
        outer = self._statement
        if isinstance(node, ast.stmt):
            self._statement = node
        self._claimed.update(claimed_literals(node))
        self._addresses.update(address_sums(node))
        if not _is_skipped(node) and node not in self._claimed:
            if not isinstance(node, ast.Subscript):
                self._record(node)
            super().visit(node)
        self._statement = outer

    def _record(self, node: ast.AST) -> None:
        if self._statement is None:
            return
        span = self.source.statement_span(self._statement)
        function = ".".join(self._scopes) or "<module>"
        for edit in edits(node, self.source):
            if not is_impossible_address(edit, node, self._addresses):
                self.found.append(Mutant(self.source, function, edit, span))

    def _visit_each(self, nodes: list) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if node.name in self._fakes or _FAKE_NAME.search(node.name) or _LAUNCH_HINT.search(node.name):
            return
        self._scopes.append(node.name)
        self._visit_defaults(node.args)
        self._visit_each(node.body)
        self._scopes.pop()

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._scopes.append(node.name)
        self._visit_each(node.body)
        self._scopes.pop()

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._visit_defaults(node.args)
        self.visit(node.body)

    def _visit_defaults(self, arguments: ast.arguments) -> None:
        positional = [*arguments.posonlyargs, *arguments.args]
        with_default = positional[len(positional) - len(arguments.defaults) :]
        pairs = [*zip(with_default, arguments.defaults, strict=True)]
        pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
        self._visit_each([default for argument, default in pairs if not _LAUNCH_HINT.search(argument.arg)])

    def visit_If(self, node: ast.If) -> None:
        test = self.source.text(node.test)
        if test.endswith("TYPE_CHECKING") or test.startswith("__name__"):
            self._visit_each(node.orelse)
        else:
            self.generic_visit(node)

    def visit_Assert(self, node: ast.Assert) -> None:
        self.visit(node.test)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Dict(self, node: ast.Dict) -> None:
        for key, value in zip(node.keys, node.values, strict=True):
            if not (isinstance(key, ast.Constant) and _LAUNCH_HINT.search(str(key.value))):
                self._visit_each([key, value])

    def visit_Call(self, node: ast.Call) -> None:
        if isinstance(node.func, ast.Subscript):
            # kernel[grid](...): the grid's own arithmetic is mutated, its place as an index is not.
            self._visit_each([node.func.value, node.func.slice, *node.args, *node.keywords])
        elif call_name(node.func) in _PROMISES:
            self._visit_each(node.args[:1])
        else:
            hints = self._hint_fields.get(call_name(node.func), set())
            arguments = [argument for index, argument in enumerate(node.args) if index not in hints]
            self._visit_each([node.func, *arguments, *node.keywords])

    def visit_Subscript(self, node: ast.Subscript) -> None:
        if call_name(node.value) not in _TYPING_SUBSCRIPTS:
            self._record(node)
            self.generic_visit(node)


def _is_skipped(node: ast.AST) -> bool:
    if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    if isinstance(node, ast.keyword):
        # strict= of zip only catches mistakes made elsewhere.
        return node.arg is not None and (node.arg == "strict" or bool(_LAUNCH_HINT.search(node.arg)))
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [target.id for target in targets if isinstance(target, ast.Name)]
        return any(_LAUNCH_HINT.search(name) or name.startswith("__") for name in names)
    if isinstance(node, ast.Call):
        return call_name(node.func) in _MESSAGE_CALLS | _TYPING_CALLS | _FAKE_REGISTRARS
    return False


def _hint_fields(tree: ast.Module) -> dict[str, set[int]]:
    """Of the tuples and data classes defined here that carry launch hints: the positions of those fields."""
    positions: dict[str, set[int]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            fields = [item.target for item in node.body if isinstance(item, ast.AnnAssign)]
            names = [field.id if isinstance(field, ast.Name) else "" for field in fields]
            positions[node.name] = {index for index, name in enumerate(names) if _LAUNCH_HINT.search(name)}
    return positions


def _fake_functions(tree: ast.Module) -> set[str]:
    """Names of the functions that only tell tracing which shapes and types come out."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            for decorator in node.decorator_list:
                function = decorator.func if isinstance(decorator, ast.Call) else decorator
                if call_name(function) in _FAKE_REGISTRARS:
                    names.add(node.name)
        elif isinstance(node, ast.Call):
            registrar = node.func.func if isinstance(node.func, ast.Call) else node.func
            if call_name(registrar) in _FAKE_REGISTRARS:
                names.update(argument.id for argument in node.args if isinstance(argument, ast.Name))
            for keyword in node.keywords:
                if keyword.arg in _FAKE_KEYWORDS and isinstance(keyword.value, ast.Name):
                    names.add(keyword.value.id)
    return names
