"""Conversations in the forms that people write them in."""

from __future__ import annotations

from typing import Any

import pytest

from polymodal.errors import PolymodalError
from polymodal.messages import Audio, Document, Image, Message, Text, Video, as_messages, assistant, system, user

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
        (
            [{"role": "user", "content": [
                {"type": "video", "video": "a.mp4", "nframes": 4.0, "video_start": 1, "video_end": 2.5},
                {"type": "video_url", "video_url": {"url": "b.mp4", "fps": 2}, "uuid": "1"},
                {"type": "video", "path": "c.mp4", "times": [0, 1.5], "audio": True, "fps": None},
            ]}],
            [user(Video("a.mp4", num_frames=4, start=1, end=2.5), Video("b.mp4", fps=2),
                  Video("c.mp4", times=(0.0, 1.5), audio=True))],
        ),
        (
            [{"role": "user", "content": [
                {"type": "document", "document": "a.pdf", "pages": "1-3", "text": "layer"},
                {"pages": 2, "text": "ocr", "document": "a.pdf"},
                {"type": "file", "file": {"filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"}},
                {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"},
            ]}],
            [user(Document("a.pdf", "1-3", "layer"), Document("a.pdf", "2", "ocr"),
                  *[Document("data:application/pdf;base64,AAAA")] * 2)],
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


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "video", "video": "a.mp4", "nframes": 2.5}, "nframes is 2.5; it must be a whole number above 0"),
        ({"type": "video", "video": "a.mp4", "num_frames": 0}, "num_frames is 0; it must be a whole number above 0"),
        ({"type": "video", "video": "a.mp4", "num_frames": True}, "num_frames is True; it must be a whole number"),
        ({"type": "video", "video": "a.mp4", "fps": 2, "nframes": 3}, "not num_frames and fps"),
        ({"type": "video", "video": "a.mp4", "fps": "2"}, "fps is '2'; it must be a number above 0"),
        ({"type": "video", "video": "a.mp4", "fps": float("nan")}, "fps is nan; it must be a number above 0"),
        ({"type": "video", "video": "a.mp4", "start": -1}, "start is -1; it must be a number, 0 or more"),
        ({"type": "video", "video": "a.mp4", "times": []}, "times is .*; it must be a list of seconds"),
        ({"type": "video", "video": "a.mp4", "times": [1, "2"]}, "times is .*; it must be a list of seconds"),
        ({"type": "video", "video": "a.mp4", "audio": 1}, "audio is 1; it must be true or false"),
        ({"type": "video", "video": "a.mp4", "start": 2, "end": 1}, "it ends at 1 seconds and starts at 2"),
        (
            {"type": "video", "video": "a.mp4", "max_pixels": 9},
            "'max_pixels' is no setting of it; there are num_frames",
        ),
        ({"type": "video", "video": ["a.png", "b.png"]}, "a list of frames, cannot be read here"),
        ({"type": "document", "document": "a.pdf", "text": "all"}, 'text is .*; it must be "none", "layer" or "ocr"'),
        ({"type": "document", "document": "a.pdf", "pages": [1]}, "pages is .*; it must be a text such as"),
        ({"type": "document", "document": "a.pdf", "dpi": 9}, "'dpi' is no setting of it; there are pages, text"),
        ({"type": "file", "file": {"file_id": "file-1"}}, "a file that was uploaded to a server"),
    ],
)
def test_settings_of_a_part_that_make_no_sense_are_refused_in_a_line(part: dict[str, Any], words: str) -> None:
    with pytest.raises(PolymodalError, match=words) as error:
        as_messages([user("a"), {"role": "user", "content": [part]}])
    assert "\n" not in str(error.value) and str(error.value).startswith("message 2: ")
