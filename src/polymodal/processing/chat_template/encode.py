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
from polymodal.processing.chat_template.pieces import MarkedTemplate, Piece, PieceTokenizer, Style, Turn
from polymodal.processing.chat_template.presets import PRESETS, Preset
from polymodal.processing.collate import Slot
from polymodal.safety.jinja_limits import UnsafeTemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SURROGATE = re.compile("[\ud800-\udfff]")
_QUESTION = Turn("user", (Piece("user", 0, ""),))
_ANSWER = Turn("assistant", (Piece("assistant", 1, ""),))


@dataclass
class Rendered:
    """A tokenised conversation."""

    input_ids: list[int] = field(default_factory=list)  # [T] ids, placeholders expanded
    loss_mask: list[bool] = field(default_factory=list)  # [T] True where the token is the assistant's, its end included
    slots: tuple[Slot, ...] = ()  # Where each image is, in order

    def add(self, ids: Sequence[int], *, trained: bool = False) -> None:
        """Write on."""
        self.input_ids.extend(ids)
        self.loss_mask.extend([trained] * len(ids))


class ChatTemplate:
    """One model's chat template over one tokenizer. Safe to use from several threads, and can be pickled."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TemplateConfig, image_token_id: int) -> None:
        self._made_from = (tokenizer, config, image_token_id)
        self._config = config
        self.image_token_id = image_token_id
        source, preset = _source(tokenizer, config.chat_template)
        self._media_only = preset is not None and preset.media_only
        self._jinja = MarkedTemplate(source, dict(tokenizer.special_tokens_map))
        self._tokens = PieceTokenizer(tokenizer, image_token_id, source)

        self.source = source
        self.style = self._find_style(in_vocabulary=image_token_id < len(tokenizer))
        if self.style != "string" and config.image_newline_text:
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
        """Tokenise a conversation; `media_tokens` is the number of placeholders of each image."""
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
        if add_generation_prompt and turns and turns[-1].role == "assistant":
            raise PolymodalError("the conversation ends with an answer; add a user message to ask for another")
        own = add_generation_prompt and self._config.own_generation_prompt
        cut_before_answer = add_generation_prompt and not own
        if cut_before_answer:
            turns.append(Turn("assistant", (Piece("assistant", len(messages), ""),)))
        return self._emit(turns, media_tokens, stop_before_last=cut_before_answer, add_generation_prompt=own)

    def _turns(self, messages: Sequence[Message]) -> list[Turn]:
        """Check the messages, and add the default system message."""
        turns: list[Turn] = []
        default = self._config.default_system
        if default is not None and not self._media_only and messages[0].role != "system":
            turns.append(Turn("system", (Piece("system", -1, default),)))
        for index, message in enumerate(messages):
            if not self._media_only or message.role != "system":
                turns.append(Turn(message.role, self._pieces(message, index)))
            elif message.media:
                raise PolymodalError(f"message {index + 1}: the plain template has no place for a system's image")
        return turns

    def _pieces(self, message: Message, index: int) -> tuple[Piece, ...]:
        """A message's texts and images; neighbouring texts are joined, so that they are tokenised as one."""
        pieces: list[Piece] = []

        def add_text(text: str) -> None:
            before = pieces.pop().text if pieces and pieces[-1].text is not None else None
            pieces.append(Piece(message.role, index, (before or "") + text))

        where = f"message {index + 1}"
        for part in message.parts:
            if isinstance(part, Text):
                if _SURROGATE.search(part.text):
                    raise PolymodalError(
                        f"{where}: the text holds half of a surrogate pair, which is no character; mend its encoding"
                    )
                if not self._media_only or message.role == "assistant":
                    add_text(part.text)
            elif not isinstance(part, Image):
                raise PolymodalError(
                    f"{where}: {type(part).__name__} parts are not supported yet; give images and text"
                )
            elif message.role == "assistant":
                raise PolymodalError(
                    f"{where}: an image in an assistant's message is not supported yet; put it in a user's message"
                )
            else:
                pieces.append(Piece(message.role, index, None))
                if self._config.image_newline_text and not self._media_only:
                    add_text(self._config.image_newline_text)
        return tuple(pieces) or (Piece(message.role, index, ""),)

    def _emit(
        self, turns: list[Turn], media_tokens: Sequence[int], *, stop_before_last: bool, add_generation_prompt: bool
    ) -> Rendered:
        """Render, cut at the markers, and tokenise piece by piece."""
        pieces = [piece for turn in turns for piece in turn.pieces]
        last = len(pieces) - 1 if stop_before_last else len(pieces)
        out = Rendered()
        expected = 0  # the piece that has to come next
        answered = False  # the piece before was an answer, whose end token is due
        for cut in self._jinja.cuts(turns, self.style, add_generation_prompt=add_generation_prompt):
            marked = cut.marker
            text = None if marked is None else cut.trim(pieces[marked].text)
            moved = "" if marked is None else self._moved(cut.scaffold, pieces[marked].role, text)
            scaffold = cut.scaffold[: len(cut.scaffold) - len(moved)]
            ids = self._tokens.scaffold(scaffold, out.input_ids)
            if answered:
                end = self._end_of(ids)
                out.add(ids[:end] if end else (self._end_id,), trained=True)
                ids = ids[end:] if end else self._tokens.scaffold(scaffold, out.input_ids)
            expected = self._add_scaffold(out, ids, pieces, expected, media_tokens)
            if marked is None:
                break
            if marked != expected:
                raise _misplaced(pieces, expected, marked)
            if marked == last:
                return out
            expected += 1
            piece = pieces[marked]
            answered = piece.role == "assistant" and text is not None
            if text is None:
                self._add_image(out, piece, media_tokens)
            elif text:
                words = self._tokens.content(text, out.input_ids, space=moved, keep_exact=answered)
                out.add(words, trained=answered)
        if expected != len(pieces):
            raise _misplaced(pieces, expected, None)
        return out

    def _moved(self, scaffold: str, role: Role, text: str | None) -> str:
        """The end of the scaffolding that is tokenised with the content after it, as in the whole string."""
        if text is None:
            return ""
        if role == "assistant" and self._gap and scaffold.endswith(self._gap):
            return self._gap
        wanted = self._tokens.hides_space if role == "assistant" else text
        return " " if wanted and scaffold.endswith(" ") else ""

    def _end_of(self, ids: Sequence[int]) -> int:
        """How many of the ids after an answer belong to its end; 0 where the template writes no end token."""
        index = self._tokens.first_added(ids)
        return index + 1 if index is not None and ids[index] == self._end_id else 0

    def _add_scaffold(
        self, out: Rendered, ids: Sequence[int], pieces: list[Piece], expected: int, media_tokens: Sequence[int]
    ) -> int:
        """Add scaffolding; placeholders that the template wrote itself become images. Returns the next piece."""
        if self.image_token_id not in ids:
            out.add(ids)
            return expected
        for token in ids:
            if token != self.image_token_id:
                out.add((token,))
                continue
            if expected >= len(pieces) or pieces[expected].text is not None:
                image = next((piece for piece in pieces[expected:] if piece.text is None), None)
                if image is not None and image.message != pieces[expected].message:  # a whole message is missing
                    raise _misplaced(pieces, expected, None)
                raise PolymodalError(
                    "the chat template places images elsewhere than the conversation does "
                    "(some templates put all images first); move the images to where the template wants them"
                )
            self._add_image(out, pieces[expected], media_tokens)
            expected += 1
        return expected

    def _add_image(self, out: Rendered, piece: Piece, media_tokens: Sequence[int]) -> None:
        count = media_tokens[len(out.slots)]
        out.slots += (Slot("image", len(out.input_ids), count, piece.message),)
        out.add([self.image_token_id] * count)

    def _find_style(self, *, in_vocabulary: bool) -> Style:
        """Try how the template takes content; templates that write an image's surroundings themselves come first."""
        asked = (Piece("user", 0, None), *_QUESTION.pieces)
        styles: tuple[Style, ...] = ("parts", "mixed") if in_vocabulary else ()
        for style in styles:
            for pieces in (asked, asked[::-1]):
                if self._takes((Turn("user", pieces), _ANSWER), style):
                    return style
        self._takes((_QUESTION, _ANSWER), "string", explain=True)
        return "string"

    def _takes(self, turns: Sequence[Turn], style: Style, *, explain: bool = False) -> bool:
        """Whether every piece of a conversation comes out once and in order."""
        pieces = [piece for turn in turns for piece in turn.pieces]
        found: list[int] = []
        try:
            for cut in self._jinja.cuts(turns, style):
                for token in self._tokens.scaffold(cut.scaffold, ()):
                    if token == self.image_token_id:
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
                f"must have its image token as id {self.image_token_id}"
            )
        return right

    def _find_gap(self) -> str:
        """White space between the template's own generation prompt and an answer, "" for none."""
        cuts = self._jinja.cuts((_QUESTION, _ANSWER), self.style)
        try:
            prompt = self._jinja.cuts((_QUESTION,), self.style, add_generation_prompt=True)
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
        tail = self._jinja.cuts((_QUESTION, _ANSWER), self.style)[-1].scaffold
        ids = self._tokens.scaffold(tail, ())
        index = self._tokens.first_added(ids)
        return None if index is None else ids[index]


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
    if name not in PRESETS:
        raise unknown_name("chat template", name, ["tokenizer", *PRESETS])
    preset = PRESETS[name]
    missing = [token for token in preset.tokens if token not in tokenizer.get_added_vocab()]
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
    who = f"the {piece.role}'s {what} (message {piece.message + 1})"
    if piece.message < 0:
        who = "the default system message"
    if marked is not None and marked < expected:
        return PolymodalError(f"the chat template repeats or moves content before {who}; choose another template")
    return PolymodalError(f"the chat template drops or moves {who}; change the conversation or choose another template")
