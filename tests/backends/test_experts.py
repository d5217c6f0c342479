"""Media that a model does not make are made by experts: their order, what each sees, the next turn, the files."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from polymodal.backends import load, load_renderer
from polymodal.backends.base import MediaEnd, MediaStart, Reply, TextDelta, require_question
from polymodal.backends.drawing import DrawingModel
from polymodal.cli import main
from polymodal.errors import ConfigError, DataError, PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Audio, Image, Message, Text, assistant, user
from polymodal.modeling.renderers.base import Renderer, RenderRequest
from tests.drawers import SIDE
from tests.speech.engines import LetterTTS, ScriptBackend


class Painter(Renderer):
    """Fills an image with the prompt's length."""

    name, output = "painter", "image"

    def __init__(self, conversational: bool = True) -> None:
        self.conversational = conversational
        self.requests: list[RenderRequest] = []

    def render(self, request: RenderRequest) -> np.ndarray:
        self.requests.append(request)
        return np.full((4, 6, 3), len(request.prompt), np.uint8)


@pytest.fixture
def model() -> ScriptBackend:
    made = ScriptBackend(["A cat ", "sits."])
    made.experts = {"image": Painter(), "audio": LetterTTS()}
    return made


def test_one_call_gives_text_image_and_speech(model: ScriptBackend) -> None:
    params = GenerationParams(modalities=("text", "image", "audio"), seed=5)
    *events, reply = model.respond("Draw our cat.", params)
    assert [type(event) for event in events] == [TextDelta, TextDelta, MediaStart, MediaEnd, MediaStart, MediaEnd]
    assert isinstance(reply, Reply) and [type(part) for part in reply.message.parts] == [Text, Image, Audio]
    assert reply.text == "A cat sits." and reply.usage.completion_tokens == 1
    (image,), (sound,) = reply.images, reply.sounds
    assert image.size == (6, 4) and image.getpixel((0, 0)) == (len("Draw our cat."),) * 3
    assert model.experts["image"].requests[0].seed == 5 and model.experts["audio"].said == ["A cat sits."]
    with wave.open(io.BytesIO(sound)) as file:
        assert file.getnframes() == 100 * len("A cat sits.") and file.getframerate() == 8000
    same = model.generate("Draw our cat.", modalities=("text", "image", "audio"))
    assert same.images[0].tobytes() == image.tobytes() and same.timing.total_s >= same.timing.first_token_s > 0


def test_what_comes_first_is_seen_by_what_comes_next(model: ScriptBackend) -> None:
    model.generate("Draw it.", modalities=("image", "text"))
    (asked,) = model.asked[-1][0]
    assert [type(part) for part in asked.parts] == [Image, Text] and model.asked[-1][1].modalities == ("text",)
    model.takes = ("audio",)  # one that sees nothing is shown nothing
    model.generate("Draw it.", modalities=("image", "text"))
    assert [type(part) for part in model.asked[-1][0][0].parts] == [Text]
    model.experts = {"image": Painter(conversational=False)}
    model.pieces = ['{"prompt": "a tabby cat on a wall"}']
    model.generate("Draw it.", modalities=("text", "image"))
    written = model.asked[-1][0]  # the prompt is asked for behind the answer
    assert [message.role for message in written] == ["user", "assistant", "user"]
    assert model.experts["image"].requests[0].prompt == "a tabby cat on a wall"
    alone = model.generate("Draw it.", modalities=("image",))
    assert alone.text == "" and len(alone.images) == 1 and alone.finish_reason == "stop"


def test_an_answer_s_media_in_the_next_turn(model: ScriptBackend) -> None:
    first = model.generate("Draw it.", modalities=("text", "image", "audio"))
    asked = [user("Draw it."), first.message, user("Which colour?")]
    one, said, next_one = require_question(asked)
    assert said.parts == (Text("A cat sits."),) and one.parts == (Text("Draw it."),)
    assert [type(part) for part in next_one.parts] == [Image, Text]
    kept = require_question(asked, ("text", "image"))
    assert [type(part) for part in kept[1].parts] == [Text, Image] and kept[2].parts == asked[2].parts
    alone = require_question([user("x"), assistant(Image("a.png")), user("y"), assistant("z"), user("w")])
    assert alone[1].parts == (Text(""),) and [len(message.media) for message in alone] == [0, 0, 1, 0, 0]


