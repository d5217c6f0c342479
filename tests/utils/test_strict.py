"""Configuration classes made in Python: one line for a mistake, and old names said with their place."""

import inspect
import warnings
from typing import Any

import pytest
from pydantic import Field

from polymodal.config import ImageConfig, ModelConfig
from polymodal.errors import ConfigError
from polymodal.training.recipes.contrastive import PairRecipe
from polymodal.training.recipes.sections import OptimConfig, RunConfig
from polymodal.training.recipes.sft import Recipe
from polymodal.utils.strict import Strict, parse_config

RULES: dict[str, Any] = {"tile_size": (28, 28), "image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}


class Inner(Strict):
    """Nested."""

    size: int = Field(default=1, ge=1)


class Outer(Strict):
    """Holds another."""

    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("make", "needle"),
    [
        (lambda: ModelConfig(llm={"model_name_or_path": "a", "dtyp": "x"}), r"ModelConfig: unknown key 'dtyp'.*dtype"),
        (lambda: ImageConfig(**RULES | {"max_pixels": 0}), r"ImageConfig: max_pixels: .*\(given 0\)"),
        (lambda: OptimConfig(learning_rate=float("nan")), "OptimConfig: learning_rate"),
        (lambda: RunConfig(epochs="many"), "RunConfig: epochs"),
        (lambda: Recipe(), "Recipe: name"),
        (lambda: PairRecipe(), "PairRecipe: name"),
        (lambda: Outer(inner={"size": 0}), r"Outer: inner\.size: .*\(given 0\)"),
        (lambda: Outer(inner=Inner(size=0)), r"Inner: size: .*\(given 0\)"),
    ],
)
def test_a_mistake_in_python_is_one_line(make: Any, needle: str) -> None:
    with pytest.raises(ConfigError, match=needle) as error:
        make()
    assert "\n" not in str(error.value)


def test_what_is_made_is_what_pydantic_makes() -> None:
    made = Outer(inner={"size": 3})  # type: ignore[arg-type]
    assert made == Outer.model_validate({"inner": {"size": 3}}) == Outer(inner=Inner(size=3))
    assert made.model_fields_set == {"inner"} and made.model_copy(update={"inner": Inner()}) == Outer()


def test_an_old_name_says_where_it_stands() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = parse_config(ImageConfig, RULES | {"several_pictures": "pad"}, "recipes/mine.yaml")
        line = inspect.currentframe().f_lineno + 1  # type: ignore[union-attr]
        made = ImageConfig(**RULES | {"several_pictures": "pad"})
    assert found == made and found.several_images == "pad"
    first, second = caught
    assert str(first.message) == "recipes/mine.yaml: the key 'several_pictures' is called 'several_images' now"
    assert (second.filename, second.lineno) == (__file__, line) and "pydantic" not in first.filename
