"""LLaVA-NeXT (LLaVA-1.6) as `LlavaNextForConditionalGeneration`: AnyRes tiles, rows that end with a newline token."""

from __future__ import annotations

from typing import Any

from polymodal.interop.huggingface.families import Pieces, llava_pieces


def read(settings: Any, where: str) -> Pieces:
    """Take a LLaVA-NeXT apart.

    Args:
        settings: A `LlavaNextConfig` of transformers.
        where: The file it is from, for errors.

    Returns:
        The pieces.

    Raises:
        NotExpressibleError: A setting cannot be expressed.
    """
    return llava_pieces(settings, where, newline=True, pinpoints=pinpoints(settings))


def pinpoints(settings: Any) -> tuple[tuple[int, int], ...]:
    """The AnyRes canvases of a configuration, (height, width)."""
    return tuple((int(height), int(width)) for height, width in settings.image_grid_pinpoints)
