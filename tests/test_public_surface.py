"""Names and signatures that users rely on, and what importing the package does and does not do.

``python tests/test_public_surface.py`` prints the surface as it is; it is compared with ``public_surface.txt``.
"""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import genloss_kernels as gk

TESTS = Path(__file__).parent
SNAPSHOT = TESTS / "public_surface.txt"
PACKAGE = Path(gk.__file__).parent

MODULES = (
    "",
    "distributed",
    "functional",
    "integrations",
    "integrations.torch_patch",
    "integrations.transformers",
    "nn",
    "testing",
)


def _describe(name: str, value: Any) -> Iterator[str]:
    if inspect.isclass(value):
        bases = [f"{b.__module__}.{b.__qualname__}" for b in value.__bases__]
        yield f"class {name}({', '.join(bases)})"
        fields = getattr(value, "_fields", None)
        if fields is not None:
            yield f"    fields: {', '.join(fields)}"
            return
        own = {n: v for n, v in vars(value).items() if inspect.isfunction(v) and (n == "__init__" or n[0] != "_")}
        for method in sorted(own):
            yield f"    def {method}{inspect.signature(own[method])}"
    elif inspect.isfunction(value):
        yield f"def {name}{inspect.signature(value)}"
    else:
        yield f"{name}: {type(value).__name__}"


def surface() -> str:
    """Every public name of every public module, with its signature; constructors only where they are not torch's."""
    lines = []
    for name in MODULES:
        module = importlib.import_module(f"genloss_kernels.{name}".rstrip("."))
        lines += [f"[{module.__name__}]"]
        for public in sorted(module.__all__):
            value = getattr(module, public)
            homes = [home for home in ("functional", "nn", "testing") if name == "" and public in getattr(gk, home).__all__]
            lines += [f"{public}: from {home}" for home in homes] or _describe(public, value)
        lines.append("")
    return "\n".join(lines)


def test_surface_is_the_snapshot() -> None:
    assert surface().splitlines() == SNAPSHOT.read_text().splitlines(), (
        "the public surface has changed; if that is meant: python tests/test_public_surface.py > tests/public_surface.txt"
    )


@pytest.mark.parametrize("name", MODULES)
def test_no_public_name_is_left_out(name: str) -> None:
    """``__all__`` has every name without an underscore that is not another module's."""
    module = importlib.import_module(f"genloss_kernels.{name}".rstrip("."))
    assert len(module.__all__) == len(set(module.__all__))
    own = [n for n, v in vars(module).items() if str(getattr(v, "__module__", "")).startswith("genloss_kernels")]
    imported = gk.functional.__all__ if name == "nn" else []
    assert {n for n in own if n[0] != "_"} <= {*module.__all__, *imported}


# The words of the contract.
CONTRACT = {
    "cross_entropy": """(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
              reduction="mean", label_smoothing=0.0, *, softcap=None, logit_scale=1.0, z_loss=0.0,
              row_weight=None, divisor=None, inplace_backward=False, return_stats=False, vocab_shard=None)""",
    "nll_loss": """(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean")""",
    "linear_cross_entropy": """(input, linear_weight, target, *, linear_bias=None, weight=None, reduction="mean",
              ignore_index=None, label_smoothing=0.0, options=None, softcap=None, logit_scale=1.0,
              z_loss=0.0, row_weight=None, divisor=None, return_stats=False, vocab_shard=None)""",
    "binary_cross_entropy_with_logits": """(input, target, weight=None, size_average=None, reduce=None,
              reduction="mean", pos_weight=None, *, label_smoothing=0.0, mask=None)""",
    "gaussian_kl": """(mu_q, logvar_q, mu_p=None, logvar_p=None, *, reduction="batchmean", free_bits=None,
              capacity=None, logvar_clamp=None)""",
    "kl_div_with_logits": """(input, target, *, temperature=1.0, direction="forward", reduction="batchmean")""",
    "js_div_with_logits": """(input, target, *, beta=0.5, temperature=1.0, reduction="batchmean")""",
    "categorical_entropy": """(logits, *, reduction="none")""",
}


@pytest.mark.parametrize("name", CONTRACT)
def test_signature_is_the_contracts(name: str) -> None:
    found = inspect.signature(getattr(gk, name))
    bare = found.replace(
        parameters=[p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()],
        return_annotation=inspect.Signature.empty,
    )
    assert str(bare).replace("'", '"') == " ".join(CONTRACT[name].split())
    assert getattr(gk.functional, name) is getattr(gk, name)


@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss", "binary_cross_entropy_with_logits"])
def test_torchs_arguments_come_first(name: str) -> None:
    """In torch's order with torch's defaults; whatever we add is keyword-only and has a default."""
    ours = list(inspect.signature(getattr(gk, name)).parameters.values())
    torchs = list(inspect.signature(getattr(torch.nn.functional, name)).parameters.values())
    assert [(p.name, p.default) for p in ours[: len(torchs)]] == [(p.name, p.default) for p in torchs]
    for extra in ours[len(torchs) :]:
        assert extra.kind == inspect.Parameter.KEYWORD_ONLY
        assert extra.default is not inspect.Parameter.empty


