"""Our tokenizer and chat template as a stock processor takes them, checked on conversations.

Stock processors hand a template lists of parts and tokenise what it writes as one string, placeholders included; our
presets take strings and are tokenised piece by piece. So the placeholder becomes a token, and a preset gets a head that
turns parts into strings with the placeholder in them and writes the default system message; templates that take parts
themselves stay as they are. A placeholder that somebody typed would be counted as an image: it is broken up. Two things
of the stock way can be in between: the tokenizer adds its beginning-of-sequence token by itself, and a space at the end
of the prompt becomes a token of its own in SentencePiece tokenizers. Whatever comes out is rendered beside ours, and
must give the same ids.
"""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from polymodal.config import TemplateConfig
from polymodal.errors import CheckpointError, PolymodalError, first_line
from polymodal.messages import Image, Message, Part, Text, assistant, system, user
from polymodal.processing.chat_template.encode import ChatTemplate
from polymodal.processing.chat_template.presets import PRESETS
from polymodal.safety.jinja_sandbox import compile_template

PLACEHOLDER = "<image>"
COUNTS = (3, 2)
"""Tokens of the first and the second image in the conversations that are tried."""

LATER = "a second question"
"""The one conversation that may differ: one string cannot always be cut as answers were trained, piece by piece."""
LATER_NOTE = (
    "in conversations of several turns the ids around earlier answers differ from training: published templates may "
    "write no end token there, and byte-level tokenizers join an answer with the space before it"
)

TYPED_NOTE = (
    "a literal {placeholder!r} in a text is written {broken!r} there, since it would be counted as an image; other "
    "control tokens that somebody types are text here and control tokens there"
)

_IMAGE = Image(b"")
PROBES: dict[str, tuple[Message, ...]] = {
    "an image, then a question": (user(_IMAGE, "What is shown here?"),),
    "a question, then an image": (user("Describe this in one word:\n", _IMAGE),),
    "two images": (user(_IMAGE, _IMAGE, "Which one is larger, and why? It's 3 to 1."),),
    "text alone": (user("Hello! 你好, how are you?"),),
    "a system message": (system("Be brief."), user(_IMAGE, "What is it?")),
    LATER: (user(_IMAGE, "What is it?"), assistant("A cat."), user("Which colour?")),
}
"""Conversations whose ids must be the same; those that our own template refuses are left out."""


def with_placeholder(
    tokenizer: PreTrainedTokenizerBase, image_token_id: int
) -> tuple[PreTrainedTokenizerBase, int, list[str]]:
    """Copy a tokenizer so that the placeholder is a token: the copy, the placeholder's id, and what was changed."""
    copied, changes = deepcopy(tokenizer), []
    if image_token_id >= len(copied):
        copied.add_special_tokens({"additional_special_tokens": [PLACEHOLDER]}, replace_extra_special_tokens=False)
        new = int(copied.convert_tokens_to_ids(PLACEHOLDER))
        changes.append(f"the image's placeholder, {image_token_id} in training, is token {new} {PLACEHOLDER!r}")
        image_token_id = new
    if copied.pad_token is None and copied.eos_token is not None:
        copied.pad_token = copied.eos_token
        changes.append(f"the tokenizer had no padding token: it pads with {copied.eos_token!r}")
    return copied, image_token_id, changes


def stock_template(
    ours: ChatTemplate, config: TemplateConfig, tokenizer: PreTrainedTokenizerBase, image_token_id: int
) -> tuple[str, PreTrainedTokenizerBase, list[str]]:
    """Find the chat template with which a stock processor gives our ids: its text, its tokenizer, what differs."""
    placeholder = str(tokenizer.convert_ids_to_tokens(image_token_id))
    sources = _candidates(ours, config, placeholder)
    first: str | None = None
    for frameless in (False, True):
        kept = _without_frame(tokenizer) if frameless else tokenizer
        for source in sources:
            wrong = differences(ours, kept, source, image_token_id)
            if wrong not in ([], [LATER]):
                first = first or next(name for name in wrong if name != LATER)
                continue
            if counts_typed(kept, source, placeholder):
                first = first or "a typed placeholder"
                continue
            changes = [*([LATER_NOTE] if wrong else []), typed_note(placeholder)]
            if frameless:
                changes.append("the tokenizer adds no special tokens of its own: the chat template writes them all")
            return source, kept, changes
    raise CheckpointError(
        f"template.chat_template: a stock processor gives other ids for {first!r} than were trained; "
        "train with another template, or export as polymodal"
    )


