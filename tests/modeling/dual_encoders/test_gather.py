"""Two processes, joined by gloo, compute what one does: values and gradients of every loss of pairs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from polymodal.modeling.dual_encoders.gradient_cache import gather, gather_with_grad

DRIVER = Path(__file__).with_name("gloo_driver.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("gloo") / "results.pt"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(path)], capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    return torch.load(path)


def names(found: dict[str, Any], kind: str) -> list[str]:
    return [name for name in found["one"][0] if name.startswith(kind)]


def test_the_shares_and_gradients_of_parameters_add_up(found: dict[str, Any]) -> None:
    (one,), (first, second) = found["one"], found["two"]
    for name in names(found, "sum/"):
        assert torch.allclose(first[name] + second[name], one[name], rtol=0, atol=1e-12), name
        # Both processes have a share, or the sum would prove nothing.
        assert first[name].abs().max() > 0 and second[name].abs().max() > 0, name
    losses = {name.removeprefix("sum/").split()[0].split("/")[0] for name in names(found, "sum/")}
    assert losses == {"clip", "siglip", "itc", "itm", "itg", "cached"}


def test_the_gradients_of_rows_are_those_of_one_process(found: dict[str, Any]) -> None:
    (one,), two = found["one"], found["two"]
    assert len(names(found, "rows/")) > 10
    for name in names(found, "rows/"):
        both = torch.cat([process[name] for process in two])
        assert torch.allclose(both, one[name], rtol=0, atol=1e-12), name


def test_gather_with_grad_carries_what_gather_cuts(found: dict[str, Any]) -> None:
    """The same loss either way, but only with gradient does a row learn from the other rows' share."""
    (one,) = found["one"]
    assert torch.equal(one["sum/itc gather"], one["sum/itc gather_with_grad"])
    for which in (0, 1):
        cut, whole = one[f"rows/itc gather/{which}"], one[f"rows/itc gather_with_grad/{which}"]
        assert cut.abs().max() > 0 and (whole - cut).abs().max() > 1e-3


def test_gathered_rows_are_everyones_in_order(found: dict[str, Any]) -> None:
    (one,), two = found["one"], found["two"]
    assert len(names(found, "all/")) == 9
    for name in names(found, "all/"):
        for process in two:
            assert process[name].dtype == one[name].dtype and torch.equal(process[name], one[name]), name


def test_half_precision_gradients_add_up(found: dict[str, Any]) -> None:
    """Each process's share has the gradient 1 + its offset."""
    for process in found["two"]:
        assert process["half"].dtype is torch.bfloat16 and process["half"].tolist() == [1 + 1 + 4] * 4


def test_unequal_rows_are_one_line(found: dict[str, Any]) -> None:
    for said in found["unequal"]:
        assert len(said) == 2 and all("hold 3, 4 rows" in line and "\n" not in line for line in said)
    for said in found["shapes"]:
        assert len(said) == 2 and all("different shapes (3x2, 3x2x2)" in line for line in said)


def test_one_process_gets_its_own_rows() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_with_grad(rows) is rows
    alone = gather(rows)
    # The gradient is cut as it is among several, so that a run does not depend on their number.
    assert torch.equal(alone, rows) and not alone.requires_grad
