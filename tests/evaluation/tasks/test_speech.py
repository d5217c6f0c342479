"""LibriSpeech: read in every form, asked as published, scored from files of answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.evaluation.mini import choices
from polymodal.errors import ConfigError, DataError
from polymodal.evaluation.results import table
from polymodal.evaluation.tasks import TASKS, find_task, read_examples
from polymodal.messages import Audio
from tests.evaluation.tasks.scripted import assert_golden_prompt, plain, predicted

TASK = TASKS["librispeech"]


def test_the_question_is_asked_as_published(tmp_path: Path) -> None:
    choices.write_librispeech(tmp_path, 2)
    assert_golden_prompt(TASK, tmp_path)


def test_every_form_gives_the_same_utterances(tmp_path: Path) -> None:
    choices.write_librispeech(tmp_path / "official", 6)
    rows = [{**row, "audio": b"RIFF"} for row in choices.librispeech_rows(6)]
    choices.parquet(tmp_path / "openslr" / "all" / "test.clean" / "0000.parquet", rows)
    lmms = [{"audio": row["audio"], "gt": row["text"], "source": "test-clean", "task": "asr_en"} for row in rows]
    choices.parquet(tmp_path / "lmms" / "data" / "librispeech_test_clean-00000-of-00001.parquet", lmms)
    official = read_examples(TASK, "test_clean", tmp_path / "official")
    assert plain(read_examples(TASK, "test_clean", tmp_path / "openslr")) == plain(official)
    other = read_examples(TASK, "test_clean", tmp_path / "lmms")  # which has no names
    assert sorted(plain(other, ids=False)) == sorted(plain(official, ids=False))
    path = tmp_path / "official" / "LibriSpeech" / "test-clean" / "61" / "70000" / "61-70000-0000.flac"
    assert official[0].messages[0].parts[0] == Audio(path)


def test_the_rate_is_all_edits_over_all_words(tmp_path: Path) -> None:
    folder = tmp_path / "LibriSpeech" / "dev-clean" / "1" / "2"
    choices.save(
        folder / "1-2.trans.txt", "1-2-0000 YES\n1-2-0001 IT WAS A DARK AND STORMY NIGHT\n1-2-0002 HE SAID NO\n"
    )
    choices.save(
        tmp_path / "LibriSpeech" / "test-clean" / "1" / "2" / "1-2.trans.txt", (folder / "1-2.trans.txt").read_text()
    )
    said = {"1-2-0000": "No, no!", "1-2-0001": "It was a dark, stormy night.", "1-2-0002": "he said: no"}
    document = predicted(TASK, tmp_path, said)
    # 2 edits of 1 word, 1 of 7, 0 of 3; the mean of utterances would be 71.4%
    assert document["figures"] == {"wer": pytest.approx(3 / 11)} and document["lower_is_better"]
    assert "| librispeech test_clean | wer | 3 | 27.3% |" in table([document])
    raw = predicted(TASK, tmp_path, said, variant="raw")["figures"]["wer"]
    assert raw == pytest.approx((2 + 7 + 3) / 11)


def test_a_wrong_split_and_a_broken_line_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="librispeech has the splits test_clean, test_other"):
        find_task("librispeech_test")
    choices.save(tmp_path / "test-clean" / "1" / "2" / "1-2.trans.txt", "1-2-0000\n")
    with pytest.raises(DataError, match=r"1-2.trans.txt: line 1 is not an utterance's name and its words"):
        read_examples(TASK, "test_clean", tmp_path)
    with pytest.raises(DataError, match=r"none of librispeech_test_other-\*.parquet"):
        read_examples(TASK, "test_other", tmp_path)