def check_plain_prompt(
    ours: ChatTemplate, config: TemplateConfig, tokenizer: PreTrainedTokenizerBase, image_token_id: int
) -> list[str]:
    """Make sure that BLIP-2's processor, which knows no chat, gives our ids: the image, then the text as it is."""
    token = tokenizer.convert_ids_to_tokens(image_token_id)
    if token != PLACEHOLDER:
        raise CheckpointError(f"the image's token is {token!r}; BLIP-2's processor knows only {PLACEHOLDER!r}")
    question = "" if drops_text(config) else "What is shown here?"
    found = ours.render([user(_IMAGE, question)], COUNTS[:1], add_generation_prompt=True).input_ids
    wanted = [image_token_id] * COUNTS[0] + list(tokenizer(question)["input_ids"])
    if replace_id(found, ours.image_token_id, image_token_id) != wanted:
        raise CheckpointError(
            "template.chat_template: BLIP-2's processor writes the image first, before even the beginning of the "
            "sequence, then the question as it is; this template writes something else around them. Train with a "
            "jinja text that does the same (for T5 the preset 't5' does)"
        )
    changes = [
        "one image a prompt, which comes first; there is no chat template",
        f"a text must not hold {PLACEHOLDER!r}, which would be counted as an image",
    ]
    return [*changes, "ask without text: the template was trained on images alone"] if not question else changes


def drops_text(config: TemplateConfig) -> bool:
    """Whether a template keeps only the images of a question, as LLaVA's for stage 1 does."""
    return config.chat_template in PRESETS and PRESETS[config.chat_template].media_only


def differences(ours: ChatTemplate, tokenizer: PreTrainedTokenizerBase, source: str, image_token_id: int) -> list[str]:
    """Name the conversations of `PROBES` that a stock processor tokenises otherwise."""
    placeholder, wrong = str(tokenizer.convert_ids_to_tokens(image_token_id)), []
    for name, messages in PROBES.items():
        counts = COUNTS[: sum(len(message.media) for message in messages)]
        try:
            rendered = ours.render(messages, counts, add_generation_prompt=True)
        except PolymodalError:
            continue
        try:
            pieces = stock_text(tokenizer, source, messages).split(placeholder)
        except PolymodalError:
            pieces = []
        # As a stock processor does: repeat the placeholders, then tokenise the whole.
        text = "".join(piece + placeholder * count for piece, count in zip(pieces, (*counts, 0), strict=False))
        begun = tokenizer.bos_token is not None and text.startswith(str(tokenizer.bos_token))
        found = list(tokenizer(text, add_special_tokens=not begun)["input_ids"])
        wanted = replace_id(rendered.input_ids, ours.image_token_id, image_token_id)
        if len(pieces) != len(counts) + 1 or found != wanted:
            wrong.append(name)
    return wrong


def broken(placeholder: str) -> str:
    """A placeholder as a text may hold it: a space in it, and it is none."""
    return f"{placeholder[:1]} {placeholder[1:]}"


def typed_note(placeholder: str) -> str:
    """What becomes of control tokens that somebody types."""
    return TYPED_NOTE.format(placeholder=placeholder, broken=broken(placeholder))


def counts_typed(tokenizer: PreTrainedTokenizerBase, source: str, placeholder: str) -> bool:
    """Whether a chat template lets a placeholder that somebody typed pass for an image."""
    typed = f"What is {placeholder}{placeholder}?"
    asked = [user(_IMAGE, typed), assistant(typed), user(Text(placeholder[:2]), Text(placeholder[2:]))]
    for messages in (asked, asked[:1]):
        try:
            return stock_text(tokenizer, source, messages).count(placeholder) != 1
        except PolymodalError:
            continue  # templates of a single turn; one that refuses all is refused for its ids
    return False


