from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from .candidates import mutants
from .report import Equivalents, Result, score
from .run import FAMILIES, _within, main
from .runner import TestRun
from .sampling import draw, shares
from .source import Mutant, Source
from .targets import CORE, find_families, find_targets


def _mutants(text: str) -> list[Mutant]:
    found = mutants(Source("some/file.py", text.encode()))
    for mutant in found:
        assert ast.dump(ast.parse(mutant.mutated)) != ast.dump(ast.parse(text)), mutant.id
    assert len({mutant.id for mutant in found}) == len(found)
    return found


def _texts(text: str, operator: str | None = None, variant: str | None = None) -> set[str]:
    """The mutated texts, of one operator and variant where they are given."""
    return {
        mutant.mutated.decode()
        for mutant in _mutants(text)
        if operator in (None, mutant.edit.operator) and variant in (None, mutant.edit.variant)
    }


@pytest.mark.parametrize(
    ("text", "operator", "expected"),
    [
        ("a + b", "sign", {"a - b"}),
        ("a - b", "sign", {"a + b"}),
        ("a * b", "sign", {"a / b"}),
        ("a / b", "sign", {"a * b"}),
        ("-a", "sign", {"a"}),
        ("-(a + b)", "sign", {"(a + b)", "-(a - b)"}),
        ("a += b", "sign", {"a -= b"}),
        ("a + b", "term", {"a", "b"}),
        ("a - b", "term", {"a"}),
        ("a * b", "term", {"a", "b"}),
        ("a / b", "term", {"a"}),
        ("a += b", "term", {"a = b"}),
        ("x_ptr + b", "term", {"x_ptr"}),
        ("tl.load(p[0] + a + b)", "term", {"tl.load((p[0] + a))", "tl.load(p[0] + b)"}),
        ("a < b", "comparison", {"a <= b", "a > b"}),
        ("a <= b", "comparison", {"a < b", "a >= b"}),
        ("a > b", "comparison", {"a >= b", "a < b"}),
        ("a >= b", "comparison", {"a > b", "a <= b"}),
        ("a == b", "comparison", {"a != b"}),
        ("a is not None", "comparison", {"a is None"}),
        ("a < b <= c", "comparison", {"a <= b <= c", "a > b <= c", "a < b < c", "a < b >= c"}),
        ("a & (b < c)", "mask", {"a", "(b < c)"}),
        ("m &= a", "mask", {"m = a"}),
        ("a and b and c", "mask", {"(b and c)", "(a and c)", "(a and b)"}),
        ("a and b or c", "logic", {"(a or b) or c", "((a and b) and c)"}),
        ("not a", "logic", {"a"}),
        ("range(n)", "bound", {"range(n + 1)", "range(n - 1)"}),
        ("tl.range(0, n, B)", "bound", {"tl.range(0, n - 1, B)"}),
        ("range(3)", None, {"range(4)", "range(2)"}),
        ("x[a:n]", "bound", {"x[a + 1:n]", "x[a - 1:n]", "x[a:n + 1]", "x[a:n - 1]"}),
        ("triton.cdiv(n + 1, b)", "bound", {"((n + 1) // b)"}),
        ("x[0]", None, {"x[1]", "x[-1]"}),
        ("x[-1]", None, {"x[0]", "x[-2]"}),
        ("x[i, 2]", "offset", {"x[i + 1, 2]", "x[i - 1, 2]", "x[i, 3]", "x[i, 1]"}),
        ("tl.load(p + o, mask=m)", "offset", {"tl.load((p + o) + 1, mask=m)"}),
        ("a = 0", "constant", {"a = 1"}),
        ("a = 1", "constant", {"a = 2", "a = 0"}),
        ("a = 0.5", "constant", {"a = 0.55", "a = 2.0"}),
        ("a = 0.0", "constant", {"a = 1.0", "a = 2.0"}),
        ("float('-inf')", "constant", {'float("inf")', "0.0"}),
        ("f(x, keepdim=True)", "flag", {"f(x, keepdim=False)"}),
        ("f(x, dim=d, y=z)", "argument", {"f(x, y=z)", "f(x, dim=d, )"}),
        ("tl.where(c, a, b + d)", "branch", {"tl.where(c, (b + d), (a))", "a", "(b + d)"}),
        ("a if c else b", "branch", {"(b if c else a)"}),
        ("tl.maximum(a, b)", "function", {"tl.minimum(a, b)"}),
        ("x.exp().amax(d)", "function", {"x.exp2().amax(d)", "x.exp().amin(d)"}),
        ("min(a, b)", "function", {"max(a, b)"}),
    ],
)
def test_operator(text: str, operator: str | None, expected: set[str]) -> None:
    assert _texts(text, operator) == expected


