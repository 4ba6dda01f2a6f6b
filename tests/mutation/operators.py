"""The mutation operators: what each kind of syntax node can be turned into.

Every operator edits the source text of one node and leaves the rest of the file byte for byte as it was, since Triton
reads kernels back from their source.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Iterator
from itertools import pairwise

from .source import Edit, Source

_ARITHMETIC = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_OPPOSITE = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}
_WORDS = {ast.Add: "plus", ast.Sub: "minus", ast.Mult: "times", ast.Div: "divide"}

# token as a pattern, then (variant, new token) for each replacement
_COMPARISONS: dict[type[ast.cmpop], tuple[str, list[tuple[str, str]]]] = {
    ast.Lt: ("<", [("lt-to-le", "<="), ("lt-to-gt", ">")]),
    ast.LtE: ("<=", [("le-to-lt", "<"), ("le-to-ge", ">=")]),
    ast.Gt: (">", [("gt-to-ge", ">="), ("gt-to-lt", "<")]),
    ast.GtE: (">=", [("ge-to-gt", ">"), ("ge-to-le", "<=")]),
    ast.Eq: ("==", [("eq-to-ne", "!=")]),
    ast.NotEq: ("!=", [("ne-to-eq", "==")]),
    ast.Is: (r"\bis\b", [("is-to-is-not", "is not")]),
    ast.IsNot: (r"\bis\s+not\b", [("is-not-to-is", "is")]),
}

_PAIRS = [
    ("maximum", "minimum"),
    ("max", "min"),
    ("amax", "amin"),
    ("argmax", "argmin"),
    ("atomic_max", "atomic_min"),
    ("clamp_max", "clamp_min"),
    ("exp", "exp2"),
    ("log", "log2"),
]
_FUNCTION_SWAPS = {**dict(_PAIRS), **{b: a for a, b in _PAIRS}}

_RANGES = {"range", "static_range"}
_MEMORY_ACCESS = {"load", "store", "atomic_add", "atomic_max", "atomic_min"}

# Without a mask a kernel runs far outside its buffers; the others change where, how fast or whether traced code runs.
_KEPT_KEYWORDS = {
    "mask", "other", "boundary_check", "device", "eviction_policy", "cache_modifier", "volatile", "sem", "scope",
    "allow_tf32", "input_precision", "stacklevel", "strict", "non_blocking", "num_warps", "num_stages", "num_ctas",
    "maxnreg", "warp_specialize", "loop_unroll_factor", "fake",
}  # fmt: skip

_POINTER = re.compile(r"ptr|pointer", re.IGNORECASE)
_ATOMS = (ast.Name, ast.Constant, ast.Attribute, ast.Subscript, ast.Call)
_SEQUENCES = (ast.Tuple, ast.List, ast.ListComp, ast.JoinedStr, ast.Dict, ast.Set)


def edits(node: ast.AST, source: Source) -> Iterator[Edit]:
    """Every edit of ``node`` itself; its children are the caller's to visit."""
    operator = _BY_NODE.get(type(node))
    if operator is not None:
        yield from operator(node, source)


def call_name(node: ast.expr) -> str:
    """``f`` of ``f(...)``, ``a.f(...)`` and ``f[...](...)``'s plain inner name; empty where there is none."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def int_literal(node: ast.AST | None) -> int | None:
    """The value of ``3`` or ``-3``."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = int_literal(node.operand)
        return None if value is None else -value
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    return None


def claimed_literals(node: ast.AST) -> list[ast.AST]:
    """Literals that ``bound`` and ``offset`` already move both ways, so that other operators would only repeat them."""
    literals: list[ast.AST | None] = []
    if isinstance(node, ast.Subscript):
        literals = [node.slice, *node.slice.elts] if isinstance(node.slice, ast.Tuple) else [node.slice]
    elif isinstance(node, ast.Slice):
        literals = [node.lower, node.upper]
    elif isinstance(node, ast.Call) and call_name(node.func) in _RANGES:
        literals = [_range_stop(node)]
    elif isinstance(node, ast.Call) and call_name(node.func) == "arange":
        # tl.arange accepts nothing but powers of two from 0: a moved literal is an error whatever the tests are.
        literals = list(node.args)
    claimed = [literal for literal in literals if int_literal(literal) is not None]
    return [part for literal in claimed for part in ast.walk(literal)]


def is_impossible_address(edit: Edit, node: ast.AST, addresses: set[ast.AST]) -> bool:
    """Whether ``edit`` leaves an offset where a pointer is needed."""
    return node in addresses and (edit.operator, edit.variant) == ("term", "drop-left")


def address_sums(node: ast.AST) -> list[ast.AST]:
    """The sums by which a memory access gets from its pointer, leftmost, to the address."""
    sums: list[ast.AST] = []
    if isinstance(node, ast.Call) and call_name(node.func) in _MEMORY_ACCESS and node.args:
        part: ast.AST = node.args[0]
        while isinstance(part, ast.BinOp):
            sums.append(part)
            part = part.left
    return sums


def _atom(node: ast.expr, source: Source) -> str:
    """Text of ``node`` that keeps its meaning wherever an expression may stand."""
    text = source.text(node)
    return text if isinstance(node, _ATOMS) and "\n" not in text else f"({text})"


