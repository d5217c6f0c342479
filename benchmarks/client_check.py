"""The same conversations, asked of several servers with OpenAI's own client: are the answers the same?

    python -m benchmarks.client_check URL[=MODEL] [URL[=MODEL] ...]

URLs such as http://127.0.0.1:8000/v1; MODEL is what requests call it (the first that the server lists). Each question
is asked whole and as a stream, greedily; OPENAI_API_KEY is sent where it is set. Status 1 where a server gives another
answer than the first one, or a stream another than the whole.
"""

from __future__ import annotations

import base64
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
from openai import OpenAI, OpenAIError

IMAGES = sorted((Path(__file__).resolve().parent.parent / "examples" / "pictures").glob("*.jpg"))
TOKENS = 24


def image(number: int) -> dict[str, Any]:
    packed = base64.b64encode(IMAGES[number].read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{packed}"}}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def questions() -> dict[str, list[dict[str, Any]]]:
    return {
        "text": [user("Name a colour.")],
        "image": [user(image(0), "What is this?")],
        "another": [user(image(1), "Describe this picture in detail.")],
        "image last": [user("What do you see here?", image(2))],
        "two images": [user(image(0), image(3), "What are the two things?")],
        "second turn": [
            user(image(1), "What is this?"),
            {"role": "assistant", "content": "A picture."},
            user("Of what?"),
        ],
        "system": [{"role": "system", "content": "Answer in one word."}, user(image(3), "What is this?")],
        "placeholder": [user(image(0), "Is <image> a word?")],
    }


def client_of(where: str) -> tuple[OpenAI, str]:
    url, _, name = where.partition("=")
    web = httpx2.Client(trust_env=False, timeout=300)
    client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=0, http_client=web)
    return client, name or client.models.list().data[0].id


def ask(client: OpenAI, model: str, messages: Any) -> tuple[str, int | None, str, float]:
    """An answer, the tokens of its prompt, the same as a stream, and the seconds of the first."""
    given: Any = {"model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 0}
    begin = time.perf_counter()
    try:
        whole = client.chat.completions.create(**given)
        seconds = time.perf_counter() - begin
        chunks = client.chat.completions.create(**given, stream=True)
        pieces = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    except OpenAIError as error:
        return f"refused: {' '.join(str(error).split())[:160]}", None, "", 0.0
    return whole.choices[0].message.content, whole.usage and whole.usage.prompt_tokens, pieces, seconds


def main(places: list[str]) -> int:
    servers = [client_of(place) for place in places]
    wrong = 0
    for name, messages in questions().items():
        answers = [ask(*server, messages) for server in servers]
        for place, (whole, tokens, pieces, seconds) in zip(places, answers, strict=True):
            marks = ["another answer"] * (whole != answers[0][0]) + ["its stream differs"] * (pieces not in (whole, ""))
            marks += ["another prompt"] * (tokens != answers[0][1])
            wrong += bool(marks)
            where = place.partition("//")[2].partition("/")[0]
            print(f"{name:<14}{where:<24}{tokens or 0:5} tokens {seconds:6.2f} s  {whole!r}  {', '.join(marks)}")
    print(f"{len(questions())} questions, {len(servers)} servers, {wrong} answers that differ")
    return int(bool(wrong))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
