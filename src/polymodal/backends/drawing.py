"""A model that makes images itself, as a renderer."""

import numpy as np

from polymodal.backends.base import Backend
from polymodal.errors import ConfigError
from polymodal.generation.params import GenerationParams, ImageParams
from polymodal.modeling.renderers.base import Renderer, RenderRequest

_NOT_HERE = ("width", "height", "steps", "frames", "fps", "image")
"""Fields of a renderer's request that codes of one size have no use for."""


class DrawingModel(Renderer):
    """A model that makes images, as a renderer."""

    output = "image"
    conversational = True

    def __init__(self, model: Backend) -> None:
        if "image" not in model.makes:
            raise ConfigError(f"{model.name}: makes {' and '.join(model.makes)}; a renderer has to make images")
        self.model, self.name = model, model.name

    def render(self, request: RenderRequest) -> np.ndarray:
        """Draw, uint8 [H, W, 3]."""
        given = {"negative_prompt": request.negative_prompt or None, **request.model_dump(include=set(_NOT_HERE))}
        if said := [name for name, value in given.items() if value is not None]:
            raise ConfigError(f"{self.name}: draws codes, for which {said[0]} says nothing; leave it out")
        image = ImageParams(guidance=request.guidance)
        params = GenerationParams(seed=request.seed, modalities=("image",), image=image)
        return np.asarray(self.model.generate(request.prompt, params).images[0])
