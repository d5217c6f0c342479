"""Conversations in the forms that people write them in."""

from __future__ import annotations

from typing import Any

import pytest

from polymodal.errors import PolymodalError
from polymodal.messages import Audio, Image, Message, Text, Video, as_messages, assistant, system, user

URL = "data:image/png;base64,AAAA"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("What?", [user("What?")]),
        (user("What?"), [user("What?")]),
        ([user("a"), assistant("b"), user("c")], [user("a"), assistant("b"), user("c")]),
        ((user("a"),), [user("a")]),
        (["What?"], [user("What?")]),
        ([Image("a.png"), "What?"], [user(Image("a.png"), "What?")]),
        (Text("What?"), [user("What?")]),
        ({"role": "user", "content": "What?"}, [user("What?")]),
        (
            [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"},
             {"role": "assistant", "content": "b", "refusal": None, "tool_calls": None}, user("c")],
            [system("Be kind."), user("a"), assistant("b"), user("c")],
        ),
        ([{"role": "developer", "content": "S"}, {"role": "user", "content": "a", "name": "E"}],
         [system("S"), user("a")]),
        ([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], [user("a"), assistant("b")]),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"},
                                          {"type": "image_url", "image_url": {"url": URL}}]}],
            [user("a", Image(URL))],
        ),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}, "b"]}], [user(Image("a.png"), "b")]),
        ([{"role": "user", "content": [{"image": "a.png"}, {"text": "b"}]}], [user(Image("a.png"), "b")]),
        ([{"role": "user", "content": [{"type": "image", "url": URL}]}], [user(Image(URL))]),
        (
            [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
                                          {"type": "video", "path": "a.mp4"}]}],
            [user(Audio("data:audio/wav;base64,AAAA"), Video("a.mp4"))],
        ),
        ([Message("user", "What?")], [user("What?")]),  # type: ignore[arg-type]
        ([Message("user", ("What?", Image("a.png")))], [user("What?", Image("a.png"))]),  # type: ignore[arg-type]
        ([], []),
    ],
)  # fmt: skip
def test_every_form_is_read(given: Any, expected: list[Message]) -> None:
    assert as_messages(given) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "a text or a list of messages, not nothing"),
        (7, "not int"),
        ([user("a"), 7], "message 2: expected a Message or a dictionary with role and content, not int"),
        ([user("a"), "b"], "message 2: expected a Message"),
        ([{"role": "tool", "content": "a"}], "message 1: the role 'tool' is none of system, user, assistant"),
        ([{"content": "a"}], "the role None is none of"),
        ([{"role": "user"}], "must be a text or a list of parts, not nothing"),
        ([{"role": "assistant", "content": "", "tool_calls": [1]}], "'tool_calls' cannot be given to a model here"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a part of type 'image' cannot be read"),
        ([{"role": "user", "content": [{"type": "file", "file": {}}]}], "a part of type 'file' cannot be read"),
        ([{"role": "user", "content": [7]}], "expected a part such as Text or Image, not int"),
        ([Message("bot", ())], "the role 'bot' is none of"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_conversation_is_refused_in_a_line(given: Any, words: str) -> None:
    with pytest.raises(PolymodalError, match=words) as caught:
        as_messages(given)
    assert "\n" not in str(caught.value)
