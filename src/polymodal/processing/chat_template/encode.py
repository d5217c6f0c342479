"""Turn a conversation into ids, a loss mask and media slots, all three at once.

The chat template (jinja, as Hugging Face tokenizers carry it) is rendered with a marker in place of every text and
every image. Cutting the result at the markers leaves the template's own scaffolding; each piece is then tokenised
where it stands: scaffolding with special tokens recognised, content with special-token parsing off, images as
runs of the placeholder id. Since it is known which piece is whose, the loss mask needs no searching, no
`{% generation %}` blocks and no second tokenisation of a shorter string, which is where LLaVA's "tokenization mismatch"
came from. What people wrote never passes through the template, so nothing they write can look like a marker or like a
header.

Rules worth knowing:

- A turn's loss covers the assistant's text and its end token. Where a template ends an answer with no token, the
  tokenizer's end token is added, since a model that never sees one never stops.
- The generation prompt is cut from the rendering of the same conversation with an answer, so it is always a prefix of
  the training ids. Where the template's own prompt stops before a space that precedes every answer ("ASSISTANT:" and
  " It is ..."), so does ours, and that space is the model's to say: it is trained with the answer. A template whose
  own prompt is no such prefix can have its way (`TemplateConfig.own_generation_prompt`).
- Templates that trim content trim it here too. Templates that drop or move content are refused.
- The beginning-of-sequence token is the template's business: it is there when the template writes it, as in
  `apply_chat_template`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polymodal.config import TemplateConfig
from polymodal.errors import ConfigError, PolymodalError, unknown_name
from polymodal.messages import Image, Message, Role, Text
from polymodal.processing.chat_template.markers import MarkedTemplate, Piece, Style, Turn
from polymodal.processing.chat_template.presets import PRESETS, Preset
from polymodal.processing.chat_template.tokenize import PieceTokenizer
from polymodal.processing.collate import Slot
from polymodal.safety.jinja_limits import UnsafeTemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Rendered:
    """A tokenised conversation."""

    input_ids: list[int]  # [T] ids, placeholders expanded
    loss_mask: list[bool]  # [T] True where the token is the assistant's, its end token included
    slots: tuple[Slot, ...] = ()  # Where each image is, in order


@dataclass
class _Output:
    """What has been written so far."""

    ids: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    slots: list[Slot] = field(default_factory=list)

    def add(self, ids: Sequence[int], *, trained: bool = False) -> None:
        self.ids.extend(ids)
        self.mask.extend([trained] * len(ids))


class ChatTemplate:
    """One model's chat template over one tokenizer. Safe to use from several threads, and can be pickled."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TemplateConfig, image_token_id: int) -> None:
        self._made_from = (tokenizer, config, image_token_id)
        self._config = config
        self.image_token_id = self._image_id = image_token_id
        source, preset = _source(tokenizer, config.chat_template)
        self._media_only = preset is not None and preset.media_only
        self._jinja = MarkedTemplate(source, dict(tokenizer.special_tokens_map))
        self._tokens = PieceTokenizer(tokenizer, image_token_id, source)

        self.source = source
        self.style = self._style = self._find_style(in_vocabulary=image_token_id < len(tokenizer))
        if self._style != "string" and config.image_newline_text:
            raise ConfigError(
                "template.image_newline_text: this chat template places images itself; leave image_newline_text empty"
            )
        self._gap = self._find_gap()
        ends = [token for token in (self._find_end(), tokenizer.eos_token_id) if token is not None]
        if not ends:
            raise ConfigError(
                "chat_template: neither the template nor the tokenizer has a token that ends an answer; "
                "set the tokenizer's eos_token"
            )
        self._end_id: int = ends[0]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*ends, *config.stop_token_ids]))

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, self._made_from

    def render(
        self, messages: Sequence[Message], media_tokens: Sequence[int] = (), *, add_generation_prompt: bool = False
    ) -> Rendered:
        """Tokenise a conversation."""
        if not messages:
            raise PolymodalError("the conversation is empty; give at least one message")
        turns = self._turns(messages)
        given = sum(piece.text is None for turn in turns for piece in turn.pieces)
        if given != len(media_tokens):
            raise PolymodalError(
                f"the conversation has {given} images, but {len(media_tokens)} token counts were given"
            )
        if any(count < 1 for count in media_tokens):
            raise PolymodalError(f"an image needs at least one token; token counts given: {list(media_tokens)}")
        if add_generation_prompt:
            if turns and turns[-1].role == "assistant":
                raise PolymodalError("the conversation ends with an answer; add a user message to ask for another")
            if self._config.own_generation_prompt:
                return self._emit(turns, list(media_tokens), stop_before_last=False, add_generation_prompt=True)
            turns.append(Turn("assistant", (Piece("assistant", len(messages), ""),)))
        return self._emit(turns, list(media_tokens), stop_before_last=add_generation_prompt)

    def _turns(self, messages: Sequence[Message]) -> list[Turn]:
        """Check the messages, add the default system message, and join neighbouring texts."""
        turns: list[Turn] = []
        default = self._config.default_system
        if default is not None and not self._media_only and messages[0].role != "system":
            turns.append(Turn("system", (Piece("system", -1, default),)))
        for index, message in enumerate(messages):
            if self._media_only and message.role == "system":
                if message.media:
                    raise PolymodalError(f"message {index + 1}: the plain template has no place for a system's image")
                continue
            pieces: list[Piece] = []
            for part in message.parts:
                if isinstance(part, Text):
                    if _SURROGATE.search(part.text):
                        raise PolymodalError(
                            f"message {index + 1}: the text holds half of a surrogate pair, which is no character; "
                            "mend its encoding"
                        )
                    if not self._media_only or message.role == "assistant":
                        _append_text(pieces, message.role, index, part.text)
                elif not isinstance(part, Image):
                    raise PolymodalError(
                        f"message {index + 1}: {type(part).__name__} parts are not supported yet; give images and text"
                    )
                elif message.role == "assistant":
                    raise PolymodalError(
                        f"message {index + 1}: an image in an assistant's message is not supported yet; "
                        "put it in a user's message"
                    )
                else:
                    pieces.append(Piece(message.role, index, None))
                    if self._config.image_newline_text and not self._media_only:
                        _append_text(pieces, message.role, index, self._config.image_newline_text)
            if not pieces:
                pieces.append(Piece(message.role, index, ""))
            turns.append(Turn(message.role, tuple(pieces)))
        return turns

    def _emit(
        self, turns: list[Turn], media_tokens: list[int], *, stop_before_last: bool, add_generation_prompt: bool = False
    ) -> Rendered:
        """Render, cut at the markers, and tokenise piece by piece."""
        pieces = [piece for turn in turns for piece in turn.pieces]
        last = len(pieces) - 1 if stop_before_last else len(pieces)
        out = _Output()
        expected = 0  # the piece that has to come next
        answered = False  # the piece before was an answer, whose end token is due
        for cut in self._jinja.cuts(turns, self._style, add_generation_prompt=add_generation_prompt):
            marked = cut.marker
            text: str | None = None
            moved = ""
            if marked is not None:
                text = cut.trim(pieces[marked].text)
                moved = self._moved(cut.scaffold, pieces[marked].role, text)
            scaffold = cut.scaffold[: len(cut.scaffold) - len(moved)]
            ids = self._tokens.scaffold(scaffold, out.ids)
            if answered:
                end = self._end_of(ids)
                out.add(ids[:end] if end else (self._end_id,), trained=True)
                ids = ids[end:] if end else self._tokens.scaffold(scaffold, out.ids)
            expected = self._add_scaffold(out, ids, pieces, expected, media_tokens)
            answered = False
            if marked is None:
                break
            if marked != expected:
                raise _misplaced(pieces, expected, marked)
            if marked == last:
                return Rendered(out.ids, out.mask, tuple(out.slots))
            expected += 1
            piece = pieces[marked]
            if text is None:
                self._add_image(out, piece, media_tokens)
            else:
                answered = piece.role == "assistant"
                words = self._tokens.content(text, out.ids, space=moved, keep_exact=answered) if text else []
                out.add(words, trained=answered)
        if expected != len(pieces):
            raise _misplaced(pieces, expected, None)
        return Rendered(out.ids, out.mask, tuple(out.slots))

    def _moved(self, scaffold: str, role: Role, text: str | None) -> str:
        """The end of the scaffolding that is tokenised with the content after it, as in the whole string."""
        if text is None:
            return ""
        if role == "assistant":
            if self._gap and scaffold.endswith(self._gap):
                return self._gap
            return " " if self._tokens.hides_space and scaffold.endswith(" ") else ""
        return " " if text and scaffold.endswith(" ") else ""

    def _end_of(self, ids: Sequence[int]) -> int:
        """How many of the ids after an answer belong to its end; 0 where the template writes no end token."""
        index = self._tokens.first_added(ids)
        return index + 1 if index is not None and ids[index] == self._end_id else 0

    def _add_scaffold(
        self, out: _Output, ids: Sequence[int], pieces: list[Piece], expected: int, media_tokens: list[int]
    ) -> int:
        """Add scaffolding; placeholders that the template wrote itself become images. Returns the next piece."""
        if self._image_id not in ids:
            out.add(ids)
            return expected
        for token in ids:
            if token != self._image_id:
                out.add((token,))
                continue
            if expected >= len(pieces) or pieces[expected].text is not None:
                raise PolymodalError(
                    "the chat template places images elsewhere than the conversation does "
                    "(some templates put all images first); move the images to where the template wants them"
                )
            self._add_image(out, pieces[expected], media_tokens)
            expected += 1
        return expected

    def _add_image(self, out: _Output, piece: Piece, media_tokens: list[int]) -> None:
        count = media_tokens[len(out.slots)]
        out.slots.append(Slot("image", len(out.ids), count, piece.message))
        out.add([self._image_id] * count)

    def _find_style(self, *, in_vocabulary: bool) -> Style:
        """Try how the template takes content; templates that write an image's surroundings themselves come first."""
        asked = (Piece("user", 0, None), Piece("user", 0, ""))
        answer = Turn("assistant", (Piece("assistant", 1, ""),))
        styles: tuple[Style, ...] = ("parts", "mixed") if in_vocabulary else ()
        for style in styles:
            for pieces in (asked, asked[::-1]):
                if self._takes((Turn("user", pieces), answer), style):
                    return style
        self._takes((Turn("user", asked[1:]), answer), "string", explain=True)
        return "string"

    def _takes(self, turns: Sequence[Turn], style: Style, *, explain: bool = False) -> bool:
        """Whether every piece of a conversation comes out once and in order."""
        pieces = [piece for turn in turns for piece in turn.pieces]
        found: list[int] = []
        try:
            for cut in self._jinja.cuts(turns, style):
                for token in self._tokens.scaffold(cut.scaffold, ()):
                    if token == self._image_id:
                        place = len(found)
                        found.append(place if place < len(pieces) and pieces[place].text is None else -1)
                if cut.marker is not None:
                    found.append(cut.marker)
        except UnsafeTemplateError:
            raise
        except PolymodalError as error:
            if explain:
                raise ConfigError(f"chat_template: {error}") from None
            return False
        right = found == list(range(len(pieces)))
        if explain and not right:
            raise ConfigError(
                "chat_template: the template leaves out text content; if it is made for a vision model, the tokenizer "
                f"must have its image token as id {self._image_id}"
            )
        return right

    def _probe(self) -> tuple[Turn, Turn]:
        return Turn("user", (Piece("user", 0, ""),)), Turn("assistant", (Piece("assistant", 1, ""),))

    def _find_gap(self) -> str:
        """White space between the template's own generation prompt and an answer, "" for none."""
        question, answer = self._probe()
        cuts = self._jinja.cuts((question, answer), self._style)
        try:
            prompt = self._jinja.cuts((question,), self._style, add_generation_prompt=True)
        except UnsafeTemplateError:
            raise
        except PolymodalError:
            return ""  # the template has no prompt of its own
        if len(prompt) != 2 or prompt[0] != cuts[0] or not cuts[1].scaffold.startswith(prompt[1].scaffold):
            return ""
        gap = cuts[1].scaffold[len(prompt[1].scaffold) :]
        return gap if not gap.strip() else ""

    def _find_end(self) -> int | None:
        """The token with which the template ends an answer, if any."""
        tail = self._jinja.cuts(self._probe(), self._style)[-1].scaffold
        ids = self._tokens.scaffold(tail, ())
        index = self._tokens.first_added(ids)
        return None if index is None else ids[index]


