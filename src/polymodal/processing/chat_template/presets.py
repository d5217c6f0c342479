"""Chat templates by name; the texts lie in `presets/`, a file each.

A preset is the same jinja text that a Hugging Face tokenizer would carry, so it can be exported as it is. Sources:
ChatML (OpenAI), Llama 2 and 3 (Meta's model cards), Mistral 7B Instruct v0.1, Vicuna v1 as LLaVA-1.5 uses it, and
LLaVA's `plain` for stage 1. Differences on purpose: no preset trims what people wrote; Llama 2 has no space between an
answer and `</s>`; and the space before an answer ("ASSISTANT: ") is part of the prompt. So what is trained is exactly
the answer and its end token. SentencePiece tokenizers draw that space into the answer's first token, as ever.
`polymodal.safety.jinja_sandbox` compiles them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import ConfigError, PolymodalError, unknown_name
from polymodal.messages import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FOLDER = Path(__file__).with_name("presets")


@dataclass(frozen=True)
class Preset:
    """A chat template that has a name."""

    jinja: str  # The template's text
    tokens: tuple[str, ...] = ()  # Tokens that the tokenizer must have as single special tokens
    needs_eos: bool = False  # Answers end with the tokenizer's own end token, so it must have one
    media_only: bool = False  # Stage 1 of LLaVA: of everything but the assistant's turns only the media are kept


def _preset(name: str, *tokens: str, needs_eos: bool = False, media_only: bool = False) -> Preset:
    """Read `presets/NAME.jinja`."""
    text = (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8").rstrip("\n")
    return Preset(text, tokens, needs_eos, media_only)


PRESETS: dict[str, Preset] = {
    "chatml": _preset("chatml", "<|im_start|>", "<|im_end|>"),
    "llama2": _preset("llama2", needs_eos=True),
    "llama3": _preset("llama3", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": _preset("mistral", needs_eos=True),
    "vicuna": _preset("vicuna", needs_eos=True),
    "t5": _preset("t5", needs_eos=True),
    "plain": _preset("plain", needs_eos=True, media_only=True),
}
"""Name -> preset."""


def check_plain(messages: Sequence[Message]) -> None:
    """Refuse what the template of LLaVA's first stage, which drops questions, would make nonsense of."""
    turns = [message for message in messages if message.role != "system"]
    if [turn.role for turn in turns[:2]] not in (["user"], ["user", "assistant"]) or len(turns) > 2:
        raise PolymodalError(
            "the plain template takes one question and one answer, since it leaves questions out; this conversation "
            f"has {len(turns)} turns: choose another template, or give each answer a conversation of its own"
        )
    if not turns[0].media:
        raise PolymodalError(
            "the plain template keeps only the images of a question, and this one has none, so nothing would be left "
            "to answer; choose another template, or leave it out"
        )


def template_source(tokenizer: PreTrainedTokenizerBase, name: str) -> tuple[str, Preset | None]:
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