def stock_text(tokenizer: PreTrainedTokenizerBase, source: str, messages: Sequence[Message]) -> str:
    """What a chat template makes of a conversation."""
    variables: dict[str, Any] = {str(name): token for name, token in tokenizer.special_tokens_map.items()}
    try:
        return compile_template(source)(
            **variables, messages=stock_chat(messages), tools=None, documents=None, add_generation_prompt=True
        )
    except (TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise PolymodalError(f"the chat template refuses this conversation: {first_line(error)}") from None


def stock_chat(messages: Sequence[Message], images: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """A conversation as chat templates take it, with the images in their places where they are given."""
    left = iter(images)
    if any(message.fields or message.role == "tool" for message in messages):
        raise PolymodalError("conversations with reasoning or tools are not compared; leave them out")

    def content(part: Part) -> dict[str, Any]:
        if isinstance(part, Text):
            return {"type": "text", "text": part.text}
        return {"type": "image", "image": next(left)} if images else {"type": "image"}

    return [{"role": message.role, "content": [content(part) for part in message.parts]} for message in messages]


def quoted(text: str) -> str:
    """Write a string as jinja does."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


def _candidates(ours: ChatTemplate, config: TemplateConfig, placeholder: str) -> list[str]:
    """Templates to try, the simplest first."""
    source = ours.source
    if ours.style != "string":
        guarded = f"{_guard(placeholder)}\n{source}"
        if config.default_system is None:
            return [source, guarded]
        turn = quoted(config.default_system)
        if ours.style != "mixed":
            turn = f"[{{'type': 'text', 'text': {turn}}}]"
        told = (
            "{%- if messages and messages[0]['role'] != 'system' -%}"
            f"{{%- set messages = [{{'role': 'system', 'content': {turn}}}] + messages -%}}{{%- endif %}}\n"
        )
        return [told + source, told + guarded]
    media_only = drops_text(config)
    image = placeholder if media_only else placeholder + config.image_newline_text
    if ours.restarts and not media_only:  # the space that is put before each text has to be written out
        image = f"{placeholder} {config.image_newline_text}"
        source = source.replace("{{- bos_token -}}", "{{- bos_token + ' ' -}}", 1)
    head = _head(image, placeholder, None if media_only else config.default_system, media_only=media_only)
    whole = f"{head}\n{source}"
    # The space after "ASSISTANT:" is the answer's where the tokenizer draws it into the first word.
    cut = (
        f"{head}\n{{% set rendered %}}\n{source}{{% endset %}}"
        "{{ rendered.rstrip(' ') if add_generation_prompt else rendered }}"
    )
    return [whole, cut]


def _break_up(text: str, placeholder: str) -> str:
    """Jinja that breaks up what was typed; every engine knows these two, and not all know `replace`."""
    return f"{text}.split({quoted(placeholder)}) | join({quoted(broken(placeholder))})"


def _guard(placeholder: str) -> str:
    """What breaks up typed placeholders before a template that takes parts; messages without them stay as they are."""
    # Neighbouring texts are joined first, here as below: a placeholder may be typed over two of them.
    flush = (
        "{%- if said.text -%}{%- set said.parts = said.parts + "
        f"[{{'type': 'text', 'text': {_break_up('said.text', placeholder)}}}] -%}}"
        f"{{%- if {quoted(placeholder)} in said.text -%}}{{%- set said.typed = true -%}}{{%- endif -%}}"
        "{%- set said.text = '' -%}{%- endif -%}"
    )
    return (
        "{%- set told = namespace(turns=[]) -%}{%- for message in messages -%}"
        "{%- set said = namespace(parts=[], text='', typed=false) -%}"
        "{%- if message['content'] is string -%}{%- set said.text = message['content'] -%}"
        "{%- elif message['content'] -%}{%- for part in message['content'] -%}"
        "{%- if part['type'] == 'text' -%}{%- set said.text = said.text + part['text'] -%}"
        f"{{%- else -%}}{flush}{{%- set said.parts = said.parts + [part] -%}}{{%- endif -%}}"
        f"{{%- endfor -%}}{{%- endif -%}}{flush}"
        "{%- if said.typed -%}{%- set told.turns = told.turns + [{'role': message['role'], 'content': "
        "said.parts[0]['text'] if message['content'] is string else said.parts}] -%}"
        "{%- else -%}{%- set told.turns = told.turns + [message] -%}{%- endif -%}"
        "{%- endfor -%}{%- set messages = told.turns %}"
    )


def _head(image: str, placeholder: str, default_system: str | None, *, media_only: bool) -> str:
    """What turns a list of parts into a string before a template that takes strings."""
    start = "{%- set told = namespace(turns=[]) -%}"
    if default_system is not None:
        start += (
            "{%- if messages and messages[0]['role'] != 'system' -%}"
            f"{{%- set told.turns = [{{'role': 'system', 'content': {quoted(default_system)}}}] -%}}{{%- endif -%}}"
        )
    typed = f"({_break_up('said.typed', placeholder)})"
    text = "{%- set said.typed = said.typed + part['text'] -%}"
    spoken = "{%- set said.typed = message['content'] -%}"
    keep = f"{{%- set told.turns = told.turns + [{{'role': message['role'], 'content': said.text + {typed}}}] -%}}"
    if media_only:
        answer = "{%- if message['role'] == 'assistant' -%}"
        text, spoken = (f"{answer}{line}{{%- endif -%}}" for line in (text, spoken))
        keep = f"{{%- if message['role'] != 'system' -%}}{keep}{{%- endif -%}}"
    return (
        f"{start}{{%- for message in messages -%}}{{%- set said = namespace(text='', typed='') -%}}"
        f"{{%- if message['content'] is string -%}}{spoken}{{%- else -%}}"
        f"{{%- for part in message['content'] -%}}{{%- if part['type'] == 'text' -%}}{text}"
        f"{{%- elif part['type'] in ['image', 'image_url'] -%}}"
        f"{{%- set said.text = said.text + {typed} + {quoted(image)} -%}}{{%- set said.typed = '' -%}}"
        "{%- else -%}{{- raise_exception('this model takes text and images') -}}{%- endif -%}{%- endfor -%}"
        f"{{%- endif -%}}{keep}{{%- endfor -%}}{{%- set messages = told.turns %}}"
    )


def _without_frame(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that adds no special tokens around a text."""
    from tokenizers import processors

    copied = deepcopy(tokenizer)
    copied.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1")
    for name in ("add_bos_token", "add_eos_token"):
        if hasattr(copied, name):
            setattr(copied, name, False)
    return copied


def replace_id(ids: Sequence[int], old: int, new: int) -> list[int]:
    """Ids with one of them replaced."""
    return [new if token == old else token for token in ids]
