"""What every backend that runs a model does with a conversation: fit it into the context, stream the answer."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from polymodal.backends.base import Reply, TextDelta, Timing, Usage
from polymodal.errors import PolymodalError
from polymodal.messages import Message, assistant

if TYPE_CHECKING:
    from polymodal.generation.streaming import TextStream


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


def stream_reply(
    steps: Iterable[tuple[int, float]],
    text: TextStream,
    *,
    begin: float,
    prompt_tokens: int,
    image_tokens: int,
    model: str,
) -> Iterator[TextDelta | Reply]:
    """Turn tokens into text as they are made, and take the times; called when the prompt is ready.

    Args:
        steps: Each token, and the seconds that encoding media took before it (0 where that is not known).
        text: Takes the tokens and decides where the answer ends.
        begin: `time.perf_counter()` of the call.
        prompt_tokens: Positions before the answer.
        image_tokens: Those of them that are pictures.
        model: The model's name.

    Yields:
        `TextDelta`s as text becomes certain, then the whole `Reply`.
    """
    prepared = first = time.perf_counter()
    made, encode_s = 0, 0.0
    for token, seconds in steps:
        if made == 0:
            first, encode_s = time.perf_counter(), seconds
        made += 1
        if delta := text.push(token):
            yield TextDelta(delta)
        if text.stopped:
            break
    if delta := text.finish():
        yield TextDelta(delta)
    end = time.perf_counter()
    yield Reply(
        message=assistant(text.text),
        usage=Usage(prompt_tokens, image_tokens, made),
        timing=Timing(
            prepare_s=prepared - begin,
            encode_s=encode_s,
            first_token_s=first - begin,
            total_s=end - begin,
            tokens_per_s=(made - 1) / (end - first) if made > 1 else 0.0,
        ),
        finish_reason="stop" if text.stopped else "length",
        model=model,
    )
