"""Recipe files: read, overridden with `section.key=value`, written."""

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from polymodal.config import parse_config
from polymodal.errors import ConfigError, first_line, unknown_name
from polymodal.training.recipes.contrastive import PairRecipe
from polymodal.training.recipes.sections import RecipeBase
from polymodal.training.recipes.sft import Recipe
from polymodal.training.recipes.tokenizer import TokenizerRecipe
from polymodal.utils.files import regular_size

RECIPES: tuple[type[RecipeBase], ...] = (PairRecipe, TokenizerRecipe, Recipe)
"""Every kind of recipe: the first whose `marker` stands in the file, or that has none."""

MAX_BYTES, MAX_VALUES = 10_000_000, 100_000
"""Of a recipe file, its aliases written out."""


def load_recipe(path: Path | str, overrides: list[str] | None = None) -> Recipe:
    """Read the recipe of a language model's stage.

    Args:
        path: The YAML file.
        overrides: `section.key=value` strings; the value is read as YAML.

    Returns:
        The recipe, checked.

    Raises:
        ConfigError: The file is missing or no YAML, a key is unknown, a value is wrong, or it is of another kind.
    """
    recipe = load_any_recipe(path, overrides)
    if not isinstance(recipe, Recipe):
        raise ConfigError(
            f"{path}: is no recipe of a language model (it has the key `{recipe.marker}`); only `polymodal train` "
            "runs it"
        )
    return recipe


def load_any_recipe(path: Path | str, overrides: list[str] | None = None) -> RecipeBase:
    """Read a recipe of any kind; see `load_recipe`.

    Args:
        path: The YAML file.
        overrides: `section.key=value` strings; the value is read as YAML.

    Returns:
        The recipe, checked: of the first of `RECIPES` whose `marker` it has.

    Raises:
        ConfigError: The file is missing or no YAML, a key is unknown, or a value is wrong.
    """
    data = read_yaml(Path(path))
    where = str(path)
    for override in overrides or []:
        apply_override(data, override, recipe_class(data))
        where = f"{path} with {' '.join(overrides or [])}"
    return parse_config(recipe_class(data), data, where)


def recipe_class(data: Any) -> type[RecipeBase]:
    """Which kind of recipe plain data are."""
    keys = data if isinstance(data, dict) else {}
    return next(kind for kind in RECIPES if kind.marker is None or kind.marker in keys)


def read_yaml(path: Path) -> Any:
    """Read a YAML file as plain data."""
    if path.is_dir():
        inside = next((file for file in (path / "pipeline.yaml", *sorted(path.glob("*.yaml"))) if file.is_file()), None)
        told = f"give a recipe in it, such as {inside}" if inside else "a recipe is a YAML file"
        raise ConfigError(f"recipe {path}: is a folder; {told}")
    if regular_size(path, f"recipe {path}", ConfigError) > MAX_BYTES:
        raise ConfigError(f"recipe {path}: has more than {MAX_BYTES:,} bytes; give a recipe, not data")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"recipe {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path}: not valid UTF-8 ({error.reason})") from error
    data = _yaml(text, str(path))
    if isinstance(data, list):
        raise ConfigError(f"{path}: a list, such as data (`polymodal data check`); a recipe is a mapping of keys")
    return data


def dump_recipe(recipe: RecipeBase) -> str:
    """Write a recipe as YAML, with every default spelled out; `load_any_recipe` reads it back unchanged."""
    plain = json.loads(recipe.model_dump_json(by_alias=True, exclude_none=True))
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def _yaml(text: str, where: str) -> Any:
    """Parse YAML, with one-line errors; `1e-3` is a number here, as every recipe writes it."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node, where, {})
        return _numbers(loader.construct_document(node))  # type: ignore[no-untyped-call]
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: it is nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits, a date that is none
        raise ConfigError(f"{where}: not valid YAML: {first_line(error)}") from None


def _check_nodes(node: yaml.Node, where: str, sizes: dict[int, int]) -> int:
    """How many values a node stands for, with its aliases written out; refuses too many, cycles and equal keys."""
    if id(node) in sizes:
        if not sizes[id(node)]:
            raise ConfigError(
                f"{where}: not valid YAML: an alias stands inside what it names (line {node.start_mark.line + 1})"
            )
        return sizes[id(node)]
    sizes[id(node)] = 0
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys: set[tuple[str, str]] = set()
        for key, value in node.value:
            parts += [key, value]
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise ConfigError(
                        f"{where}: the key {key.value!r} stands twice, again in line {key.start_mark.line + 1}"
                    )
                keys.add((key.tag, key.value))
    elif isinstance(node, yaml.SequenceNode):
        parts += node.value
    size = 1 + sum(_check_nodes(part, where, sizes) for part in parts)
    if size > MAX_VALUES:
        raise ConfigError(f"{where}: its aliases stand for more than {MAX_VALUES:,} values; write them out")
    sizes[id(node)] = size
    return size


def _numbers(value: Any) -> Any:
    # YAML 1.1 reads 1e-3 as text (it wants 1.0e-3); nobody who writes it means text.
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and "e" in value.lower() and value[:1] in "+-.0123456789":
        try:
            return float(value)
        except ValueError:
            return value
    return value


def apply_override(data: Any, override: str, schema: type[BaseModel] | None = None) -> None:
    """Set one dotted key in plain data, in place."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    value = _yaml(text, f"override {override!r}")
    steps = key.split(".")
    schema = schema or Recipe
    here = data
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        if isinstance(here, list):
            if not step.isdigit() or int(step) >= len(here):
                raise ConfigError(f"override {override!r}: {step!r} is no index into {len(here)} entries")
            if last:
                here[int(step)] = value
            else:
                here = here[int(step)]
            continue
        if not isinstance(here, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(steps[:position])} has no keys")
        if schema is not None:
            names = [field.alias or name for name, field in schema.model_fields.items()]
            if step not in names and step not in schema.model_fields:
                raise ConfigError(f"override {override!r}: {unknown_name('key', step, names)}")
        schema = None if schema is None else _nested(schema, step)
        if last:
            here[step] = value
        else:
            if here.get(step) is None:
                here[step] = {}
            here = here[step]


def _nested(schema: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The config class behind a key, where there is one."""
    field = schema.model_fields.get(key)
    if field is None:
        return None
    for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
