"""How one answer is scored against the accepted ones, and scores as tables for people."""

import re
from collections.abc import Iterable, Sequence

_ARTICLES = {"a", "an", "the"}
_FUNCTION_WORDS = _ARTICLES | {
    "and", "or", "of", "in", "on", "at", "to", "with", "for", "from", "by", "is", "are", "it", "its", "this", "that",
    "there",
}  # fmt: skip


def words_of(text: str) -> list[str]:
    """Lower-case words without punctuation; Chinese text gives its characters."""
    return re.findall(r"[\u4e00-\u9fff]|[^\W_\u4e00-\u9fff]+(?:'[a-z]+)?", text.lower())


def _singular(word: str) -> str:
    """Strip a plural ending, the same way on both sides of a comparison."""
    for ending, keep in (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x"), ("s", "")):
        if word.endswith(ending) and len(word) > len(ending) + 1 and not (ending == "s" and word.endswith("ss")):
            return word[: -len(ending)] + keep
    return word


def _plain(text: str) -> list[str]:
    return [_singular(word) for word in words_of(text) if word not in _ARTICLES]


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """Whether an answer is one of the accepted ones, articles, case, punctuation and plural aside."""
    said = _plain(answer)
    return float(any(said == _plain(right) for right in accepted))


def mentions(answer: str, accepted: Sequence[str]) -> float:
    """Whether an answer contains one of the accepted phrases as whole words."""
    said = _plain(answer)
    for right in map(_plain, accepted):
        if right and any(said[i : i + len(right)] == right for i in range(len(said))):
            return 1.0
    return 0.0


def word_recall(answer: str, accepted: Sequence[str]) -> float:
    """Share of a caption's content words that the answer has; the best over the accepted captions."""
    said = {_singular(word) for word in words_of(answer)}
    best = 0.0
    for right in accepted:
        wanted = {_singular(word) for word in words_of(right)} - _FUNCTION_WORDS
        if wanted:
            best = max(best, len(wanted & said) / len(wanted))
    return best


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]], words: int = 1) -> str:
    """A Markdown table; its first columns hold words, the others numbers."""
    rule = "|---" * words + "|--:" * (len(head) - words) + "|"
    first, *others = ("".join(f"| {cell} " if cell != "" else "| " for cell in row) + "|" for row in (head, *rows))
    return "\n".join([first, rule, *others])


def span(interval: tuple[float, float]) -> str:
    """An interval in percent."""
    return f"{interval[0]:.1%} to {interval[1]:.1%}"