def test_a_model_that_sees_is_asked_about_what_was_drawn(tiny_model_folder: Path) -> None:
    model = load(tiny_model_folder, "cpu")
    model.experts = {"image": Painter(), "audio": LetterTTS()}
    params = GenerationParams(max_new_tokens=3)
    reply = model.generate("Draw it.", params, modalities=("image", "text"))
    assert reply.usage.image_tokens and len(reply.images) == 1
    again = model.generate([user("Draw it."), reply.message, user("What is it?")], params)
    assert again.usage.image_tokens == reply.usage.image_tokens
    with pytest.raises(PolymodalError, match="makes text, and no image"):
        list(model.stream("x", GenerationParams(modalities=("text", "image"))))


def test_a_folder_that_draws_is_a_renderer(drawer_folder: Path, tiny_model_folder: Path) -> None:
    renderer = load_renderer(drawer_folder, "cpu")
    assert isinstance(renderer, DrawingModel) and renderer.conversational
    drawn = renderer.render(RenderRequest(prompt="x", seed=3))
    assert drawn.shape == (SIDE, SIDE, 3) and drawn.dtype == np.uint8
    assert np.array_equal(drawn, renderer.render(RenderRequest(prompt="x", seed=3)))
    for fields in ({"steps": 4}, {"width": 64, "height": 64}, {"negative_prompt": "blue"}, {"frames": 2}):
        with pytest.raises(ConfigError, match=f"{next(iter(fields))} says nothing"):
            renderer.render(RenderRequest(prompt="x", **fields))
    with pytest.raises(ConfigError, match="a renderer has to make images"):
        load_renderer(tiny_model_folder, "cpu")


def test_experts_amiss(model: ScriptBackend) -> None:
    for kinds, words in ((("audio",), "name text before it"), (("image", "audio", "text"), "name text before it")):
        with pytest.raises(ConfigError, match=words):
            model.generate("x", modalities=kinds)
    model.pieces = ["..."]
    with pytest.raises(DataError, match="nothing to speak"):
        model.generate("x", modalities=("text", "audio"))
    with pytest.raises(ConfigError, match="prompt is empty"):
        model.generate(" ", modalities=("image",))

    class Film(Painter):
        output = "video"

    model.experts = {"image": Film()}
    with pytest.raises(ConfigError, match="makes video, and an image is asked for"):
        model.generate("x", modalities=("image",))


def test_files_of_a_command(
    model: ScriptBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("polymodal.cli.common.open_model", lambda args: model)
    monkeypatch.setattr("polymodal.cli.common.load_renderer", lambda name: Painter())
    out = tmp_path / "out"
    flags = ["generate", "--modalities", "text,image,audio", "--prompt", "Draw it.", "-o", str(out)]
    assert main([*flags, "--json"]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert said["text"] == "A cat sits." and said["images"] == [str(out / "image-1.png")]
    assert said["sounds"] == [str(out / "audio-1.wav")]
    assert main([*flags, "--stream", "--renderer", "any"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["audio-1.wav", "audio-2.wav", "image-1.png", "image-2.png"]
    assert capsys.readouterr().out.startswith("A cat sits.")
    assert PILImage.open(out / "image-2.png").size == (6, 4)


def test_an_endpoint_s_answer_gets_them_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from polymodal.backends.openai import open_endpoint

    def talk(self: Any, messages: Any, params: Any, stream: bool) -> Iterator[TextDelta | Reply]:
        yield from ScriptBackend(["Good."]).stream(messages, params)

    monkeypatch.setattr("polymodal.backends.openai.OpenAIBackend._talk", talk)
    model = open_endpoint("tiny", base_url="http://localhost:1/v1", api_key="key")
    model.experts = {"audio": LetterTTS()}
    reply = model.generate("x", modalities=("text", "audio"))
    assert isinstance(reply.message, Message) and len(reply.sounds) == 1
