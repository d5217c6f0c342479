"""Every key of a recipe file with its type, default and sentence: the JSON Schema, and the table of `polymodal config`.

Both come from the configuration classes and their docstrings, so nothing is written twice.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

from polymodal.config import Strict
from polymodal.training.recipes.contrastive import PairRecipe
from polymodal.training.recipes.pipeline import KINDS, PipelineFile
from polymodal.training.recipes.sft import Recipe
from polymodal.training.recipes.tokenizer import TokenizerRecipe

FILES: Mapping[str, tuple[str, type[Strict], str | None]] = {
    "stage": ("A supervised stage of a language model", Recipe, None),
    "pairs": ("A stage over pairs of image and text", PairRecipe, PairRecipe.marker),
    "tokenizer": ("A tokenizer of images", TokenizerRecipe, TokenizerRecipe.marker),
    "pipeline": ("A pipeline of stages", PipelineFile, "stages"),
}
"""Each kind of file: what it is, its class, and the key that tells it from the others."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """One key."""

    path: str  # From the top of the file, such as "optim.learning_rate"
    type: str  # In words, with choices and limits
    default: str  # "required", or as YAML writes it
    sentence: str
    section: bool  # Whether it has keys of its own


def schema() -> Json:
    """The JSON Schema of a recipe or pipeline file."""
    definitions: Json = {}
    kinds: dict[str, Json] = {}
    for name, (_, cls, _) in FILES.items():
        document = cls.model_json_schema(ref_template="#/$defs/{model}")
        definitions |= document.pop("$defs", {})
        kinds[name] = document
    stages = []
    for key, cls in KINDS.items():
        document = cls.model_json_schema(ref_template="#/$defs/{model}")
        if key == "recipe":  # a file, with sections laid over it
            document = {"type": "object", "properties": {"recipe": {"type": "string"}}}
        definitions |= document.pop("$defs", {})
        stages.append({**document, "required": [key]})
    kinds["pipeline"]["properties"]["stages"]["additionalProperties"] = {"anyOf": stages}
    found = kinds["stage"]
    for name, (_, _, marker) in FILES.items():
        if marker is not None:
            found = {"if": {"required": [marker]}, "then": kinds[name], "else": found}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "polymodal: a recipe or a pipeline",
        **found,
        "$defs": dict(sorted(definitions.items())),
    }


def keys(kind: str) -> Iterator[Key]:
    """Every key of one kind of file, sections before what is in them."""
    if kind == "pipeline":
        yield from _keys(PipelineFile.model_json_schema(), {}, "")
        for marker, cls in KINDS.items():
            if marker == "recipe":
                told = "A recipe file, which is trained; sections of it may follow, which are laid over the file."
                yield Key("stages.NAME.recipe", "text", "required", told, False)
            else:
                yield from _keys(cls.model_json_schema(), {}, "stages.NAME.")
        return
    document = FILES[kind][1].model_json_schema()
    yield from _keys(document, document["$defs"], "")


def _keys(document: Json, definitions: Json, prefix: str, above: tuple[str, ...] = ()) -> Iterator[Key]:
    for name, about in document.get("properties", {}).items():
        if about.get("type") == "null":  # a key of other kinds of recipe
            continue
        path = f"{prefix}{name}"
        nested = [found for found in _nested(about) if found not in above]
        default = "required" if name in document.get("required", ()) else _plain(about.get("default"))
        if "default" not in about and default != "required":
            default = "its own" if nested else default
        yield Key(path, _words(about), default, " ".join(about.get("description", "").split()), bool(nested))
        step = ".0." if "array" in (about.get("type"), *(each.get("type") for each in about.get("anyOf", ()))) else "."
        seen: set[str] = set()
        for found in nested:  # keys that several forms of a section share are told once
            for key in _keys(definitions[found], definitions, f"{path}{step}", (*above, found)):
                if key.path not in seen:
                    seen.add(key.path)
                    yield key


def _nested(about: Json) -> Iterator[str]:
    """The sections that a key may hold."""
    if "$ref" in about:
        yield about["$ref"].rpartition("/")[2]
    for inner in (*about.get("anyOf", ()), *about.get("oneOf", ()), *about.get("allOf", ())):
        yield from _nested(inner)
    if isinstance(about.get("items"), dict):
        yield from _nested(about["items"])


def _words(about: Json) -> str:
    """A type as a person says it."""
    if "const" in about:
        return _plain(about["const"])
    if "enum" in about:
        return " | ".join(map(_plain, about["enum"]))
    for many in ("anyOf", "oneOf"):
        if many in about:
            words = [_words(each) for each in about[many] if each.get("type") != "null"]
            return " | ".join(dict.fromkeys(words))
    if "$ref" in about or about.get("type") == "object":
        return "section"
    if about.get("type") == "array":
        inner = about.get("items") or {"anyOf": about.get("prefixItems", [])}
        return f"list of {_words(inner) if inner else 'values'}"
    names = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true | false"}
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {about[key]:g}" for key, sign in signs.items() if abs(about.get(key, 1e18)) < 1e18]
    return ", ".join([names.get(about.get("type", ""), "any value"), *limits])


def _plain(value: Any) -> str:
    """A value as YAML writes it, on one line."""
    return '""' if value == "" else TypeAdapter(Any).dump_json(value).decode().strip('"')


def page() -> str:
    """`docs/configuration.md`."""
    lines = [
        "# Configuration",
        "",
        "Every key of a recipe file, as `polymodal config --markdown` prints them; `polymodal config SECTION` prints",
        "a part, `polymodal config --schema` the JSON Schema by which editors complete and check keys. A file names it",
        "in its first line: `# yaml-language-server: $schema=../schema.json`. Numbers stand for entries of lists,",
        "such as `data.mix.0.path`. A value is changed by its path: `polymodal train RECIPE run.epochs=2`.",
    ]
    for kind, (title, _, marker) in FILES.items():
        lines += ["", f"## {title}", ""]
        if marker is not None:
            lines += [f"A file with the key `{marker}`.", ""]
        lines += ["| Key | Type | Default | |", "|---|---|---|---|"]
        for key in keys(kind):
            cells = (f"`{key.path}`", key.type, f"`{key.default}`", key.sentence)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