@pytest.mark.parametrize(
    "text",
    [
        '"""1 + 1."""',
        "import a.b as c",
        "raise ValueError(a + 1)",
        "f'{a + 1} of {b[0]}'",
        "'a' + b",
        "shape + (n,)",
        "x: int | None",
        "def f(x: Tuple[1, 2]) -> Foo[0]: ...",
        "@decorated(1)\ndef f(): ...",
        "def f(num_warps=4, *, num_stages=2): ...",
        "num_warps = 4 if n < 8 else 2",
        "kernel[grid](x, num_warps=4)",
        "config = {'num_warps': 4}",
        "def _num_warps(n): return n + 1",
        "class Tile(NamedTuple):\n    block: int\n    num_warps: int\nTile(b, 4)",
        "tl.arange(0, BLOCK)",
        "tl.multiple_of(x, 16)",
        "zip(a, b, strict=True)",
        "kernel[grid](x, b=b)",
        "launch(kernel, x, BLOCK=b)",
        "@torch.library.register_fake('a::b')\ndef f(x): return x + 1",
        "def f(x): return x + 1\ntorch.library.register_fake('a::b')(f)",
        "def f(x): return x + 1\nregister(schema, fake=f)",
        "def _f_fake(x): return x + 1",
        "if TYPE_CHECKING:\n    a = 1",
        "if __name__ == '__main__':\n    a = 1",
        "warnings.warn('a', stacklevel=2)",
        "Alias = Optional[0]",
    ],
)
def test_is_left_alone(text: str) -> None:
    assert _texts(text) == set()


def test_masks_are_never_dropped() -> None:
    assert not _texts("tl.load(p, mask=m, other=o)", "argument")


def test_edit_keeps_every_other_byte() -> None:
    text = "x = (  # λ - one\n    (a)  # - two\n    - (b)\n)\n"
    assert _texts(text, "sign") == {text.replace("- (b)", "+ (b)")}
    assert _texts(text, "term") == {"x = (  # λ - one\n    a\n)\n"}


def test_replaced_operands_keep_their_grouping() -> None:
    assert "a / ((b + c))" in _texts("a / ((b + c) * d)", "term", "drop-right")


def test_ids_are_stable_and_keys_survive_edits_elsewhere() -> None:
    before = _mutants("def f(a, b):\n    return a - b\n")[0]
    after = _mutants("c = 3\n\n\ndef f(a, b):\n    return a  -  b\n")[-2]
    assert before.id == "some/file.py:2:14:sign:minus-to-plus"
    assert (before.edit.variant, after.edit.variant) == ("minus-to-plus", "minus-to-plus")
    assert before.key == after.key
    assert before.key["function"] == "f"
    assert (before.key["original"], before.key["mutated"]) == ("return a - b", "return a + b")


def test_shares_follow_the_counts() -> None:
    assert shares({"a": 100, "b": 50, "c": 1}, 30) == {"a": 19, "b": 10, "c": 1}
    assert shares({"a": 3, "b": 2}, 0) == {"a": 3, "b": 2}
    assert sum(shares({str(i): 10 for i in range(7)}, 4).values()) == 4


def test_draw_is_seeded_and_local_to_a_file() -> None:
    first, second = (_mutants("\n".join(f"v{i} = a + {i}" for i in range(n))) for n in (8, 9))
    drawn = draw({"x": first, "y": first}, 10, seed=1)
    assert drawn == draw({"x": first, "y": first}, 10, seed=1)
    assert drawn != draw({"x": first, "y": first}, 10, seed=2)
    other = draw({"x": first, "y": second}, 10, seed=1)
    assert drawn[:5] == other[:5]


def test_this_repository() -> None:
    assert FAMILIES[CORE].files
    for name, family in FAMILIES.items():
        assert family.tests, name


_TOY = {
    "genloss_kernels/__init__.py": "",
    "genloss_kernels/core/__init__.py": "",
    "genloss_kernels/core/layout.py": "def half(n):\n    return n // 2 + 0\n",
    "genloss_kernels/core/checks.py": "A = 1\n",
    "genloss_kernels/core/unused.py": "A = 1\n",
    "genloss_kernels/losses/__init__.py": "",
    "genloss_kernels/losses/a/__init__.py": "",
    "genloss_kernels/losses/a/api.py": "A = 1\n",
    "genloss_kernels/losses/a/op.py": (
        "from ...core.layout import half\n\n\n"
        "def shrink(n):\n    while n > 1:\n        n = half(n)\n    return min(n, 1) if n > 5 else n\n"
    ),
    "genloss_kernels/losses/a_b/__init__.py": "",
    "genloss_kernels/losses/a_b/eager.py": "def one():\n    return 1\n",
    "genloss_kernels/losses/a_b/kernels.py": "import triton.language as tl\n\nTWO = 2\n",
    "tests/losses/test_a.py": (
        "from genloss_kernels.losses.a.op import shrink\n\n\ndef test():\n    assert shrink(9) == 1\n"
    ),
    "tests/losses/test_a_b_more.py": "def test():\n    pass\n",
}


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    for name, text in _TOY.items():
        path = tmp_path / "toy" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "toy"


