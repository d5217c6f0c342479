"""The prompt of a published model as its own processor writes it, as one of our chat templates.

LLaVA's processors take the chat template's text and give it to the tokenizer, which adds its beginning-of-sequence
token where the template wrote none. BLIP-2's and InstructBLIP's know no chat: the picture's placeholders come first,
even before that token, then the text as it is. Both become jinja text here that writes everything itself.

Nothing is taken on trust: a question about a picture is rendered by that template and tokenised piece by piece, as
everything is here, and must give the very ids that the stock way gives; otherwise the folder is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from polymodal.config import TemplateConfig
from polymodal.errors import CheckpointError, PolymodalError
from polymodal.interop.huggingface.families import NotExpressibleError
from polymodal.messages import Image, user
from polymodal.processing.chat_template.encode import ChatTemplate
from polymodal.safety.config_json import read_json
from polymodal.safety.jinja_sandbox import compile_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION = "What is shown here?"
PROBE_TOKENS = 3
"""Placeholders of the picture in the question that is tried."""

_PLAIN = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}"
    "{{- raise_exception('this model takes no system message; put the text into the question') -}}"
    "{%- elif message['role'] == 'user' -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}{{- placeholder -}}{%- endfor -%}"
    "{{- before if loop.first else space -}}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{{- after -}}"
    "{%- else -%}"
    "{{- gap -}}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}"
    "{{- eos_token -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
)


def template_of(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
    prompt: Literal["chat", "plain"],
    *,
    encoder_decoder: bool = False,
    stop_token_ids: tuple[int, ...] = (),
) -> TemplateConfig:
    """Find the template that gives the ids of the folder's own processor.

    Args:
        folder: The published folder.
        tokenizer: Its tokenizer, which knows the placeholder.
        image_token_id: The placeholder's id.
        prompt: "chat" for the folder's chat template, "plain" for BLIP-2's way.
        encoder_decoder: Whether an answer is the decoder's, so that nothing stands between it and the question.
        stop_token_ids: Further tokens that end an answer.

    Returns:
        The template, as jinja text.

    Raises:
        CheckpointError: The folder has no chat template, or one that takes no picture.
        NotExpressibleError: No template of ours gives the same ids.
    """
    placeholder = tokenizer.convert_ids_to_tokens(image_token_id)
    assert isinstance(placeholder, str)  # one id gives one token
    before, after = _frame(tokenizer)
    if prompt == "chat":
        source = chat_template_of(folder, tokenizer)
        wanted = _chat_ids(folder, tokenizer, source, placeholder)
        candidates = [source, *(f"{{{{ {_quoted(before + space)} }}}}{source}" for space in ("", " ") if before)]
    else:
        wanted = [image_token_id] * PROBE_TOKENS + list(tokenizer(QUESTION)["input_ids"])
        gap = "" if encoder_decoder else " "
        candidates = [_plain(placeholder, before, space, after, gap) for space in ("", " ")]
    reason = "the ids differ"
    # Where the template's own generation prompt is no beginning of an answer, that prompt is taken as it is.
    for candidate, own in ((candidate, own) for own in (False, True) for candidate in candidates):
        config = TemplateConfig(
            chat_template=candidate, stop_token_ids=stop_token_ids, own_generation_prompt=own and prompt == "chat"
        )
        try:
            template = ChatTemplate(tokenizer, config, image_token_id)
            found = template.render([user(Image(b""), QUESTION)], [PROBE_TOKENS], add_generation_prompt=True)
        except PolymodalError as error:
            reason = str(error)
            continue
        if found.input_ids == wanted:
            return config
    raise NotExpressibleError(f"{folder}: its prompt cannot be written here as its own processor does ({reason})")


def chat_template_of(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """Find a folder's chat template: the processor's, in any of the files it has been kept in, else the tokenizer's.

    Args:
        folder: The published folder.
        tokenizer: Its tokenizer.

    Returns:
        The jinja text.

    Raises:
        CheckpointError: There is none.
    """
    found: Any = _in_json(folder / "processor_config.json")
    if not found:
        found = _in_json(folder / "chat_template.json")
    if not found and (folder / "chat_template.jinja").is_file():
        found = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not found:
        found = tokenizer.chat_template
    if isinstance(found, dict):
        found = found.get("default")
    if not isinstance(found, str) or not found:
        raise CheckpointError(
            f"{folder}: there is no chat template, so how the model wants to be asked is not known; "
            "add chat_template.jinja to the folder"
        )
    return found


def _in_json(path: Path) -> Any:
    return read_json(path).get("chat_template") if path.is_file() else None


def _chat_ids(folder: Path, tokenizer: PreTrainedTokenizerBase, source: str, placeholder: str) -> list[int]:
    """What the folder's processor makes of a question about a picture: render, expand, then tokenise the whole."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    variables: dict[str, Any] = {str(name): token for name, token in tokenizer.special_tokens_map.items()}
    try:
        text = compile_template(source)(
            **variables,
            messages=[{"role": "user", "content": content}],
            tools=None,
            documents=None,
            add_generation_prompt=True,
        )
    except (PolymodalError, TemplateError, TypeError, KeyError, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: its chat template does not take a question about a picture: {error}"
        ) from None
    if text.count(placeholder) != 1:
        raise CheckpointError(
            f"{folder}: its chat template writes {placeholder!r} {text.count(placeholder)} times for one picture"
        )
    text = text.replace(placeholder, placeholder * PROBE_TOKENS)
    begun = tokenizer.bos_token is not None and text.startswith(str(tokenizer.bos_token))
    return list(tokenizer(text, add_special_tokens=not begun)["input_ids"])


def _frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The special tokens that the tokenizer puts before and after a text."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    before, after = whole[:start], whole[start + len(bare) :]
    return "".join(tokenizer.convert_ids_to_tokens(before)), "".join(tokenizer.convert_ids_to_tokens(after))


def _plain(placeholder: str, before: str, space: str, after: str, gap: str) -> str:
    """BLIP-2's prompt, with the folder's tokens as variables in front of it."""
    values = {"placeholder": placeholder, "before": before + space, "space": space, "after": after, "gap": gap}
    return "".join(f"{{%- set {name} = {_quoted(value)} -%}}" for name, value in values.items()) + _PLAIN


def _quoted(text: str) -> str:
    """A string as jinja writes it."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"
