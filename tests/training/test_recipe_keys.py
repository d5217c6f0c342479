"""The reference of configuration keys: whole, fresh, and agreeing with what the recipes use."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import BaseModel

from polymodal.cli import main
from polymodal.training.recipes.keys import FILES, keys, page, schema
from polymodal.training.recipes.load import read_yaml, recipe_class
from polymodal.utils.strict import sentences

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def fields(annotation: Any, prefix: str, above: tuple[Any, ...] = ()) -> Iterator[str]:
    """Paths of all fields below a type, found in pydantic's own tables and not in the schema."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in above:
        for name, field in annotation.model_fields.items():
            if field.annotation is type(None):  # a key of other kinds of recipe
                continue
            path = f"{prefix}{field.alias or name}"
            yield path
            yield from fields(field.annotation, f"{path}.", (*above, annotation))
        return
    arguments = getattr(annotation, "__args__", ())
    step = "0." if getattr(annotation, "__origin__", None) in (tuple, list) else ""
    for inner in arguments:
        yield from fields(inner, f"{prefix}{step}", above)


def used(data: Any, prefix: str = "") -> Iterator[str]:
    """Paths of all keys in plain data, of lists those of any entry."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield f"{prefix}{key}"
            yield from used(value, f"{prefix}{key}.")
    elif isinstance(data, list):
        for value in data:
            yield from used(value, f"{prefix}0.")


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != "pipeline"])
def test_every_key_that_pydantic_knows_is_listed_with_a_sentence(kind: str) -> None:
    listed = {key.path: key for key in keys(kind)}
    assert set(fields(FILES[kind][1], "")) == set(listed)
    assert not [path for path, key in listed.items() if not (key.sentence and key.type and key.default)]
    assert not [path for path, key in listed.items() if key.type == "any value"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_schema_and_the_list_know_what_shipped_recipes_use(path: Path) -> None:
    data = read_yaml(path)
    jsonschema.Draft202012Validator(schema()).validate(data)
    first, name = path.read_text(encoding="utf-8").partition("\n")[0], "# yaml-language-server: $schema="
    assert first.startswith(name) and (path.parent / first.removeprefix(name)).resolve() == ROOT / "recipes/schema.json"
    if "stages" in data:
        return
    kind = next(kind for kind, (_, cls, _) in FILES.items() if cls is recipe_class(data))
    listed = {key.path for key in keys(kind)}
    # Keys of fresh towers of a pair are those of transformers' own configurations.
    free = ("init.model.vision.", "init.model.text.") if kind == "pairs" else ()
    assert not [key for key in used(data) if key not in listed and not key.startswith(free)]


@pytest.mark.parametrize(
    "change",
    [{"optm": {}}, {"optim": {"learning_rte": 1}}, {"optim": {"learning_rate": "fast"}}, {"name": None}, {"data": {}}],
)
def test_the_schema_refuses_what_the_reader_refuses(change: dict[str, Any]) -> None:
    data = {**read_yaml(ROOT / "recipes/tiny/stage1.yaml"), **change}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema()).validate(data)


def test_the_written_files_are_fresh() -> None:
    """Made anew by `polymodal config --markdown > docs/configuration.md` and `--schema > recipes/schema.json`."""
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == page()
    assert json.loads((ROOT / "recipes/schema.json").read_text(encoding="utf-8")) == schema()


def test_the_verb_prints_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "optim"]) == 0
    out = capsys.readouterr().out
    assert re.match(
        r"optim: section \(default: its own\)\n    Optimizer and schedule.\noptim\.learning_rate: number, > 0", out
    )
    assert "data.mix" not in out
    assert main(["config", "pairs.objective.type"]) == 0
    assert capsys.readouterr().out.startswith("objective.type: clip | siglip | blip2 (required)\n")
    assert main(["config", "tokenizer", "--json"]) == 0
    assert "tokenizer.l1" in {key["path"] for key in json.loads(capsys.readouterr().out)}
    assert main(["config", "optm"]) == 2
    assert "did you mean 'optim'" in capsys.readouterr().err


def test_sentences_are_read_from_the_docstrings_of_all_bases() -> None:
    class Base(BaseModel):
        """A base.

        Attributes:
            a: First,
                on two lines.
            b: Old.
        """

    class Below(Base):
        """Below.

        Attributes:
            b: New: with a colon.

        More text: not a key.
        """

    assert sentences(Below) == {"a": "First, on two lines.", "b": "New: with a colon."}
