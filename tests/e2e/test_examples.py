"""The examples and the benchmark run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def run(cwd: Path, script: str, *arguments: str) -> str:
    argv = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_demo(tmp_path: Path) -> None:
    out = run(tmp_path, "examples/demo.py")
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert set(facts) >= {"image", "question", "answer", "tokens", "time", "seen"}
    assert "of the image" in facts["tokens"]
    assert "tokens/s" in facts["time"]
    with Image.open(tmp_path / "runs" / "demo" / "seen.png") as seen:
        assert seen.width > 400


def test_benchmark(tmp_path: Path, tiny_model_folder: Path) -> None:
    out = run(
        tmp_path, "benchmarks/chat_speed.py", str(tiny_model_folder), str(ROOT / "examples/pictures/cat.jpg"), "2"
    )
    assert "(16 of the image)" in out
    for field in ("prepare_s", "encode_s", "first_token_s", "total_s", "tokens_per_s"):
        assert field in out


def test_publish_makes_a_half_precision_copy_and_keeps_the_card(tmp_path: Path, tiny_model_folder: Path) -> None:
    from safetensors.torch import load_file

    target = tmp_path / "default"
    target.mkdir()
    (target / "MODEL_CARD.md").write_text("the card")
    assert "MB" in run(tmp_path, "recipes/default/publish.py", str(tiny_model_folder), str(target))
    assert (target / "MODEL_CARD.md").read_text() == "the card"
    before = load_file(tiny_model_folder / "projector.safetensors")
    after = load_file(target / "projector.safetensors")
    assert {name: tensor.half().tolist() for name, tensor in before.items()} == {
        name: tensor.tolist() for name, tensor in after.items()
    }
    assert {str(tensor.dtype) for tensor in after.values()} == {"torch.float16"}
