"""An OpenAI-compatible images endpoint as a renderer: OpenAI, vLLM-Omni, LocalAI, ...

Named `openai:MODEL`, or by its address. Beyond OpenAI's own parameters (prompt, size) the names of vLLM-Omni and of
diffusers are sent (negative_prompt, num_inference_steps, guidance_scale, seed), to other servers than OpenAI's; what a
server refuses is left out with a warning.
"""

from __future__ import annotations

import base64
import binascii
import os
import re
import warnings
from collections.abc import Mapping
from typing import Any

import httpx2
import numpy as np

from polymodal.backends.openai import OPENAI_URL, answers, connect
from polymodal.backends.openai.http import MAX_BODY, Endpoint, Patience, Refused
from polymodal.checkpoints.locate import ENDPOINT
from polymodal.errors import ConfigError, EndpointError, first_line
from polymodal.media.image import open_image
from polymodal.modeling.renderers.base import Output, Renderer, RenderRequest

_NEEDED = ("model", "prompt", "n", "size")
"""What is not left out for a server; one that refuses it refuses its value."""


def _first(answer: answers.Event) -> dict[str, Any]:
    """The first image of an answer, as the server gives it."""
    data = answer.get("data")
    data = [one for one in data if isinstance(one, dict)] if isinstance(data, list) else []
    return next((one for one in data if one.get("b64_json") or one.get("url")), {})


class Images(Endpoint):
    """One server's image generations."""

    path = "/images/generations"
    what = "image"
    has_answer = staticmethod(_first)

    def download(self, url: str) -> bytes:
        """Fetch an image that the server points to, without the key."""
        # The address is the server's word: https alone, or the server itself, so that it opens no door in between.
        link = httpx2.URL(url)
        own = (link.scheme, link.host, link.port) == (self._url.scheme, self._url.host, self._url.port)
        if not own and (link.scheme != "https" or not link.host):
            raise Refused(f"{self.shown}: points to an image at {answers.clean(url, 100)}, which is not fetched")
        try:
            with self._client.stream("GET", link, timeout=self.patience.connect_s * 6) as response:
                if response.status_code != 200:
                    raise EndpointError(f"{self.shown}: the image it points to is not there ({response.status_code})")
                return self._whole(response.iter_bytes(), MAX_BODY)
        except httpx2.RequestError as error:
            raise EndpointError(
                f"{self.shown}: the image it points to cannot be had ({self._safe(str(error))})"
            ) from error


def open_images(
    model: str,
    *,
    base_url: str | None = None,
    api_key: str | None = None,
    allow_http: bool = False,
    patience: Patience | None = None,
    extra: Mapping[str, Any] | None = None,
) -> EndpointRenderer:
    """Make a renderer of an endpoint; nothing is sent yet. Of an address that has one model, `model` may be empty."""
    if not model and base_url:
        key = api_key if api_key is not None else os.environ.get("OPENAI_API_KEY")
        return EndpointRenderer("", Images(base_url, key, patience, allow_http), extra)
    endpoint = connect(Images, model, base_url, api_key, allow_http, patience, "gpt-image-1")
    return EndpointRenderer(model.strip(), endpoint, extra)


class EndpointRenderer(Renderer):
    """Draws with a model behind an endpoint."""

    output: Output = "image"

    def __init__(self, model: str, endpoint: Images, extra: Mapping[str, Any] | None = None) -> None:
        self.model = model
        self.endpoint = endpoint
        self.extra = dict(extra or {})
        self.name = f"{ENDPOINT}{model}" if model else endpoint.shown
        self._refused: set[str] = set()  # Parameters that the server does not take

    def render(self, request: RenderRequest) -> np.ndarray:
        """Draw."""
        if request.image is not None or request.frames is not None:
            raise ConfigError(f"{self.name}: an endpoint draws one image from a prompt; leave out image and frames")
        body: dict[str, Any] = {"prompt": request.prompt, "n": 1, "response_format": "b64_json"}
        if self.model:
            body["model"] = self.model
        if request.width and request.height:
            body["size"] = f"{request.width}x{request.height}"
        more = {
            "negative_prompt": request.negative_prompt or None,
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "seed": request.seed,
        }
        body |= {name: value for name, value in more.items() if value is not None}
        if self.endpoint.shown.startswith(OPENAI_URL):
            self._refused |= set(more)
            if lost := [name for name, value in more.items() if value and name in body]:
                warnings.warn(f"{self.name}: OpenAI takes no {', '.join(lost)}; left out", stacklevel=2)
        found = _first(self._ask(body | self.extra))
        return self._opened(found)

    def close(self) -> None:
        """Close the connections that are kept open between calls."""
        self.endpoint.close()

    def _ask(self, body: dict[str, Any]) -> answers.Event:
        """Ask, and ask again without what the server says it does not take."""
        while True:
            sent = {name: value for name, value in body.items() if name not in self._refused}
            try:
                *_, answer = self.endpoint.send(sent)
                return answer
            except Refused as error:
                said = str(error).removeprefix(self.endpoint.shown)
                named = [name for name in sent if name not in _NEEDED and re.search(rf"\b{name}\b", said)]
                if not named:
                    raise
                self._refused.add(named[0])
                if named[0] != "response_format" and sent[named[0]]:  # a seed of 0 is what nobody chose
                    warnings.warn(f"{self.name}: the server takes no {named[0]}; left out", stacklevel=3)

    def _opened(self, found: dict[str, Any]) -> np.ndarray:
        """Read the image that an answer holds or points to; it is untrusted as any other."""
        name = f"the image from {self.endpoint.shown}"
        text = str(found.get("b64_json") or found.get("url"))
        if found.get("b64_json") or text.startswith("data:"):
            try:
                data = base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
            except (binascii.Error, ValueError) as error:
                raise EndpointError(f"{name} is no base64 ({first_line(error)})") from None
        else:
            data = self.endpoint.download(text)
        return np.asarray(open_image(data, name=name))
