"""Messages and settings -> the JSON of a request to OpenAI's chat API, media inside as base64.

Servers differ in small ways that only a refusal shows. What was learnt is kept, so that it costs one request.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from polymodal.backends.base import check_messages
from polymodal.backends.openai.media import MAX_REQUEST, SENDING, Json, Sending, media_parts, size_of, with_pages
from polymodal.errors import ConfigError, MediaError, PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Message, Text

_LIMITS = ("max_tokens", "max_completion_tokens")
"""Older servers know only the first; OpenAI's reasoning models refuse it and want the second."""


@dataclass(frozen=True)
class Accepts:
    """What a server takes, as far as it has shown."""

    limit: str = _LIMITS[0]  # The name of the most tokens to make
    most_tokens: int | None = None  # The most that it makes
    stream_options: bool = True  # Whether a streamed answer may be asked to count its tokens
    zero_temperature: bool = True  # Whether temperature 0 may be asked for; reasoning models take nothing but their own
    videos: bool = True  # Whether it takes videos; frames go as images otherwise


def learn(accepts: Accepts, refusal: str, body: Mapping[str, Any]) -> Accepts | None:
    """What to try next, after a refusal."""
    if "stream_options" in refusal and "stream_options" in body:
        return replace(accepts, stream_options=False)
    if "temperature" in refusal and body.get("temperature") == 0.0 and accepts.zero_temperature:
        return replace(accepts, zero_temperature=False)
    if accepts.videos and _SENT_BACK.search(refusal) and not _NAMES_LIMIT.search(refusal) and _has_video(body):
        return replace(accepts, videos=False)
    if not _NAMES_LIMIT.search(refusal):
        return None
    if "context" not in refusal and (most := _most_tokens(refusal, body.get(accepts.limit))) is not None:
        return replace(accepts, most_tokens=most)
    other = _LIMITS[_LIMITS.index(accepts.limit) - 1]
    if accepts.limit in refusal and (other in refusal or _UNKNOWN.search(refusal)) and not _TOO_MANY.search(refusal):
        return replace(accepts, limit=other)
    return None


def _has_video(body: Mapping[str, Any]) -> bool:
    contents = [message["content"] for message in body["messages"]]
    return any(part["type"] == "video_url" for parts in contents if isinstance(parts, list) for part in parts)


# Few servers say that it is the video which they do not take.
_SENT_BACK = re.compile(r"\b(400|404|413|415|422)\b|video|multimodal|modalit|unsupported content", re.IGNORECASE)
_NAMES_LIMIT = re.compile(r"max[_ ]?((new|output|completion)[_ ]?)?tokens", re.IGNORECASE)
_UNKNOWN = re.compile(
    r"not support|unsupported|unknown|unrecogni[sz]ed|unexpected|extra|not (permitted|allowed)|deprecated"
    r"|invalid (parameter|field|argument|key|property)",
    re.IGNORECASE,
)
_TOO_MANY = re.compile(
    r"too (large|many|big|high|long)|at most|exceed|\brange\b|less than|greater than|maximum|context|大|超过",
    re.IGNORECASE,
)
_MOST = re.compile(
    r"(?:[\[(]\s*\d+\s*,|\bbetween \d+ and|\bfrom \d+(?: \(inclusive\))? to|(?<![\w.-])\d+\s*(?:~|–|to)"
    r"|\brange\D{0,20}\d+\s*-|\bat most|\bup to|\bno more than|\bless than or equal to|<=|≤"
    r"|(?P<below>\bless than|\bbelow|<)|(?:exceed|maximum|limit|max\b|超过|不大于|最大)\D{0,60}?)"
    r"\s*(?P<most>\d+)(?P<open>\s*\(exclusive\)|\s*\))?",
    re.IGNORECASE,
)
"""Words before the most tokens of an answer, in the refusals of servers."""


def _most_tokens(refusal: str, asked: Any) -> int | None:
    """The most tokens that a refusal allows; None where it names no number below what was asked for."""
    if not isinstance(asked, int):
        return None
    plain = re.sub(r"(?<![\[(\d])\d{1,3}(?:,\d{3})+\b", lambda m: m[0].replace(",", ""), refusal)  # not "[1,512]"
    plain = re.sub(rf"\b{asked}\s*>", "at most", plain)  # "256 > 100"
    for found in _MOST.finditer(plain):
        most = int(found["most"]) - bool(found["below"] or (found["open"] or "").endswith("(exclusive)"))
        if 1 <= most < asked:
            return most
    return None


def request_body(
    model: str, messages: list[Json], params: GenerationParams, accepts: Accepts, stream: bool, extra: Mapping[str, Any]
) -> Json:
    """Write a request."""
    for name in ("top_k", "repetition_penalty", "min_p", "logprobs", "response_schema", "grammar"):
        if getattr(params, name) != GenerationParams.model_fields[name].default:
            raise ConfigError(
                f"{name} is no part of OpenAI's API, or nothing that is read of an endpoint's answer; leave it out, or "
                "give it in `extra` to a server that takes it"
            )
    most = min(params.max_new_tokens, accepts.most_tokens or params.max_new_tokens)
    body: Json = {"model": model, "messages": messages, accepts.limit: most}
    if params.temperature > 0 or accepts.zero_temperature:
        body["temperature"] = params.temperature
    if params.top_p != 1.0:
        body["top_p"] = params.top_p
    for name in ("presence_penalty", "frequency_penalty"):
        if value := getattr(params, name):
            body[name] = value
    if params.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias.items()}
    if params.seed is not None:
        body["seed"] = params.seed
    if stops := [text for text in params.stop if text]:
        body["stop"] = stops
    if stream:
        body["stream"] = True
        if accepts.stream_options:
            body["stream_options"] = {"include_usage": True}
    return body | dict(extra)


def to_openai(messages: Sequence[Message], sending: Sending = SENDING) -> list[Json]:
    """Write a conversation as OpenAI's `messages`."""
    check_messages(messages)
    messages = with_pages(messages, sending)
    for number, message in enumerate(messages, start=1):
        if message.role == "assistant" and not message.text.strip():
            # Most servers refuse such a turn, and with it every later question of the conversation.
            raise PolymodalError(
                f"message {number}: the assistant's turn says nothing, which servers refuse; take it and its question "
                "out, or write what was said"
            )
    written = [{"role": m.role, "content": _content(m, sending)} for m in messages]
    size = sum(map(size_of, written))
    if size > MAX_REQUEST:
        raise MediaError(
            f"the media of the conversation take {size:,} bytes in base64, at most {MAX_REQUEST:,} are sent; give "
            "fewer or smaller ones, or fewer frames or pages"
        )
    return written


def _content(message: Message, sending: Sending) -> str | list[Json]:
    if not message.media:
        return message.text
    parts: list[Json] = []
    for part in message.parts:
        if isinstance(part, Text):
            parts += [{"type": "text", "text": part.text}] if part.text else []
        else:
            parts += media_parts(part, sending)
    return parts
