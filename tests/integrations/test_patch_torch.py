"""The life of ``gk.patch_torch()``: what it replaces, nesting and reverting, other patches, threads, compiled code."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import genloss_kernels as gk
from genloss_kernels.core.torch_losses import TORCH_LOSSES
from genloss_kernels.integrations.torch_patch import routing

# Dynamo instantiates the class itself while it traces an autograd.Function.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

X, Y = torch.linspace(-1.0, 1.0, 20).view(4, 5), torch.arange(4)


def standing() -> dict[str, Any]:
    return {name: getattr(F, name) for name in TORCH_LOSSES}


@pytest.fixture(autouse=True)
def reverted() -> Iterator[None]:
    """Every test leaves torch as it found it."""
    assert standing() == TORCH_LOSSES
    yield
    assert standing() == TORCH_LOSSES


def ours(patch: Any, name: str = "cross_entropy") -> int:
    return patch.report()["calls"].get(name, {"ours": 0})["ours"]


def test_every_function_of_torch_that_is_ours_is_replaced() -> None:
    assert set(TORCH_LOSSES) == {name for name in gk.functional.__all__ if hasattr(F, name)}
    with gk.patch_torch():
        for name, original in TORCH_LOSSES.items():
            wrapper = getattr(F, name)
            assert wrapper is not original
            assert (wrapper.__name__, wrapper.__module__, wrapper.__doc__) == (name, original.__module__, original.__doc__)


def test_reverts_when_left_by_an_error() -> None:
    with pytest.raises(ZeroDivisionError), gk.patch_torch() as patch:
        raise ZeroDivisionError
    assert not patch.active


def test_a_handle_is_active_at_once_and_reverts_once() -> None:
    first, second = gk.patch_torch(), gk.patch_torch()
    first.revert()
    first.revert()
    assert second.active
    assert F.cross_entropy is not TORCH_LOSSES["cross_entropy"]
    second.revert()


def test_nested_patches_count_their_own_calls() -> None:
    with gk.patch_torch() as outer:
        F.cross_entropy(X, Y)
        with gk.patch_torch() as inner:
            F.cross_entropy(X, Y)
        F.cross_entropy(X, Y)
    assert (ours(outer), ours(inner)) == (3, 1)
    TORCH_LOSSES["cross_entropy"](X, Y)
    assert ours(outer) == 3


def test_a_handle_can_be_entered_again() -> None:
    patch = gk.patch_torch()
    with patch:
        with patch:
            F.cross_entropy(X, Y)
        assert patch.active
    assert not patch.active
    with patch:
        F.cross_entropy(X, Y)
    assert ours(patch) == 2
    with patch:
        patch.revert()
        F.cross_entropy(X, Y)
    assert ours(patch) == 2


def test_a_handle_that_was_reverted_within_is_left_by_the_next_block() -> None:
    patch = gk.patch_torch()
    patch.__enter__()
    patch.revert()
    with patch:
        assert patch.active
    assert not patch.active


def test_a_patch_on_top_is_left_in_place() -> None:
    """And what it wraps passes its calls to torch, until the next patch."""
    handle = gk.patch_torch()
    under = F.cross_entropy

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return 2.0 * under(*args, **kwargs)

    F.cross_entropy = theirs
    try:
        with gk.patch_torch() as inner:
            assert F.cross_entropy is theirs
            assert inner.report()["replaced"] == ["cross_entropy"]
            assert "replaced by others: cross_entropy" in str(inner)
            torch.testing.assert_close(F.cross_entropy(X, Y), 2.0 * TORCH_LOSSES["cross_entropy"](X, Y))
            assert ours(inner) == 1
        handle.revert()
        assert F.cross_entropy is theirs
        F.cross_entropy(X, Y)
        assert ours(handle) == 1
        with gk.patch_torch() as later:
            assert F.cross_entropy is theirs
            assert later.report()["replaced"] == ["cross_entropy"]
            F.cross_entropy(X, Y)
            # What goes to torch does not come back by way of the other patch.
            with pytest.raises(ValueError, match="batch_size"):
                F.cross_entropy(X, Y[:2])
        assert F.cross_entropy is theirs
        assert ours(later) == 1
        F.cross_entropy = under  # they undo theirs, out of order
        F.cross_entropy(X, Y)
        assert ours(later) == 1
        with gk.patch_torch():
            pass
        assert F.cross_entropy is TORCH_LOSSES["cross_entropy"]
    finally:
        F.cross_entropy = TORCH_LOSSES["cross_entropy"]


class Overriding(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func


def test_a_patch_below_is_left_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its term of the loss must not vanish; nor does torch's own code see it, for which it is no part of torch."""
    with monkeypatch.context() as change:
        change.setattr(F, "mse_loss", lambda *args, **kwargs: "theirs")
        with gk.patch_torch() as patch:
            assert F.mse_loss(X, X) == torch.nn.MSELoss()(X, X) == "theirs"
            assert patch.report()["replaced"] == ["mse_loss"]
            assert routing.WRAPPERS["mse_loss"](X.as_subclass(Overriding), X) is TORCH_LOSSES["mse_loss"]
        assert F.mse_loss(X, X) == "theirs"


