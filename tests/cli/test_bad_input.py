"""Every mistake a person can make at the command line is one clear line and exit status 2, without a traceback."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from PIL import Image

from polymodal.cli import inspect, main
from polymodal.errors import PolymodalError


def expect_error(argv: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run, and check status 2 and one line on standard error that holds the words; returns the line."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("polymodal: error: ")]
    assert out == ""
    assert len(lines) == 1
    assert "Traceback" not in err
    for word in words:
        assert word in lines[0]
    return lines[0]


def png_header(width: int, height: int) -> bytes:
    """A PNG whose header claims a size and that has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.fixture
def ask(tiny_model_folder: Path) -> list[str]:
    return ["generate", "--model", str(tiny_model_folder), "--prompt", "what?", "--max-new-tokens", "2"]


def test_missing_image(ask: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    expect_error([*ask, "--image", str(tmp_path / "absent.jpg")], capsys, "absent.jpg")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jpg", b""),
        ("text.jpg", b"this is no image at all"),
        ("huge.png", png_header(30_000, 30_000)),
        ("page.png", b"<!doctype html><html></html>"),
    ],
    ids=["empty", "text", "huge", "page"],
)
def test_files_that_are_no_image(
    name: str, content: bytes, ask: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    expect_error([*ask, "--image", str(tmp_path / name)], capsys, name)


def test_truncated_image(
    ask: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, image_folder: Path
) -> None:
    whole = (image_folder / "cat.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    expect_error([*ask, "--image", str(tmp_path / "half.jpg")], capsys, "half.jpg")


def test_the_second_image_is_named(
    ask: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, image_folder: Path
) -> None:
    good = str(image_folder / "cat.jpg")
    expect_error([*ask, "--image", good, "--image", str(tmp_path / "second.jpg")], capsys, "second.jpg")


def test_tiny_and_animated_images_are_fine(ask: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    images = ["--image", str(tmp_path / "dot.png"), "--image", str(tmp_path / "moving.gif")]
    assert main([*ask, *images, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["usage"]["image_tokens"] == 32


def test_a_typed_placeholder_stays_text(ask: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ask[:3], "--prompt", "<image> <image>", "--max-new-tokens", "1", "--json"]) == 0
    usage = json.loads(capsys.readouterr().out)["usage"]
    assert usage["image_tokens"] == 0
    assert usage["prompt_tokens"] > len("<image> <image>")  # every byte is a token, and the turn's frame


def test_a_prompt_longer_than_the_context(ask: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    expect_error([*ask[:3], "--prompt", "x" * 600], capsys, "512", "context")


def test_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    expect_error(["generate", "--model", "defualt", "--prompt", "x"], capsys, "'defualt'")


@pytest.mark.parametrize("verb", ["generate", "inspect"])
def test_a_folder_that_is_no_model(verb: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    expect_error([verb, "--model", str(tmp_path), "--prompt", "x"], capsys, "polymodal.json")


def change_tensors(folder: Path, target: Path, drop: str | None, add: str | None) -> Path:
    """Copy a model folder and take a tensor out of the projector, or put one in."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    tensors = load_file(target / "projector.safetensors")
    if drop is not None:
        name = next(name for name in sorted(tensors) if name.endswith(drop))
        del tensors[name]
    if add is not None:
        tensors[add] = torch.zeros(2)
    save_file(tensors, target / "projector.safetensors")
    return target


@pytest.mark.parametrize(("drop", "add"), [("weight", None), (None, "projector.surplus")])
def test_a_model_with_a_missing_or_an_extra_tensor(
    drop: str | None, add: str | None, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = change_tensors(tiny_model_folder, tmp_path / "model", drop, add)
    line = expect_error(["generate", "--model", str(folder), "--prompt", "x"], capsys, "projector.safetensors")
    assert (add or "weight") in line


def test_an_unknown_key_in_the_models_configuration(
    tiny_model_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_folder, folder)
    document = json.loads((folder / "polymodal.json").read_text())
    document["config"]["vision"]["mm_vision_select_layr"] = -1
    (folder / "polymodal.json").write_text(json.dumps(document))
    expect_error(
        ["generate", "--model", str(folder), "--prompt", "x"],
        capsys,
        "'mm_vision_select_layr'",
        "did you mean 'mm_vision_select_layer'",
    )


def test_an_unknown_key_in_a_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "name: x\ninit: {from: somewhere}\ndata: {mix: [{path: a.json}]}\noptimm: {clip: 1}\noutput_dir: o\n"
    )
    expect_error(["train", str(tmp_path / "recipe.yaml"), "--dry-run"], capsys, "'optimm'", "'optim'")


def test_a_missing_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    expect_error(["train", str(tmp_path / "absent.yaml")], capsys, "absent.yaml")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ("VERB",)),
        (["paint"], ("'paint'",)),
        (["generate"], ("--prompt",)),
        (["generate", "--prompt", "x", "--max-new-tokens", "many"], ("--max-new-tokens", "'many'")),
        (["generate", "--prompt", "x", "--max-new-tokens", "0"], ("max_new_tokens",)),
        (["generate", "--prompt", "x", "--temperature", "-1"], ("temperature",)),
        (["generate", "--prompt", "x", "--top-p", "2"], ("top_p",)),
        (["generate", "--prompt", "x", "--temperature", "inf"], ("temperature", "finite")),
        (["generate", "--prompt", "x", "--temperature", "nan"], ("temperature",)),
        (["generate", "--prompt", "x", "--seed", str(2**64)], ("seed", "less than")),
        (["generate", "--prompt", "x", "--repetition-penalty", "1e-45"], ("repetition_penalty", "0.01")),
        (["generate", "--prompt", "x", "--device", "gpu"], ("device 'gpu'", "cpu, cuda, cuda:NUMBER or mps")),
        (["generate", "--prompt", "x", "--device", "cuda:977"], ("device 'cuda:977' is not on this machine",)),
        (["generate", "--prompt", "x", "--device", "cuda:-1"], ("device 'cuda:-1'",)),
        (["generate", "--prompt", "x", "--json", "--stream"], ("--json", "--stream")),
        (["inspect", "--prompt", "x", "--png", "seen.png"], ("--image",)),
    ],
)
def test_flags(argv: list[str], words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    expect_error(argv, capsys, *words)


def test_a_file_that_cannot_be_written(
    tiny_model_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "no" / "such" / "folder.html"
    assert main(["inspect", "--model", str(tiny_model_folder), "--prompt", "x", "--html", str(target)]) == 2
    assert f"--html: {target}: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_device_that_is_not_here(kind: str, ask: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available() if kind == "cuda" else torch.backends.mps.is_available():
        pytest.skip("it is here")
    expect_error([*ask, "--device", kind], capsys, f"device '{kind}' is not on this machine, which has cpu")


def test_a_terminal_that_is_not_utf8(tiny_model_folder: Path) -> None:
    script = (
        "import sys, polymodal.cli as c, polymodal.cli.common as k\n"
        "import polymodal.backends.base as b, polymodal.messages as m\n"
        "class Said(b.Backend):\n"
        "    name = 'x'\n"
        "    def stream(self, messages, params=None):\n"
        "        yield b.TextDelta('猫 🐈 é')\n"
        "        yield b.Reply(m.assistant('猫 🐈 é'), b.Usage(1, 0, 1), b.Timing(0, 0, 0, 0, 0), 'stop', 'x')\n"
        "k.open_model = lambda args: Said()\n"
        "sys.exit(c.main(['generate', '--prompt', 'x', *sys.argv[1:]]))"
    )
    for encoding, expected in (("ascii", rb"\u732b \U0001f408 \xe9"), ("utf-8", "猫 🐈 é".encode())):
        for flag in ([], ["--stream"], ["--json"]):
            environment = {**os.environ, "PYTHONIOENCODING": encoding}
            argv = [sys.executable, "-c", script, *flag]
            done = subprocess.run(argv, capture_output=True, env=environment)
            assert done.returncode == 0 and done.stderr == b""
            if flag == ["--json"]:
                assert json.loads(done.stdout.decode(encoding))["text"] == "猫 🐈 é"
            else:
                assert done.stdout.strip() == expected


def test_a_pipe_that_is_not_utf8(
    tiny_model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("größe\n".encode("latin-1")), encoding="utf-8"))
    expect_error(["chat", "--model", str(tiny_model_folder)], capsys, "standard input is not utf-8")


def test_debug_raises(ask: list[str], tmp_path: Path) -> None:
    for argv in (["--debug", *ask], [*ask, "--debug"]):
        with pytest.raises(PolymodalError, match="absent"):
            main([*argv, "--image", str(tmp_path / "absent.jpg")])


def test_the_process_itself(tmp_path: Path) -> None:
    """Once through a real process: the status and both streams as a shell sees them."""
    argv = [sys.executable, "-m", "polymodal", "train", str(tmp_path / "absent.yaml")]
    plain = subprocess.run(argv, capture_output=True, text=True)
    assert (plain.returncode, plain.stdout, len(plain.stderr.splitlines())) == (2, "", 1)
    loud = subprocess.run([*argv, "--debug"], capture_output=True, text=True)
    assert "Traceback" in loud.stderr


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "default", "--data", "{data}", "--json", "{bad}"],
        ["eval", "default", "--data", "{data}", "--output", "{bad}"],
        ["eval", "vit_small", "--tasks", "retrieval", "--data", "{data}", "--json", "{bad}"],
        ["inspect", "--prompt", "a", "--html", "{bad}"],
        ["inspect", "--prompt", "a", "--image", "{data}", "--png", "{bad}"],
        ["data", "inspect", "{data}", "--html", "{bad}"],
        ["data", "check", "{data}", "--output", "{bad}"],
        ["export", "default", "{bad}"],
        ["convert", "default", "{bad}"],
        ["train", "{recipe}", "data.mix.0.path={data}", "output_dir={bad}"],
    ],
)
def test_a_place_for_results_is_checked_before_anything_is_loaded(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import polymodal.backends
    import polymodal.checkpoints.locate
    from polymodal.cli import common
    from polymodal.training.sft import task

    def never(*_args: object, **_named: object) -> None:
        raise AssertionError("something was loaded first")

    for place, name in (
        (common, "load"), (polymodal.backends, "load_processor"), (inspect, "load_processor"),
        (polymodal.checkpoints.locate, "find_model"), (task, "load_inputs"),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, never)
    (tmp_path / "data.json").write_text(
        json.dumps([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}])
    )
    recipe = Path(__file__).parents[2] / "recipes" / "default" / "stage1.yaml"
    places = {"data": tmp_path / "data.json", "bad": tmp_path / "data.json" / "a" / "b", "recipe": recipe}
    assert main([part.format(**places) for part in command]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path / "data.json") in error and "cannot be written" in error


@pytest.mark.parametrize(
    "command",
    [
        ["chat", "{recipe}"],
        ["chat", "--model", "{recipe}"],
        ["generate", "{recipe}", "What?"],
        ["generate", "--model", "{recipe}", "--prompt", "x"],
        ["inspect", "--model", "{recipe}", "--prompt", "x"],
        ["inspect", "--image", "{recipe}", "--prompt", "x"],
        ["describe", "{recipe}"],
        ["eval", "{recipe}", "--tasks", "demo"],
        ["export", "{recipe}", "{folder}/out"],
        ["data", "check", "{recipe}", "--output", "{folder}/report"],
        ["data", "inspect", "{recipe}"],
    ],
)
def test_a_recipe_in_the_place_of_something_else(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)  # nothing is loaded for it
    recipe = shutil.copy(Path(__file__).parents[2] / "recipes/tiny/stage1.yaml", tmp_path)
    line = expect_error([part.format(recipe=recipe, folder=tmp_path) for part in command], capsys, "stage1.yaml")
    assert "recipe" in line.replace(str(recipe), "") and "`polymodal check" in line
    assert [path.name for path in tmp_path.iterdir()] == ["stage1.yaml"]


@pytest.mark.parametrize("verb", ["chat", "generate"])
def test_a_model_folder_in_the_place_of_an_image(
    verb: str, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expect_error([verb, str(tiny_model_folder)], capsys, "a folder", f"--model {tiny_model_folder}")


@pytest.mark.parametrize("verb", ["check", "train"])
def test_other_things_in_the_place_of_a_recipe(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expect_error([verb, str(tmp_path)], capsys, "is a folder; a recipe is a YAML file")
    (tmp_path / "stage1.yaml").write_text("name: x")
    expect_error([verb, str(tmp_path)], capsys, "is a folder", str(tmp_path / "stage1.yaml"))
    (tmp_path / "rows.json").write_text("[]")
    expect_error([verb, str(tmp_path / "rows.json")], capsys, "rows.json", "`polymodal data check")


def test_a_dtype_that_is_called_otherwise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(Path(__file__).parents[2] / "recipes/tiny/stage1.yaml")
    for given, meant in (("fp16", "float16"), ("fp32", "float32"), ("bf16", "bfloat16"), ("torch.float16", "float16")):
        argv = ["check", recipe, f"init.model.llm.dtype={given}"]
        expect_error(argv, capsys, "init.model.llm.dtype", f"given {given!r}", f"did you mean {meant!r}?")
