"""Questions about held-out images, each beside an image-blind control and the majority answer.

The control is the same model with every image replaced by plain grey of the same size, so what it scores comes from
language alone. The majority answer is the one that would score best if given to every question of a kind: what can be
had without looking or thinking. A failed generation is a failed item in the report, never an empty answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from polymodal.backends.base import Backend
from polymodal.errors import DataError, PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Image, Message
from polymodal.metrics.text import exact_match, mean_interval, mentions, word_recall

if TYPE_CHECKING:
    from polymodal.data.readers.conversations import Record

Metric = Callable[[str, Sequence[str]], float]

METRICS: dict[str, Metric] = {"name": mentions, "caption": word_recall, "caption_zh": word_recall}
"""The metric of a kind; exact match where a kind is not listed."""

GREY = (128, 128, 128)


@dataclass(frozen=True)
class Item:
    """One scored question."""

    id: str  # The record's id
    kind: str  # The record's kind
    accepted: tuple[str, ...]  # The right answers
    answer: str | None  # What the model said; None where it failed
    blind: str | None  # What it said about grey; None where it failed
    score: float  # Of `answer`
    blind_score: float  # Of `blind`
    error: str | None = None  # Why it failed, if it did


@dataclass(frozen=True)
class KindScore:
    """The mean scores of one kind."""

    kind: str  # The kind
    count: int  # Questions asked
    failed: int  # Questions that could not be answered; they count as wrong
    score: float  # Mean score, 0 to 1
    blind: float  # The image-blind control's
    majority: float  # The best constant answer's
    margin: tuple[float, float]  # 95% interval of `score - blind`, paired by question


def evaluate(
    model: Backend,
    records: Sequence[Record],
    *,
    batch_size: int = 16,
    params: GenerationParams | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Item]:
    """Ask every question twice: about the image, and about grey."""
    params = params or GenerationParams(max_new_tokens=24)
    questions: list[list[Message] | PolymodalError] = [_question(record) for record in records]
    total = 2 * len(records)
    answers: list[list[str | PolymodalError]] = []
    for conversations in (questions, [_blind(_question(record)) for record in records]):
        given: list[str | PolymodalError] = []
        for start in range(0, len(conversations), batch_size):
            given += _answer(model, conversations[start : start + batch_size], params)
            if progress is not None:
                progress(len(answers) * len(records) + len(given), total)
        answers.append(given)
    return [_item(record, seen, blind) for record, seen, blind in zip(records, *answers, strict=True)]


def summarise(items: Sequence[Item]) -> list[KindScore]:
    """Mean scores by kind, in order of first appearance."""
    by_kind: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        by_kind[item.kind].append(item)
    rows = []
    for kind, group in by_kind.items():
        scores = np.array([item.score for item in group])
        blind = np.array([item.blind_score for item in group])
        rows.append(
            KindScore(
                kind, len(group), sum(item.error is not None for item in group), float(scores.mean()),
                float(blind.mean()), _majority(kind, group), mean_interval(scores - blind),
            )
        )  # fmt: skip
    return rows


def table(rows: Sequence[KindScore]) -> str:
    """Rows as a Markdown table, in percent."""
    lines = [
        "| kind | metric | questions | model | image-blind | majority | margin over blind (95%) |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        metric = METRICS.get(row.kind, exact_match).__name__.replace("_", " ")
        low, high = row.margin
        lines.append(
            f"| {row.kind} | {metric} | {row.count} | {row.score:.1%} | {row.blind:.1%} | {row.majority:.1%} "
            f"| {row.score - row.blind:+.1%} ({low:+.1%} to {high:+.1%}) |"
        )
    return "\n".join(lines)


def _answer(
    model: Backend, conversations: Sequence[list[Message] | PolymodalError], params: GenerationParams
) -> list[str | PolymodalError]:
    """Answer some questions; one that cannot be asked or answered keeps its error."""
    asked = [messages for messages in conversations if not isinstance(messages, PolymodalError)]
    answers = iter(model.generate_batch(asked, params))
    return [messages if isinstance(messages, PolymodalError) else next(answers) for messages in conversations]


def _item(record: Record, seen: str | PolymodalError, blind: str | PolymodalError) -> Item:
    accepted = _accepted(record)
    metric = METRICS.get(record.kind, exact_match)
    failed = next((a for a in (seen, blind) if isinstance(a, PolymodalError)), None)
    return Item(
        id=record.id,
        kind=record.kind,
        accepted=accepted,
        answer=None if isinstance(seen, PolymodalError) else seen,
        blind=None if isinstance(blind, PolymodalError) else blind,
        score=0.0 if isinstance(seen, PolymodalError) else metric(seen, accepted),
        blind_score=0.0 if isinstance(blind, PolymodalError) else metric(blind, accepted),
        error=None if failed is None else str(failed),
    )


def _question(record: Record) -> list[Message]:
    if len(record.messages) < 2 or record.messages[-1].role != "assistant":
        raise DataError(f"{record.id}: a held-out record needs a question and its answer")
    return list(record.messages[:-1])


def _accepted(record: Record) -> tuple[str, ...]:
    answers = record.extra.get("answers")
    return tuple(answers) if answers else (record.messages[-1].text,)


def _blind(messages: Sequence[Message]) -> list[Message] | PolymodalError:
    """The control's question; an image that cannot be read fails it as it fails the question itself."""
    try:
        return in_grey(messages)
    except PolymodalError as error:
        return error


def in_grey(messages: Sequence[Message]) -> list[Message]:
    """Hide the images of a conversation."""
    from PIL import Image as PILImage

    from polymodal.media.image import open_image

    blind = []
    for message in messages:
        parts = [
            Image(PILImage.new("RGB", open_image(part.source).size, GREY)) if isinstance(part, Image) else part
            for part in message.parts
        ]
        blind.append(replace(message, parts=tuple(parts)))
    return blind


def _majority(kind: str, group: Sequence[Item]) -> float:
    """Score of the best constant answer among the accepted ones."""
    metric = METRICS.get(kind, exact_match)
    candidates = {item.accepted[0] for item in group}
    return max(sum(metric(answer, item.accepted) for item in group) / len(group) for answer in candidates)
