"""Rows one after the other: lists and lines, whole and broken; large files element by element."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymodal.data.readers import json_files
from polymodal.data.readers.base import Options, RawRow
from polymodal.data.readers.json_files import LINES, LIST, elements, events, file_form, members, read_rows
from polymodal.errors import DataError

ROWS = [{"id": str(n), "conversations": [{"from": "human", "value": "a\u2028b {"}, {"from": "gpt"}]} for n in range(4)]


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "data.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def text_rows(path: Path) -> list[RawRow]:
    return list(read_rows(path, Options(path.parent)))


def codes(rows: list[RawRow]) -> list[str]:
    return [row.error.code if row.error else "" for row in rows]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_list(tmp_path: Path, indent: int | None, mark: str) -> None:
    path = write(tmp_path, mark + json.dumps(ROWS, indent=indent, ensure_ascii=False))
    rows = text_rows(path)
    assert file_form(path) == LIST
    assert [row.data for row in rows] == ROWS and not any(row.error for row in rows)
    lines = path.read_text("utf-8-sig").split("\n")
    for row in rows:
        assert json.loads(row.text) == row.data
        assert row.text.split("\n")[0] in lines[row.line - 1]


def test_lines(tmp_path: Path) -> None:
    body = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    path = write(tmp_path, "\ufeff" + body + "\r\n")
    assert file_form(path) == LINES
    assert [(number, row.line, row.data) for number, row in enumerate(text_rows(path))] == [
        (n, 2 * n + 1, row) for n, row in enumerate(ROWS)
    ]


@pytest.mark.parametrize("indent", [None, 1])
def test_after_a_broken_element_the_next_row_is_found(tmp_path: Path, indent: int | None) -> None:
    whole = [json.dumps(row, indent=indent) for row in ROWS]
    broken = whole[1].replace('"gpt"', "gpt")
    rows = text_rows(write(tmp_path, "[" + ",\n".join([whole[0], broken, *whole[2:]]) + "]"))
    assert codes(rows) == ["", "broken-json", "", ""]
    assert [row.data for row in rows] == [ROWS[0], None, ROWS[2], ROWS[3]]
    missing_comma = text_rows(write(tmp_path, "[" + whole[0] + "\n" + ",\n".join(whole[1:]) + "]"))
    assert [row.data for row in missing_comma if not row.error][-2:] == ROWS[2:]
    assert codes(missing_comma)[0] == "broken-json"


def test_a_list_that_is_cut(tmp_path: Path) -> None:
    text = json.dumps(ROWS)
    for end in (len(text) - 1, len(text) - 30, len(text) // 2):
        rows = text_rows(write(tmp_path, text[:end]))
        good = [row.data for row in rows if not row.error]
        assert good == ROWS[: len(good)] and codes(rows)[len(good) :] == ["broken-json"]


def test_what_no_parser_takes_is_one_broken_row(tmp_path: Path) -> None:
    pieces = [json.dumps(ROWS[0]), '{"n": ' + "9" * 5000 + "}", "[" * 200_000, json.dumps(ROWS[1])]
    rows = text_rows(write(tmp_path, "\n".join(pieces)))
    assert codes(rows) == ["", "broken-json", "broken-json", ""]
    assert "digits" in str(rows[1].error) and "nested" in str(rows[2].error)
    rows = text_rows(write(tmp_path, b'{"a": "\xff"}\n{"a": 1}\n'))
    assert codes(rows) == ["not-utf8", ""] and [row.data for row in rows] == [None, {"a": 1}]


def joined(*texts: str) -> str:
    return "\n".join(texts) + "\n"


LINE = [json.dumps(row) for row in ROWS]
PRETTY = [json.dumps(row, indent=2) for row in ROWS]
WHOLE = {
    "cat of two lists": joined(json.dumps(ROWS[:2], indent=1), json.dumps(ROWS[2:], indent=1)),
    "lists on one line": json.dumps(ROWS[:2]) + json.dumps(ROWS[2:]),
    "lines appended to a list": joined(json.dumps(ROWS[:2]), *LINE[2:]),
    "a list of one row a line": joined(*(f"[{line}]" for line in LINE)),
    "objects over several lines": joined(*PRETTY),
    "the same with a mark": "\ufeff" + joined(*PRETTY),
    "some over several lines": joined(LINE[0], PRETTY[1], LINE[2], PRETTY[3]),
}


@pytest.mark.parametrize("name", WHOLE)
def test_no_row_is_lost_after_the_first_value(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, WHOLE[name])
    rows = text_rows(path)
    assert [row.data for row in rows] == ROWS and not any(row.error for row in rows)
    lines = path.read_text("utf-8-sig").split("\n")
    for row in rows:
        assert json.loads(row.text) == row.data and row.text.split("\n")[0] in lines[row.line - 1]


def test_a_list_that_ends_too_early_is_said_and_read_on(tmp_path: Path) -> None:
    rows = text_rows(write(tmp_path, "[" + LINE[0] + ",\n" + LINE[1] + "\n],\n" + LINE[2] + ",\n" + LINE[3] + "]\n"))
    assert [row.data for row in rows] == [*ROWS[:2], None, *ROWS[2:]] and codes(rows)[2] == "broken-json"
    assert rows[2].line == 3 and "more follows after the end of a list" in str(rows[2].error)
    twice = text_rows(write(tmp_path, json.dumps(ROWS) + "]\nrest"))
    assert [row.data for row in twice] == [*ROWS, None, None] and [row.line for row in twice[4:]] == [1, 2]


@pytest.mark.parametrize(("own", "key"), [(("role", "content"), "messages"), (("from", "value"), "conversations")])
def test_a_list_of_turns_is_a_row(tmp_path: Path, own: tuple[str, str], key: str) -> None:
    chats = [
        [dict(zip(own, ("user", f"Q{n}"), strict=True)), dict(zip(own, ("assistant", "A"), strict=True))]
        for n in (1, 2)
    ]
    for text in (joined(*map(json.dumps, chats)), json.dumps(chats), joined(*(json.dumps(c, indent=1) for c in chats))):
        path = write(tmp_path, text)
        assert [row.data for row in text_rows(path)] == [{key: chat} for chat in chats]
    assert file_form(write(tmp_path, joined(*map(json.dumps, chats)))) == LINES


def test_a_line_that_is_broken_does_not_swallow_the_next(tmp_path: Path) -> None:
    rows = text_rows(write(tmp_path, joined(LINE[0], LINE[1][:-30], LINE[2], LINE[3] + LINE[0], LINE[1])))
    assert codes(rows) == ["", "broken-json", "", "broken-json", ""]
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]


def test_a_key_that_comes_twice_breaks_its_row(tmp_path: Path) -> None:
    twice = '{"id": "a", "conversations": [], "id": "b"}'
    for text in (joined(twice, LINE[0]), f"[{twice}, {LINE[0]}]"):
        rows = text_rows(write(tmp_path, text))
        assert codes(rows) == ["broken-json", ""] and "the key 'id' comes twice" in str(rows[0].error)
    with pytest.raises(DataError, match="the key 'n' comes twice in one object; keep one"):
        list(elements(write(tmp_path, '{"a": [{"n": 1}, {"m": {"n": 1, "n": 2}}]}'), "a"))
    with pytest.raises(DataError, match="the key 'n' comes twice"):
        list(members(write(tmp_path, '{"a": {"n": 1, "n": 2}}')))


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no records"):
        (text_rows(write(tmp_path, " \n ")))
    with pytest.raises(DataError, match="no such file"):
        (text_rows(tmp_path / "none.json"))
    with pytest.raises(DataError, match="is a directory; give a file"):
        (text_rows(tmp_path))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(1 - 2**63, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=60, deadline=None)
@given(
    data=st.dictionaries(st.text(min_size=1, max_size=4), VALUES, max_size=6),
    listed=st.lists(VALUES, max_size=6),
    first=st.booleans(),
    indent=st.sampled_from([None, 1]),
    ascii=st.booleans(),
    mark=st.sampled_from(["", "\ufeff"]),
    chunk=st.integers(1, 40),
)
def test_stream_sees_what_json_sees(
    tmp_path_factory: pytest.TempPathFactory,
    data: dict[str, Any],
    listed: list[Any],
    first: bool,
    indent: int | None,
    ascii: bool,
    mark: str,
    chunk: int,
) -> None:
    path = tmp_path_factory.mktemp("stream") / "x.json"
    data = {"listed": listed, **data} if first else {**data, "listed": listed}
    text = json.dumps(data, indent=indent, ensure_ascii=ascii)
    path.write_text(mark + text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(json_files._SAFE, "buf_size", chunk)  # any value may be cut anywhere
        seen, listed_seen = list(members(path)), list(elements(path, "listed"))
        keys = [value for place, event, value in events(path) if not place and event == "map_key"]
    assert dict(seen) == data and listed_seen == listed and keys == list(data)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'{"a": [1, 2', "not valid JSON: .*EOF after 2 elements of `a`"),
        (b'{"a": [1\n 2]}', r"expect ',' or '\]' after 1 elements of `a`, near '{\"a\": \[1  ?2\]}'"),
        (b'{"a": "x', "premature EOF"),
        (b'{"a" 1}', "must be separated by a colon"),
        (b"{1: 2}", "invalid object key"),
        (b'{"a": 1} x', "trailing garbage"),
        (b"7", "expected an object or a list"),
        (b'"text"', "expected an object or a list"),
        (b'{"a": ' + b"1" * 5000 + b"}", "integer overflow"),
        (b'{"a": 1.' + b"1" * 5000 + b"e999}", "floating point.* overflow"),
        (b'{"a": NaN}', "invalid char in json text.*NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": "\xff"}', "not UTF-8 text after 0 elements of `a`, near "),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8 text"),
        (b"", "premature EOF"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": [' + b'{"b": "\\"]]]\\\\", "c": [' * 600, "nested too deeply"),
        (b'{"a": ' + b"[" * 1200 + b"]" * 1200 + b"}", "nested too deeply"),
    ],
)
def test_stream_names_the_place(content: bytes, complaint: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=complaint) as caught:
        list(elements(path, "a"))
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert caught.value.code in ("broken-json", "not-utf8")


@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
def test_brackets_in_strings_are_not_nesting(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(json_files._SAFE, "buf_size", chunk)
    rows = [{"t": "[" * 900 + '\\"' * k + "{" * 900 + "\\"} for k in range(3)] * 5
    path = write(tmp_path, json.dumps({"a": rows, "b": [[[]]] * 3000}))
    assert list(elements(path, "a")) == rows


def test_a_stream_is_never_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"a": [{"id": n, "text": "x" * 100} for n in range(5000)]})[:-20] + "?")
    found = elements(path, "a")
    assert next(found)["id"] == 0  # the fault at the end is not met yet
    with pytest.raises(DataError, match="after 4999 elements"):
        list(found)
