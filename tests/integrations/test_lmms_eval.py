"""The adapter for lmms-eval, against a stand-in of what it takes from there: a base class, a manifest and requests."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from polymodal.backends import load
from polymodal.errors import ConfigError, PolymodalError
from polymodal.generation.params import GenerationParams

ADAPTER = Path(__file__).resolve().parents[2] / "integrations" / "lmms_eval" / "polymodal_lmms_eval.py"


class Hook:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def add_partial(self, *what: Any) -> None:
        self.seen.append(what)


class Lmms:
    def __init__(self) -> None:
        self.cache_hook, self.task_dict = Hook(), {}

    @staticmethod
    def _resolve_system_prompt(value: str) -> str:
        return value

    def _apply_system_prompt(self, messages: list[Any], prompt: str) -> list[Any]:
        first = [{"role": "system", "content": [{"type": "text", "text": prompt}]}] if prompt else []
        return [*first, *messages]


@dataclass
class Manifest:
    model_id: str
    chat_class_path: str


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    stubs = {"lmms_eval.api.model": {"lmms": Lmms}, "lmms_eval.models.registry_v2": {"ModelManifest": Manifest}}
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models", *stubs):
        module = types.ModuleType(name)
        vars(module).update(stubs.get(name, {}))
        monkeypatch.setitem(sys.modules, name, module)
    spec = importlib.util.spec_from_file_location("polymodal_lmms_eval", ADAPTER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module


def image(shade: int) -> PILImage.Image:
    return PILImage.new("RGB", (40, 30), (shade, 200 - shade, 90))


DOCS = [{"image": image(30 * i), "question": f"What is number {'x' * i}?"} for i in range(5)]


def to_messages(doc: dict[str, Any]) -> list[Any]:
    content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


def requests(settings: list[dict[str, Any]], docs: list[Any] = DOCS) -> list[Any]:
    return [
        types.SimpleNamespace(args=(doc["question"], to_messages, settings[i % len(settings)], i, "tiny", "test"))
        for i, doc in enumerate(docs)
    ]


def opened(adapter: Any, folder: Path, docs: list[Any] = DOCS, **args: Any) -> Any:
    model = adapter.Polymodal(pretrained=str(folder), device="cpu", **args)
    model.task_dict = {"tiny": {"test": docs}}
    return model


def test_answers_are_the_models_own_in_batches_of_equal_settings(
    adapter: Any, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = {"max_new_tokens": 3, "until": ["\n\n"]}, {"max_new_tokens": 7, "temperature": 0, "do_sample": False}
    model = opened(adapter, tiny_model_folder, batch_size="2")
    sizes = []
    whole = model.model.generate_batch
    monkeypatch.setattr(
        model.model, "generate_batch", lambda a, p: sizes.append((len(a), p.max_new_tokens)) or whole(a, p)
    )
    answers = model.generate_until(requests([short, long]))
    assert sizes == [(2, 3), (1, 3), (2, 7)]
    direct = load(tiny_model_folder, "cpu")
    for i, (doc, answer) in enumerate(zip(DOCS, answers, strict=True)):
        params = GenerationParams(max_new_tokens=7 if i % 2 else 3, stop=() if i % 2 else ("\n\n",))
        assert answer == direct.generate(to_messages(doc), params).text.strip()
    assert len(set(answers)) > 1
    assert sorted(seen[2] for seen in model.cache_hook.seen) == sorted(answers)


def test_a_system_prompt_comes_first(adapter: Any, tiny_model_folder: Path) -> None:
    model = opened(adapter, tiny_model_folder, system_prompt="Be short.")
    said = {"role": "system", "content": "Be short."}
    expected = load(tiny_model_folder, "cpu").generate(
        [said, *to_messages(DOCS[0])], GenerationParams(max_new_tokens=5)
    )
    assert model.generate_until(requests([{"max_new_tokens": 5}])[:1]) == [expected.text.strip()]


def test_what_a_tasks_settings_mean(adapter: Any) -> None:
    greedy = adapter.decoding({"until": "END", "max_new_tokens": 9, "temperature": 0, "top_p": None, "num_beams": 1})
    assert greedy == GenerationParams(max_new_tokens=9, stop=("END",))
    drawn = adapter.decoding({"temperature": 0.7, "top_p": 0.9, "until": ["a", ""]}, seed=3)
    assert drawn == GenerationParams(max_new_tokens=1024, temperature=0.7, top_p=0.9, seed=3, stop=("a",))
    with pytest.raises(ConfigError, match="num_beams 3"):
        adapter.decoding({"num_beams": 3})


def test_a_question_that_cannot_be_asked_ends_the_run_or_is_skipped(adapter: Any, tiny_model_folder: Path) -> None:
    docs = [DOCS[0], {"image": "absent.png", "question": "What?"}]
    settings = [{"max_new_tokens": 2}]
    with pytest.raises(PolymodalError, match=r"tiny, test, document 1.*absent\.png.*skip_errors"):
        opened(adapter, tiny_model_folder, docs).generate_until(requests(settings, docs))
    answers = opened(adapter, tiny_model_folder, docs, skip_errors=True).generate_until(requests(settings, docs))
    assert answers[1] == "" and len(answers) == 2


def test_the_entry_point_names_the_class(adapter: Any) -> None:
    made = adapter.manifest()
    module, name = made.chat_class_path.rsplit(".", 1)
    assert made.model_id == "polymodal" and getattr(sys.modules[module], name) is adapter.Polymodal
    settings = (ADAPTER.parent / "pyproject.toml").read_text()
    assert 'entry-points."lmms_eval.models"' in settings and '"polymodal_lmms_eval:manifest"' in settings
    assert adapter.Polymodal.is_simple is False


def test_it_says_what_it_does_not_offer(adapter: Any, tiny_model_folder: Path) -> None:
    model = opened(adapter, tiny_model_folder)
    for method in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="generate_until only"):
            method([])
