"""`polymodal inspect` on a tiny model, and the example that draws tiles."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from polymodal.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_inspect_prints_and_writes(
    tiny_model_folder: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, sheet = tmp_path / "seen.html", tmp_path / "seen.png"
    argv = ["inspect", "--model", str(tiny_model_folder), "--prompt", "What? \x1b[2J", "--answer", "A cat."]
    argv += ["--image", str(image_folder / "cat.jpg"), "--image", str(image_folder / "apple.png")]
    assert main([*argv, "--html", str(page), "--png", str(sheet)]) == 0
    out = capsys.readouterr().out
    assert "⟨image 1: 16 tokens⟩⟨image 2: 16 tokens⟩What? \\x1b[2J" in out
    assert "⟦A cat.<|im_end|>⟧" in out
    assert "32 media, 7 trained" in out  # six letters and the end token
    assert "451 × 300 pixels, padded to 451 × 451" in out
    assert page.read_text(encoding="utf-8").count("data:image/png;base64,") == 2
    with Image.open(sheet) as drawing:
        assert drawing.height > 400


def test_colours_only_where_asked_for(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["inspect", "--model", str(tiny_model_folder), "--prompt", "What?", "--answer", "That."]
    for colour, coloured in (("auto", False), ("always", True), ("never", False)):
        assert main([*argv, "--color", colour]) == 0
        assert ("\x1b[32m" in capsys.readouterr().out) is coloured


def test_inspect_needs_no_language_model(tiny_model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "llm")
    assert main(["inspect", "--model", str(tmp_path / "model"), "--prompt", "What?"]) == 0


def test_inspect_sees_what_generate_is_given(tiny_model_folder: Path, image_folder: Path) -> None:
    from polymodal.backends import load, load_processor
    from polymodal.messages import Image as ImagePart
    from polymodal.messages import user

    messages = [user("a", ImagePart(image_folder / "cat.jpg"), "b")]
    alone = load_processor(tiny_model_folder)(messages, add_generation_prompt=True)
    loaded = load(tiny_model_folder).processor(messages, add_generation_prompt=True)
    assert alone.input_ids.tolist() == loaded.input_ids.tolist()
    assert alone.plans == loaded.plans
    assert alone.media_keys == loaded.media_keys


def test_draw_tiles_example(image_folder: Path, tmp_path: Path) -> None:
    script, target = ROOT / "examples" / "draw_tiles.py", tmp_path / "tiles.jpg"
    done = subprocess.run(
        [sys.executable, str(script), str(image_folder / "coffee.jpg"), str(target)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "anyres: 5 tiles, 2144 tokens" in done.stdout
    assert target.stat().st_size > 10_000


def test_the_largest_image_may_be_set(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("POLYMODAL_MAX_PIXELS", raising=False)
    Image.new("L", (300, 200)).save(tmp_path / "photo.png")
    argv = ["inspect", "--model", str(tiny_model_folder), "--prompt", "What?", "--image", str(tmp_path / "photo.png")]
    assert main(["--max-pixels", "59999", *argv]) == 2
    assert "at most 59,999 are allowed; scale it down, or allow it with --max-pixels 60000" in capsys.readouterr().err
    assert main([*argv, "--max-pixels", "60000"]) == 0
    assert main([*argv, "--max-pixels", "0"]) == 2
    assert "must be a whole number from 1 to 400,000,000" in capsys.readouterr().err
    assert "POLYMODAL_MAX_PIXELS" not in os.environ


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "blip"}, ("a captioner", "`polymodal generate`")),
        ({"model_type": "git"}, ("a captioner", "`polymodal generate`")),
        ({"model_type": "qwen2_vl"}, ("of type 'qwen2_vl'", "`polymodal generate`")),
        ({"model_type": "clip"}, ("a pair of towers", "`polymodal embed`")),
        ({"model_type": "llava", "mm_vision_tower": "a/b"}, ("the LLaVA repository", "`polymodal convert`")),
        ({"model_type": "bert"}, ("of type 'bert'", "`polymodal describe`")),
    ],
)
def test_a_folder_that_is_not_ours_says_what_it_is_and_what_takes_it(
    config: dict[str, str], words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["inspect", "--model", str(tmp_path), "--prompt", "x"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error and all(word in error for word in words)
    assert "polymodal.json" not in error and ("generate" in error) == ("`polymodal generate`" in words)
