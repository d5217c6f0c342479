"""The adapter for VLMEvalKit, against a stand-in of its base class and its table of models."""

from __future__ import annotations

import importlib.util
import runpy
import sys
import types
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from polymodal.backends import load
from polymodal.generation.params import GenerationParams
from polymodal.messages import Image, user

ADAPTER = Path(__file__).resolve().parents[2] / "integrations" / "vlmevalkit" / "polymodal_vlmevalkit.py"


class BaseModel:
    def generate(self, message: Any, dataset: str | None = None) -> str:
        return str(self.generate_inner(message, dataset))  # type: ignore[attr-defined]


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    stubs: dict[str, dict[str, Any]] = {
        "vlmeval": {}, "vlmeval.vlm": {}, "vlmeval.vlm.base": {"BaseModel": BaseModel},
        "vlmeval.config": {"supported_VLM": {}},
    }  # fmt: skip
    for name, values in stubs.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
        if "." in name:
            setattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2], module)
    spec = importlib.util.spec_from_file_location("polymodal_vlmevalkit", ADAPTER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{shade}.png" for shade in range(6)]
    for shade, path in enumerate(paths):
        PILImage.new("RGB", (40, 30), (40 * shade, 90, 200 - 30 * shade)).save(path)
    return paths


def message(path: Path, text: str = "What?") -> list[dict[str, str]]:
    return [{"type": "image", "value": str(path)}, {"type": "text", "value": text}]


def test_questions_of_several_threads_become_batches(
    adapter: Any, tiny_model_folder: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter.register("tiny", str(tiny_model_folder), device="cpu", batch_size=4, max_new_tokens=6, wait_s=1.0)
    made = sys.modules["vlmeval.config"].supported_VLM["tiny"]()
    sizes: list[int] = []
    whole = made.backend.generate_batch
    monkeypatch.setattr(made.backend, "generate_batch", lambda a, p: sizes.append(len(a)) or whole(a, p))
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(made.generate, map(message, images)))
    assert sorted(sizes) == [2, 4] and made.is_api
    direct = load(tiny_model_folder, "cpu")
    for path, answer in zip(images, answers, strict=True):
        asked = [user(Image(path), "What?")]
        assert answer == direct.generate(asked, GenerationParams(max_new_tokens=6)).text.strip()
    assert len(set(answers)) > 1


def test_a_failure_is_one_that_vlmevalkit_asks_again(adapter: Any, tiny_model_folder: Path, images: list[Path]) -> None:
    model = adapter.Polymodal(str(tiny_model_folder), device="cpu", max_new_tokens=2, wait_s=0.01)
    assert model.generate(message(Path("absent.png"))).startswith("Failed to obtain answer via API. absent.png")
    assert not model.generate(message(images[0])).startswith("Failed")


def test_an_error_of_the_model_reaches_who_asked(
    adapter: Any, tiny_model_folder: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapter.Polymodal(str(tiny_model_folder), device="cpu", wait_s=0.01)

    def broken(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.backend, "generate_batch", broken)
    for _ in range(2):  # and the thread that answers lives on
        with pytest.raises(RuntimeError, match="out of memory"):
            model.generate(message(images[0]))


def test_sampling_and_stop_texts_are_the_backends(adapter: Any, tiny_model_folder: Path) -> None:
    model = adapter.Polymodal(str(tiny_model_folder), device="cpu", temperature=0.5, until=("END",), max_new_tokens=3)
    assert model.params == GenerationParams(max_new_tokens=3, temperature=0.5, stop=("END",), seed=0)


def test_it_starts_their_program_with_the_models_registered(
    adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "run.py"
    program.write_text("import sys\nfrom vlmeval.config import supported_VLM\nsupported_VLM['seen'] = sys.argv[1:]\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", [str(ADAPTER), "a=default", "b=runs/x=y", str(program), "--model", "a"])
    runpy.run_path(str(ADAPTER), run_name="__main__")
    table = sys.modules["vlmeval.config"].supported_VLM
    assert table["seen"] == ["--model", "a"]
    assert table["a"].keywords == {"model": "default"} and table["b"].keywords == {"model": "runs/x=y"}
    monkeypatch.setattr(sys, "argv", [str(ADAPTER), "--model", "a"])
    with pytest.raises(SystemExit, match="usage"):
        runpy.run_path(str(ADAPTER), run_name="__main__")
