"""Which turns of a conversation may be forgotten so that the rest fits a model's context."""

from __future__ import annotations

from collections.abc import Sequence

from polymodal.errors import PolymodalError
from polymodal.messages import Message


def require_question(messages: Sequence[Message]) -> None:
    """Check that a conversation asks for an answer.

    Args:
        messages: The conversation.

    Raises:
        PolymodalError: It is empty, or its last message is not a user's.
    """
    if not messages or messages[-1].role != "user":
        raise PolymodalError("a conversation to answer must end with a user message")


def forget_oldest(messages: Sequence[Message], length: int, context: int) -> list[Message]:
    """Leave out the oldest question of plain text and its answer; media and the last question always stay.

    Args:
        messages: A conversation that is too long.
        length: Tokens it takes.
        context: Tokens the model was made for.

    Returns:
        What is left.

    Raises:
        PolymodalError: There is no such turn; names both lengths.
    """
    start = next((i for i in range(len(messages) - 2) if _is_text_turn(messages, i)), None)
    if start is None:
        raise PolymodalError(
            f"the conversation takes {length} tokens and the model's context is {context}; "
            "shorten the text or give fewer or smaller pictures (media are never cut)"
        )
    return [*messages[:start], *messages[start + 2 :]]


def _is_text_turn(messages: Sequence[Message], start: int) -> bool:
    """Whether a question of plain text and its answer stand here."""
    pair = messages[start : start + 2]
    return [m.role for m in pair] == ["user", "assistant"] and not any(m.media for m in pair)