def _append_text(pieces: list[Piece], role: Role, message: int, text: str) -> None:
    """Add text, joined to the text before it, so that both are tokenised as one."""
    if pieces and pieces[-1].text is not None:
        pieces[-1] = Piece(role, message, pieces[-1].text + text)
    else:
        pieces.append(Piece(role, message, text))


def _source(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[str, Preset | None]:
    """Find the template's text."""
    if name == "tokenizer":
        own: Any = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        if not own:
            raise ConfigError(
                "template.chat_template: the tokenizer has no chat template of its own; "
                f"choose one of {', '.join(PRESETS)}"
            )
        return str(own), None
    if "{{" in name or "{%" in name:
        return name, None
    preset = PRESETS.get(name)
    if preset is None:
        raise unknown_name("chat template", name, ["tokenizer", *PRESETS])
    vocabulary = tokenizer.get_added_vocab()
    missing = [token for token in preset.tokens if token not in vocabulary]
    if missing:
        raise ConfigError(
            f"template.chat_template: {name!r} needs the special tokens {', '.join(missing)}, which the "
            "tokenizer lacks; add them to it or choose another template"
        )
    if preset.needs_eos and tokenizer.eos_token is None:
        raise ConfigError(
            f"template.chat_template: {name!r} ends answers with the tokenizer's eos_token, which is not set"
        )
    return preset.jinja, preset


def _misplaced(pieces: list[Piece], expected: int, marked: int | None) -> PolymodalError:
    """Say what a template did to the content."""
    if expected >= len(pieces):
        return PolymodalError("the chat template writes some of the content twice; choose another template")
    piece = pieces[expected]
    what = "image" if piece.text is None else "text"
    who = (
        f"the {piece.role}'s {what} (message {piece.message + 1})"
        if piece.message >= 0
        else "the default system message"
    )
    if marked is not None and marked < expected:
        return PolymodalError(f"the chat template repeats or moves content before {who}; choose another template")
    return PolymodalError(f"the chat template drops or moves {who}; change the conversation or choose another template")
