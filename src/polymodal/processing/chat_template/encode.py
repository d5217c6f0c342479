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
  those of `apply_chat_template`, but for control tokens that somebody typed, which stay text, and for an answer or call
  that begins with white space, which the whole string may join with the header's.
- Reasoning in a field of its own, tools, calls and their results (`places.py`) are rendered by templates that have a
  place for them, and refused otherwise. A call is the assistant's to its end token, and trained; a result is not.
- The beginning-of-sequence token is there when the template writes it, as in `apply_chat_template`.
"""

import itertools
import re
from collections.abc import Collection, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from polymodal.config import TemplateConfig
from polymodal.errors import ConfigError, PolymodalError
from polymodal.messages import Document, Image, Message, Text
from polymodal.processing.chat_template import places
from polymodal.processing.chat_template.pieces import MarkedTemplate, Piece, PieceTokenizer, Style, Turn, reasoned
from polymodal.processing.chat_template.presets import check_plain, template_source
from polymodal.processing.chat_template.writer import Rendered, Writer
from polymodal.processing.collate import Slot
from polymodal.safety.jinja_limits import UnsafeTemplateError

_WORD = re.compile(r"[^\s\]>)}:]*\Z")  # a word or token that is not whole
_QUESTION = Turn("user", (Piece("user", 0, ""),))
_ANSWER = Turn("assistant", (Piece("assistant", 1, ""),))


class _Opening(NamedTuple):
    """How the template begins an answer."""

    prompt: str = ""  # Its own generation prompt; "" where it has none
    gap: str = ""  # What it writes between that and an answer
    header: str | None = None  # What it writes before any answer; None where that cannot be seen


class ChatTemplate:
    """One model's chat template over one tokenizer. Safe to use from several threads, and can be pickled."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TemplateConfig, image_token_id: int) -> None:
        self._made_from = (tokenizer, config, image_token_id)
        self._config = config
        self.image_token_id = image_token_id
        source, preset = template_source(tokenizer, config.chat_template)
        self._media_only = preset is not None and preset.media_only
        self._preset = preset is not None
        named = {True: f"the chat template {config.chat_template!r}", False: "the chat template"}[self._preset]
        self._name = "the tokenizer's chat template" if config.chat_template == "tokenizer" else named
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
        self._opening = self._find_opening()
        ends = [token for token in (self._find_end(_QUESTION, _ANSWER), tokenizer.eos_token_id) if token is not None]
        if not ends:
            raise ConfigError(
                "chat_template: neither the template nor the tokenizer has a token that ends an answer; "
                "set the tokenizer's eos_token"
            )
        self._end_id: int = ends[0]
        self._turn_end = self._find_end(_QUESTION)
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*ends, *config.stop_token_ids]))

    def __reduce__(self) -> tuple[Any, ...]:
        return ChatTemplate, self._made_from

    def render(
        self,
        messages: Sequence[Message],
        media_tokens: Sequence[int | Sequence[int]] = (),
        *,
        add_generation_prompt: bool = False,
    ) -> Rendered:
        """Tokenise a conversation; `media_tokens` is how many placeholders each medium takes, or its ids as codes."""
        if not messages:
            raise PolymodalError("the conversation is empty; give at least one message")
        if any(message.fields or message.role == "tool" for message in messages):
            places.require(messages, self._places, self._name)
        turns = self._turns(messages, iter(media_tokens))
        given = sum(len(message.media) for message in messages)
        if given != len(media_tokens):
            raise PolymodalError(
                f"the conversation has {given} images or other media, but {len(media_tokens)} token counts were given"
            )
        counts = [count for count in media_tokens if isinstance(count, int)]
        codes = [ids for ids in media_tokens if not isinstance(ids, int)]
        if any(count < 1 for count in counts):
            raise PolymodalError(f"an image needs at least one token; token counts given: {counts}")
        if add_generation_prompt and turns and turns[-1].role == "assistant":
            raise PolymodalError("the conversation ends with an answer; add a user message to ask for another")
        own = add_generation_prompt and (self._config.own_generation_prompt or bool(self._opening.prompt))
        cut_before_answer = add_generation_prompt and not own
        silent = {index for index, message in enumerate(messages) if not message.train}
        tools = self._tokens.disguised(messages[0].tools)
        problem: PolymodalError | None = None
        for version in places.versions(turns):
            if cut_before_answer:
                version = [*version, Turn("assistant", (Piece("assistant", len(messages), ""),))]
            try:
                out = Writer(self._tokens, codes)
                return self._emit(
                    out, version, tools, counts, silent, stop_before_last=cut_before_answer, add_generation_prompt=own
                )
            except UnsafeTemplateError:
                raise
            except PolymodalError as error:
                problem = error if problem is None or problem.code == places.QUOTED else problem
        assert problem is not None  # there is at least one version
        raise problem

    def plain(self, text: str, before: Sequence[int]) -> list[int]:
        """Tokenise a text that stands in no conversation."""
        return self._tokens.text(text, before)

    @cached_property
    def _places(self) -> dict[str, str]:
        """What the template has a place for beside text and images: the field of a message, and its name for it."""
        return {} if self._preset else places.find(self._jinja, self.style)

    def _turns(self, messages: Sequence[Message], media: Iterator[int | Sequence[int]]) -> list[Turn]:
        """Check the messages, and add the default system message."""
        turns: list[Turn] = []
        numbers = itertools.count()  # of media that are made of codes
        default = self._config.default_system
        if default is not None and not self._media_only and messages[0].role != "system":
            turns.append(Turn("system", (Piece("system", -1, default),)))
        for index, message in enumerate(messages):
            if not self._media_only or message.role != "system":
                fields = {key: value for key, value in message.fields.items() if key in places.AS_THEY_ARE}
                nothing = "" if message.parts or not message.tool_calls else None
                pieces = self._pieces(message, index, media, numbers)
                turns.append(Turn(message.role, pieces, self._tokens.disguised(fields), nothing))
            elif message.media:
                raise PolymodalError(f"message {index + 1}: the plain template has no place for a system's image")
        if self._media_only:
            check_plain(messages)
        return turns

    def _pieces(
        self, message: Message, index: int, media: Iterator[int | Sequence[int]], numbers: Iterator[int]
    ) -> tuple[Piece, ...]:
        """A message's texts and images; neighbouring texts are joined, so that they are tokenised as one."""
        # Media made of codes are text to the template, which has no place for an assistant's images.
        pieces: list[Piece] = []

        def add_text(text: str) -> None:
            before = pieces.pop().text if pieces and pieces[-1].text is not None else None
            pieces.append(Piece(message.role, index, (before or "") + text))

        where = f"message {index + 1}"
        for part in message.parts:
            if isinstance(part, Text):
                if places.SURROGATE.search(part.text):
                    raise PolymodalError(f"{where}: {places.HALF}")
                if not self._media_only or message.role == "assistant":
                    add_text(part.text)
            elif isinstance(part, Document):
                raise PolymodalError(f"{where}: a document was not turned into its pages; let the processor do it")
            elif not isinstance(next(media, 1), int):
                add_text(self._tokens.codes(next(numbers)))
            elif message.role == "assistant":
                what = "an image" if isinstance(part, Image) else f"a {type(part).__name__.lower()} part"
                raise PolymodalError(
                    f"{where}: {what} in an assistant's message is not supported here; put it in a user's message"
                )
            else:
                pieces.append(Piece(message.role, index, None, modality=type(part).__name__.lower()))
                if self._config.image_newline_text and not self._media_only:
                    add_text(self._config.image_newline_text)
        thought = message.reasoning_content
        if message.role == "assistant" and pieces and not thought and "</think>" in self.source:
            pieces = [*reasoned(pieces[0])]
        if message.tool_calls:  # templates ask whether there is a text beside them
            pieces = [piece for piece in pieces if piece.text or piece.before]
        elif not pieces:
            pieces = [Piece(message.role, index, "")]
        if thought:
            field = self._places["reasoning_content"]
            pieces.insert(0, Piece(message.role, index, thought, reasoning=True, field=field))
        names = (self._tokens.disguised(str(call["function"]["name"])) for call in message.tool_calls)
        return (*pieces, *(Piece(message.role, index, name, field="tool_calls") for name in names))

    def _emit(
        self,
        out: Writer,
        turns: list[Turn],
        tools: Sequence[Any],
        media_tokens: Sequence[int],
        silent: Collection[int],
        *,
        stop_before_last: bool,
        add_generation_prompt: bool,
    ) -> Rendered:
        """Render, cut at the markers, and tokenise piece by piece."""
        pieces = [piece for turn in turns for piece in turn.pieces]
        last = len(pieces) - 1 if stop_before_last else len(pieces)
        cuts = self._jinja.cuts(turns, self.style, tools, add_generation_prompt=add_generation_prompt)
        places.check(cuts, turns, tools)
        asked = max((piece.message for piece in pieces if piece.role == "user"), default=-1)
        expected = 0  # the piece that has to come next
        said: Piece | None = None  # the piece before, where it is the assistant's
        if self._preset:  # presets, which are ours, look at no text
            texts = [None if cut.marker is None else cut.trim(pieces[cut.marker].text) for cut in cuts]
        else:
            texts = self._jinja.texts(cuts, turns, self.style, tools, add_generation_prompt=add_generation_prompt)
        for cut, text in zip(cuts, texts, strict=True):
            marked = cut.marker
            piece = None if marked is None else pieces[marked]
            goes_on = said is not None and piece is not None and piece.message == said.message
            begins = piece is not None and piece.role == "assistant" and text is not None and not goes_on
            opening = self._opening
            if begins and piece is not None and not cut.scaffold.startswith(opening.prompt or "\0"):
                opening = self._opening_of(piece, turns, tools)
            head = self._head(
                cut.scaffold, opening, piece if begins else None, marked is None and add_generation_prompt
            )
            scaffold, gap = cut.scaffold[:head], cut.scaffold[head:]
            bits = self._tokens.cut_up(scaffold) if scaffold else ()
            if said is not None and not goes_on:
                bits = self._end_answer(out, bits, said)
            expected = self._add_scaffold(out, bits, pieces, expected, media_tokens, trained=goes_on)
            if marked is None or piece is None:
                break
            while expected < marked and pieces[expected].reasoning:
                if pieces[expected].field and pieces[expected].message > asked:
                    raise PolymodalError(
                        f"message {pieces[expected].message + 1}: `reasoning_content`: {self._name} drops it from this "
                        "conversation, though no question follows; take it out, or choose another template"
                    )
                out.out.dropped += (pieces[expected].message,)
                expected += 1
            if marked != expected:
                raise places.misplaced(pieces, expected, marked)
            if marked == last:
                return out.flush()
            expected += 1
            out.silent = piece.message in silent
            if text is None:
                self._add_image(out, piece, media_tokens)
            elif not begins:
                out.text(text, trained=goes_on)
            elif gap.strip():
                self._add_scaffold(out, self._tokens.cut_up(gap), pieces, expected, media_tokens, trained=True)
                out.text(text, trained=True)
            elif text:
                out.text(text, trained=True, space=gap)
            said = piece if piece.role == "assistant" and text is not None else None
        if expected != len(pieces):
            raise places.misplaced(pieces, expected, None)
        return out.flush()

    def _opening_of(self, answer: Piece, turns: Sequence[Turn], tools: Sequence[Any]) -> _Opening:
        """How an answer begins after other turns than a question; the usual where there are no tools."""
        if not tools and not any(turn.role == "tool" or "tool_calls" in turn.fields for turn in turns):
            return self._opening
        place = next(i for i, turn in enumerate(turns) if turn.pieces and turn.pieces[0].message == answer.message)
        return self._find_opening(turns[:place], tools)

    def _head(self, scaffold: str, opening: _Opening, answer: Piece | None, asks: bool) -> int:
        """How much of the scaffolding before an answer, or after the last turn, is not the answer's to say."""
        prompt, gap, header = opening
        head = len(scaffold)
        if answer is not None and prompt and scaffold.startswith(prompt):
            head = len(prompt)
        elif answer is not None and answer.field:  # a call, or reasoning in a field of its own
            if header is None:
                raise PolymodalError(
                    f"message {answer.message + 1}: the chat template does not show where the assistant's answer begins"
                )
            pairs = enumerate(zip(scaffold, header, strict=False))
            same = next((place for place, (ours, usual) in pairs if ours != usual), min(len(scaffold), len(header)))
            head = len(_WORD.sub("", scaffold[:same]))
        elif answer is not None and gap and scaffold.endswith(gap):
            head -= len(gap)
        elif (answer is not None or (asks and prompt)) and self._tokens.hides_space and scaffold.endswith(" "):
            head -= 1
        return head

    def _end_answer(self, out: Writer, bits: tuple[int | str, ...], said: Piece) -> tuple[int | str, ...]:
        """Write an answer's end: the template's, with the white space before it, else the tokenizer's."""
        if said.field == "tool_calls":
            end = next((place for place, bit in enumerate(bits) if bit in self.stop_ids), None)
            if end is None:
                raise PolymodalError(
                    f"message {said.message + 1}: the chat template ends a call with no token that ends an answer; "
                    "name it in template.stop_token_ids"
                )
            self._add_scaffold(out, bits[:end], [], 0, (), trained=True)
            out.token(int(bits[end]), trained=True)
            return bits[end + 1 :]
        blank = bits[0] if bits and isinstance(bits[0], str) and not bits[0].strip() else ""
        rest = bits[1:] if blank else bits
        if rest and rest[0] == self._end_id:
            out.text(str(blank), trained=True)
            out.token(self._end_id, trained=True)
            return rest[1:]
        if not rest or rest[0] != self._turn_end:  # gpt-oss ends earlier answers as it ends questions
            out.token(self._end_id, trained=True)
        return bits

    def _add_scaffold(
        self,
        out: Writer,
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
                    raise places.misplaced(pieces, expected, None)
                raise PolymodalError(
                    "the chat template places images elsewhere than the conversation does "
                    "(some templates put all images first); move the images to where the template wants them"
                )
            else:
                self._add_image(out, pieces[expected], media_tokens)
                expected += 1
        return expected

    def _add_image(self, out: Writer, piece: Piece, media_tokens: Sequence[int]) -> None:
        rendered = out.flush()
        count = media_tokens[len(rendered.slots)]
        rendered.slots += (Slot(piece.modality, len(rendered.input_ids), count, piece.message),)
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

    def _find_opening(self, before: Sequence[Turn] = (_QUESTION,), tools: Sequence[Any] = ()) -> _Opening:
        """How the template begins an answer after these turns."""
        count = sum(len(turn.pieces) for turn in before)
        try:
            cuts = self._jinja.cuts((*before, _ANSWER), self.style, tools)
            bare = self._jinja.cuts(before, self.style, tools)
            asked = self._jinja.cuts(before, self.style, tools, add_generation_prompt=True)
        except UnsafeTemplateError:
            raise
        except PolymodalError:
            return _Opening()  # it takes no question that is still to be answered
        header = next((cut.scaffold for cut in cuts if cut.marker == count), None)
        if header is None or len(asked) < 2 or asked[-2].marker != count - 1:
            return _Opening()
        prompt = asked[-1].scaffold
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
        if own:
            return _Opening(prompt, gap, prompt)
        gap = "" if gap.strip() else gap
        return _Opening("", gap, header.removesuffix(gap))

    def _find_end(self, *turns: Turn) -> int | None:
        """The token with which the template ends the last of these turns, if any."""
        try:
            tail = self._jinja.cuts(turns, self.style)[-1].scaffold
        except UnsafeTemplateError:
            raise
        except PolymodalError:
            return None
        bits = [bit for bit in self._tokens.cut_up(tail) if not isinstance(bit, str) or bit.strip()]
        return bits[0] if bits and isinstance(bits[0], int) else None


def _end_of(text: str) -> str:
    return text if len(text) <= 60 else f"...{text[-60:]}"
