"""LibriSpeech: what is said in a recording. The prompt is lmms-eval's, the normaliser Whisper's (`metrics.speech`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from polymodal.errors import DataError
from polymodal.evaluation.files import Row, file_in, rows_in, text_lines
from polymodal.evaluation.task import Example, Figures, Sample, Task
from polymodal.messages import Audio, user
from polymodal.metrics.speech import word_count

_ASKED = "Please recognize the speech and only output the recognized content:"


def _transcript(path: Path) -> Iterator[Row]:
    """An utterance a line."""
    for number, line in text_lines(path):
        name, _, said = line.partition(" ")
        if not said:
            raise DataError(f"{path}: line {number} is not an utterance's name and its words")
        sound = file_in(path.parent, f"{name}.flac")
        yield Row({"id": name, "text": said, "audio": sound}, f"{path}: line {number}")


def _read_librispeech(folder: Path, split: str) -> Iterator[Example]:
    part, noise = split.split("_")
    tables = [f"librispeech_{split}-*.parquet", f"{part}.{noise}/*.parquet", f"{noise}/{part}/*.parquet"]
    tables += [f"{noise}/{part}-*.parquet", f"{split}-*.parquet"]
    for number, row in enumerate(rows_in(folder, *tables, (f"{part}-{noise}/**/*.trans.txt", _transcript))):
        if row.get("audio") is None:
            raise DataError(f"{row.where}: the column `audio` is empty or not there")
        name = row.text("id", "file", default=str(number))
        yield Example(Path(name).stem, (user(Audio(row["audio"]), _ASKED),), (row.text("text", "gt"),))


def _librispeech_figures(samples: Sequence[Sample]) -> Figures:
    """All edits over all words."""
    words = [word_count(s.references[0], s.options.get("variant", "official")) for s in samples]
    edits = sum((s.score or 0.0) * max(1, count) for s, count in zip(samples, words, strict=True))
    return {"wer": edits / max(1, sum(words))}


LIBRISPEECH = Task(
    name="librispeech",
    about="read English speech; word error rate after Whisper's English normaliser (--variant basic, raw, lmms_eval)",
    metric="wer",
    splits=("test_clean", "test_other", "dev_clean", "dev_other"),
    read=_read_librispeech,
    hub="lmms-lab-audio/librispeech",
    hub_files={split: [f"*{split}*.parquet"] for split in ("test_clean", "test_other", "dev_clean", "dev_other")},
    max_new_tokens=256,
    aggregate=_librispeech_figures,
    lower_is_better=True,
    needs=("audio",),
)

TASKS = (LIBRISPEECH,)
