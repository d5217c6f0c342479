"""LibriSpeech: what is said in a recording. The prompt is lmms-eval's, the normaliser Whisper's (`metrics.speech`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from polymodal.errors import DataError
from polymodal.evaluation.files import TableRow, file_in, located, need_rows, text_lines
from polymodal.evaluation.task import Example, Figures, Sample, Task
from polymodal.messages import Audio, user
from polymodal.metrics.speech import word_count

_ASKED = "Please recognize the speech and only output the recognized content:"


def _rows(folder: Path, split: str) -> Iterator[TableRow]:
    """Of the transcripts of a subset, an utterance a line; else of parquet."""
    part, noise = split.split("_")
    texts = sorted(folder.rglob(f"{part}-{noise}/**/*.trans.txt"))
    if not texts:
        names = (f"librispeech_{split}-*.parquet", f"{part}.{noise}/*.parquet", f"{noise}/{part}/*.parquet")
        yield from need_rows(folder, *names, f"{noise}/{part}-*.parquet", f"{split}-*.parquet")
    for path in texts:
        for number, line in text_lines(path):
            name, _, said = line.partition(" ")
            if not said:
                raise DataError(f"{path}: line {number} is not an utterance's name and its words")
            sound = file_in(path.parent, f"{name}.flac")
            yield located({"id": name, "text": said, "audio": sound}, f"{path}: line {number}")


def _read(folder: Path, split: str) -> Iterator[Example]:
    for number, row in enumerate(_rows(folder, split)):
        if row.get("audio") is None:
            raise DataError(f"{row.where}: the column `audio` is empty or not there")
        name = row.text("id", "file", default=str(number))
        yield Example(Path(name).stem, (user(Audio(row["audio"]), _ASKED),), (row.text("text", "gt"),))


def _corpus(samples: Sequence[Sample]) -> Figures:
    """All edits over all words."""
    words = [word_count(s.references[0], s.options.get("variant", "official")) for s in samples]
    edits = sum((s.score or 0.0) * max(1, count) for s, count in zip(samples, words, strict=True))
    return {"wer": edits / max(1, sum(words))}


LIBRISPEECH = Task(
    name="librispeech",
    about="read English speech; word error rate after Whisper's English normaliser (--variant basic, raw, lmms_eval)",
    metric="wer",
    splits=("test_clean", "test_other", "dev_clean", "dev_other"),
    read=_read,
    hub="lmms-lab-audio/librispeech",
    hub_files={split: [f"*{split}*.parquet"] for split in ("test_clean", "test_other", "dev_clean", "dev_other")},
    max_new_tokens=256,
    aggregate=_corpus,
    lower_is_better=True,
    needs=("audio",),
)

TASKS = (LIBRISPEECH,)
