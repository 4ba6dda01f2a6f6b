"""What the script counts on processes of this machine, and its estimate, worked by hand."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
pytest.importorskip("matplotlib", reason="the scripts' helpers draw with it")

import vocab_parallel
from vocab_parallel import Shape


def test_counts(tmp_path: Path) -> None:
    shape = ["--tokens", "16", "--features", "8", "--vocabulary", "50", "--rounds", "1"]
    assert vocab_parallel.main(["--ranks", "2", *shape, "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "vocab_parallel.json").read_text())["rows"]
    assert row["collectives"] == [["all_gather", 16 * 8], ["all_reduce", 16 * 8 * 4]]
    assert "| 2 | 1.00 |" in (tmp_path / "vocab_parallel.md").read_text()


def test_estimate() -> None:
    found = vocab_parallel.estimate(Shape(1000, 4, 300), 2)
    assert found["bytes_per_token"] == 8.0 + 4 * 4
    assert found["collectives_us"] == pytest.approx(24_000 / vocab_parallel.NVLINK * 1e6)
    assert found["products_us"] == pytest.approx(6 * 1000 * 4 * 150 / vocab_parallel.PRODUCTS * 1e6)
    assert found["logits_bytes_per_token"] == 300.0
    beyond = vocab_parallel.estimate(Shape(1000, 4, 300), 16)
    assert beyond["collectives_us"] == pytest.approx((8 * 15 + 2 * 4 * 4 * 15 / 16) * 1000 / vocab_parallel.NETWORK * 1e6)