def _module(name: str, **names: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(names)
    return module


@pytest.fixture
def bound_earlier(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with ``from torch.nn.functional import cross_entropy as criterion, relu``."""
    module = _module("bound_earlier", criterion=F.cross_entropy, relu=F.relu)
    monkeypatch.setitem(sys.modules, "bound_earlier", module)
    return module


def test_names_bound_earlier_are_reported(bound_earlier: ModuleType) -> None:
    with gk.patch_torch() as patch:
        assert bound_earlier.criterion is TORCH_LOSSES["cross_entropy"]
        missed = patch.report()["missed"]
    assert "bound_earlier.criterion" in missed
    assert not [name for name in missed if name.startswith(("torch.", "genloss_kernels.", "bound_earlier.relu"))]
    assert "bound_earlier.criterion" in str(patch)


HOLDERS = """
import torch
from functools import partial
from torch.nn.functional import cross_entropy
class Metaclass(type):
    def __getattribute__(self, name):
        raise AssertionError(f"{name} was asked for")
class Kit(metaclass=Metaclass):
    loss = staticmethod(cross_entropy)
    table = {"ce": cross_entropy}
    def step(self, x, criterion=cross_entropy):
        return criterion
def step(x, y=0, criterion=cross_entropy, *, other=cross_entropy):
    return criterion
losses, pair, mean = {"ce": cross_entropy, None: cross_entropy}, (0, cross_entropy), partial(cross_entropy, reduction="mean")
class Unequal:
    __hash__ = None
    def __getattr__(self, name):
        raise AssertionError(f"{name} was asked for")
    @property
    def __class__(self):
        raise AssertionError("its class was asked for")
unequal = Unequal()
del cross_entropy
"""


def test_what_holds_torchs_functions_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """And none of its code runs."""
    module = _module("holders")
    monkeypatch.setitem(sys.modules, "holders", module)
    exec(HOLDERS, vars(module))
    with gk.patch_torch() as patch:
        missed = [name.removeprefix("holders.") for name in patch.report()["missed"] if name.startswith("holders.")]
    assert missed == [
        "Kit.loss",
        "Kit.step(criterion=)",
        "Kit.table['ce']",
        "losses['ce']",
        "losses[...]",
        "mean.func",
        "pair[1]",
        "step(criterion=)",
        "step(other=)",
    ]


@pytest.mark.parametrize("by_name", [False, True])
def test_names_bound_earlier_are_patched_in_modules(by_name: bool, bound_earlier: ModuleType) -> None:
    with gk.patch_torch(modules=["bound_earlier" if by_name else bound_earlier]) as patch:
        bound_earlier.criterion(X, Y)
        assert not [name for name in patch.report()["missed"] if name.startswith("bound_earlier")]
        with gk.patch_torch(modules=[bound_earlier]):
            pass
        bound_earlier.criterion(X, Y)
    assert ours(patch) == 2
    assert bound_earlier.criterion is TORCH_LOSSES["cross_entropy"]
    assert bound_earlier.relu is F.relu


def test_each_patch_keeps_its_modules(bound_earlier: ModuleType) -> None:
    outer = gk.patch_torch()
    inner = gk.patch_torch(modules=[bound_earlier])
    outer.revert()
    assert bound_earlier.criterion is F.cross_entropy is not TORCH_LOSSES["cross_entropy"]
    inner.revert()
    assert bound_earlier.criterion is TORCH_LOSSES["cross_entropy"]


def test_names_bound_under_the_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    with gk.patch_torch() as patch:
        module = _module("bound_under", criterion=F.cross_entropy)
        monkeypatch.setitem(sys.modules, "bound_under", module)
        module.criterion(X, Y)
    before = routing.counts()
    torch.testing.assert_close(module.criterion(X, Y), F.cross_entropy(X, Y))
    assert routing.counts() == before, "a wrapper ran ours when no patch was in force"
    assert ours(patch) == 1
    with gk.patch_torch() as again:
        module.criterion(X, Y)
    assert ours(again) == 1
    with gk.patch_torch(modules=[module]):
        pass
    assert module.criterion is TORCH_LOSSES["cross_entropy"]


@pytest.mark.parametrize(
    ("modules", "error"), [(["no_such_module"], ValueError), ([3], TypeError), ("torch", TypeError), (sys, TypeError)]
)
def test_wrong_modules_change_nothing(modules: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="modules"):
        gk.patch_torch(modules=modules)


class Frozen(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("frozen")


def test_a_module_that_refuses_changes_nothing(bound_earlier: ModuleType) -> None:
    frozen = Frozen("frozen")
    vars(frozen)["criterion"] = F.cross_entropy
    for _ in range(2):
        with pytest.raises(AttributeError, match="frozen"):
            gk.patch_torch(modules=[bound_earlier, frozen])
        assert standing() == TORCH_LOSSES
        assert bound_earlier.criterion is frozen.criterion is F.cross_entropy
    with gk.patch_torch(modules=[bound_earlier]):
        bound_earlier.criterion(X, Y)
    assert bound_earlier.criterion is F.cross_entropy


def test_report_is_empty_at_first() -> None:
    with gk.patch_torch() as patch:
        assert patch.report()["calls"] == {}
        assert str(patch).startswith("patch_torch: active")
    assert str(patch).startswith("patch_torch: reverted")


def test_text_of_the_report() -> None:
    with gk.patch_torch() as patch:
        F.cross_entropy(X, Y)
        F.mse_loss(X, X.double())
        F.mse_loss(X, X.double())
    lines = str(patch).splitlines()
    assert lines[2].split() == ["cross_entropy", "1", "0"]
    assert lines[3].split() == ["mse_loss", "0", "2", "2", "operands", "of", "several", "dtypes"]


def test_threads_patch_and_call_at_once() -> None:
    """Calls are all counted, and the last to leave reverts."""
    rounds, workers, calls = 20, 6, 15
    errors = []
    entered = threading.Barrier(workers)

    def work() -> None:
        try:
            entered.wait()
            for _ in range(rounds):
                with gk.patch_torch() as patch:
                    for _ in range(calls):
                        F.cross_entropy(X, Y)
                    assert ours(patch) >= calls
        except BaseException as error:
            errors.append(error)

    with gk.patch_torch() as everything:
        threads = [threading.Thread(target=work) for _ in range(workers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert ours(everything) == rounds * workers * calls


def test_our_own_functions_are_not_counted() -> None:
    """They reach torch's by other names, with a default device too."""
    pair = X, X.flip(0)
    shares = X.sigmoid(), X.flip(0).sigmoid()
    with gk.patch_torch() as patch, torch.device("cpu"), gk.backend("eager"):
        for module in (gk.CrossEntropyLoss(), gk.NLLLoss(), gk.nn.CrossEntropyLoss(reduction="none")):
            module(X, Y)
        for module in (gk.BCELoss(), gk.BCEWithLogitsLoss(), gk.MSELoss(), gk.L1Loss(), gk.SmoothL1Loss(), gk.HuberLoss()):
            module(*shares)
        gk.CosineEmbeddingLoss()(*pair, torch.ones(4))
        gk.KLDivLoss(reduction="sum")(*pair)
        gk.GaussianNLLLoss()(*pair, X.exp())
        gk.LinearCrossEntropyLoss(5, 5)(X, Y)
        gk.FusedLMHead(5, 5)(X, Y)
        gk.vae_loss(*shares, *pair, recon_loss="bce")
        gk.mse_loss(*pair, weight=X.exp())
        gk.smooth_l1_loss(X.bfloat16(), X.flip(0).bfloat16())
        gk.binary_cross_entropy(shares[0].bfloat16(), shares[1].bfloat16(), X.exp().bfloat16())
        gk.nll_loss(X.bfloat16(), Y)
        torch.func.vmap(gk.binary_cross_entropy)(*shares)
        torch.func.vmap(gk.huber_loss)(*pair)
    assert patch.report()["calls"] == {}


def test_tools_compare_with_torchs_own() -> None:
    from genloss_kernels import cases
    from genloss_kernels.bench import candidates

    with gk.patch_torch() as patch:
        # But for the one that is made of another, which it looks up.
        for name in TORCH_LOSSES.keys() - {"linear_cross_entropy"}:
            case = cases.select(cases.DOCTOR, (name,))[0]
            for function in (case.oracle, candidates.builtin(case)):
                function(**case.call().arguments)
    assert patch.report()["calls"] == {}


# --- torch.compile ---------------------------------------------------------------------------------------------------


class Graphs:
    """A compiler that runs what it is given, and remembers what it called."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, module: Any, _: Any) -> Any:
        self.seen.append(" ".join(str(node.target) for node in module.graph.nodes))
        return module

    def new(self) -> list[bool]:
        """Of each graph since the last call, whether ours is in it."""
        found = ["autograd_function_apply" in graph or "genloss" in graph for graph in self.seen]
        self.seen.clear()
        return found


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch.compiler.reset()
    yield Graphs()
    torch.compiler.reset()


def test_compiled_code_follows_the_patch(graphs: Graphs) -> None:
    """Each state has its code: no stale one runs, and none is compiled twice."""
    module = torch.nn.CrossEntropyLoss()
    for loss in (lambda x, y: 1.0 * F.cross_entropy(x, y), lambda x, y: 1.0 * module(x, y)):
        compiled = torch.compile(loss, backend=graphs, fullgraph=True)
        expected = loss(X, Y)
        leaf = X.clone().requires_grad_()
        for fresh in (True, False):
            torch.testing.assert_close(compiled(leaf, Y), expected)
            assert graphs.new() == ([False] if fresh else [])
            with gk.patch_torch() as patch:
                torch.testing.assert_close(compiled(leaf, Y), expected)
                assert graphs.new() == ([True] if fresh else [])
                with gk.patch_torch():
                    compiled(leaf, Y)
                assert graphs.new() == []
        assert patch.report()["calls"] == {}


COMPILED: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda x: F.cross_entropy(x, Y),
    "nll_loss": lambda x: F.nll_loss(x, Y),
    "binary_cross_entropy_with_logits": lambda x: F.binary_cross_entropy_with_logits(x, X.sigmoid()),
    "binary_cross_entropy": lambda x: F.binary_cross_entropy(x.sigmoid(), X.sigmoid()),
    "kl_div": lambda x: F.kl_div(x, X.sigmoid()),
    "mse_loss": lambda x: F.mse_loss(x, X.sigmoid()),
    "weighted mse_loss": lambda x: F.mse_loss(x, X.sigmoid(), weight=X.exp()),
    "one tensor twice": lambda x: F.mse_loss(x, X, weight=X),
    "l1_loss": lambda x: F.l1_loss(x, X.sigmoid()),
    "smooth_l1_loss": lambda x: F.smooth_l1_loss(x, X.sigmoid()),
    "huber_loss": lambda x: F.huber_loss(x, X.sigmoid()),
    "cosine_embedding_loss": lambda x: F.cosine_embedding_loss(x, X.sigmoid(), torch.ones(4)),
    "to torch": lambda x: F.mse_loss(x, X[:1].double()) + F.cross_entropy(x, Y, size_average=False),
    "made inside": lambda x: torch.nn.CrossEntropyLoss()(x, Y),
    "vmap": lambda x: torch.func.vmap(lambda a, b: 1.0 * F.cross_entropy(a, b))(x, Y),
    "grad": lambda x: 1.0 * torch.func.grad(lambda a: F.mse_loss(a, X))(x),
}
if "linear_cross_entropy" in TORCH_LOSSES:
    COMPILED["linear_cross_entropy"] = lambda x: F.linear_cross_entropy(x, X, Y)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
@pytest.mark.filterwarnings("ignore:Using a target size:UserWarning")
@pytest.mark.filterwarnings("ignore:size_average and reduce:UserWarning")
@pytest.mark.parametrize("case", COMPILED)
def test_compiled_losses_are_torchs(case: str, graphs: Graphs) -> None:
    def run(loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = X.flip(1).clone().requires_grad_()
        found = loss(leaf)
        found.sum().backward()
        assert leaf.grad is not None
        return found.detach(), leaf.grad

    torch.manual_seed(0)
    expected = run(COMPILED[case])
    with gk.patch_torch():
        found = run(torch.compile(COMPILED[case], backend="aot_eager", fullgraph=True))
    torch.testing.assert_close(found, expected)


# A function of a number, and numbers of which the second makes it symbolic.
NUMBERED: dict[str, tuple[Callable[[Tensor, Any], Tensor], tuple[Any, ...]]] = {
    "cross_entropy, ignore_index": (lambda x, n: F.cross_entropy(x, Y, ignore_index=n), (1, 2, 3)),
    "cross_entropy, label_smoothing": (lambda x, n: F.cross_entropy(x, Y, label_smoothing=n), (0.1, 0.2, 0.3)),
    "nll_loss": (lambda x, n: F.nll_loss(x, Y, ignore_index=n), (1, 2, 3)),
    "smooth_l1_loss": (lambda x, n: F.smooth_l1_loss(x, X, beta=n), (0.5, 0.6, 0.7)),
    "huber_loss": (lambda x, n: F.huber_loss(x, X, delta=n), (0.5, 0.6, 0.7)),
    "gaussian_nll_loss, eps": (lambda x, n: F.gaussian_nll_loss(x, X, X.exp(), eps=n), (0.5, 0.6, 0.7)),
    "gaussian_nll_loss, var": (lambda x, n: F.gaussian_nll_loss(x, X, n), (0.5, 0.6, 0.7)),
    "cosine_embedding_loss": (lambda x, n: F.cosine_embedding_loss(x, X, -torch.ones(4), margin=n), (0.1, 0.2, 0.3)),
}
if "linear_cross_entropy" in TORCH_LOSSES:
    NUMBERED["linear_cross_entropy"] = (lambda x, n: F.linear_cross_entropy(x, X, Y, ignore_index=n), (1, 2, 3))


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
@pytest.mark.parametrize("case", NUMBERED)
def test_compiled_losses_take_numbers_that_change(case: str, graphs: Graphs) -> None:
    loss, numbers = NUMBERED[case]
    expected = [loss(X.flip(0), number) for number in numbers]
    with gk.patch_torch():
        compiled = torch.compile(loss, backend=graphs, fullgraph=True, dynamic=True)
        torch.testing.assert_close([compiled(X.flip(0), number) for number in numbers], expected)


def test_a_gaussian_loss_that_torch_does_not_compile_whole_compiles(graphs: Graphs) -> None:
    with gk.patch_torch():
        compiled = torch.compile(lambda x: F.gaussian_nll_loss(x, X, X.exp()), backend=graphs, fullgraph=True)
        torch.testing.assert_close(compiled(X.flip(0)), gk.gaussian_nll_loss(X.flip(0), X, X.exp()))


def test_ours_runs_where_the_first_thing_compiled_is_patched() -> None:
    """Dynamo files torch's functions by name when it is imported."""
    source = """
import torch, genloss_kernels as gk
import torch.nn.functional as F
seen = []
def compiler(module, _):
    seen.append([str(node.target) for node in module.graph.nodes])
    return module
x, y = torch.randn(4, 5, requires_grad=True), torch.arange(4)
with gk.patch_torch():
    loss = torch.compile(lambda x, y: F.cross_entropy(x, y), backend=compiler, fullgraph=True)
    loss(x, y)
loss(x, y)
assert "autograd_function_apply" in seen[0], seen
assert any("function cross_entropy" in target for target in seen[1]), seen
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_torchs_table_of_overrides_keeps_torchs_functions() -> None:
    """Which it makes when it is first asked for one."""
    source = """
import torch, genloss_kernels as gk
import torch.nn.functional as F
with gk.patch_torch():
    torch.overrides.resolve_name(torch.add), torch.overrides.get_testing_overrides()
assert torch.overrides.resolve_name(F.cross_entropy) == "torch.nn.functional.cross_entropy"
assert F.cross_entropy in torch.overrides.get_testing_overrides()
assert F.cross_entropy in torch.overrides.get_overridable_functions()[F]
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pickles_by_name() -> None:
    with gk.patch_torch():
        under = F.cross_entropy
        assert pickle.loads(pickle.dumps(under)) is under
        with pytest.raises(pickle.PicklingError):
            pickle.dumps(TORCH_LOSSES["cross_entropy"])
    with pytest.raises(pickle.PicklingError):
        pickle.dumps(under)


def test_overrides_and_graphs_get_what_does_not_stand_in_torchs_place() -> None:
    with gk.patch_torch():
        assert F.mse_loss(X.as_subclass(Overriding), X) is TORCH_LOSSES["mse_loss"] is not F.mse_loss
        (target,) = (n.target for n in torch.fx.symbolic_trace(torch.nn.MSELoss()).graph.nodes if n.op == "call_function")
        assert target is TORCH_LOSSES["mse_loss"]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cross_entropy", (X, Y + 3)),
        ("nll_loss", (X, Y + 3)),
        ("binary_cross_entropy", (X, X)),
        ("gaussian_nll_loss", (X, X, X)),
    ],
)
def test_values_that_are_refused_raise_torchs_type(name: str, arguments: tuple[Tensor, ...]) -> None:
    with pytest.raises(Exception) as torchs:  # noqa: PT011 - whichever it is
        TORCH_LOSSES[name](*arguments)
    with gk.patch_torch() as patch, pytest.raises(torchs.type):
        getattr(F, name)(*arguments)
    assert ours(patch, name) == 1
