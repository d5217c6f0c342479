"""Whole conversations under published chat templates have the ids of `apply_chat_template`, one for one."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from polymodal.config import TemplateConfig
from polymodal.errors import ConfigError, PolymodalError
from polymodal.messages import Image, Message, assistant, system, user
from polymodal.processing.chat_template.encode import ChatTemplate, Rendered
from tests.processing.published_templates import PUBLISHED, R1
from tests.processing.test_chat_template_tokenizers import CORPUS, with_bytes

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = ("byte_level", "legacy", "metaspace_first", "gemma")
MORE = ["Two\n\nlines\n\n\nof text", "user\nassistant\nmodel\n  indented  twice", "<<SYS>>\nS\n<</SYS>>\n\n [/INST] a"]


@cache
def make_tokenizer(name: str, kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer of a kind, with a template and its control tokens."""
    source, _, tokens = PUBLISHED[name]
    raw = Tokenizer(models.BPE(unk_token=None if kind == "byte_level" else "<unk>", fuse_unk=True))
    options: dict[str, Any] = {"vocab_size": 420, "show_progress": False}
    if kind == "byte_level":
        words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
        raw.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
        raw.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
        raw.train_from_iterator(CORPUS + MORE, trainers.BpeTrainer(**options))
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        lines = [line for text in CORPUS + MORE for line in text.splitlines()]
        raw.train_from_iterator(lines, trainers.BpeTrainer(**options, special_tokens=["<unk>"]))
        raw = with_bytes(raw)
        raw.pre_tokenizer, raw.normalizer = None, normalizers.Replace(" ", "▁")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        raw.decoder = decoders.Sequence(steps if kind == "gemma" else [*steps, decoders.Strip(" ", 1, 0)])
        if kind == "legacy":
            raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        elif kind == "metaspace_first":
            raw.normalizer = None
            raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:  # Gemma's has white space among its added tokens
            raw.add_tokens([AddedToken(char * n, normalized=False) for char in ("\n", "▁") for n in (2, 3, 4)])
    # Phi-3's take the white space behind them
    raw.add_special_tokens(["<s>", "</s>", *(AddedToken(token, rstrip=name == "phi3") for token in tokens)])
    raw.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = source
    return tokenizer


def ours(name: str, kind: str, messages: list[Message], **more: Any) -> Rendered:
    tokenizer = make_tokenizer(name, kind)
    config = TemplateConfig(enable_thinking=more.pop("enable_thinking", None))
    return ChatTemplate(tokenizer, config, len(tokenizer)).render(messages, **more)


def theirs(name: str, kind: str, messages: list[Message], **more: Any) -> list[int]:
    plain = [{"role": message.role, "content": message.text} for message in messages]
    return list(make_tokenizer(name, kind).apply_chat_template(plain, tokenize=True, return_dict=False, **more))


def trained(name: str, kind: str, rendered: Rendered) -> str:
    kept = [token for token, mask in zip(rendered.input_ids, rendered.loss_mask) if mask]
    return str(make_tokenizer(name, kind).decode(kept, clean_up_tokenization_spaces=False))


TURNS = [user("What is this?"), assistant("A small cat."), user("And 12 dogs?\n"), assistant("Two.\n\nThe cat sits")]
ODD = [user(" \n  Hello  there \n\n"), assistant("It's 猫 é 😀 \n"), user("\n\n[INST] a\nb"), assistant("x ")]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_are_those_of_apply_chat_template(name: str, kind: str) -> None:
    if (name, kind) == ("phi3", "gemma"):
        pytest.skip("tokens that take white space away beside tokens of white space: no such tokenizer")
    chats = [TURNS, ODD]
    if name not in ("gemma", "mistral"):
        chats += [[system("Be brief.\n"), *chat] for chat in chats]
    chats.append([user(""), assistant("A")])
    for chat in chats:
        assert ours(name, kind, chat).input_ids == theirs(name, kind, chat)
        asked = ours(name, kind, chat[:-1], add_generation_prompt=True).input_ids
        assert asked == theirs(name, kind, chat[:-1], add_generation_prompt=True)
        assert ours(name, kind, chat).input_ids[: len(asked)] == asked


@pytest.mark.parametrize("name", PUBLISHED)
def test_typed_control_tokens_stay_text(name: str) -> None:
    kind, tokens = PUBLISHED[name][1:]
    tokenizer = make_tokenizer(name, kind)
    special = {*tokenizer.all_special_ids, *tokenizer.convert_tokens_to_ids(["<think>", "</think>"])}
    special -= {tokenizer.unk_token_id}
    typed = "".join(("a<s></s> b", *tokens))
    chat = [user(typed), assistant("A"), user("Q" + typed), assistant("B" + typed)]
    harmless = [user("a"), assistant("A"), user("Q"), assistant("B")]
    found, plain = ours(name, kind, chat), ours(name, kind, harmless)
    if "think" not in tokenizer.chat_template:
        special -= set(tokenizer.convert_tokens_to_ids(["<think>", "</think>"]))
    assert [i for i in found.input_ids if i in special] == [i for i in plain.input_ids if i in special]
    shown = tokenizer.decode(found.input_ids, clean_up_tokenization_spaces=False)
    assert shown.count(typed) == 3
    assert plain.input_ids == theirs(name, kind, harmless)


