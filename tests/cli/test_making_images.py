"""Images that a model makes, on the command line: flags, files, what a terminal is shown, the chat's next turn."""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from polymodal.backends import load
from polymodal.cli import chat, common, main
from polymodal.generation.params import GenerationParams, ImageParams
from tests.drawers import SIDE


def test_generate_saves_images(drawer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["generate", "--model", str(drawer_folder), "--modalities", "image", "--prompt", "x", "--seed", "3"]
    flags += ["-o", str(tmp_path / "out"), "--guidance", "1.5", "--image-temperature", "0.5"]
    for more, expected in (([], ["image-1.png"]), (["--stream"], ["image-1.png", "image-2.png"])):
        assert main([*flags, *more]) == 0
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == expected
    assert Image.open(tmp_path / "out" / "image-1.png").size == (SIDE, SIDE)
    one, two = ((tmp_path / "out" / f"image-{n}.png").read_bytes() for n in (1, 2))
    assert one == two  # the seed holds for images too
    capsys.readouterr()
    assert main([*flags, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == [str(tmp_path / "out" / "image-3.png")]


def test_what_a_model_does_not_make_is_one_line(
    drawer_folder: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for model, kinds, complaint in (
        (tiny_model_folder, "audio,text", "name text before it"),
        (drawer_folder, "text,smell", "modalities"),
        (drawer_folder, "", "modalities"),
    ):
        assert main(["generate", "--model", str(model), "--modalities", kinds, "--prompt", "x"]) == 2
        err = capsys.readouterr().err
        assert complaint in err and err.count("\n") == 1


def test_chat_keeps_the_image_for_the_next_turn(
    drawer_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = load(drawer_folder, "cpu")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("draw\nand again\n"))
    params = GenerationParams(modalities=("image",), image=ImageParams(guidance=1.0))
    talk = chat.Chat(model, params, None)
    assert talk.run() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image-1.png", "image-2.png"]
    assert [len(message.media) for message in talk.messages] == [0, 1, 0, 1]
    assert "no answer" not in capsys.readouterr().err


def test_terminals_that_can_are_shown_the_image() -> None:
    png = bytes(range(256)) * 20
    assert common.inline_image(png, {"TERM": "xterm"}) == ""
    iterm = common.inline_image(png, {"TERM_PROGRAM": "iTerm.app"})
    assert iterm.startswith("\x1b]1337;File=inline=1") and iterm.endswith(base64.b64encode(png).decode() + "\a")
    kitty = common.inline_image(png, {"KITTY_WINDOW_ID": "1"})
    commands = [part.removeprefix("\x1b_G") for part in kitty.split("\x1b\\") if part]
    heads, data = zip(*(command.split(";") for command in commands), strict=True)
    assert heads == ("a=T,f=100,m=1", "m=0") and base64.b64decode("".join(data)) == png


def test_inspect_shows_codes_as_codes(drawer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (SIDE, SIDE), "red").save(tmp_path / "red.png")
    flags = ["inspect", "--model", str(drawer_folder), "--image", str(tmp_path / "red.png"), "--prompt", "What?"]
    assert main(flags) == 0
    assert "<boi>⟨9 codes⟩<eoi>What?" in capsys.readouterr().out
    assert main([*flags, "--html", str(tmp_path / "view.html")]) == 0
    assert main([*flags, "--png", str(tmp_path / "view.png")]) == 2
    assert "reads these images as codes" in capsys.readouterr().err
