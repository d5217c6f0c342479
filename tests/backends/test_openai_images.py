"""An images endpoint as a renderer, against a small server."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polymodal.backends import load_renderer
from polymodal.backends.openai.http import Patience
from polymodal.backends.openai.images import EndpointRenderer, open_images
from polymodal.errors import CheckpointError, ConfigError, EndpointError, MediaError, PolymodalError
from polymodal.modeling.renderers import RenderRequest
from tests.backends.test_openai import hangs_up, sends

KEY = "sk-test-0123456789abcdef"
QUICK = Patience(connect_s=2.0, read_s=0.3, total_s=3.0, retries=2, first_wait_s=0.01, longest_wait_s=0.2)
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
PROMPT = RenderRequest(prompt="a red circle")


def png(pixels: np.ndarray = PIXELS) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def drawn(data: bytes | None = None, **more: Any) -> dict[str, Any]:
    return {"created": 1, "data": [{"b64_json": base64.b64encode(data or png()).decode(), **more}]}


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def draws(server: Any) -> Iterator[EndpointRenderer]:
    made = open_images("tiny", base_url=server.url, api_key=KEY, patience=QUICK)
    yield made
    made.close()


def test_an_image_as_base64(server: Any, draws: EndpointRenderer) -> None:
    server.plays(sends(drawn(revised_prompt="a very red circle")))
    more = {"negative_prompt": "blur", "width": 512, "height": 256, "steps": 7, "guidance": 2.5, "seed": 3}
    assert np.array_equal(draws.render(RenderRequest(prompt="a red circle", **more)), PIXELS)
    assert draws.output == "image" and server.paths == ["/v1/images/generations"]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert server.bodies[0] == {
        "model": "tiny", "prompt": "a red circle", "n": 1, "response_format": "b64_json", "size": "512x256",
        "negative_prompt": "blur", "num_inference_steps": 7, "guidance_scale": 2.5, "seed": 3,
    }  # fmt: skip


def test_an_image_behind_an_address(server: Any, draws: EndpointRenderer) -> None:
    asked: list[Any] = []

    def get(handler: Any) -> None:
        asked.append((handler.path, handler.headers.get("Authorization")))
        sends(png(), kind="image/png")(handler)

    server.http.RequestHandlerClass.do_GET = get
    server.plays(sends({"data": [{"url": f"{server.root}/files/1.png?sig=x"}]}))
    assert np.array_equal(draws.render(PROMPT), PIXELS)
    assert asked == [("/files/1.png?sig=x", None)]  # the key goes nowhere else
    url = f"data:image/png;base64,{base64.b64encode(png()).decode()}"
    server.plays(sends({"data": [{"url": url}]}))
    assert np.array_equal(draws.render(PROMPT), PIXELS)
    for url in ("http://169.254.169.254/latest", "file:///etc/passwd", "ftp://host/x.png", "//host/x"):
        server.plays(sends({"data": [{"url": url}]}))
        with pytest.raises(EndpointError, match="not fetched"):
            draws.render(PROMPT)
    server.http.RequestHandlerClass.do_GET = lambda handler: sends({}, status=404)(handler)
    server.plays(sends({"data": [{"url": f"{server.root}/gone.png"}]}))
    with pytest.raises(EndpointError, match="not there"):
        draws.render(PROMPT)


def test_what_a_server_refuses_is_left_out_and_said(server: Any, draws: EndpointRenderer) -> None:
    def refusal(name: str) -> Any:
        return sends({"error": {"message": f"Unknown parameter: '{name}'."}}, status=400)

    request = RenderRequest(prompt="x", steps=3, seed=0)
    server.plays(refusal("response_format"), refusal("num_inference_steps"), refusal("seed"), sends(drawn()))
    with pytest.warns(UserWarning, match="takes no num_inference_steps; left out") as said:
        draws.render(request)
    assert len(said) == 1  # nobody chose the seed 0, and the format is not seen
    assert server.bodies[-1] == {"model": "tiny", "prompt": "x", "n": 1}
    server.plays(sends(drawn()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draws.render(request)  # it was learnt
    server.plays(sends({"error": {"message": "invalid size 24x24: size must be 1024x1024"}}, status=400))
    with pytest.raises(EndpointError, match="1024x1024"):
        draws.render(RenderRequest(prompt="x", width=24, height=24))


def test_trying_again_and_giving_up(server: Any, draws: EndpointRenderer) -> None:
    server.plays(sends({"error": "busy"}, status=503), hangs_up, sends(drawn()))
    assert np.array_equal(draws.render(PROMPT), PIXELS)
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("action", "error", "words"),
    [
        (sends({"error": {"message": f"bad key {KEY}"}}, status=401), EndpointError, "OPENAI_API_KEY"),
        (sends({"data": []}), EndpointError, "no image"),
        (sends({"choices": [{"message": {"content": "a circle"}}]}), EndpointError, "no image"),
        (sends({"data": [{"b64_json": "%%%"}]}), EndpointError, "no base64"),
        (sends(drawn(b"GIF87a nonsense")), MediaError, "the image from"),
        (sends(b"<html></html>", kind="text/html"), EndpointError, "not with JSON"),
        (sends({"error": {"message": "blocked by the safety system"}}, status=400), EndpointError, "safety system"),
    ],
    ids=["key", "empty", "chat", "no base64", "no image", "page", "safety"],
)
def test_answers_that_are_none(
    action: Any, error: type[PolymodalError], words: str, server: Any, draws: EndpointRenderer
) -> None:
    server.plays(action)
    with pytest.raises(error, match=words) as caught:
        draws.render(PROMPT)
    assert "\n" not in str(caught.value) and KEY not in str(caught.value)


def test_names_of_endpoints(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server.plays(sends(drawn()))
    alone = load_renderer(server.url)
    assert np.array_equal(alone.render(PROMPT), PIXELS) and "model" not in server.bodies[0]
    assert "authorization" not in server.headers[0]
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    named = load_renderer("openai:tiny")
    named.render(PROMPT)
    assert server.bodies[1]["model"] == "tiny" and named.name == "openai:tiny"
    monkeypatch.delenv("OPENAI_BASE_URL")
    for name, options, words in (
        ("openai:tiny", {}, "OPENAI_API_KEY"),
        ("openai: ", {}, "gpt-image-1"),
        (server.url, {"base_url": server.url}, "address already"),
        (server.url, {"device": "cpu"}, "device"),
        ("http://example.org/v1", {"api_key": KEY}, "openly"),
        ("https://user@host/v1", {}, "user name"),
        (Path("folder"), {"base_url": server.url}, "for endpoints"),
        (None, {"api_key": KEY}, "for endpoints"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_renderer(name, **options)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="no such folder"):
        load_renderer("absent")


def test_what_an_endpoint_cannot_draw(draws: EndpointRenderer) -> None:
    for more in ({"image": PIXELS}, {"frames": 3}):
        with pytest.raises(ConfigError, match="one image from a prompt"):
            draws.render(RenderRequest(prompt="x", **more))
