"""Turn a conversation into ids, a loss mask and media slots, all three at once.

The chat template (jinja, as Hugging Face tokenizers carry it) is rendered with a marker in place of every text and
every image. Cutting the result at the markers leaves the template's own scaffolding; each piece is then tokenised
where it stands: scaffolding with special tokens recognised, content with special-token parsing off, images as
runs of the placeholder id. Since it is known which piece is whose, the loss mask needs no searching, no
`{% generation %}` blocks and no second tokenisation of a shorter string, which is where LLaVA's "tokenization mismatch"
came from. What people wrote never passes through the template, so nothing they write can look like a marker or like a
header.

Rules worth knowing:

- A turn's loss covers the assistant's text and its end token, unless `Message.train` is off. Where a template ends an
  answer with no token, the tokenizer's end token is added, since a model that never sees one never stops.
- The generation prompt is the template's own, or, where it has none, what stands before an answer; either way it is a
  prefix of the training ids. What the template writes between its prompt and an answer (a space, an empty block of
  reasoning) is the model's to say: it is trained with the answer. A template whose own prompt is no such prefix is
  refused, unless it is to have its way all the same (`TemplateConfig.own_generation_prompt`).
- Templates that trim content trim it here too. Templates that drop or move content are refused, and so are those that
  look at content and write something else for it: each conversation is rendered with its real texts too and compared.
  An assistant's reasoning, in <think>...</think>, is shown to a template that knows these tags, which may move or drop
  it as it does in `apply_chat_template`; the tags it writes are tokens, and trained.
- Text is tokenised from one control token, image or border of the loss to the next, as in the whole string. So ids are
  those of `apply_chat_template`, but for control tokens that somebody typed, which stay text, and for an answer that
  begins with white space, which the whole string may join with the header's.
- The beginning-of-sequence token is there when the template writes it, as in `apply_chat_template`.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from polymodal.config import TemplateConfig
from polymodal.errors import ConfigError, PolymodalError, unknown_name
from polymodal.messages import Image, Message, Text
from polymodal.processing.chat_template.pieces import Cut, MarkedTemplate, Piece, PieceTokenizer, Style, Turn, reasoned
from polymodal.processing.chat_template.presets import PRESETS, Preset, check_plain
from polymodal.processing.collate import Slot
from polymodal.safety.jinja_limits import UnsafeTemplateError

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


class _Writer:
    """Writes a conversation down; text waits until a control token, an image or a border of the loss ends it."""

    def __init__(self, tokens: PieceTokenizer) -> None:
        self.out = Rendered()
        self._tokens = tokens
        self._text, self._trained, self._own = "", False, True
        self._space: str | None = None  # what stands before the waiting text where that begins with an answer
        self._stripped = False  # the control token before takes the white space after it
        self.silent = False  # what is trained is an answer without a loss; its borders stay, so its ids do

    def text(self, text: str, *, trained: bool = False, own: bool = False, space: str | None = None) -> None:
        """Write a text; `own` where the template wrote it, `space` where an answer begins behind the template's."""
        if trained != self._trained or space is not None:
            self.flush()
            self._trained, self._space = trained, space
        if self._stripped and not self._text:
            text = text.lstrip()
        if text:
            self._text, self._own = self._text + text, self._own and own

    def token(self, token: int, *, trained: bool = False, count: int = 1) -> None:
        """Write a control token or the placeholders of an image."""
        if self._tokens.strips(token, "lstrip"):
            self._text = self._text.rstrip()
        self.flush()
        self.out.add([token] * count, trained=trained and not self.silent)
        self._stripped = self._tokens.strips(token, "rstrip")

    def flush(self) -> Rendered:
        """Tokenise what waits; gives all that was written."""
        if self._text:
            before, space = self.out.input_ids, self._space
            if space is not None:
                ids = self._tokens.answer(self._text, before, "" if self._stripped else space)
            else:
                ids = self._tokens.text(self._text, before, own=self._own)
            self.out.add(ids, trained=self._trained and not self.silent)
            self._stripped = False
        self._text, self._own, self._space = "", True, None
        return self.out