def test_families_and_targets_come_from_the_folders(toy: Path) -> None:
    families = find_families(toy)
    assert {name: family.tests for name, family in families.items()} == {
        "a": ("tests/losses/test_a.py",),
        "a_b": ("tests/losses/test_a_b_more.py",),
        "core": (),
    }
    suites = {target.file.removeprefix("genloss_kernels/"): target.suites for target in find_targets(toy, families)}
    assert suites == {
        "losses/a/op.py": ("a",),
        "losses/a_b/eager.py": ("a_b",),
        "losses/a_b/kernels.py": ("a_b",),
        "core/layout.py": ("a",),
        "core/unused.py": ("a", "a_b"),
    }
    assert {target.file.rpartition("/")[2]: target.modes for target in find_targets(toy, families)} == {
        "op.py": ("eager", "kernels"),
        "eager.py": ("eager",),
        "kernels.py": ("kernels",),
        "layout.py": ("eager", "kernels"),
        "unused.py": ("eager", "kernels"),
    }
    assert {target.file.rpartition("/")[2] for target in find_targets(toy, families, ["a_b"])} == {"eager.py", "kernels.py"}


@pytest.mark.parametrize(
    ("only", "condition", "killed"),
    [
        pytest.param("eager", "!= '1'", True, id="eager.py by the eager suite"),
        pytest.param("eager", "== '1'", False, id="eager.py not by the kernels"),
        pytest.param("kernels", "== '1'", True, id="kernels.py by the kernels"),
        pytest.param("kernels", "!= '1'", False, id="kernels.py not by the eager suite"),
    ],
)
def test_each_file_meets_the_suite_that_runs_it(
    toy: Path, monkeypatch: pytest.MonkeyPatch, only: str, condition: str, killed: bool
) -> None:
    """The test reads its constant from the text, which it does not have to import, in one of the two modes."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    file, intact = f"genloss_kernels/losses/a_b/{only}.py", "return 1" if only == "eager" else "TWO = 2"
    (toy / "tests/losses/test_a_b_more.py").write_text(
        "import os\nfrom pathlib import Path\n\n\ndef test():\n"
        f"    if os.environ['TRITON_INTERPRET'] {condition}:\n        assert {intact!r} in Path({file!r}).read_text()\n"
    )
    identifier = f"{file}:2:12:constant:plus-one" if only == "eager" else f"{file}:3:7:constant:plus-one"
    families = find_families(toy)
    assert main(["--only", identifier], toy, families, toy / "none.json") == (0 if killed else 1)


@pytest.mark.parametrize(("budget", "count"), [(None, 3), (11.0, 3), (10.0, 2), (0.0, 1)])
def test_the_quickest_families_within_a_budget(budget: float | None, count: int) -> None:
    pairs = [(name, "eager") for name in "abc"]
    assert _within(budget, pairs, dict(zip(pairs, (4.0, 6.0, 1.0), strict=True))) == pairs[:count]


def test_kills_survivors_and_equivalents(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    op = "genloss_kernels/losses/a/op.py"
    ids = {
        f"{op}:5:13:comparison:gt-to-ge": "killed",
        f"{op}:7:12:function:min-to-max": "survived",
        "genloss_kernels/core/layout.py:2:19:sign:plus-to-minus": "equivalent",
    }
    entry = {
        "file": "genloss_kernels/core/layout.py",
        "function": "half",
        "operator": "sign",
        "original": "return n // 2 + 0",
        "mutated": "return n // 2 - 0",
        "why": "zero has no sign here",
    }
    (toy / "equivalents.json").write_text(json.dumps([entry]))
    arguments = [part for identifier in ids for part in ("--only", identifier)]
    arguments += ["--json", str(toy / "out.json")]

    code = main(arguments, toy, find_families(toy), toy / "equivalents.json")

    document = json.loads((toy / "out.json").read_text())
    assert {mutant["id"]: mutant["status"] for mutant in document["mutants"]} == ids
    assert (code, round(document["score"], 3)) == (1, 0.5)
    assert "+    return max(n, 1) if n > 5 else n" in capsys.readouterr().out


def test_survivors_again(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a test was added and lines have moved; what was killed is not run again."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    op, out = toy / "genloss_kernels/losses/a/op.py", toy / "out.json"
    file = op.relative_to(toy).as_posix()
    arguments = ["--only", f"{file}:5:13:comparison:gt-to-ge", "--only", f"{file}:7:12:function:min-to-max"]
    assert main([*arguments, "--json", str(out)], toy, find_families(toy), toy / "none.json") == 1
    op.write_text("# moved\n" + op.read_text())
    test = toy / "tests/losses/test_a.py"
    test.write_text(test.read_text() + f"    assert 'min(n, 1)' in open({file!r}).read()\n")
    before = json.loads(out.read_text())
    assert main(["--again", str(out), "--json", str(out)], toy, find_families(toy), toy / "none.json") == 0
    now = json.loads(out.read_text())
    assert [mutant["status"] for mutant in before["mutants"]] == ["killed", "survived"]
    assert [mutant["status"] for mutant in now["mutants"]] == ["killed", "killed"]
    assert now["mutants"][0] == before["mutants"][0]
    assert (before["score"], now["score"]) == (0.5, 1.0)
    assert now["later_passes"] == [{"rerun": 1, "counts": {"killed": 1}}]
    assert "later_passes" not in before


def test_endless_loop_is_killed(toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    identifier = "genloss_kernels/core/layout.py:2:21:constant:plus-one"
    assert main(["--only", identifier, "--timeout", "2"], toy, find_families(toy), toy / "none.json") == 0
    assert "killed 1 (of them 1 by timeout)" in capsys.readouterr().out


def test_failing_baseline_measures_nothing(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    (toy / "tests/losses/test_a_b_more.py").write_text("def test():\n    assert 0\n")
    assert main(["--family", "a_b"], toy, find_families(toy), toy / "none.json") == 2
    assert "unmutated tests of a_b must pass" in capsys.readouterr().err


def test_score_counts_timeouts_and_leaves_equivalents_out() -> None:
    mutant = _mutants("a + b")[0]
    statuses = ["killed", "timeout", "survived", "equivalent"]
    assert score([Result(mutant, status, 1.0, "") for status in statuses]) == pytest.approx(2 / 3)
    assert score([Result(mutant, "equivalent", 1.0, "")]) is None


def test_equivalents_must_say_why_and_match_something(tmp_path: Path) -> None:
    mutant = _mutants("a + b")[0]
    path = tmp_path / "equivalents.json"
    path.write_text(json.dumps([{**mutant.key, "why": ""}]))
    with pytest.raises(ValueError, match="lacks why"):
        Equivalents(path)
    path.write_text(json.dumps([{**mutant.key, "why": "so"}, {**mutant.key, "original": "gone", "why": "so"}]))
    equivalents = Equivalents(path)
    assert equivalents.why(mutant) == "so"
    assert len(equivalents.stale([mutant])) == 1


def test_runs_as_a_file() -> None:
    script = Path(__file__).with_name("run.py")
    result = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
    assert "--minimum" in result.stdout


@pytest.mark.parametrize(
    ("returncode", "output", "status"),
    [
        (0, "", "survived"),
        (5, "", "survived"),
        (None, "", "timeout"),
        (1, "FAILED tests/test_a.py::test", "killed"),
        (2, "!!! Interrupted: 1 error during collection !!!", "killed"),
        (2, "!!! KeyboardInterrupt !!!", "error"),
        (3, "INTERNALERROR> OSError", "error"),
        (4, "ImportError while loading conftest 'tests/conftest.py'.", "killed"),
        (4, "ERROR: unrecognized arguments: -n", "error"),
        (-9, "", "error"),
        (-15, "", "error"),
    ],
)
def test_status(returncode: int | None, output: str, status: str) -> None:
    assert TestRun(1.0, returncode, output).status == status


def test_crash_is_killed() -> None:
    crashed = TestRun(1.0, -11, "")
    assert (crashed.status, crashed.detail) == ("killed", "SIGSEGV")


def test_errors_are_repeated_and_fail_the_run(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are neither killed nor survivors, and run again with these."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    op, out = "genloss_kernels/losses/a/op.py", toy / "out.json"
    killing = f"import os, signal\nif 'n >= 1' in open({op!r}).read():\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    test = toy / "tests/losses/test_a.py"
    kept = test.read_text()
    test.write_text(killing + kept)
    arguments = ["--only", f"{op}:5:13:comparison:gt-to-ge", "--json", str(out)]
    assert main(arguments, toy, find_families(toy), toy / "none.json") == 2
    before = json.loads(out.read_text())
    assert before["counts"] == {"error": 1}
    assert before["score"] is None
    assert "ERROR SIGKILL" in capsys.readouterr().out
    test.write_text(kept)
    assert main(["--again", str(out), "--json", str(out)], toy, find_families(toy), toy / "none.json") == 0
    now = json.loads(out.read_text())
    assert (now["counts"], now["later_passes"]) == ({"killed": 1}, [{"rerun": 1, "counts": {"killed": 1}}])