def _replace(operator: str, variant: str, node: ast.AST, text: str, source: Source, anchor: int | None = None) -> Edit:
    start = source.start(node)
    return Edit(operator, variant, start if anchor is None else anchor, start, source.end(node), text)


def _is_text_or_sequence(node: ast.expr) -> bool:
    return isinstance(node, _SEQUENCES) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))


def _mentions_pointer(node: ast.AST) -> bool:
    return any(isinstance(part, ast.Name) and _POINTER.search(part.id) for part in ast.walk(node))


def _binary(node: ast.BinOp, source: Source) -> Iterator[Edit]:
    if _is_text_or_sequence(node.left) or _is_text_or_sequence(node.right):
        return
    gap = source.end(node.left), source.start(node.right)
    kind = type(node.op)
    if kind is ast.BitAnd:
        anchor, _ = source.find_token("&", *gap)
        yield _replace("mask", "drop-left", node, _atom(node.right, source), source, anchor)
        yield _replace("mask", "drop-right", node, _atom(node.left, source), source, anchor)
    if kind not in _ARITHMETIC:
        return
    start, end = source.find_token(re.escape(_ARITHMETIC[kind]), *gap)
    opposite = _OPPOSITE[kind]
    yield Edit("sign", f"{_WORDS[kind]}-to-{_WORDS[opposite]}", start, start, end, _ARITHMETIC[opposite])
    yield _replace("term", "drop-right", node, _atom(node.left, source), source, start)
    if kind is ast.Mult or (kind is ast.Add and not _mentions_pointer(node.left)):
        yield _replace("term", "drop-left", node, _atom(node.right, source), source, start)


def _augmented(node: ast.AugAssign, source: Source) -> Iterator[Edit]:
    kind = type(node.op)
    gap = source.end(node.target), source.start(node.value)
    if _is_text_or_sequence(node.value):
        return
    if kind is ast.BitAnd:
        start, end = source.find_token("&=", *gap)
        yield Edit("mask", "drop-left", start, start, end, "=")
    if kind not in _ARITHMETIC:
        return
    start, end = source.find_token(re.escape(_ARITHMETIC[kind]) + "=", *gap)
    opposite = _OPPOSITE[kind]
    yield Edit("sign", f"{_WORDS[kind]}-to-{_WORDS[opposite]}", start, start, end, f"{_ARITHMETIC[opposite]}=")
    yield Edit("term", "drop-left", start, start, end, "=")


def _unary(node: ast.UnaryOp, source: Source) -> Iterator[Edit]:
    if isinstance(node.op, ast.USub):
        yield _replace("sign", "drop-minus", node, _atom(node.operand, source), source)
    elif isinstance(node.op, ast.Not):
        yield _replace("logic", "drop-not", node, _atom(node.operand, source), source)


def _compare(node: ast.Compare, source: Source) -> Iterator[Edit]:
    operands = [node.left, *node.comparators]
    for left, operator, right in zip(operands, node.ops, operands[1:], strict=False):
        if type(operator) not in _COMPARISONS:
            continue
        pattern, replacements = _COMPARISONS[type(operator)]
        start, end = source.find_token(pattern, source.end(left), source.start(right))
        for variant, token in replacements:
            yield Edit("comparison", variant, start, start, end, token)


def _boolean(node: ast.BoolOp, source: Source) -> Iterator[Edit]:
    texts = [_atom(value, source) for value in node.values]
    word, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
    gaps = [(source.end(left), source.start(right)) for left, right in pairwise(node.values)]
    anchors = [source.find_token(rf"\b{word}\b", *gap)[0] for gap in gaps]
    yield _replace("logic", f"{word}-to-{other}", node, f"({f' {other} '.join(texts)})", source, anchors[0])
    for index in range(len(texts)):
        rest = texts[:index] + texts[index + 1 :]
        text = rest[0] if len(rest) == 1 else f"({f' {word} '.join(rest)})"
        yield _replace("mask", f"drop-{index + 1}", node, text, source, anchors[max(0, index - 1)])


def _conditional(node: ast.IfExp, source: Source) -> Iterator[Edit]:
    body, test, orelse = (_atom(part, source) for part in (node.body, node.test, node.orelse))
    anchor = source.start(node.test)
    yield _replace("branch", "swap", node, f"({orelse} if {test} else {body})", source, anchor)


def _shifted(node: ast.expr, step: int, source: Source) -> str:
    value = int_literal(node)
    if value is not None:
        return str(value + step)
    return f"{_atom(node, source)} {'+' if step > 0 else '-'} 1"


def _range_stop(node: ast.Call) -> ast.expr | None:
    if not node.args or any(isinstance(argument, ast.Starred) for argument in node.args):
        return None
    return node.args[min(1, len(node.args) - 1)]


