"""The warm start that says what is where: what each token is taught, and that it learns it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from polymodal.config import ProjectorConfig
from polymodal.errors import ConfigError
from polymodal.media_plan import Size
from polymodal.messages import assistant
from polymodal.modeling.projectors import build_projector
from polymodal.training.recipes.sft import SceneWarmStartConfig
from polymodal.training.sft import scene_warm_start as scenes
from polymodal.training.sft.scene_warm_start import Place, attributes_of, places_of, said, scene_warm_start

COLOURS = frozenset({"red", "blue"})


def test_first_words_of_many_phrases_are_attributes() -> None:
    things = ["circle", "heart", "star", "cup", "car", "hat", "dog", "cat"]
    assert attributes_of([f"red {thing}" for thing in things] + ["polar bear", "fire engine"]) == {"red"}


def test_places_come_from_the_record_or_from_a_short_caption() -> None:
    assert places_of({"places": [["a dog", 0.0, 0.5, 0.5, 1.0]]}, "x") == [Place("a dog", 0.0, 0.5, 0.5, 1.0)]
    assert places_of({}, "A red kangaroo.") == [Place("red kangaroo", 0.0, 0.0, 1.0, 1.0)]
    assert places_of({}, "Two dogs stand beside a tall tree.") == []


def test_the_summary_says_things_from_left_to_right_and_patches_what_covers_them() -> None:
    places = [Place("a red car", 0.6, 0.6, 0.9, 0.9), Place("a dog", 0.0, 0.0, 0.4, 0.4)]
    taught = said(places, COLOURS, {}, queries=5, grid=Size(2, 2))
    assert [taught[number] for number in range(5)] == [
        ("dog", "car"), ("dog",), ("left", "top"), ("car",), ("red", "right", "bottom"),
    ]  # fmt: skip
    # Patches: above left the dog, below right the car; nothing covers the others.
    assert {number: units for number, units in taught.items() if number >= 5} == {5: ("dog",), 8: ("car", "red")}


def test_several_of_a_kind_are_counted_and_size_is_told() -> None:
    dogs = [Place("a dog", x, 0.1, x + 0.1, 0.2) for x in (0.1, 0.4, 0.7)]
    assert said(dogs, COLOURS, {}, queries=4, grid=Size(1, 1)) == {0: ("dog",), 1: ("dog",), 2: ("three",)}
    big = said([Place("a dog", 0.0, 0.0, 1.0, 0.9)], COLOURS, {}, queries=3, grid=Size(1, 1))
    assert big[2] == ("middle", "big")


def test_what_is_written_is_spelled_after_the_things() -> None:
    places = [Place('"STOP"', 0.2, 0.2, 0.8, 0.8), Place("a sign", 0.0, 0.0, 1.0, 1.0)]
    taught = said(places, COLOURS, {'"STOP"': [7, 9]}, queries=6, grid=Size(1, 1))
    assert [taught[number] for number in (1, 3, 4)] == [("sign",), (7,), (9,)]
    assert 5 not in taught and taught[6] == (7, 9)  # the smallest that covers the patch


class Tokenizer:
    words = ("dog", "car", "sun", "left", "right", "middle", "big", "small", "top", "bottom")

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [self.words.index(word) if word in self.words else len(self.words) for word in text.split()]


def parts(kind: str = "summary") -> tuple[Any, Any]:
    torch.manual_seed(0)
    settings = {"num_query_tokens": 3, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2}
    more: dict[str, Any] = {"summary": settings} if kind == "summary" else {}
    projector = build_projector(ProjectorConfig(mm_projector_type=kind, **more), 6, Size(1, 2), 12)
    table = torch.nn.Embedding(11, 12)
    model = SimpleNamespace(
        projector=projector,
        vision_encoder=SimpleNamespace(grid=Size(1, 2)),
        llm=SimpleNamespace(get_input_embeddings=lambda: table),
    )
    rng = np.random.default_rng(0)
    names, features, records = ("dog", "car", "sun"), [], []
    for number in range(240):
        name, right = number % 3, (number // 3) % 2
        one = rng.normal(0, 0.1, (2, 6))
        one[right, name] += 2.0
        features.append(one)
        box = [0.5 * right, 0.0, 0.5 + 0.5 * right, 1.0]
        extra = {"places": [[f"a {names[name]}", *box]]}
        records.append(SimpleNamespace(extra=extra, messages=(assistant(names[name]),)))
    store = SimpleNamespace(array=lambda: np.array(features, dtype=np.float32))
    dataset = SimpleNamespace(
        store=store,
        prepared=SimpleNamespace(records=records),
        alone=lambda: ((number, number) for number in range(240)),
    )
    return model, dataset


def test_it_learns_to_say_names_and_places(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(scenes, "log", lines.append)
    monkeypatch.setattr(scenes, "class_head_of", lambda model: None)
    monkeypatch.setattr(scenes, "HELD_OUT", 7)
    model, dataset = parts()
    config = SceneWarmStartConfig(steps=150, batch_size=32, learning_rate=1e-2, patches=2)
    scene_warm_start(model, Tokenizer(), dataset, config, seed=0)  # type: ignore[arg-type]
    assert lines[-1].endswith("first name 100.0%, summary 100.0%, patches 100.0%")


def test_other_projectors_are_told_of_their_own_warm_start() -> None:
    model, dataset = parts("linear")
    with pytest.raises(ConfigError, match="scene_warm_start is for mm_projector_type 'summary'"):
        scene_warm_start(model, Tokenizer(), dataset, SceneWarmStartConfig(), seed=0)  # type: ignore[arg-type]
