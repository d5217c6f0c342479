"""LLaVA-1.5 (arXiv:2310.03744) as `LlavaForConditionalGeneration`: one tile a picture."""

from __future__ import annotations

from typing import Any

from polymodal.interop.huggingface.families import Pieces, llava_pieces


def read(settings: Any, where: str) -> Pieces:
    """Take a LLaVA apart.

    Args:
        settings: A `LlavaConfig` of transformers.
        where: The file it is from, for errors.

    Returns:
        The pieces.

    Raises:
        NotExpressibleError: A setting cannot be expressed.
    """
    return llava_pieces(settings, where)