class ChatTemplate:
    """One model's chat template over one tokenizer. Safe to use from several threads, and can be pickled."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TemplateConfig, image_token_id: int) -> None:
        self._made_from = (tokenizer, config, image_token_id)
        self._config = config
        self.image_token_id = image_token_id
        source, preset = _source(tokenizer, config.chat_template)
        self._media_only = preset is not None and preset.media_only
        self._preset = preset is not None
        variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        if config.enable_thinking is not None:
            variables["enable_thinking"] = config.enable_thinking
        self._jinja = MarkedTemplate(source, variables)
        self._tokens = PieceTokenizer(tokenizer, image_token_id, source, restarts=config.text_restarts)

        self.source = source
        self.restarts = self._tokens.restarts  # `TemplateConfig.text_restarts`, where it changes ids
        self.style = self._find_style(in_vocabulary=image_token_id < len(tokenizer))
        if self.style != "string" and config.image_newline_text:
            raise ConfigError(
                "template.image_newline_text: this chat template places images itself; leave image_newline_text empty"
            )
        self._prompt, self._gap = self._find_prompt()
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
        own = add_generation_prompt and (self._config.own_generation_prompt or bool(self._prompt))
        cut_before_answer = add_generation_prompt and not own
        if cut_before_answer:
            turns.append(Turn("assistant", (Piece("assistant", len(messages), ""),)))
        silent = {index for index, message in enumerate(messages) if not message.train}
        return self._emit(turns, media_tokens, silent, stop_before_last=cut_before_answer, add_generation_prompt=own)

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
        if self._media_only:
            check_plain(messages)
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
        if message.role == "assistant" and pieces and "</think>" in self.source:
            return reasoned(pieces[0])
        return tuple(pieces) or (Piece(message.role, index, ""),)

    def _emit(
        self,
        turns: list[Turn],
        media_tokens: Sequence[int],
        silent: Collection[int],
        *,
        stop_before_last: bool,
        add_generation_prompt: bool,
    ) -> Rendered:
        """Render, cut at the markers, and tokenise piece by piece."""
        pieces = [piece for turn in turns for piece in turn.pieces]
        last = len(pieces) - 1 if stop_before_last else len(pieces)
        out = _Writer(self._tokens)
        cuts = self._jinja.cuts(turns, self.style, add_generation_prompt=add_generation_prompt)
        expected = 0  # the piece that has to come next
        answered = reasoned = False  # the piece before was an answer, whose end token is due; or its reasoning
        for cut, text in zip(cuts, self._texts(cuts, pieces, turns, add_generation_prompt), strict=True):
            marked = cut.marker
            begins = marked is not None and pieces[marked].role == "assistant" and text is not None and not reasoned
            scaffold, gap = self._part(cut.scaffold, begins, marked is None and add_generation_prompt)
            bits = self._tokens.cut_up(scaffold) if scaffold else ()
            if answered:
                bits = self._end_answer(out, bits)
            expected = self._add_scaffold(out, bits, pieces, expected, media_tokens, trained=reasoned)
            if marked is None:
                break
            while expected < marked and pieces[expected].reasoning:
                expected += 1
            if marked != expected:
                raise _misplaced(pieces, expected, marked)
            if marked == last:
                return out.flush()
            expected += 1
            piece = pieces[marked]
            out.silent = piece.message in silent
            if text is None:
                self._add_image(out, piece, media_tokens)
            elif not begins:
                out.text(text, trained=reasoned)
            elif gap.strip():
                self._add_scaffold(out, self._tokens.cut_up(gap), pieces, expected, media_tokens, trained=True)
                out.text(text, trained=True)
            elif text:
                out.text(text, trained=True, space=gap)
            reasoned = piece.reasoning
            answered = piece.role == "assistant" and text is not None and not reasoned
        if expected != len(pieces):
            raise _misplaced(pieces, expected, None)
        return out.flush()

    def _texts(
        self, cuts: list[Cut], pieces: list[Piece], turns: list[Turn], add_generation_prompt: bool
    ) -> list[str | None]:
        """What the template makes of the texts; presets, which are ours, look at none."""
        if self._preset:
            return [None if cut.marker is None else cut.trim(pieces[cut.marker].text) for cut in cuts]
        return self._jinja.texts(cuts, turns, self.style, add_generation_prompt=add_generation_prompt)

    def _part(self, scaffold: str, answer: bool, prompt: bool) -> tuple[str, str]:
        """Part scaffolding from the end of it that is the answer's to say, or would be after a prompt."""
        head = len(scaffold)
        if answer and self._prompt and scaffold.startswith(self._prompt):
            head = len(self._prompt)
        elif answer and self._gap and scaffold.endswith(self._gap):
            head -= len(self._gap)
        elif (answer or (prompt and self._prompt)) and self._tokens.hides_space and scaffold.endswith(" "):
            head -= 1
        return scaffold[:head], scaffold[head:]

    def _end_answer(self, out: _Writer, bits: tuple[int | str, ...]) -> tuple[int | str, ...]:
        """Write an answer's end: the template's, with the white space before it, else the tokenizer's."""
        blank = bits[0] if bits and isinstance(bits[0], str) and not bits[0].strip() else ""
        rest = bits[1:] if blank else bits
        if rest and rest[0] == self._end_id:
            out.text(str(blank), trained=True)
            out.token(self._end_id, trained=True)
            return rest[1:]
        out.token(self._end_id, trained=True)
        return bits

    def _add_scaffold(
        self,
        out: _Writer,
        bits: Sequence[int | str],
        pieces: list[Piece],
        expected: int,
        media_tokens: Sequence[int],
        *,
        trained: bool,
    ) -> int:
        """Add scaffolding; placeholders that the template wrote itself become images. Returns the next piece."""
        for bit in bits:
            if isinstance(bit, str):
                out.text(bit, trained=trained, own=True)
            elif bit != self.image_token_id:
                out.token(bit, trained=trained)
            elif expected >= len(pieces) or pieces[expected].text is not None:
                image = next((piece for piece in pieces[expected:] if piece.text is None), None)
                if image is not None and image.message != pieces[expected].message:  # a whole message is missing
                    raise _misplaced(pieces, expected, None)
                raise PolymodalError(
                    "the chat template places images elsewhere than the conversation does "
                    "(some templates put all images first); move the images to where the template wants them"
                )
            else:
                self._add_image(out, pieces[expected], media_tokens)
                expected += 1
        return expected

    def _add_image(self, out: _Writer, piece: Piece, media_tokens: Sequence[int]) -> None:
        rendered = out.flush()
        count = media_tokens[len(rendered.slots)]
        rendered.slots += (Slot("image", len(rendered.input_ids), count, piece.message),)
        out.token(self.image_token_id, count=count)

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
                for bit in self._tokens.cut_up(cut.scaffold):
                    if bit == self.image_token_id:
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

    def _find_prompt(self) -> tuple[str, str]:
        """The template's own generation prompt, "" for none, and what it writes between that and an answer."""
        cuts = self._jinja.cuts((_QUESTION, _ANSWER), self.style)
        try:
            bare = self._jinja.cuts((_QUESTION,), self.style)
            asked = self._jinja.cuts((_QUESTION,), self.style, add_generation_prompt=True)
        except UnsafeTemplateError:
            raise
        except PolymodalError:
            return "", ""  # it takes no question that is still to be answered
        if len(asked) != 2:
            return "", ""
        prompt, header = asked[-1].scaffold, cuts[1].scaffold
        own, begun = asked != bare and not self._config.own_generation_prompt, header.startswith(prompt)
        if own and not begun:
            raise ConfigError(
                f"chat_template: it asks for an answer with {_end_of(prompt)!r}, but writes answers after "
                f"{_end_of(header)!r}, so what is asked for is not what is trained; set "
                "template.own_generation_prompt: true to ask so all the same, or choose another template"
            )
        gap = header[len(prompt) :] if begun else ""
        if own and self._tokens.hides_space and prompt.endswith(" "):
            prompt, gap = prompt[:-1], f" {gap}"
        return (prompt, gap) if own else ("", "" if gap.strip() else gap)

    def _find_end(self) -> int | None:
        """The token with which the template ends an answer, if any."""
        tail = self._jinja.cuts((_QUESTION, _ANSWER), self.style)[-1].scaffold
        bits = [bit for bit in self._tokens.cut_up(tail) if not isinstance(bit, str) or bit.strip()]
        return bits[0] if bits and isinstance(bits[0], int) else None


def _end_of(text: str) -> str:
    return text if len(text) <= 60 else f"...{text[-60:]}"


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
