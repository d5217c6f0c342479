"""The comparison of projectors: every entry fits the default recipe and makes as many tokens as the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.projectors.__main__ import PROJECTORS, RECIPES, main, table
from polymodal.media_plan import Size
from polymodal.modeling.projectors import build_projector
from polymodal.training.recipes.load import load_recipe

CHANNELS, WIDTH = 1888, 576
"""Of the default tower and the default language model."""


@pytest.mark.parametrize("name", PROJECTORS)
def test_every_projector_makes_sixteen_tokens(name: str) -> None:
    recipe = load_recipe(RECIPES / "stage1.yaml", [f"init.model.projector={PROJECTORS[name]}"])
    assert recipe.init.model is not None
    projector = build_projector(recipe.init.model.projector, CHANNELS, Size(4, 4), WIDTH)
    assert recipe.init.model.projector.mm_projector_type == name
    assert projector.output_grid.area == 16


def test_a_run_that_fails_says_which(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path), "--output", str(tmp_path / "out"), "--only", "linear"]) == 1
    assert "projectors: linear:" in capfd.readouterr().err


def test_the_table_has_a_column_for_each_kind() -> None:
    row = {
        "projector": "linear",
        "parameters": 1_100_000,
        "tokens": 16,
        "first_token_s": 0.123,
        "loss": 0.5,
        "loss_grey": 1.25,
    }
    drawn = table([row | {"score": 0.5, "blind": 0.25, "kinds": {"count": 0.4, "photographs": 0.6}}])
    assert drawn.splitlines()[2] == "| linear | 1.1 M | 16 | 123 ms | 0.500 | 1.250 | 50.0 | 25.0 | 40.0 | 60.0 |"
