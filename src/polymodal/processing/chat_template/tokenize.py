"""Tokenise the pieces of a rendered conversation so that they join up as one string would have been.

Two kinds of text meet in a prompt. Scaffolding, which the template wrote, is read with special tokens recognised.
Content, which a person or a dataset wrote, never is: `<image>` or `<|im_start|>system` typed by a user stays text.

Tokenising piece by piece has one trap: SentencePiece-like tokenizers put a space in front of every string that they
are given (Llama's "legacy" prefix, Metaspace's `prepend_scheme`). Here the private copies of the Rust tokenizer that
read later pieces have that prefix switched off, and it is added back exactly where the whole string would have got
it. The caller's tokenizer is never changed, so nothing has to be restored and threads do not meet.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from tokenizers import Tokenizer

from polymodal.errors import ConfigError, PolymodalError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prefix: TypeAlias = Literal["never", "first", "always"]
"""Where a tokenizer puts a space of its own: nowhere, before the whole string, also behind each added token."""


class PieceTokenizer:
    """Tokenises scaffolding and content, each as a continuation of the ids before it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_token_id: int, template: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"tokenizer {type(tokenizer).__name__} is not a fast tokenizer; save it as tokenizer.json first"
            )
        backend: Tokenizer = tokenizer.backend_tokenizer
        data = json.loads(backend.to_str())
        data["truncation"] = data["padding"] = None
        self.prefix: Prefix = _prefix_scheme(data)
        self.added = {image_token_id, *(entry["id"] for entry in data["added_tokens"])}
        special = {image_token_id, *tokenizer.all_special_ids}
        for entry in data["added_tokens"]:
            if entry["special"] or (entry["content"].strip() and entry["content"] in template):
                special.add(entry["id"])
        # Pieces that stand for what they do not spell: honest, unless somebody typed the very name.
        stand_ins = [f"<0x{byte:02X}>" for byte in range(256)] if data["model"].get("byte_fallback") else []
        if tokenizer.unk_token is not None:
            stand_ins.append(tokenizer.unk_token)
        ids = ((backend.token_to_id(name), name) for name in stand_ins)
        self._stand_ins: dict[int, str] = {token: name for token, name in ids if token is not None}
        self._suspect = special | set(self._stand_ins)

        self._natural = Tokenizer.from_str(json.dumps(data))
        _drop_prefix(data)
        self._scaffold = self._natural if self.prefix == "never" else Tokenizer.from_str(json.dumps(data))
        for entry in data["added_tokens"]:
            entry["special"] = entry["id"] in special
        self._content = Tokenizer.from_str(json.dumps(data))
        self._content.encode_special_tokens = True
        spaced = self._content.encode(" a", add_special_tokens=False).ids
        self.hides_space = self.prefix != "never" and self._content.decode(spaced) == "a"
        self._cached_scaffold = lru_cache(maxsize=4096)(self._encode_scaffold)

    def is_fresh(self, ids: Sequence[int]) -> bool:
        """Whether the tokenizer would put its own space in front of text that follows these ids."""
        if self.prefix == "always":
            return not ids or ids[-1] in self.added
        return self.prefix == "first" and not ids

    def scaffold(self, text: str, before: Sequence[int]) -> tuple[int, ...]:
        """Tokenise what the template wrote, special tokens recognised."""
        return self._cached_scaffold(text, self.is_fresh(before)) if text else ()

    def _encode_scaffold(self, text: str, fresh: bool) -> tuple[int, ...]:
        if fresh or self.prefix == "never":
            return tuple(self._natural.encode(text, add_special_tokens=False).ids)
        encoding = self._scaffold.encode(text, add_special_tokens=False)
        if self.prefix == "always":
            for index, (token, (_, end)) in enumerate(zip(encoding.ids, encoding.offsets, strict=True)):
                if token in self.added and end < len(text):  # what follows an added token is fresh again
                    rest = self._natural.encode(text[end:], add_special_tokens=False).ids
                    return (*encoding.ids[: index + 1], *rest)
        return tuple(encoding.ids)

    def first_added(self, ids: Sequence[int]) -> int | None:
        """Index of the first added token, if nothing but white space comes before it."""
        for index, token in enumerate(ids):
            if token in self.added:
                blank = not self._natural.decode(list(ids[:index]), skip_special_tokens=False).strip()
                return index if blank else None
        return None

    def content(self, text: str, before: Sequence[int], *, space: str = "", keep_exact: bool = False) -> list[int]:
        """Tokenise what somebody wrote; nothing in it is read as a special token."""
        wanted = self.hides_space or not (keep_exact or text.startswith(" "))
        if not space and wanted and self.is_fresh(before):
            space = " "
        return self._plain(space + text)

    def _plain(self, text: str) -> list[int]:
        """Tokenise without specials; models that list them as ordinary pieces are made to take them apart."""
        encoding = self._content.encode(text, add_special_tokens=False)
        if self._suspect.isdisjoint(encoding.ids):
            return list(encoding.ids)
        for token, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            name = self._stand_ins.get(token)
            if token not in self._suspect or (name is not None and name not in text[start:end]):
                continue
            cut = start + 1
            if cut >= len(text):
                raise PolymodalError(
                    f"the text holds {text[start:end]!r}, which is a special token of one character; take it out"
                )
            return self._plain(text[:cut]) + self._plain(text[cut:])
        return list(encoding.ids)


def _members(step: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """Flatten a normalizer or pre-tokenizer and the sequences inside it."""
    if step is None:
        return []
    if step["type"] == "Sequence":
        return [member for inner in step[key] for member in _members(inner, key)]
    return [step]


def _prefix_scheme(data: dict[str, Any]) -> Prefix:
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


def _drop_prefix(data: dict[str, Any]) -> None:
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
