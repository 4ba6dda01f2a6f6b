"""Fixtures and filters that these tests share."""

from __future__ import annotations

import pytest

from genloss_kernels.losses.adversarial import api as adversarial_api
from genloss_kernels.losses.binary_cross_entropy import api as binary_cross_entropy_api
from genloss_kernels.losses.cosine import api as cosine_api
from genloss_kernels.losses.cross_entropy import api as cross_entropy_api
from genloss_kernels.losses.divergence import api as divergence_api
from genloss_kernels.losses.energy import api as energy_api
from genloss_kernels.losses.gaussian_kl import api as gaussian_kl_api
from genloss_kernels.losses.gaussian_nll import api as gaussian_nll_api
from genloss_kernels.losses.kl_div import api as kl_div_api
from genloss_kernels.losses.linear_cross_entropy import api as linear_cross_entropy_api
from genloss_kernels.losses.regression import api as regression_api
from genloss_kernels.losses.vae import api as vae_api


@pytest.fixture
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """``"blocks"``: no input is small enough for torch's own operators; ``"as is"``: those below the limits go to them."""
    if request.param == "blocks":
        monkeypatch.setattr(cosine_api, "BUILTIN_BELOW", 0)
        monkeypatch.setattr(cross_entropy_api, "BUILTIN_BELOW", 0)
        monkeypatch.setattr(binary_cross_entropy_api, "BUILTIN_BELOW", 0)
        monkeypatch.setattr(binary_cross_entropy_api, "PROBABILITIES_BUILTIN_BELOW", 0)
        monkeypatch.setattr(linear_cross_entropy_api, "LOGITS_BELOW", 0)
        for api in (adversarial_api, divergence_api, energy_api, gaussian_kl_api, gaussian_nll_api, regression_api):
            monkeypatch.setattr(api, "PLAIN_BELOW", 0)
        monkeypatch.setattr(adversarial_api, "NORMS_BELOW", 0)
        monkeypatch.setattr(vae_api, "PARTS_BELOW", 0)
        monkeypatch.setattr(kl_div_api, "BUILTIN_BELOW", 0)
        monkeypatch.setattr(kl_div_api, "LOGARITHMS_BUILTIN_BELOW", 0)
    return request.param
