"""`polymodal data check`: every row read, its media decoded and its conversation tokenised, before training does it.

A row goes through the same reader, decoder and processor as in training, so what passes here passes there.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polymodal.data.check.fix import Repair, make_repair
from polymodal.data.check.rows import FAULTS, Finding, Inspected, Row, make_inspector, read_row, short
from polymodal.data.load import iter_rows
from polymodal.data.readers.conversations import Record
from polymodal.data.readers.json_files import LIST, file_form
from polymodal.data.readers.registry import detect_format
from polymodal.errors import DataError
from polymodal.messages import Media
from polymodal.processing.processor import Processor
from polymodal.utils.files import write_text
from polymodal.utils.threads import Progress, ahead, quiet


@dataclass(frozen=True)
class Shown:
    """A row sampled for the report: its first medium, what is asked and what is answered."""

    id: str
    where: str
    medium: Media
    question: str
    answer: str


@dataclass
class FileResult:
    """Counts of one file."""

    path: Path  # The file
    rows: int = 0  # Its rows
    dropped: int = 0  # Rows that must go
    warned: int = 0  # Rows kept with a warning
    repaired: int = 0  # Rows that --fix repaired
    fixed: Path | None = None  # The corrected file, where one was written


@dataclass
class Summary:
    """What a check found."""

    files: list[FileResult] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # Rows with each fault
    # Place, id and reason of the first rows with each fault
    examples: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)
    repairs: Counter[str] = field(default_factory=Counter)  # Rows that each repair changed
    # One line for each dropped row: file, id, row, line, code, reason
    dropped: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)  # The same for rows that were kept with a warning
    tokens: list[int] = field(default_factory=list)  # Tokens of each row that was kept
    targets: list[int] = field(default_factory=list)  # Trained tokens of each
    turns: list[int] = field(default_factory=list)  # Answers of each
    silent: int = 0  # Answers that the data keep out of the loss
    fields: Counter[str] = field(default_factory=Counter)  # Rows with reasoning and with tools, refused ones too
    images: list[int] = field(default_factory=list)  # Images of each
    tiles: list[int] = field(default_factory=list)  # Tiles of each row with images
    sizes: list[tuple[int, int]] = field(default_factory=list)  # Height and width of each image
    videos: list[tuple[int, float]] = field(default_factory=list)  # Frames and seconds of each video
    sounds: list[tuple[float, int]] = field(default_factory=list)  # Seconds and samples a second of each sound
    pages: list[int] = field(default_factory=list)  # Pages that are read of each document
    kinds: Counter[str] = field(default_factory=Counter)  # Rows of each kind
    sources: Counter[str] = field(default_factory=Counter)  # Rows of each source
    shown: list[Shown] = field(default_factory=list)  # Rows for the report

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files)

    @property
    def dropped_share(self) -> float:
        """Share of all rows that must go."""
        return len(self.dropped) / self.rows if self.rows else 0.0

    @property
    def media(self) -> dict[str, Any]:
        """What was decoded, in numbers."""
        return {
            "images": len(self.sizes),
            "videos": len(self.videos),
            "video_frames": sum(frames for frames, _ in self.videos),
            "video_seconds": round(sum(seconds for _, seconds in self.videos), 3),
            "sounds": len(self.sounds),
            "sound_seconds": round(sum(seconds for seconds, _ in self.sounds), 3),
            "sound_rates": dict(sorted(Counter(rate for _, rate in self.sounds).items())),
            "documents": len(self.pages),
            "pages": sum(self.pages),
        }


def summary_json(summary: Summary) -> str:
    """Write the counts for scripts."""
    plain = {
        "rows": summary.rows,
        "dropped": len(summary.dropped),
        "dropped_share": summary.dropped_share,
        "warned": sum(file.warned for file in summary.files),
        "faults": dict(sorted(summary.counts.items())),
        "repairs": dict(sorted(summary.repairs.items())),
        "tokens": sum(summary.tokens),
        "trained_tokens": sum(summary.targets),
        "answers_without_loss": summary.silent,
        "rows_with": dict(sorted(summary.fields.items())),
        **summary.media,
        "files": [vars(file) for file in summary.files],
    }
    return json.dumps(plain, indent=2, ensure_ascii=False, default=str) + "\n"


JSON_FORMATS = ("json", "llava", "messages", "openai")
SAMPLES = 12
"""Rows shown with their image, video or sound in the report."""
EXAMPLES = 5
"""Rows named for each fault in the report."""


class Checker:
    """A check in progress: what was seen so far, and what becomes of the next row."""

    def __init__(self, inspect: Callable[[Record], Inspected], *, fix: bool) -> None:
        self.inspect = inspect
        self.repair: Repair | None = make_repair(lambda id: id in self._ids) if fix else None
        self.summary = Summary()
        self._seen: dict[bytes, str] = {}
        self._ids: set[str] = set()
        self._sampled: list[tuple[bytes, int, Shown]] = []

    def start_file(self, path: Path) -> FileResult:
        """Begin a file; ids count from here, duplicate rows over all files."""
        self._ids = set()
        self.summary.files.append(FileResult(path))
        return self.summary.files[-1]

    def add(self, row: Row, seen: Inspected) -> str | None:
        """Judge a row."""
        summary, file = self.summary, self.summary.files[-1]
        file.rows += 1
        findings = self._findings(row, seen)
        for code in dict.fromkeys(finding.code for finding in findings):
            summary.counts[code] += 1
            reason = next(finding.reason for finding in findings if finding.code == code)
            examples = summary.examples.setdefault(code, [])
            if len(examples) < EXAMPLES:
                examples.append((row.where, row.id, reason))
        said = row.record.messages if row.record is not None else ()
        summary.fields.update({name for message in said for name in message.fields} - {"name", "tool_call_id"})
        text = row.raw.text
        if findings and self.repair is not None:
            row, seen, findings, names = self._repaired(row, seen, findings)
            summary.repairs.update(names)
            file.repaired += bool(names)
            text = json.dumps(row.raw.data, ensure_ascii=False) if names else text
        fatal = [finding for finding in findings if FAULTS[finding.code].severity == "drop"]
        if findings:
            first = (fatal or findings)[0]
            line = {
                "file": str(file.path),
                "id": row.id,
                "row": row.raw.number,
                "line": row.raw.line,
                "code": first.code,
                "reason": first.reason,
                "advice": FAULTS[first.code].advice,
                "all": sorted({finding.code for finding in findings}),
            }
            (summary.dropped if fatal else summary.warnings).append(line)
        if fatal:
            file.dropped += 1
            return None
        file.warned += bool(findings)
        self._keep(row, seen)
        return text

    def _findings(self, row: Row, seen: Inspected) -> list[Finding]:
        """All findings of a row, those that depend on earlier rows too."""
        findings = [*row.findings, *seen.findings]
        if seen.content in self._seen and seen.content:
            findings.append(Finding("duplicate-row", f"the same as {self._seen[seen.content]}"))
        elif row.record is not None and row.id in self._ids:
            findings.append(Finding("duplicate-id", f"the id {row.id!r} was used before"))
        return findings

    def _repaired(
        self, row: Row, seen: Inspected, findings: list[Finding]
    ) -> tuple[Row, Inspected, list[Finding], tuple[str, ...]]:
        """Repair as long as it helps: one repair may bring the next fault to light."""
        assert self.repair is not None
        names: tuple[str, ...] = ()
        for _ in range(4):
            done = self.repair(row, findings)
            if done is None:
                break
            row, more = done
            names += more
            seen = self.inspect(row.record) if row.record is not None else Inspected()
            findings = self._findings(row, seen)
        return row, seen, findings, names

    def _keep(self, row: Row, seen: Inspected) -> None:
        summary, record = self.summary, row.record
        assert record is not None  # a row that could not be read has a finding that drops it
        self._ids.add(row.id)
        self._seen.setdefault(seen.content, row.where)
        summary.tokens.append(seen.tokens)
        summary.targets.append(seen.targets)
        answers = [message for message in record.messages if message.role == "assistant"]
        summary.turns.append(len(answers))
        summary.silent += sum(not answer.train for answer in answers)
        summary.images.append(len(seen.sizes))
        if seen.tiles:
            summary.tiles.append(seen.tiles)
        for name in ("sizes", "videos", "sounds", "pages"):
            getattr(summary, name).extend(getattr(seen, name))
        kinds = record.extra.get("kinds")
        summary.kinds.update([str(kind) for kind in kinds] if isinstance(kinds, list) else [record.kind])
        summary.sources[record.source] += 1
        self._sample(row, seen, record)

    def _sample(self, row: Row, seen: Inspected, record: Record) -> None:
        """Keep a few rows with media, drawn evenly and the same on every run: those of the largest hash."""
        medium = next((part for message in record.messages for part in message.media), None)
        if medium is None:
            return
        first = {message.role: message.text for message in reversed(record.messages)}
        question, answer = short(first.get("user", ""), 160), short(first.get("assistant", ""), 240)
        shown = Shown(row.id, row.where, medium, question, answer)
        entry = (hashlib.sha256(seen.content).digest(), -row.raw.number, shown)
        self._sampled = sorted([*self._sampled, entry], key=lambda entry: entry[:2])[-SAMPLES:]
        self.summary.shown = [shown for *_, shown in self._sampled]


def check_files(
    paths: Sequence[Path],
    processor: Processor,
    output: Path,
    *,
    image_root: Path | None = None,
    form: str = "auto",
    annotations: Path | None = None,
    max_length: int = 2048,
    fix: bool = False,
    workers: int = 2,
    progress: Progress = quiet,
) -> Summary:
    """Check data files; write `dropped.jsonl`, `warnings.jsonl` and, with `fix`, corrected files."""
    checker = Checker(make_inspector(processor, max_length), fix=fix)
    for number, path in enumerate(paths):
        result = checker.start_file(path)
        found = detect_format(path) if form == "auto" else form
        if fix and not (path.is_file() and found in JSON_FORMATS):
            raise DataError(f"{path}: --fix writes JSON lists and JSONL only; check this file without it")
        rows, again = (iter_rows(path, image_root, format=found, annotations=annotations) for _ in range(2))
        total = sum(1 for _ in again)
        judged = progress(_judged(checker, map(read_row, rows), workers), f"checking {path.name}", total)
        if fix:
            twins = sum(other.name == path.name for other in paths[:number])
            result.fixed = output / f"{path.stem}.fixed{f'-{twins + 1}' if twins else ''}{path.suffix}"
            _write_rows(result.fixed, judged, as_list=file_form(path) == LIST)
        else:
            for _ in judged:
                pass
    for name, lines in (("dropped.jsonl", checker.summary.dropped), ("warnings.jsonl", checker.summary.warnings)):
        write_text(output / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return checker.summary


def _write_rows(path: Path, texts: Iterable[str | None], *, as_list: bool) -> None:
    """Write the rows that are kept while they come; the file appears when it is whole."""
    work = path.with_name(f".{path.name}.tmp")
    try:
        with work.open("w", encoding="utf-8", newline="\n") as handle:
            before = "[\n" if as_list else ""
            for text in texts:
                if text is not None:
                    handle.write(f"{before}{text}" if as_list else f"{text}\n")
                    before = ",\n"
            if as_list:
                handle.write("[]\n" if before == "[\n" else "\n]\n")
        work.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        work.unlink(missing_ok=True)


def _judged(checker: Checker, rows: Iterator[Row], workers: int) -> Iterator[str | None]:
    """Inspect rows in threads and judge them in order."""

    def inspect(row: Row) -> tuple[Row, Inspected]:
        return row, checker.inspect(row.record) if row.record is not None else Inspected()

    for row, seen in ahead(inspect, rows, workers):
        yield checker.add(row, seen)
