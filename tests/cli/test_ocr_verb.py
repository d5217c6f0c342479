"""`polymodal ocr`: lines in reading order, with a stub of its engine, and the engine itself where it is installed."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from polymodal.cli import main
from polymodal.media import ocr

INSTALLED = importlib.util.find_spec("rapidocr") is not None and importlib.util.find_spec("onnxruntime") is not None
PDF = importlib.util.find_spec("pypdfium2") is not None


def line(text: str, x: float, y: float, width: float = 200, height: float = 10) -> ocr.Line:
    return ocr.Line(text, 0.9, [[x, y], [x + width, y], [x + width, y + height], [x, y + height]])


def order(lines: list[ocr.Line]) -> list[str]:
    """The order of the texts, which must not depend on the engine's."""
    found = [one.text for one in ocr.reading_order(lines)]
    for seed in range(5):
        assert [one.text for one in ocr.reading_order(random.Random(seed).sample(lines, len(lines)))] == found
    return found


def test_one_column_goes_down() -> None:
    assert order([line(str(row), 5, 15 * row) for row in range(20)]) == [str(row) for row in range(20)]
    assert order([]) == []


def test_columns_under_a_title_go_one_after_the_other() -> None:
    left = [line(f"l{row}", 0, 40 + 15 * row) for row in range(6)]
    right = [line(f"r{row}", 230, 40 + 15 * row) for row in range(6)]
    title, foot = line("title", 100, 0, 250, 20), line("foot", 100, 170, 250)
    names = [f"l{row}" for row in range(6)] + [f"r{row}" for row in range(6)]
    assert order([foot, *right, *left, title]) == ["title", *names, "foot"]


def test_a_table_goes_row_by_row() -> None:
    cells = [line(f"{row}{column}", 100 * column, 15 * row + column, 40) for row in range(8) for column in range(3)]
    assert order(cells) == [f"{row}{column}" for row in range(8) for column in range(3)]


def test_crooked_lines_stay_in_their_row() -> None:
    assert order([line("b", 300, 4), line("a", 0, 0), line("d", 300, 19), line("c", 0, 15)]) == ["a", "b", "c", "d"]


def test_many_lines_are_no_trouble() -> None:
    assert len(order([line(str(row), row % 7 * 30, row * 12.0 + row**0.5, 20) for row in range(1000)])) == 1000


class Stub:
    """Reads one line an image, whose place and text follow the image."""

    def __call__(self, pixels: np.ndarray) -> Any:
        if pixels.max() == 255:  # white
            return SimpleNamespace(boxes=None, txts=None, scores=None)
        blue, green, red = pixels[0, 0].tolist()
        box = np.array([[[1, 2], [9, 2], [9, 6], [1, 6]]], np.float32)
        return SimpleNamespace(boxes=box, txts=(f"{red} {green} {blue}\x1b[31m",), scores=(0.98765,))


def test_what_it_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ocr, "load_engine", Stub)
    pages = [PILImage.new("RGB", (20, 10), colour) for colour in ((1, 2, 3), (255, 255, 255), (7, 8, 9))]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert main(["ocr", str(tmp_path / "a.tif"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["file"] == str(tmp_path / "a.tif") and [page["page"] for page in found["pages"]] == [1, 2, 3]
    assert found["pages"][0] == {
        "page": 1, "height": 10, "width": 20,
        "lines": [{"text": "1 2 3\x1b[31m", "confidence": 0.9877, "box": [[1, 2], [9, 2], [9, 6], [1, 6]]}],
    }  # fmt: skip
    assert found["pages"][1]["lines"] == []
    assert main(["ocr", str(tmp_path / "a.tif"), "--pages", "3,1"]) == 0
    assert capsys.readouterr().out == "7 8 9\\x1b[31m\n\n1 2 3\\x1b[31m\n\n"


def test_bad_input_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ocr, "load_engine", Stub)
    (tmp_path / "a.png").write_bytes(b"no image")
    for arguments, message in (
        ([str(tmp_path / "none.png")], "no such file"),
        ([str(tmp_path / "a.png")], "is not a document that can be read"),
        ([str(tmp_path / "a.png"), "--dpi", "0"], "dpi is 0"),
    ):
        assert main(["ocr", *arguments]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_where_the_extra_is_missing(
    package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["ocr", "page.png"]) == 2
    assert f"ocr needs {package}, which is not installed" in (said := capsys.readouterr().err)
    assert "pip install 'polymodal[ocr]'" in said


@pytest.mark.skipif(not INSTALLED, reason="needs the extra `ocr`")
@pytest.mark.parametrize(
    "form", ["png", pytest.param("pdf", marks=pytest.mark.skipif(not PDF, reason="needs pypdfium2"))]
)
def test_the_engine_itself(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = ["Invoice 4711", "Total due: 42.50 EUR", "Thank you for your order"]
    image = PILImage.new("RGB", (520, 220), "white")
    for row, text in enumerate(texts):
        ImageDraw.Draw(image).text((20, 20 + 60 * row), text, font=ImageFont.load_default(28), fill="black")
    image.save(tmp_path / f"page.{form}")
    assert main(["ocr", str(tmp_path / f"page.{form}"), "--json", "--dpi", "72"]) == 0
    found = json.loads(capsys.readouterr().out)["pages"]
    assert [one["text"] for one in found[0]["lines"]] == texts and found[0]["width"] == 520
    for row, one in enumerate(found[0]["lines"]):
        assert one["confidence"] > 0.8
        assert np.abs(np.mean(one["box"], axis=0)[1] - (36 + 60 * row)) < 12
