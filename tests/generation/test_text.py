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


def test_stop_id_ends_without_text() -> None:
    a, b = TOKENIZER.encode("ab", add_special_tokens=False)
    stream = TextStream(TOKENIZER, stop_ids=[b])
    assert stream.push(a) + stream.push(b) + stream.finish() == "a" and stream.stopped
