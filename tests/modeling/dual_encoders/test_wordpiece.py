"""The text tokenizer of small BLIP-2 runs: BERT's form, the same every time, with [DEC]."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, BertTokenizerFast

from polymodal.errors import CheckpointError, DataError
from polymodal.modeling.dual_encoders.blip2_stage1_folder import load_wordpiece, train_wordpiece

CAPTIONS = [
    "A red apple.",
    "two red apples on a table",
    "A table, red!",
    "红色的苹果",
    "an apple-red car",
    "Café au lait",
] * 3


def digest(vocabulary: dict[str, int]) -> str:
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()


def test_it_is_a_bert_tokenizer_with_dec(tmp_path: Path) -> None:
    train_wordpiece(CAPTIONS).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, BertTokenizerFast)
    assert (tokenizer.pad_token_id, tokenizer.cls_token, tokenizer.sep_token, tokenizer.bos_token) == (
        0,
        "[CLS]",
        "[SEP]",
        "[DEC]",
    )
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("A RED apple")["input_ids"])
    assert pieces == ["[CLS]", "a", "red", "apple", "[SEP]"]
    assert "[UNK]" in tokenizer.convert_ids_to_tokens(tokenizer("日")["input_ids"])
    for caption in CAPTIONS:
        ids = tokenizer(caption)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        letters = tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "")
        assert letters == caption.lower().replace(" ", "").replace("é", "e")
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_every_process_learns_the_same_vocabulary() -> None:
    script = (
        "from tests_wordpiece import CAPTIONS, digest, train_wordpiece\n"
        "print(digest(train_wordpiece(CAPTIONS, 60).get_vocab()))"
    ).replace("tests_wordpiece", Path(__file__).stem)
    found = {digest(train_wordpiece(CAPTIONS, 60).get_vocab())}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parent, timeout=120
        )
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.strip())
    assert len(found) == 1


def test_the_size_is_kept() -> None:
    letters = len(train_wordpiece(CAPTIONS, 1000, min_frequency=10**6))
    assert len(train_wordpiece(CAPTIONS, letters + 3)) == letters + 3
    with pytest.raises(DataError, match=f"{letters} pieces for their letters"):
        train_wordpiece(CAPTIONS, letters - 1)
    with pytest.raises(DataError, match="every caption is empty"):
        train_wordpiece(["", "  "])


def test_dec_is_added_to_berts_own(tmp_path: Path) -> None:
    words = {token: number for number, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat"])}
    BertTokenizerFast(vocab=words).save_pretrained(tmp_path)
    tokenizer = load_wordpiece(tmp_path)
    assert tokenizer.bos_token_id == 6 and len(tokenizer) == 7
    tokenizer.save_pretrained(tmp_path / "again")
    assert len(load_wordpiece(tmp_path / "again")) == 7


def test_other_tokenizers_are_refused(tmp_path: Path, byte_tokenizer: BertTokenizerFast) -> None:
    byte_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has no cls_token; a BERT tokenizer is needed"):
        load_wordpiece(tmp_path)
    with pytest.raises(CheckpointError, match="text tokenizer"):
        load_wordpiece(tmp_path / "nothing")
