"""What a check of data found: counts by file and fault, the rows to drop, and the numbers behind the charts."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polymodal.messages import Source


@dataclass(frozen=True)
class Shown:
    """A row drawn by chance for the report: its first picture, what is asked and what is answered."""

    id: str
    where: str
    picture: Source
    question: str
    answer: str


@dataclass
class FileResult:
    """Counts of one file.

    Attributes:
        path: The file.
        rows: Its rows.
        dropped: Rows that must go.
        warned: Rows kept with a warning.
        repaired: Rows that --fix repaired.
        fixed: The corrected file, where one was written.
    """

    path: Path
    rows: int = 0
    dropped: int = 0
    warned: int = 0
    repaired: int = 0
    fixed: Path | None = None


@dataclass
class Summary:
    """What a check found.

    Attributes:
        files: Counts of each file.
        counts: Rows with each fault.
        examples: Place, id and reason of the first rows with each fault.
        repairs: Rows that each repair changed.
        dropped: One line for each dropped row: file, id, row, line, code, reason.
        warnings: The same for rows that were kept with a warning.
        tokens: Tokens of each row that was kept.
        targets: Trained tokens of each.
        turns: Answers of each.
        pictures: Pictures of each.
        tiles: Tiles of each row with pictures.
        sizes: Height and width of each picture.
        kinds: Rows of each kind.
        sources: Rows of each source.
        shown: Rows for the report.
    """

    files: list[FileResult] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)
    repairs: Counter[str] = field(default_factory=Counter)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    pictures: list[int] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    shown: list[Shown] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files)

    @property
    def dropped_share(self) -> float:
        """Share of all rows that must go."""
        return len(self.dropped) / self.rows if self.rows else 0.0


def summary_json(summary: Summary) -> str:
    """Write the counts for scripts.

    Args:
        summary: What was found.

    Returns:
        JSON text.
    """
    plain = {
        "rows": summary.rows,
        "dropped": len(summary.dropped),
        "dropped_share": summary.dropped_share,
        "warned": sum(file.warned for file in summary.files),
        "faults": dict(sorted(summary.counts.items())),
        "repairs": dict(sorted(summary.repairs.items())),
        "tokens": sum(summary.tokens),
        "trained_tokens": sum(summary.targets),
        "pictures": len(summary.sizes),
        "files": [
            {
                "path": str(file.path),
                "rows": file.rows,
                "dropped": file.dropped,
                "warned": file.warned,
                "repaired": file.repaired,
                "fixed": None if file.fixed is None else str(file.fixed),
            }
            for file in summary.files
        ],
    }
    return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"
