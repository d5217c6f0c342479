"""The JSON of OpenAI's chat API: answers, whole and in pieces."""

import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from polymodal.backends.base import MediaEnd, Reply, StreamEvent, TextDelta
from polymodal.generation.sampling import Chance
from polymodal.generation.streaming import spelt
from polymodal.messages import Audio, Message
from polymodal.serving.errors import Json
from polymodal.serving.makers import media_deltas, media_fields
from polymodal.serving.models import Served
from polymodal.serving.protocol import Asked
from polymodal.serving.streams import DONE, Answer, data
from polymodal.serving.tools import Calling

LEAST = -9999.0
"""What OpenAI says of a token that cannot be; JSON has no infinity."""


def usage_of(replies: Sequence[Reply], messages: Sequence[Message]) -> Json | None:
    """What an answer took; None where nobody counted, as some servers behind an endpoint do not."""
    first = replies[0].usage
    made = [reply.usage.completion_tokens for reply in replies]
    if first.prompt_tokens is None or None in made:
        return None
    completion = sum(count for count in made if count is not None)
    usage: Json = {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": first.prompt_tokens + completion,
    }
    heard, seen = first.audio_tokens, first.image_tokens
    if seen is not None and heard is None:
        kinds = {isinstance(part, Audio) for message in messages for part in message.media}
        heard = 0 if True not in kinds else seen if kinds == {True} else None
    if seen is not None and heard is not None:
        text = first.prompt_tokens - seen
        details = {"image_tokens": seen - heard, "audio_tokens": heard, "text_tokens": text}
        if first.cached_tokens is not None:
            details["cached_tokens"] = first.cached_tokens
        usage["prompt_tokens_details"] = details
    return usage


class ChatAnswer(Answer):
    """An answer of the chat API."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked.served, [(asked.messages, asked.choices)], asked.stream, asked.salt)
        self.asked = asked
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": asked.served.name}
        self.begun: dict[int, CallSplit] = {}
        self.images: Counter[int] = Counter()

    def whole(self, replies: Sequence[Reply]) -> Json:
        """All of it."""
        choices = []
        for index, reply in enumerate(replies):
            text, calls = self.asked.calling.read(reply.text) if self.asked.calling else (reply.text, [])
            message: Json = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
            told = self._logprobs(reply.chances)
            finish = "tool_calls" if calls else reply.finish_reason
            message |= {"tool_calls": calls} if calls else {}
            message |= media_fields(reply.message.parts, self.asked.audio, self.head, index)
            choices.append({"index": index, "message": message, "finish_reason": finish, "logprobs": told})
        usage = usage_of(replies, self.asked.messages)
        return {**self.head, "object": "chat.completion", "choices": choices, "usage": usage}

    def pieces(self, index: int, event: StreamEvent) -> Iterator[bytes]:
        """The role first, text as it comes, then calls, and why it ended."""
        if index not in self.begun:
            self.begun[index] = CallSplit(self.asked.calling)
            yield self._chunk(index, {"role": "assistant", "content": ""})
        split = self.begun[index]
        if isinstance(event, TextDelta):
            text = split.push(event.text)
            if text or event.chances:
                yield self._chunk(index, {"content": text}, chances=event.chances)
        elif isinstance(event, MediaEnd):
            for delta in media_deltas(event.part, self.asked.audio, self.head, index, self.images[index], split.text):
                yield self._chunk(index, delta)
            self.images[index] += 1
        elif isinstance(event, Reply):
            text, calls = split.end()
            if text:
                yield self._chunk(index, {"content": text})
            for at, call in enumerate(calls):
                yield self._chunk(index, {"tool_calls": [{"index": at, **call}]})
            yield self._chunk(index, {}, finish="tool_calls" if calls else event.finish_reason)

    def last(self, replies: Sequence[Reply]) -> Iterator[bytes]:
        """What it took, and the end."""
        if self.asked.include_usage:
            usage = usage_of(replies, self.asked.messages)
            yield data({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        yield DONE

    def _chunk(self, index: int, delta: Json, finish: str | None = None, chances: Sequence[Chance] = ()) -> bytes:
        told = self._logprobs(chances) if chances else None
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": told}
        usage: Json = {"usage": None} if self.asked.include_usage else {}
        return data({**self.head, "object": "chat.completion.chunk", "choices": [choice], **usage})

    def _logprobs(self, chances: Sequence[Chance]) -> Json | None:
        if self.asked.choices[0].logprobs is None:
            return None
        return {"content": logprobs(self.served, chances), "refusal": None}


def logprobs(served: Served, chances: Sequence[Chance]) -> list[Json]:
    """How likely tokens were."""
    tokenizer: Any = served.backend.tokenizer  # type: ignore[attr-defined]  # whoever tells chances has one

    def one(token: int, logprob: float) -> Json:
        spelling = spelt(tokenizer, token)
        text = spelling.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": [*spelling]}

    return [
        {**one(chance.token, chance.logprob), "top_logprobs": [one(*other) for other in chance.likeliest]}
        for chance in chances
    ]


class CallSplit:
    """The text of an answer as it comes, without the calls behind it."""

    def __init__(self, calling: Calling | None) -> None:
        self.calling, self.text, self.told = calling, "", 0

    def push(self, delta: str) -> str:
        """Take a piece; gives what is text for certain."""
        self.text += delta
        if self.calling is None:
            return delta
        end = max(self.told, len(self.text[: self.calling.form.begins(self.text)].rstrip()))
        start, self.told = self.told, end
        return self.text[start:end]

    def end(self) -> tuple[str, list[Json]]:
        """The text that was held back, and the calls."""
        if self.calling is None:
            return "", []
        text, calls = self.calling.read(self.text)
        return text[self.told :], calls
