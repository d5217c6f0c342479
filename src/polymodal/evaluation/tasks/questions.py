"""Questions about held-out images, each beside an image-blind control and the majority answer.

The control is the same model with every image replaced by plain grey of the same size, so what it scores comes from
language alone. What can be had without looking or thinking stands beside it twice: the majority answer, the single
accepted answer that scores best if given to every question of a kind, and the constant text, words strung together for
the metric's sake, no longer than the model's longest answer. A failed generation is a failed item, never an empty one.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image as PILImage

from polymodal.backends.base import Backend
from polymodal.data.readers.conversations import Record
from polymodal.errors import DataError, PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.media.image import open_image
from polymodal.messages import Image, Message
from polymodal.metrics.text import exact_match, markdown_table, mean_interval, mentions, word_recall, words_of

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
    majority: float  # The best single accepted answer's
    constant: float  # The best constant text's, never below `majority`
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
    return [_kind_score(kind, group) for kind, group in by_kind.items()]


def _kind_score(kind: str, group: Sequence[Item]) -> KindScore:
    metric = METRICS.get(kind, exact_match)
    scores, blind = np.array([(item.score, item.blind_score) for item in group], dtype=float).T
    accepted = [item.accepted for item in group]
    majority = max(_mean(metric, answer, accepted) for answer in {item.accepted[0] for item in group})
    longest = max(len(words_of(item.answer or "")) for item in group)
    return KindScore(
        kind=kind,
        count=len(group),
        failed=sum(item.error is not None for item in group),
        score=float(scores.mean()),
        blind=float(blind.mean()),
        majority=majority,
        constant=max(majority, _mean(metric, constant_text(metric, accepted, longest), accepted)),
        margin=mean_interval(scores - blind),
    )


def constant_text(metric: Metric, accepted: Sequence[Sequence[str]], longest: int, tried: int = 48) -> str:
    """Words of the accepted answers, the frequent first, each kept where it raises the mean score of the text."""
    counts = Counter(word for answers in accepted for word in {word for answer in answers for word in words_of(answer)})
    text, best = "", 0.0
    for word, _ in counts.most_common(tried):
        longer = f"{text} {word}".strip()
        score = _mean(metric, longer, accepted)
        if score > best and len(words_of(longer)) <= longest:
            text, best = longer, score
    return text


def _mean(metric: Metric, answer: str, accepted: Sequence[Sequence[str]]) -> float:
    return sum(metric(answer, right) for right in accepted) / len(accepted)


def table(rows: Sequence[KindScore]) -> str:
    """Rows as a Markdown table, in percent."""
    head = (
        "kind",
        "metric",
        "questions",
        "model",
        "image-blind",
        "majority",
        "constant text",
        "margin over blind (95%)",
    )
    cells = []
    for row in rows:
        metric = METRICS.get(row.kind, exact_match).__name__.replace("_", " ")
        means = (f"{mean:.1%}" for mean in (row.score, row.blind, row.majority, row.constant))
        margin = f"{row.score - row.blind:+.1%} ({row.margin[0]:+.1%} to {row.margin[1]:+.1%})"
        cells.append((row.kind, metric, row.count, *means, margin))
    return markdown_table(head, cells, words=2)


def _answer(
    model: Backend, conversations: Sequence[list[Message] | PolymodalError], params: GenerationParams
) -> list[str | PolymodalError]:
    """Answer some questions; one that cannot be asked or answered keeps its error."""
    asked = [messages for messages in conversations if not isinstance(messages, PolymodalError)]
    answers = iter(model.generate_batch(asked, params))
    return [messages if isinstance(messages, PolymodalError) else next(answers) for messages in conversations]


def _item(record: Record, seen: str | PolymodalError, blind: str | PolymodalError) -> Item:
    accepted = tuple(record.extra.get("answers") or (record.messages[-1].text,))
    metric = METRICS.get(record.kind, exact_match)
    failed = next((a for a in (seen, blind) if isinstance(a, PolymodalError)), None)
    answer, control = (None if isinstance(a, PolymodalError) else a for a in (seen, blind))
    score, blind_score = (0.0 if a is None else metric(a, accepted) for a in (answer, control))
    error = None if failed is None else str(failed)
    return Item(record.id, record.kind, accepted, answer, control, score, blind_score, error)


def _question(record: Record) -> list[Message]:
    if len(record.messages) < 2 or record.messages[-1].role != "assistant":
        raise DataError(f"{record.id}: a held-out record needs a question and its answer")
    return list(record.messages[:-1])


def _blind(messages: Sequence[Message]) -> list[Message] | PolymodalError:
    """The control's question; an image that cannot be read fails it as it fails the question itself."""
    try:
        return in_grey(messages)
    except PolymodalError as error:
        return error


def in_grey(messages: Sequence[Message]) -> list[Message]:
    """Hide the images of a conversation."""
    blind = []
    for message in messages:
        parts = [
            Image(PILImage.new("RGB", open_image(part.source).size, GREY)) if isinstance(part, Image) else part
            for part in message.parts
        ]
        blind.append(replace(message, parts=tuple(parts)))
    return blind