def test_functional_names_are_reexported() -> None:
    for module in (gk.functional, gk.nn):
        for name in module.__all__:
            assert name in gk.__all__
            assert getattr(gk, name) is getattr(module, name)


@pytest.mark.parametrize("name", [n for n in gk.nn.__all__ if hasattr(torch.nn, n)])
def test_modules_subclass_torchs(name: str) -> None:
    """And override nothing but the constructor and the forward."""
    ours, base = getattr(gk.nn, name), getattr(torch.nn, name)
    assert issubclass(ours, base)
    own = {n for n in vars(ours) if not n.startswith("__") or n == "__init__"}
    assert own <= {"__init__", "forward"}
    torchs = [(p.name, p.default) for p in inspect.signature(base).parameters.values()]
    extras = list(inspect.signature(ours).parameters.values())
    assert [(p.name, p.default) for p in extras[: len(torchs)]] == torchs
    assert all(p.kind == inspect.Parameter.KEYWORD_ONLY for p in extras[len(torchs) :])


LAYERS = {"FusedLMHead", "LinearCrossEntropyLoss"}


@pytest.mark.parametrize("name", sorted({*gk.nn.__all__} - LAYERS))
def test_modules_are_modules(name: str) -> None:
    module = getattr(gk, name)()
    assert isinstance(module, torch.nn.Module)
    assert not list(module.parameters())


def test_class_weights_are_buffers() -> None:
    """They move and are saved with the module, as torch's are."""
    weight = torch.rand(4)
    for module, keys in (
        (gk.CrossEntropyLoss(weight), {"weight"}),
        (gk.NLLLoss(weight), {"weight"}),
        (gk.BCELoss(weight), {"weight"}),
        (gk.BCEWithLogitsLoss(weight, pos_weight=weight), {"weight", "pos_weight"}),
    ):
        assert set(module.state_dict()) == keys
        assert all(t.dtype == torch.float64 for t in module.double().state_dict().values())


# --- what importing does, each in a process of its own ---------------------------------------------------------------


