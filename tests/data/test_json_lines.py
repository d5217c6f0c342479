"""Rows one after the other: lists and lines, whole and broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polymodal.data.readers.json_lines import LINES, LIST, file_form, text_rows
from polymodal.errors import DataError

ROWS = [{"id": str(n), "conversations": [{"from": "human", "value": "a\u2028b {"}, {"from": "gpt"}]} for n in range(4)]


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "data.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_list(tmp_path: Path, indent: int | None, mark: str) -> None:
    path = write(tmp_path, mark + json.dumps(ROWS, indent=indent, ensure_ascii=False))
    rows = list(text_rows(path))
    assert file_form(path) == LIST
    assert [row.data for row in rows] == ROWS and not any(row.code for row in rows)
    lines = path.read_text("utf-8-sig").split("\n")
    for row in rows:
        assert json.loads(row.text) == row.data
        assert row.text.split("\n")[0] in lines[row.line - 1]


def test_lines(tmp_path: Path) -> None:
    body = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    path = write(tmp_path, "\ufeff" + body + "\r\n")
    assert file_form(path) == LINES
    assert [(row.number, row.line, row.data) for row in text_rows(path)] == [
        (n, 2 * n + 1, row) for n, row in enumerate(ROWS)
    ]


@pytest.mark.parametrize("indent", [None, 1])
def test_after_a_broken_element_the_next_row_is_found(tmp_path: Path, indent: int | None) -> None:
    whole = [json.dumps(row, indent=indent) for row in ROWS]
    broken = whole[1].replace('"gpt"', "gpt")
    rows = list(text_rows(write(tmp_path, "[" + ",\n".join([whole[0], broken, *whole[2:]]) + "]")))
    assert [row.code for row in rows] == ["", "broken-json", "", ""]
    assert [row.data for row in rows] == [ROWS[0], None, ROWS[2], ROWS[3]]
    missing_comma = list(text_rows(write(tmp_path, "[" + whole[0] + "\n" + ",\n".join(whole[1:]) + "]")))
    assert [row.data for row in missing_comma if not row.code][-2:] == ROWS[2:]
    assert missing_comma[0].code == "broken-json"


def test_a_list_that_is_cut(tmp_path: Path) -> None:
    text = json.dumps(ROWS)
    for end in (len(text) - 1, len(text) - 30, len(text) // 2):
        rows = list(text_rows(write(tmp_path, text[:end])))
        good = [row.data for row in rows if not row.code]
        assert good == ROWS[: len(good)] and [row.code for row in rows][len(good) :] == ["broken-json"]


def test_what_no_parser_takes_is_one_broken_row(tmp_path: Path) -> None:
    pieces = [json.dumps(ROWS[0]), '{"n": ' + "9" * 5000 + "}", "[" * 200_000, json.dumps(ROWS[1])]
    rows = list(text_rows(write(tmp_path, "\n".join(pieces))))
    assert [row.code for row in rows] == ["", "broken-json", "broken-json", ""]
    assert "digits" in rows[1].error and "nested" in rows[2].error
    rows = list(text_rows(write(tmp_path, b'{"a": "\xff"}\n{"a": 1}\n')))
    assert [(row.code, row.data) for row in rows] == [("not-utf8", None), ("", {"a": 1})]


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no records"):
        list(text_rows(write(tmp_path, " \n ")))
    with pytest.raises(DataError, match="no such file"):
        list(text_rows(tmp_path / "none.json"))
    with pytest.raises(DataError, match="cannot be read"):
        list(text_rows(tmp_path))
