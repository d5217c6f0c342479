"""Streaming text: the pieces joined are the whole, stop texts never leak, characters are never split."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from polymodal.generation.streaming import UNFINISHED, TextStream


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, so that every character beyond ASCII is split over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


TOKENIZER = byte_tokenizer()


@given(st.text(max_size=40))
def test_pieces_join_to_the_whole(text: str) -> None:
    stream = TextStream(TOKENIZER)
    pieces = [stream.push(i) for i in TOKENIZER.encode(text, add_special_tokens=False)]
    assert all(UNFINISHED not in piece for piece in pieces) or UNFINISHED in text
    assert "".join(pieces) + stream.finish() == text


@pytest.mark.parametrize("stop", ["END", "\n\n", "é!"])
def test_stop_text_is_cut_and_never_shown(stop: str) -> None:
    stream = TextStream(TOKENIZER, stop=(stop,))
    shown = ""
    for token in TOKENIZER.encode(f"EN is no {stop[:1]} yet{stop}after", add_special_tokens=False):
        shown += stream.push(token)
        if stream.stopped:
            break
    assert shown == f"EN is no {stop[:1]} yet" and stream.text == shown


def byte_fallback() -> PreTrainedTokenizerFast:
    """Words of SentencePiece's kind, and a token for each byte, as Llama 2 has them."""
    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "b", "▁"]
    raw = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")


BYTES = byte_fallback()


def streamed(data: bytes, before: tuple[str, ...] = (), after: tuple[str, ...] = ()) -> tuple[list[str], str]:
    """The pieces of a text given as bytes, and the whole."""
    stream = TextStream(BYTES, stop_ids=[1])
    tokens = [*before, *(f"<0x{byte:02X}>" for byte in data), *after]
    pieces = [stream.push(i) for i in BYTES.convert_tokens_to_ids(tokens)]
    return [*pieces, stream.finish()], stream.text


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_that_is_cut_off_spoils_no_other(cut: int) -> None:
    pieces, text = streamed("描述 🐈".encode()[:-cut], before=("▁a",))
    assert text == "a描述 " + UNFINISHED * (4 - cut) and "".join(pieces) == text
    assert pieces[3] == "描" and pieces[6] == "述"  # as soon as they are whole


def test_a_wrong_byte_spoils_no_character() -> None:
    assert (
        streamed(b"\xff" + "猫".encode() + b"\x80" + "é".encode(), ("▁a",), ("b",))[1]
        == f"a{UNFINISHED}猫{UNFINISHED}éb"
    )
    assert streamed("猫 🐈".encode())[1] == "猫 🐈"
    spelled = f"猫{UNFINISHED}é"  # a character like any other
    assert streamed(spelled.encode(), before=("▁a",), after=("b",))[1] == f"a{spelled}b"


@given(st.binary(max_size=12))
def test_bytes_are_never_lost(data: bytes) -> None:
    pieces, text = streamed(data, before=("▁a",), after=("b",))
    assert "".join(pieces) == text
    assert text.replace(UNFINISHED, "") == f"a{data.decode('utf-8', 'ignore').replace(UNFINISHED, '')}b"


def test_stop_id_ends_without_text() -> None:
    a, b = TOKENIZER.encode("ab", add_special_tokens=False)
    stream = TextStream(TOKENIZER, stop_ids=[b])
    assert stream.push(a) + stream.push(b) + stream.finish() == "a" and stream.stopped
