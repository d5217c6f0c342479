"""Readers for the field's JSON forms, and what they say about broken records."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polymodal.data.load import load_records, record_from_json, record_to_json
from polymodal.data.readers.conversations import read_llava, read_messages, read_openai, read_record
from polymodal.errors import DataError
from polymodal.messages import Audio, Document, Image, Message, Text, Video, assistant, system, user

ROOT = Path("/data/set").absolute()


def image(name: str) -> Image:
    return Image(ROOT / name)


def llava(*values: str, **fields: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
    return {**fields, "conversations": turns}


def test_llava_with_placeholders_anywhere() -> None:
    record = llava("<image>\nWhat?", "A cat.", "And <image>, or\n<image>", "Dogs.", image=["a.jpg", "b/c.jpg", "d.jpg"])
    assert read_llava(record, ROOT, "here") == [
        user(image("a.jpg"), "What?"),
        assistant("A cat."),
        user("And ", image("b/c.jpg"), ", or", image("d.jpg")),
        assistant("Dogs."),
    ]


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("<image>", [Image(ROOT / "a")]),
        ("<image>\n\nQ", [Image(ROOT / "a"), Text("\nQ")]),
        ("Q\n<image>", [Text("Q"), Image(ROOT / "a")]),
        ("Q\n\n<image>", [Text("Q\n"), Image(ROOT / "a")]),
        ("Q\n<image>\nR", [Text("Q\n"), Image(ROOT / "a"), Text("R")]),
        ("Q <image> R", [Text("Q "), Image(ROOT / "a"), Text(" R")]),
    ],
)
def test_one_newline_belongs_to_the_placeholder(value: str, parts: list[Any]) -> None:
    messages = read_llava(llava(value, "A", image="a"), ROOT, "here")
    assert messages[0] == Message("user", tuple(parts))


def test_llava_roles_system_and_other_media() -> None:
    turns = [
        {"from": "system", "value": "S"},
        {"from": "user", "value": "<video>\n<audio>\nQ <image>"},
        {"from": "assistant", "value": ""},
    ]
    record = {"conversations": turns, "video": "v.mp4", "audios": ["s.wav"], "images": ["data:image/png;base64,AA=="]}
    assert read_llava(record, ROOT, "here") == [
        system("S"),
        user(Video(ROOT / "v.mp4"), Audio(ROOT / "s.wav"), "Q ", Image("data:image/png;base64,AA==")),
        Message("assistant", ()),
    ]
    assert read_llava(llava("The <video> tag?", "HTML.", system="S"), ROOT, "here")[:2] == [
        system("S"),
        user("The <video> tag?"),
    ]


SPELLINGS = [(who, what, names) for who in ("from", "role") for what in ("value", "content") for names in (0, 1)]


@pytest.mark.parametrize("key", ["conversations", "messages"])
@pytest.mark.parametrize(("who", "what", "names"), SPELLINGS)
def test_every_mixture_of_the_two_spellings_reads(key: str, who: str, what: str, names: int) -> None:
    question, answer = (("human", "gpt"), ("user", "assistant"))[names]
    chinese = "<image>描述这张图片中的内容"
    turns: list[dict[str, Any]] = [{who: question, what: chinese}, {who: answer, what: "一个红色的圆。"}]
    turns += [{"from": "human", "value": "More?"}, {"role": "assistant", "content": "No."}]
    record = {"id": "1", "image": "a.jpg", key: turns}
    expected = (user(image("a.jpg"), chinese[7:]), assistant("一个红色的圆。"), user("More?"), assistant("No."))
    assert read_record(record, ROOT, "here").messages == expected
    # As a table with columns for both: what is empty is not there.
    wide = [{"from": None, "role": None, "value": None, "content": None, **turn} for turn in turns]
    assert read_record({**record, key: wide}, ROOT, "here").messages == expected
    with pytest.raises(DataError, match=r"\[0\]: has both .*, which differ; keep one"):
        read_record({**record, key: [{**turns[0], "from": "human", "role": "system"}, turns[1]]}, ROOT, "here")


def test_the_newline_belongs_to_the_placeholder_in_conversations_only() -> None:
    turns = [{"role": "user", "content": "<image>\n描述"}, {"role": "assistant", "content": "A"}]
    assert read_record({"image": "a", "conversations": turns}, ROOT, "x").messages[0] == user(image("a"), "描述")
    assert read_record({"image": "a", "messages": turns}, ROOT, "x").messages[0] == user(image("a"), "\n描述")


@pytest.mark.parametrize("none", ["", [""], None, [None], [], ["", None]])
@pytest.mark.parametrize("key", ["image", "images"])
def test_ways_to_say_that_there_is_no_image(none: Any, key: str) -> None:
    assert read_record(llava("Q", "A", **{key: none}), ROOT, "x").messages == (user("Q"), assistant("A"))
    other = {"image": "images", "images": "image"}[key]
    both = read_record(llava("<image>Q", "A", **{key: none, other: "a"}), ROOT, "x")
    assert both.messages[0] == user(image("a"), "Q")
    with pytest.raises(DataError, match=r"1 <image> placeholders but (0 items in `images?`|no `image` key)") as caught:
        read_record(llava("<image>Q", "A", **{key: none}), ROOT, "x")
    assert caught.value.code == "placeholder-count"
    with pytest.raises(DataError, match=r"`images`\[1\] must be a path or URL, found"):
        read_record(llava("<image>Q<image>", "A", images=["a", ""]), ROOT, "x")


@pytest.mark.parametrize("key", ["conversations", "messages", "openai"])
@pytest.mark.parametrize(
    ("name", "value"), [("loss", False), ("weight", 0), ("weight", 0.0), ("train", False), ("loss_mask", 0)]
)
def test_a_turn_that_is_not_trained(key: str, name: str, value: Any) -> None:
    turns = [
        {"role": "user", "content": "Q", name: value},
        {"role": "assistant", "content": "BAD", name: value},
        {"role": "user", "content": "Again."},
        {"role": "assistant", "content": "Two.", name: not value},
    ]
    form, key = (key, "messages") if key == "openai" else ("", key)
    record = read_record({key: turns}, ROOT, "here", form=form)
    assert [message.train for message in record.messages] == [True, False, True, True]
    assert record_from_json(json.loads(json.dumps(record_to_json(record)))) == record


UNTOLD = {"role": "user", "content": "Q"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("fields", "turn", "complaint"),
    [
        ({}, {"reasoning_content": ["two"]}, r"messages\[1\]: `reasoning_content` must be text, found list"),
        (
            {},
            {"reasoning_content": "a", "reasoning": "b"},
            "has both `reasoning_content` and `reasoning`, which differ",
        ),
        ({}, {"reasoning_details": [{"text": "a"}]}, "`reasoning_details` cannot be followed; write it into the text"),
        ({}, {"tool_calls": [{"id": "a"}]}, r"messages\[1\]: `tool_calls` must be .\"function\": ."),
        ({}, {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}, "`arguments` of 'f' must be an object"),
        ({}, {"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "`arguments` must be JSON, found '{'"),
        ({}, {"function_call": CALL}, "`function_call` cannot be followed; call it `tool_calls`"),
        ({}, {"tools": [CALL]}, r"messages\[1\]: `tools` cannot be followed; put them beside the turns"),
        ({}, {"weight": 0.5}, "`weight`: 0.5 cannot be followed; give true or false, 1 or 0"),
        ({}, {"loss": "false"}, "`loss`: 'false' cannot be followed"),
        ({}, {"loss": True, "weight": 0}, "`loss` and `weight` contradict each other"),
        ({}, {"images": ["a.png"]}, "`images` cannot be followed"),  # as in Ollama's requests
        ({}, {"masked": True}, "`masked` cannot be followed"),
        ({"tools": [{"type": "function"}]}, {}, r"here: `tools`\[0\] must be an object with `function`"),
        ({"tools": "a hammer"}, {}, "here: `tools` must be JSON, found 'a hammer'"),
        ({"functions": [CALL]}, {}, "here: `functions` cannot be followed; call them `tools`"),
        ({"objects": {"ref": ["square"], "bbox": [[1, 2, 3, 4]]}}, {}, "`objects` cannot be followed; write each box"),
        ({"objects": [[1, 2, 3, 4]]}, {"content": "At <bbox>."}, "here: `objects` cannot be followed"),
        ({"system": "A", "system_prompt": "B"}, {}, "has both `system` and `system_prompt`, which differ"),
    ],
)
def test_keys_that_change_the_meaning_are_refused_by_name(
    fields: dict[str, Any], turn: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        read_record({**fields, "messages": [UNTOLD, {"role": "assistant", "content": "A", **turn}]}, ROOT, "here")
    assert caught.value.code in ("unsupported-key", "bad-field")
    with pytest.raises(DataError, match="`train`: True cannot be followed; only an answer is trained"):
        read_record({"messages": [{**UNTOLD, "train": True}, {"role": "assistant", "content": "A"}]}, ROOT, "here")


def test_keys_that_say_nothing_are_no_fault() -> None:
    empty = {"tools": "[]", "objects": {}, "functions": None, "chat_template_kwargs": {}}
    turn = {"tool_calls": None, "reasoning_content": "", "loss": None, "name": "x"}
    record = read_record({**empty, "messages": [UNTOLD, {"role": "assistant", "content": "A", **turn}]}, ROOT, "x")
    assert record.messages == (user("Q"), assistant("A"))
    assert not record.messages[0].fields and not record.messages[1].fields
    notes = read_record({"objects": ["cat"], **llava("Q", "A", system_prompt="Be short.")}, ROOT, "x")
    assert notes.messages[0] == system("Be short.") and notes.extra == {"objects": ["cat"]}


def test_turns_that_say_nothing_are_refused_where_they_are_read() -> None:
    for values, code in ((("Q", " \n"), "empty-answer"), ((" ", "A"), "empty-question")):
        with pytest.raises(DataError, match=r"turn \d \(\w+\) says nothing; write it or take it out") as caught:
            read_record(llava(*values), ROOT, "x")
        assert caught.value.code == code
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "", "loss": False}]
    assert len(read_record({"messages": turns}, ROOT, "x").messages) == 2


def test_a_conversation_of_endless_text_is_refused() -> None:
    with pytest.raises(DataError, match=r"16,777,218 characters of text, at most 16,777,216") as caught:
        read_record(llava("Q" * 2**24, "AB"), ROOT, "x")
    assert caught.value.code == "too-long"


def test_messages_with_lists_beside_them() -> None:
    record = {
        "messages": [
            {"role": "user", "content": "<image>Left or\n<image>?"},
            {"role": "assistant", "content": "Left."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "<image> is text here"}]},
        ],
        "images": ["a.png", {"path": "b.png", "bytes": None}, str(ROOT / "c.png")],
    }
    assert read_messages(record, ROOT, "here") == [
        user(image("a.png"), "Left or\n", image("b.png"), "?"),
        assistant("Left."),
        user(image("c.png"), "<image> is text here"),
    ]


def test_openai_parts() -> None:
    content = [
        {"type": "text", "text": "See <image>"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
        {"type": "image_url", "image_url": "https://example.org/a.png"},
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "b.png"},
        {"type": "image", "url": "file://" + str(ROOT / "c.png")},
        {"type": "input_image", "image_url": "d.png"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "mp3"}},
        {"type": "video_url", "video_url": {"url": "v.mp4"}},
        {"type": "document", "path": "p.pdf"},
        "plain",
    ]
    messages = [{"role": "developer", "content": "S"}, {"role": "user", "content": content}]
    assert read_openai(messages, "request", ROOT) == [
        system("S"),
        user(
            "See <image>",
            Image("data:image/png;base64,AA=="),
            Image("https://example.org/a.png"),
            *(image(name) for name in ("a.png", "b.png", "c.png", "d.png")),
            Audio("data:audio/mp3;base64,AAAA"),
            Video(ROOT / "v.mp4"),
            Document(ROOT / "p.pdf"),
            "plain",
        ),
    ]
    record = read_record({"messages": messages[1:]}, ROOT, "here")
    assert len(record.messages[0].media) == 9


@pytest.mark.parametrize("url", ["file://{}", "file://localhost{}", "FILE://{}", "file:{}"])
def test_file_urls(url: str) -> None:
    message = {"role": "user", "content": [{"type": "image", "url": url.format(ROOT / "my%20cat%231.png")}]}
    assert read_openai([message], "request", ROOT) == [user(Image(ROOT / "my cat#1.png"))]


@pytest.mark.parametrize("path", ["/etc/passwd", "a.png", "file:///etc/passwd", "../a.png"])
def test_requests_cannot_name_files(path: str) -> None:
    part = {"type": "image_url", "image_url": {"url": path}}
    with pytest.raises(DataError, match=r"request\[0\].content\[0\]: `image_url`: local files cannot be named here"):
        read_openai([{"role": "user", "content": [part]}], "request")


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        (llava("<image> <image>", "A", image="a"), "2 <image> placeholders but 1 items in `image`"),
        (llava("<image>", "A", image=["a", "b"]), "1 <image> placeholders but 2 items in `image`"),
        (llava("Q", "A", image="a"), "0 <image> placeholders but 1 items in `image`"),
        (llava("<image>", "A"), "1 <image> placeholders but no `image` key"),
        (llava("<image>", "A", image=None), "1 <image> placeholders but no `image` key"),
        (llava("Q", "<video>", video="a"), r"conversations\[1\]: <video> in a turn of the assistant"),
        (llava("Q", "A", image="a", images=["b"]), "both `image` and `images`"),
        (llava("<image>", "A", image="../a"), r"`image`\[0\]: '../a' leaves the folder"),
        (llava("<image>", "A", image="b/../../a"), "leaves the folder"),
        (llava("<image>", "A", image="/etc/passwd"), "'/etc/passwd' leaves the folder"),
        (llava("<image>", "A", image="/data/set2/a"), "leaves the folder"),
        (llava("<image>", "A", image=[7]), r"`image`\[0\] must be a path or URL, found int"),
        (llava("<image>", "A", image=""), r"1 <image> placeholders but 0 items in `image`"),
        (llava("Q", "A", "Q", kind=3), "`kind` must be text, found int"),
        ({"conversations": [{"from": "gpt", "value": "A"}]}, "starts with the assistant"),
        ({"conversations": [{"from": "system", "value": "A"}]}, "only a system message"),
        (
            {"conversations": [{"from": "human", "value": "Q"}] * 2},
            "turn 2 is the user's; user and assistant must take",
        ),
        (
            {"conversations": [{"from": "robot", "value": "Q"}]},
            r"conversations\[0\]: unknown role `from`: 'robot'; known: human",
        ),
        ({"conversations": [{"from": "human"}]}, r"conversations\[0\]: `value` must be text, found nothing"),
        ({"conversations": ["Q"]}, r"conversations\[0\]: expected an object with `from`, found text"),
        ({"conversations": []}, "`conversations` must be a list of turns, found empty list"),
        ({"conversations": [], "messages": []}, "both `conversations` and `messages`"),
        ({"text": "Q", "image": "a"}, r"expected `conversations` \(LLaVA\) or `messages`, found image, text"),
        (["Q"], "expected a JSON object, found list"),
        ({"messages": [{"role": "user", "content": None}]}, "`content` must be text or a list of parts, found nothing"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "1 <image> placeholders but no `image` key"),
        (
            {"messages": [{"role": "user", "content": [{"type": "picture"}]}]},
            r"messages\[0\].content\[0\]: unknown part type 'picture'; known: text, image_url",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "Q"},
                    {"role": "assistant", "content": [{"type": "video", "path": "a"}]},
                ]
            },
            r"messages\[1\].content\[0\]: media in a turn of the assistant",
        ),
    ],
)
def test_broken_records(record: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        read_record(record, ROOT, "set.json: record 3")
    assert str(caught.value).startswith("set.json: record 3")
    assert "\n" not in str(caught.value)


def test_an_error_line_stays_short_whatever_the_data_hold() -> None:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A"}]
    for record in (
        {"conversations": [{"from": "x" * 10**6, "value": "Q"}, turns[1]]},
        {"image": "../" + "x" * 10**6, "conversations": turns},
        {"image": "a", "conversations": [turns[0], {**turns[1], "weight": 10**4000}]},
        {"messages": [{"role": "user", "content": [{"type": "y" * 10**6}]}]},
    ):
        with pytest.raises(DataError) as caught:
            read_record(record, ROOT, "x")
        assert len(str(caught.value)) < 500


def test_records_keep_their_fields(tmp_path: Path) -> None:
    rows = [
        llava("<image>\nQ", "A", image="p/a.png", id=7, kind="colour", source="stamps", answers=["red"], kinds=["x"]),
        llava("Q", "A"),
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    first, second = load_records(tmp_path / "train.json")
    assert (first.id, first.kind, first.source) == ("7", "colour", "stamps")
    assert first.extra == {"answers": ["red"], "kinds": ["x"]}
    assert first.messages[0].parts[0] == Image(tmp_path / "p/a.png")
    assert (second.id, second.kind, second.source, second.extra) == ("train-1", "conversation", "train", {})
    elsewhere = load_records(tmp_path / "train.json", tmp_path / "pictures")
    assert elsewhere[0].messages[0].parts[0] == Image(tmp_path / "pictures/p/a.png")


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    lines = [json.dumps(llava("Q\u2028", "A"), ensure_ascii=False), "", json.dumps(llava("<image>", "A"))]
    path.write_text("\n".join(lines[:2]), encoding="utf-8")
    assert load_records(path)[0].messages[0] == user("Q\u2028")
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=r"train.jsonl: line 3: 1 <image> placeholders but no `image` key"):
        load_records(path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no records"),
        (b"[]", "holds no records"),
        (b'[{"messages": [', r"record 0: not valid JSON: .*\(line 1\)"),
        (
            b'{"messages": [{"role": "user", "content": "Q"}]}\n{"messages": [',
            "line 2: not valid JSON: .*one object a line",
        ),
        (b'{\n "messages": []\n}', "line 1: `messages` must be a list of turns, found empty list"),
        (b"\xff\xfe[", r"line 1: not UTF-8 text"),
        (b"[3]", "record 0: expected a JSON object, found int"),
    ],
)
def test_broken_files(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=complaint) as caught:
        load_records(path)
    assert str(caught.value).startswith(str(path))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        load_records(tmp_path / "none.json")
    with pytest.raises(DataError, match="no images"):
        load_records(tmp_path)


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
ASKS = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def test_reasoning_and_tools_are_read_in_every_spelling() -> None:
    turns = [
        UNTOLD,
        {"role": "assistant", "content": None, "tool_calls": [{**ASKS, "id": "1"}], "reasoning": "Look."},
        {"role": "tool", "tool_call_id": "1", "name": "weather", "content": [{"type": "text", "text": "3 <image>"}]},
        {"role": "assistant", "content": "Three.", "reasoning_content": "Cold.", "thinking": "Cold."},
    ]
    expected = (
        replace(user("Q"), tools=(TOOL,)),
        Message("assistant", (), tool_calls=({**ASKS, "id": "1"},), reasoning_content="Look."),
        Message("tool", (Text("3 <image>"),), tool_call_id="1", name="weather"),
        replace(assistant("Three."), reasoning_content="Cold."),
    )
    for form in ("", "openai"):
        record = read_record({"messages": turns, "tools": [TOOL]}, ROOT, "here", form=form)
        assert record.messages == expected and "tools" not in record.extra
        assert record_from_json(json.loads(json.dumps(record_to_json(record)))) == record
        turns[1]["content"] = ""
        assert read_record({"messages": turns}, ROOT, "x", form=form).messages[1].parts == (Text(""),)
        turns[1]["content"] = None

    said = [
        ("human", "Q"),
        ("function_call", json.dumps(ASKS["function"])),
        ("observation", "3"),
        ("gpt", "Three."),
        ("human", "And now?"),
        ("function_call", json.dumps([ASKS["function"], {"name": "clock", "arguments": ""}])),
    ]
    shared = {
        "tools": json.dumps([TOOL["function"]]),
        "conversations": [{"from": role, "value": text} for role, text in said],
    }
    messages = read_record(shared, ROOT, "here").messages
    assert [message.role for message in messages] == ["user", "assistant", "tool", "assistant", "user", "assistant"]
    assert messages[0].tools == (TOOL,) and messages[1] == Message("assistant", (), tool_calls=(ASKS,))
    clock = {"type": "function", "function": {"name": "clock", "arguments": {}}}
    assert messages[2] == Message("tool", (Text("3"),)) and messages[5].tool_calls == (ASKS, clock)
    bare = read_record({"messages": [UNTOLD, {"role": "assistant", "tool_calls": [ASKS["function"]]}]}, ROOT, "x")
    assert bare.messages[1].tool_calls == (ASKS,)


@pytest.mark.parametrize(
    ("roles", "complaint"),
    [
        (["user", "tool"], "turn 2 is the tool's; a tool's result stands between two turns of the assistant"),
        (["user", "assistant", "tool", "user"], "turn 4 is the user's; a tool's result stands between"),
        (["tool", "assistant"], "turn 1 is the tool's"),
        (["user", "assistant", "assistant"], "turn 3 is the assistant's; user and assistant must take turns"),
    ],
)
def test_a_result_stands_between_two_turns_of_the_assistant(roles: list[str], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        read_record({"messages": [{"role": role, "content": "x"} for role in roles]}, ROOT, "here")
    assert caught.value.code == "role-order"
    written = [{"from": role, "value": "x"} for role in ("human", "gpt", "tool", "tool", "gpt")]  # calls in the text
    assert len(read_record({"conversations": written}, ROOT, "here").messages) == 5


def test_reasoning_and_calls_are_the_assistants() -> None:
    for field in ({"reasoning_content": "Hm."}, {"tool_calls": [ASKS]}):
        with pytest.raises(DataError, match=f"`{next(iter(field))}` in a turn of the user; only the assistant"):
            read_record({"messages": [{**UNTOLD, **field}, {"role": "assistant", "content": "A"}]}, ROOT, "here")
    with pytest.raises(DataError, match="a call must be JSON, found 'weather"):
        turns = [{"from": "human", "value": "Q"}, {"from": "function_call", "value": "weather(Oslo)"}]
        read_record({"conversations": turns}, ROOT, "here")


FIELD = [  # what a record has beside its turns, its question, and what is meant
    ({"video": "v.mp4"}, "<video>\nQ", [Video(ROOT / "v.mp4"), "Q"]),
    ({"videos": ["v.mp4", "w.mp4"]}, "<video><video>Q", [Video(ROOT / "v.mp4"), Video(ROOT / "w.mp4"), "Q"]),
    ({"video": "v.mp4"}, "<image>\nQ", [Video(ROOT / "v.mp4"), "Q"]),  # LLaVA-Video
    ({"video": "v.mp4", "image": "a"}, "<image>Q<video>", [Image(ROOT / "a"), "Q", Video(ROOT / "v.mp4")]),
    ({"videos": [{"path": "v.mp4", "num_frames": 4}]}, "<video>Q", [Video(ROOT / "v.mp4", num_frames=4), "Q"]),
    ({"video": {"video": "v.mp4", "fps": 2}}, "<video>Q", [Video(ROOT / "v.mp4", fps=2), "Q"]),
    (
        {"videos": [{"video": "v.mp4", "nframes": 3, "video_start": 1, "video_end": 2.5, "max_pixels": 100352}]},
        "<video>Q",
        [Video(ROOT / "v.mp4", num_frames=3, start=1, end=2.5), "Q"],
    ),
    ({"video": {"url": "v.mp4", "start": 0.5, "end": None}}, "<video>Q", [Video(ROOT / "v.mp4", start=0.5), "Q"]),
    ({"audio": "s.wav"}, "<audio>Q", [Audio(ROOT / "s.wav"), "Q"]),
    (
        {"audios": ["s.wav", {"audio": "t.wav", "sampling_rate": 16000}]},
        "<audio>Q<audio>",
        [Audio(ROOT / "s.wav"), "Q", Audio(ROOT / "t.wav")],
    ),
    ({"document": "d.pdf"}, "<document>Q", [Document(ROOT / "d.pdf"), "Q"]),
    (
        {"documents": [{"path": "d.pdf", "pages": "1-2", "text": "layer"}, {"document": "e.tif", "pages": 3}]},
        "<document>Q<document>",
        [Document(ROOT / "d.pdf", "1-2", "layer"), "Q", Document(ROOT / "e.tif", "3")],
    ),
]


@pytest.mark.parametrize("key", ["conversations", "messages"])
@pytest.mark.parametrize(("media", "question", "parts"), FIELD)
def test_videos_sounds_and_documents_and_what_is_said_of_them(
    key: str, media: dict[str, Any], question: str, parts: list[Any]
) -> None:
    turns = [{"role": "user", "content": question.replace("\n", "") if key == "messages" else question}]
    record = read_record({**media, key: [*turns, {"role": "assistant", "content": "A"}]}, ROOT, "x", default_id="1")
    assert record.messages == (user(*parts), assistant("A"))
    assert not record.extra
    assert record_from_json(json.loads(json.dumps(record_to_json(record)))) == record


@pytest.mark.parametrize("form", ["messages", "openai"])
def test_parts_of_a_message_say_more(form: str) -> None:
    content = [
        {"type": "video", "video": "file:///data/set/v.mp4", "fps": 1.0, "max_frames": 32},
        {"type": "video_url", "video_url": {"url": "v.mp4", "nframes": 4}},
        {"type": "video", "video": "v.mp4", "times": [0, 1.5], "audio": True},
        {"type": "document", "path": "d.pdf", "pages": "2-", "text": "ocr"},
        {"type": "file", "file": {"filename": "d.pdf", "file_data": "data:application/pdf;base64,AAAA"}},
        {"type": "text", "text": "Q"},
    ]
    record = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}]}
    video = ROOT / "v.mp4"
    assert read_record(record, ROOT, "x", form=form).messages[0] == user(
        Video(video, fps=1.0),
        Video(video, num_frames=4),
        Video(video, times=(0.0, 1.5), audio=True),
        Document(ROOT / "d.pdf", "2-", "ocr"),
        Document("data:application/pdf;base64,AAAA"),
        "Q",
    )


def test_a_part_without_a_source_takes_the_next_of_the_list() -> None:
    content = [{"type": "video", "fps": 2}, {"type": "document"}, {"type": "text", "text": "Q"}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}]
    record = {"videos": ["v.mp4"], "documents": ["d.pdf"], "messages": turns}
    expected = user(Video(ROOT / "v.mp4", fps=2), Document(ROOT / "d.pdf"), "Q")
    assert read_record(record, ROOT, "x").messages[0] == expected


@pytest.mark.parametrize(
    ("media", "question", "problem"),
    [
        ({"video": {"path": "v.mp4", "frame_stride": 2}}, "<video>", "`video`[0]: 'frame_stride' is no setting of it"),
        ({"video": {"path": "v.mp4", "fps": 0}}, "<video>", "`video`[0]: fps is 0; it must be a number above 0"),
        ({"video": {"path": "v.mp4", "num_frames": "4"}}, "<video>", "`video`[0]: num_frames is '4'"),
        ({"videos": [{"path": "v.mp4", "start": 3, "end": 2}]}, "<video>", "it ends at 2 seconds and starts at 3"),
        ({"audio": {"path": "s.wav", "start": 2}}, "<audio>", "`start` of a sound cannot be followed; cut the file"),
        ({"document": {"path": "d.pdf", "text": "all"}}, "<document>", "text is 'all'; it must be"),
        ({"video": {"num_frames": 4}}, "<video>", "`video`[0] must be a path or URL, found nothing"),
        ({"video": "v.mp4"}, "<video><video>", "2 <video> placeholders but 1 items in `video`"),
        ({"video": "v.mp4"}, "Q", "0 <video> placeholders but 1 items in `video`"),
        ({"document": "d.pdf"}, "Q", "0 <document> placeholders but 1 items in `document`"),
        ({"video": "../v.mp4"}, "<video>", "leaves the folder"),
    ],
)
def test_what_cannot_be_followed_of_a_medium(media: dict[str, Any], question: str, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        read_record(llava(f"{question}Q", "A", **media), ROOT, "here")
    assert str(caught.value).startswith("here: ") and problem in str(caught.value)


def test_a_document_that_is_a_text_is_a_field_like_any_other() -> None:
    record = read_record(llava("Sum it up.", "A", document="Once upon a time.\nThe end."), ROOT, "x")
    assert record.messages[0] == user("Sum it up.") and record.extra == {"document": "Once upon a time.\nThe end."}
