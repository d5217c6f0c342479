"""The model that ships: it opens offline, answers about images it never saw, and needs the image to do so."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

import polymodal
from polymodal import Audio, Document, Video, user
from polymodal.backends import load_renderer
from polymodal.backends.local import LocalBackend
from polymodal.data.load import load_records
from polymodal.evaluation.runner import Settings, run_task
from polymodal.evaluation.tasks.demo import DEMO
from polymodal.evaluation.tasks.questions import ask_records
from polymodal.modeling.renderers.base import RenderRequest
from polymodal.utils.files import shipped_folder
from recipes.default.dataset import build_default
from recipes.draw.judge import look
from recipes.draw.scenes import Scene, Thing, random_scene
from recipes.draw.wording import request, scene_phrase
from tests.speech.engines import LetterTTS

FOLDER = shipped_folder() / "default"


@pytest.fixture(scope="module")
def model() -> LocalBackend:
    return polymodal.load("default", "cpu")


def test_it_is_small_enough_for_a_package_and_has_a_card() -> None:
    size = sum(path.stat().st_size for path in shipped_folder().rglob("*") if path.is_file())
    assert size < 90_000_000
    card = (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    for section in ("## Data", "## Scores", "## Limits", "GPL-2", "image-blind"):
        assert section in card
    assert "@" not in card.replace("@1", "")  # every figure was filled in


def test_its_history_names_all_stages() -> None:
    history = json.loads((FOLDER / "polymodal.json").read_text())["history"]
    stages = [entry["stage"] for entry in history]
    assert list(dict.fromkeys(stages)) == ["default-stage1", "default-stage2", "default-stage3"] and stages == sorted(
        stages
    )
    trained = [entry["trained"] for entry in history]
    assert trained[:3] == [["projector"], ["lora", "projector"], ["audio_projector", "lora", "temporal_encoder"]]


def test_it_beats_its_blind_self_on_shapes_it_never_saw(model: LocalBackend, tmp_path: Path) -> None:
    """The held-out shapes of the generator's smallest set, which needs no packages."""
    build_default(tmp_path / "data", size="tiny", seed=123, workers=1, progress=False)
    kinds = {"name", "exists", "color", "category"}
    records = [r for r in load_records(tmp_path / "data" / "val.json") if r.kind in kinds]
    samples = ask_records(model, records).samples
    score = sum(sample.score or 0.0 for sample in samples) / len(samples)
    blind = sum(sample.blind_score or 0.0 for sample in samples) / len(samples)
    assert len(samples) >= 10 and score > blind + 0.2


def test_it_sees_what_moves_and_hears_what_is_asked(model: LocalBackend) -> None:
    """The shipped samples; what it does with held-out ones is on its card."""
    assert model.takes == ("image", "video", "audio")  # `make install` gets its ears
    media = FOLDER.parents[3] / "examples" / "media"
    assert "right" in model.ask("Which way does it move?", Video(media / "penguin.mp4")).lower()
    said = model.ask("Write down what is said.", Audio(media / "question.wav")).lower()
    assert "animal" in said or "picture" in said
    assert model.ask("What is this?", Document(media / "garden.pdf", pages="1"))


@pytest.mark.slow
def test_the_demo_benchmark_is_no_worse_than_the_card_says(model: LocalBackend) -> None:
    """The guard of later trainings: the card's score of all questions, less the tolerance that it states."""
    card = (FOLDER / "MODEL_CARD.md").read_text(encoding="utf-8")
    (stated,) = re.findall(r"^\| all \| .*? \| 220 \| ([\d.]+)% ", card, flags=re.MULTILINE)
    (tolerance,) = re.findall(r"more than (\d+) points below", card)
    run = run_task(model, DEMO, list(DEMO.read(Path(), "test")), Settings(cached=False))
    score = DEMO.aggregate(run.samples)["score"]
    assert score >= float(stated) / 100 - float(tolerance) / 100
    assert not any(sample.error for sample in run.samples)


def test_a_text_conversation_keeps_its_manners(model: LocalBackend) -> None:
    assert "paris" in model.ask("What is the capital of France?").lower()


def test_one_call_gives_text_an_image_and_speech(model: LocalBackend) -> None:
    """With the drawer and, for want of installed packages in a test, a voice that stands in."""
    model.experts = {"audio": LetterTTS()}
    reply = model.generate("Draw a large red circle on the left.", modalities=("text", "image", "audio"))
    assert reply.text.strip() and model.experts["audio"].said
    (image,), (sound,) = reply.images, reply.sounds
    assert look(np.asarray(image)).nearest == Scene((Thing("circle", "red", "large", "left"),))
    assert sound[:4] == b"RIFF"
    asked = [user("Draw a large red circle on the left."), reply.message, user("What color is the circle?")]
    assert "red" in model.generate(asked).text.lower()


@pytest.mark.slow
def test_the_drawer_draws_what_its_card_says(tmp_path: Path) -> None:
    """The first hundred held-out prompts of the card's table."""
    card = (shipped_folder() / "drawer" / "MODEL_CARD.md").read_text(encoding="utf-8")
    stated = float(re.findall(r"^\| drawn \| 1200 \|.*\| ([\d.]+)% \([^|]*\) \|$", card, flags=re.MULTILINE)[0])
    scenes = [random_scene(random.Random(f"card/{n}"), 1 + n % 3, heldout=True) for n in range(99)]
    renderer = load_renderer(None, "cpu")
    drawn = [renderer.render(RenderRequest(prompt=request(scene_phrase(scene)))) for scene in scenes]
    right = sum(look(image).nearest == scene for image, scene in zip(drawn, scenes, strict=True))
    assert right >= stated / 100 * len(scenes) - 12
