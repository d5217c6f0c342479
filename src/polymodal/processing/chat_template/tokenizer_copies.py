"""A tokenizer's settings as JSON, and tokenizers of other settings that share its vocabulary.

The vocabulary is nearly all of a tokenizer: written out and read again for each copy, 128,000 pieces take seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Model, Unigram

Prefix: TypeAlias = Literal["never", "first", "always"]
"""Where a tokenizer puts a space of its own: nowhere, before the whole string, also behind each added token."""


def without_vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    """A tokenizer's JSON but for its model and added tokens, which are most of it."""
    bare = Tokenizer(BPE())
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        if (step := getattr(tokenizer, part)) is not None:
            setattr(bare, part, step)
    settings: dict[str, Any] = json.loads(bare.to_str())
    return settings


def tokenizer_over(model: Model, settings: dict[str, Any], added: Mapping[int, AddedToken]) -> Tokenizer:
    """A tokenizer of these settings over a model that it shares with others."""
    made = Tokenizer.from_str(json.dumps(settings))
    made.model = model
    made.add_tokens([token for _, token in sorted(added.items())])
    assert made.get_added_tokens_decoder().keys() == added.keys()
    return made


def as_special(token: AddedToken, special: bool) -> AddedToken:
    """An added token that is special, or is not."""
    sides: Any = {side: getattr(token, side) for side in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(token.content, **sides, special=special)


def spells_bytes(model: Model) -> bool:
    """Whether a model writes what it has no piece for as bytes."""
    if isinstance(model, BPE):
        return bool(model.byte_fallback)
    return bool(json.loads(model.__getstate__()).get("byte_fallback")) if isinstance(model, Unigram) else False


def prefix_scheme(data: dict[str, Any]) -> Prefix:
    """Read from a tokenizer's JSON where it puts a space of its own."""
    scheme: Prefix = "never"
    for step in _members(data["normalizer"], "normalizers"):
        if step["type"] == "Prepend":
            return "always"
    for step in _members(data["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            scheme = "always"
        elif step["type"] == "Metaspace":
            old = "always" if step.get("add_prefix_space") else "never"
            found = step.get("prepend_scheme", old)
            scheme = found if found in ("first", "always") else scheme
    return scheme


def drop_prefix(data: dict[str, Any]) -> None:
    """Switch the tokenizer's own space off, in place."""

    def without_prepend(step: dict[str, Any] | None) -> dict[str, Any] | None:
        if step is None or step["type"] == "Prepend":
            return None
        if step["type"] == "Sequence":
            kept = [inner for inner in map(without_prepend, step["normalizers"]) if inner is not None]
            return {**step, "normalizers": kept}
        return step

    data["normalizer"] = without_prepend(data["normalizer"])
    _keep_inner_spaces(data)
    for step in _members(data["pre_tokenizer"], "pretokenizers"):
        if step["type"] == "ByteLevel":
            step["add_prefix_space"] = False
        elif step["type"] == "Metaspace":
            step.pop("add_prefix_space", None)
            step["prepend_scheme"] = "never"


def _keep_inner_spaces(data: dict[str, Any]) -> None:
    """Where words are cut out first and each is marked after (T5), let spaces be the marks instead, in place."""
    steps = _members(data["pre_tokenizer"], "pretokenizers")
    kinds = [step["type"] for step in steps]
    if "Metaspace" not in kinds or "WhitespaceSplit" not in kinds[: kinds.index("Metaspace")]:
        return
    data["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [step for step in steps if step["type"] != "WhitespaceSplit"],
    }
    one_space = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
    no_tail = {"type": "Strip", "strip_left": False, "strip_right": True}
    before = [] if data["normalizer"] is None else [data["normalizer"]]
    data["normalizer"] = {"type": "Sequence", "normalizers": [*before, one_space, no_tail]}


def _members(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Flatten a normalizer or pre-tokenizer and the sequences inside it."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [member for inner in step[key] for member in _members(inner, key)]
    return [step]