def _run(source: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "GENLOSS_BACKEND", "GENLOSS_DEBUG")}
    path = os.pathsep.join([str(PACKAGE.parent), *filter(None, [kept.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", source],
        env={**kept, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def _passes(source: str, **environment: str) -> str:
    done = _run(source, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


# A training step of every loss on the CPU; `results` are the losses.
EVERY_LOSS = """
import torch, genloss_kernels as gk
x, y = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, -100, 4])
probabilities = torch.rand(4, 5)
results = [
    gk.cross_entropy(x, y),
    gk.cross_entropy(x, probabilities, softcap=3.0, z_loss=0.1, label_smoothing=0.1),
    gk.cross_entropy(x, y, return_stats=True).entropy.sum(),
    gk.nll_loss(x.log_softmax(1), y),
    gk.binary_cross_entropy_with_logits(x, probabilities),
    gk.binary_cross_entropy_with_logits(x, probabilities, mask=probabilities > 0.5, label_smoothing=0.1),
    gk.binary_cross_entropy(x.sigmoid(), probabilities), gk.BCELoss()(x.sigmoid(), probabilities),
    gk.kl_div(x.log_softmax(1), probabilities, reduction="batchmean"),
    gk.cosine_embedding_loss(x, probabilities, y),
    gk.gaussian_kl(x, x * 0.1),
    gk.gaussian_kl(x, x * 0.1, x * 0.2, x * 0.3, capacity=1.0, free_bits=0.1),
    gk.kl_div_with_logits(x, probabilities), gk.categorical_entropy(x, reduction="sum"),
    gk.KLDivWithLogitsLoss(direction="reverse")(x, probabilities), gk.JSDivWithLogitsLoss()(x, probabilities),
    gk.CrossEntropyLoss()(x, y), gk.NLLLoss()(x, y), gk.BCEWithLogitsLoss()(x, probabilities), gk.GaussianKLLoss()(x, x),
]
torch.stack([r.double() for r in results]).sum().backward()
assert all(r.isfinite() for r in results) and x.grad.isfinite().all()
"""


def test_importing_starts_nothing() -> None:
    _passes("""
import sys, torch
def members(*modules):
    return {(m.__name__, n): id(v) for m in modules for n, v in vars(m).items()}
modules = (torch, torch.nn, torch.nn.functional, torch.nn.modules.loss, torch.Tensor, torch.autograd)
before = members(*modules)
loaded = set(sys.modules)
import genloss_kernels
assert members(*modules) == before, "torch was patched"
assert not torch.cuda.is_initialized()
assert not torch.distributed.is_initialized()
new = {m.partition(".")[0] for m in set(sys.modules) - loaded}
assert not new & {"triton", "numpy", "matplotlib", "transformers"}, new
tools = {m for m in sys.modules if m.startswith("genloss_kernels.")}
assert not any(m.split(".")[1] in ("bench", "meters", "__main__") for m in tools), tools
""")


def test_eager_losses_do_not_import_triton() -> None:
    _passes(EVERY_LOSS + "import sys\nassert 'triton' not in sys.modules\nassert not torch.cuda.is_initialized()")


# As if the package were not installed: no finder knows it.
WITHOUT_TRITON = """
import sys
class Hidden:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Hidden(finder) for finder in sys.meta_path]
try:
    import triton
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("triton is still there")
"""


def test_works_without_triton() -> None:
    _passes(
        WITHOUT_TRITON
        + EVERY_LOSS
        + """
for interpreted_or_not in range(2):
    try:
        with gk.backend("triton"):
            gk.cross_entropy(x, y)
    except RuntimeError as error:
        assert "pip install triton" in str(error), error
    else:
        raise AssertionError("no error")
with gk.backend("eager"):
    gk.cross_entropy(x, y)
"""
    )


@pytest.mark.parametrize(
    "loss", ["cross_entropy(x, y)", "nll_loss(x, y)", "gaussian_kl(x, x)", "mse_loss(x, x)", "js_div_with_logits(x, x)"]
)
def test_kernels_on_a_cpu_need_the_interpreter(loss: str) -> None:
    source = f"""
import torch, genloss_kernels as gk
x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 4])
with gk.backend("triton"):
    gk.{loss}
"""
    done = _run(source)
    assert done.returncode == 1
    assert "RuntimeError: " in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr


COUNT = """
import warnings, torch, genloss_kernels as gk
warnings.simplefilter("ignore")
with gk.testing.count_launches() as launches:
    gk.cross_entropy(torch.randn(4, 5), torch.tensor([0, 1, 2, 4]))
print(sorted(launches))
"""


@pytest.mark.parametrize(("backend", "kernels"), [("triton", True), ("eager", False), ("auto", False)])
def test_environment_chooses_the_backend(backend: str, kernels: bool) -> None:
    launched = ast.literal_eval(_passes(COUNT, GENLOSS_BACKEND=backend, TRITON_INTERPRET="1"))
    assert bool(launched) == kernels


def test_invalid_backend_in_the_environment() -> None:
    done = _run("import genloss_kernels", GENLOSS_BACKEND="fast")
    assert done.returncode == 1
    assert "ValueError: " in done.stderr
    assert "'fast'" in done.stderr
    assert all(repr(name) in done.stderr for name in ("auto", "triton", "eager"))


# --- torch 2.11 ------------------------------------------------------------------------------------------------------


def test_integrations_do_not_import_what_they_integrate() -> None:
    source = "import sys, genloss_kernels as gk\ngk.integrations.transformers.patch\n"
    _passes(source + "assert not {'accelerate', 'peft', 'transformers'} & set(sys.modules)")


# Everything of torch that the package may name. Look a new one up in torch 2.11's documentation, or guard its use, before
# adding it.
TORCH_NAMES = set((TESTS / "torch_2_11_names.txt").read_text().split())


def torch_names(source: str) -> set[str]:
    """Every name of torch that ``source`` spells out, less the ``torch.``."""
    tree = ast.parse(source)
    known: dict[str, str] = {}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "torch":
                    known[alias.asname or "torch"] = alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] == "torch":
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found.add(f"{node.module}.{alias.name}")

    def full(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return known.get(node.id)
        if isinstance(node, ast.Attribute):
            base = full(node.value)
            return base and f"{base}.{node.attr}"
        return None

    found |= {name for node in ast.walk(tree) if isinstance(node, ast.Attribute) and (name := full(node))}
    return {name.removeprefix("torch.") for name in found if name != "torch"}


def test_names_of_torch_are_read() -> None:
    source = "import torch.nn.functional as F\nfrom torch import nn as n\nimport torch\nF.a(n.B, torch.c.d.e, x.f)"
    assert torch_names(source) == {"nn", "nn.functional.a", "nn.B", "c", "c.d", "c.d.e"}


@pytest.mark.parametrize("file", sorted(p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py")))
def test_uses_only_names_that_torch_2_11_has(file: str) -> None:
    used = torch_names((PACKAGE / file).read_text())
    tree = ast.parse((TESTS / "without_newer_torch.py").read_text())
    (newer,) = (ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign))
    assert not used & set(newer)
    assert used <= TORCH_NAMES, f"not known to be in torch 2.11: {sorted(used - TORCH_NAMES)}"


# --- examples in docstrings ------------------------------------------------------------------------------------------

DOCUMENTED = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for pattern in (
        "losses/*/api.py",
        "losses/vocab_parallel/shard.py",
        "nn.py",
        "core/backend.py",
        "core/launch.py",
        "integrations/torch_patch/handle.py",
        "integrations/transformers/loss.py",
    )
    for path in PACKAGE.glob(pattern)
)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", gk.functional.__all__)
def test_every_function_has_an_example(name: str) -> None:
    function = getattr(gk, name)
    assert function.__doc__
    if inspect.isfunction(function):
        assert ">>> " in function.__doc__


if __name__ == "__main__":
    sys.stdout.write(surface())