THOUGHT = "<think>\nTwo and two.\n</think>\n\nFour."
REASONED = {
    "one": [user("2+2?"), assistant(THOUGHT)],
    "earlier": [user("2+2?"), assistant(THOUGHT), user("3+3?"), assistant("<think>\nThree.\n</think>\n\nSix.")],
    "none": [user("2+2?"), assistant("Four.")],
    "earlier only": [user("2+2?"), assistant(THOUGHT), user("3+3?"), assistant("Six.")],
    "empty": [user("2+2?"), assistant("<think>\n\n</think>\n\nFour.")],
    "no first tag": [user("2+2?"), assistant("Two and two.</think>Four.")],
    "odd space": [user("2+2?"), assistant("\n<think> Two\n\nand two.  </think> Four.\n")],
    "newline first": [user("2+2?"), assistant("\n\nFour.")],
    "no answer": [user("2+2?"), assistant("<think>\nHm.\n</think>\n\n")],
    "asked about": [user("What does <b> mean?"), assistant("<think>a</think>bold")],
}


@pytest.mark.parametrize("thinking", [None, True, False])
@pytest.mark.parametrize("case", REASONED)
@pytest.mark.parametrize("kind", ["byte_level", "legacy"])
def test_reasoning_as_qwen3_writes_it(kind: str, case: str, thinking: bool | None) -> None:
    chat = REASONED[case]
    more = {} if thinking is None else {"enable_thinking": thinking}
    found = ours("qwen3", kind, chat, enable_thinking=thinking)
    assert found.input_ids == theirs("qwen3", kind, chat, **more)
    asked = ours("qwen3", kind, chat[:-1], enable_thinking=thinking, add_generation_prompt=True).input_ids
    assert asked == theirs("qwen3", kind, chat[:-1], add_generation_prompt=True, **more)


def test_what_is_trained_of_reasoning() -> None:
    assert trained("qwen3", "byte_level", ours("qwen3", "byte_level", REASONED["one"])) == f"{THOUGHT}<|im_end|>"
    # The template drops earlier reasoning, and writes an empty block before a last answer without any.
    rendered = ours("qwen3", "byte_level", REASONED["earlier only"])
    assert trained("qwen3", "byte_level", rendered) == "Four.<|im_end|><think>\n\n</think>\n\nSix.<|im_end|>"
    rendered = ours("qwen3", "byte_level", REASONED["none"], enable_thinking=False)
    assert trained("qwen3", "byte_level", rendered) == "Four.<|im_end|>"
    for thinking, chat in itertools.product((None, False), (REASONED["one"], REASONED["none"])):
        full = ours("qwen3", "byte_level", chat, enable_thinking=thinking).input_ids
        asked = ours("qwen3", "byte_level", chat[:1], enable_thinking=thinking, add_generation_prompt=True).input_ids
        assert thinking is False or full[: len(asked)] == asked


@pytest.mark.parametrize("text", ["a</think>b</think>c", "<think>a<think>b</think>c"])
def test_reasoning_that_cannot_be_told_apart_is_refused_or_the_same(text: str) -> None:
    chat = [user("Q"), assistant(text)]
    try:
        found = ours("qwen3", "byte_level", chat)
    except PolymodalError as error:
        assert "message 2" in str(error)
    else:
        assert found.input_ids == theirs("qwen3", "byte_level", chat)


LOOKING = {
    "length": "{% if m.content | length < 9 %}short {% endif %}{{ m.content }}",
    "replace": "{{ m.content.replace('bad', 'good') }}",
    "start": "{% if m.content.startswith('bad') %}!{% endif %}{{ m.content }}",
    "end": "{{ m.content }}{% if 'dog' in m.content %}!{% endif %}",
}


@pytest.mark.parametrize("how", LOOKING)
def test_templates_that_look_at_content_are_refused_by_name(how: str) -> None:
    tokenizer = make_tokenizer("chatml", "byte_level")
    source = "{% for m in messages %}<|im_start|>" + LOOKING[how] + "<|im_end|>{% endfor %}"
    template = ChatTemplate(tokenizer, TemplateConfig(chat_template=source), len(tokenizer))
    with pytest.raises(PolymodalError, match="the chat template looks at what message 1 says"):
        template.render([user("bad dog"), assistant("And again, what is it?")])
    fine = [user("What is this thing?", Image("a.png")), assistant("A thing, as you see.")]
    assert template.render(fine, [2]).input_ids.count(len(tokenizer)) == 2


def test_a_prompt_that_no_answer_begins_with_is_refused() -> None:
    tokenizer = make_tokenizer("chatml", "byte_level")
    with pytest.raises(ConfigError, match="own_generation_prompt"):
        ChatTemplate(tokenizer, TemplateConfig(chat_template=R1), len(tokenizer))
    config = TemplateConfig(chat_template=R1, own_generation_prompt=True)
    template = ChatTemplate(tokenizer, config, len(tokenizer))
    chat = [user("Q"), assistant("<think>\nHm.\n</think>\nA"), user("R")]
    plain = [{"role": message.role, "content": message.text} for message in chat]
    for asks in (True, False):
        stock = tokenizer.apply_chat_template(plain, chat_template=R1, return_dict=False, add_generation_prompt=asks)
        assert template.render(chat, add_generation_prompt=asks).input_ids == stock
