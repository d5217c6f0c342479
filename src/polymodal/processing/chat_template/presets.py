"""Chat templates by name.

A preset is the same jinja text that a Hugging Face tokenizer would carry, so it can be exported as it is. Sources:
ChatML (OpenAI), Llama 2 and 3 (Meta's model cards), Mistral 7B Instruct v0.1, Vicuna v1 as LLaVA-1.5 uses it, and
LLaVA's `plain` for stage 1. Differences on purpose: no preset trims what people wrote; Llama 2 has no space between an
answer and `</s>`; and the space before an answer ("ASSISTANT: ") is part of the prompt. So what is trained is exactly
the answer and its end token. SentencePiece tokenizers draw that space into the answer's first token, as ever.
`polymodal.safety.jinja_sandbox` compiles them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from polymodal.errors import PolymodalError
from polymodal.messages import Message

_SYSTEM_FIRST = r"""
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}
{%- else -%}
{%- set system = none -%}{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('after an optional system message, turns must alternate: user, assistant, user, ...') -}}
{%- endif -%}
{%- endfor -%}
"""

_CHATML = r"""
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

_LLAMA2 = (
    _SYSTEM_FIRST
    + r"""
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{{- bos_token -}}{{- '[INST] ' -}}
{%- if loop.first and system is not none -%}{{- '<<SYS>>\n' + system + '\n<</SYS>>\n\n' -}}{%- endif -%}
{{- message['content'] + ' [/INST] ' -}}
{%- else -%}
{{- message['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
)

_LLAMA3 = r"""
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""

_MISTRAL = (
    _SYSTEM_FIRST
    + r"""
{{- bos_token -}}
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{{- '[INST] ' -}}
{%- if loop.first and system is not none -%}{{- system + '\n\n' -}}{%- endif -%}
{{- message['content'] + ' [/INST] ' -}}
{%- else -%}
{{- message['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
)

_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user\\'s questions."
)

_VICUNA = (
    _SYSTEM_FIRST
    + r"""
{{- bos_token -}}
{%- if system is none -%}{{- '"""
    + _VICUNA_SYSTEM
    + r""" ' -}}{%- else -%}{{- system + ' ' -}}{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{{- 'USER: ' + message['content'] + ' ASSISTANT: ' -}}
{%- else -%}
{{- message['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""
)

_PLAIN = r"""
{{- bos_token -}}
{%- for message in messages -%}
{{- message['content'] -}}{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
"""


_T5 = (
    _SYSTEM_FIRST
    + r"""
{%- if system is not none -%}{{- system + ' ' -}}{%- endif -%}
{%- for message in turns -%}
{{- message['content'] + eos_token -}}
{%- endfor -%}
"""
)


@dataclass(frozen=True)
class Preset:
    """A chat template that has a name."""

    jinja: str  # The template's text
    tokens: tuple[str, ...] = ()  # Tokens that the tokenizer must have as single special tokens
    needs_eos: bool = False  # Answers end with the tokenizer's own end token, so it must have one
    media_only: bool = False  # Stage 1 of LLaVA: of everything but the assistant's turns only the media are kept


PRESETS: dict[str, Preset] = {
    "chatml": Preset(_CHATML.strip(), ("<|im_start|>", "<|im_end|>")),
    "llama2": Preset(_LLAMA2.strip(), needs_eos=True),
    "llama3": Preset(_LLAMA3.strip(), ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "mistral": Preset(_MISTRAL.strip(), needs_eos=True),
    "vicuna": Preset(_VICUNA.strip(), needs_eos=True),
    "t5": Preset(_T5.strip(), needs_eos=True),
    "plain": Preset(_PLAIN.strip(), needs_eos=True, media_only=True),
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