def _call(node: ast.Call, source: Source) -> Iterator[Edit]:
    name = call_name(node.func)
    # a.f(...).g(...) starts where a.f(...) does: the end of the name tells the two calls apart.
    anchor = source.end(node.func) - len(name.encode())
    plain = len(node.args) if not any(isinstance(argument, ast.Starred) for argument in node.args) else 0

    if name in _RANGES and (stop := _range_stop(node)) is not None:
        yield _replace("bound", "stop-minus-one", stop, _shifted(stop, -1, source), source)
        # One more than the end of a stepped loop adds at most a block that its mask empties.
        if len(node.args) < 3:
            yield _replace("bound", "stop-plus-one", stop, _shifted(stop, 1, source), source)
    elif name == "cdiv" and plain == 2 and not node.keywords:
        left, right = (_atom(argument, source) for argument in node.args)
        yield _replace("bound", "cdiv-to-floor", node, f"({left} // {right})", source, anchor)
    elif name == "where" and plain == 3:
        condition, first, second = (source.text(argument) for argument in node.args)
        called = source.text(node.func)
        yield _replace("branch", "swap", node, f"{called}({condition}, ({second}), ({first}))", source, anchor)
        yield _replace("branch", "first", node, _atom(node.args[1], source), source, anchor)
        yield _replace("branch", "second", node, _atom(node.args[2], source), source, anchor)
    elif name in _MEMORY_ACCESS and plain:
        pointer = node.args[0]
        yield _replace("offset", "pointer-plus-one", pointer, _shifted(pointer, 1, source), source)
    elif name == "float" and plain == 1 and _is_text_or_sequence(node.args[0]):
        yield from _infinity(node, source)

    # A bare name would need the other one imported too, except for the builtins.
    if name in _FUNCTION_SWAPS and (isinstance(node.func, ast.Attribute) or name in {"max", "min"}):
        other = _FUNCTION_SWAPS[name]
        yield Edit("function", f"{name}-to-{other}", anchor, anchor, source.end(node.func), other)

    if not isinstance(node.func, ast.Subscript):
        yield from _dropped_keywords(node, source)


def _dropped_keywords(node: ast.Call, source: Source) -> Iterator[Edit]:
    for keyword in node.keywords:
        # Upper case is a kernel's parameter: a launch that lacks one is an error whatever the tests are.
        if keyword.arg is None or keyword.arg.isupper() or keyword.arg in _KEPT_KEYWORDS:
            continue
        start, end = source.start(keyword), source.end(keyword)
        comma = re.match(rb"\s*,\s*", source.data[end : source.end(node)])
        yield Edit("argument", f"drop-{keyword.arg}", start, start, end + (comma.end() if comma else 0), "")


def _infinity(node: ast.Call, source: Source) -> Iterator[Edit]:
    opposite = {"inf": "-inf", "-inf": "inf"}.get(getattr(node.args[0], "value", None))
    if opposite is not None:
        yield _replace("constant", "infinity-sign", node, f'float("{opposite}")', source)
        yield _replace("constant", "infinity-to-zero", node, "0.0", source)


def _slice(node: ast.Slice, source: Source) -> Iterator[Edit]:
    for side, bound in (("lower", node.lower), ("upper", node.upper)):
        if bound is not None:
            yield _replace("bound", f"{side}-plus-one", bound, _shifted(bound, 1, source), source)
            yield _replace("bound", f"{side}-minus-one", bound, _shifted(bound, -1, source), source)


def _subscript(node: ast.Subscript, source: Source) -> Iterator[Edit]:
    for index in node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]:
        if int_literal(index) is not None or isinstance(index, ast.BinOp) or _is_index_name(index):
            yield _replace("offset", "plus-one", index, _shifted(index, 1, source), source)
            yield _replace("offset", "minus-one", index, _shifted(index, -1, source), source)


def _is_index_name(node: ast.expr) -> bool:
    """Lower-case names index arrays; a name by which a mapping is read says so."""
    return isinstance(node, ast.Name) and node.id.islower() and not re.search(r"key|name|dtype|mask|grid", node.id)


def _constant(node: ast.Constant, source: Source) -> Iterator[Edit]:
    value = node.value
    if isinstance(value, bool):
        yield _replace("flag", f"to-{str(not value).lower()}", node, str(not value), source)
    elif isinstance(value, int):
        yield _replace("constant", "plus-one", node, str(value + 1), source)
        if value == 1:
            yield _replace("constant", "one-to-zero", node, "0", source)
    elif isinstance(value, float) and math.isfinite(value):
        # 1.1 of the largest floats is infinite, which has no literal.
        scaled = value * 1.1 if value and math.isfinite(value * 1.1) else value / 2 + 1.0
        yield _replace("constant", "scale", node, repr(scaled), source)
        if value != 2.0:
            yield _replace("constant", "to-two", node, "2.0", source)
        if value == 1.0:
            yield _replace("constant", "one-to-zero", node, "0.0", source)


_BY_NODE: dict[type[ast.AST], Callable[..., Iterator[Edit]]] = {
    ast.BinOp: _binary,
    ast.AugAssign: _augmented,
    ast.UnaryOp: _unary,
    ast.Compare: _compare,
    ast.BoolOp: _boolean,
    ast.IfExp: _conditional,
    ast.Call: _call,
    ast.Slice: _slice,
    ast.Subscript: _subscript,
    ast.Constant: _constant,
}
