"""Renderers: what draws from a prompt (the relay family, in which the language model writes the prompt)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from polymodal.errors import CheckpointError
from polymodal.modeling.renderers.base import Output, Renderer, RenderRequest
from polymodal.modeling.renderers.diffusion import INDEX, DiffusersRenderer, fetch
from polymodal.utils.files import home_path

RENDERERS: dict[str, Callable[[Path, str, str | None], Renderer]] = {"diffusers": DiffusersRenderer}
"""Each kind of renderer that lies in a folder, and what opens it: (folder, name, device)."""

__all__ = ["RENDERERS", "Output", "RenderRequest", "Renderer", "load_renderer"]


def load_renderer(name: str | Path | Renderer, device: str | None = None) -> Renderer:
    """Open a renderer that lies in a folder; `polymodal.backends.load_renderer` opens endpoints too.

    Args:
        name: The folder or hub id of a pipeline of diffusers, which has a `model_index.json`; or an open renderer.
        device: Such as "cpu" or "cuda"; a GPU where there is one if None.

    Returns:
        The renderer.

    Raises:
        CheckpointError: There is no such folder, or what lies in it is no pipeline, damaged or not safe to open.
        ConfigError: `diffusers` is not installed, or the name is none.
    """
    if isinstance(name, Renderer):
        return name
    folder = home_path(name)
    if folder.is_file():
        raise CheckpointError(f"{name}: a file, and a renderer is a folder with {INDEX}; name the folder")
    if not folder.is_dir():
        folder = fetch(str(name))
    return RENDERERS["diffusers"](folder, str(name), device)
