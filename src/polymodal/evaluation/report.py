"""Scores as tables for people."""

from collections.abc import Iterable, Sequence


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]], words: int = 1) -> str:
    """A Markdown table; its first columns hold words, the others numbers."""
    rule = "|---" * words + "|--:" * (len(head) - words) + "|"
    first, *others = ("".join(f"| {cell} " if cell != "" else "| " for cell in row) + "|" for row in (head, *rows))
    return "\n".join([first, rule, *others])


def span(interval: tuple[float, float]) -> str:
    """An interval in percent."""
    return f"{interval[0]:.1%} to {interval[1]:.1%}"
