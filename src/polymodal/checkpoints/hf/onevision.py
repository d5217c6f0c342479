"""LLaVA-OneVision (arXiv:2408.03326) as `LlavaOnevisionForConditionalGeneration`: SigLIP, AnyRes with a limit.

A picture that is alone is cut into tiles, and its tokens are shrunk to what the limit allows; several pictures are
padded to one tile each (`ImageConfig.several_pictures`), as the chat template of transformers' processor hands them
over. Video is not read.
"""

from __future__ import annotations

from typing import Any

from polymodal.checkpoints.hf.llava_next import pinpoints
from polymodal.interop.huggingface.families import Pieces, llava_pieces


def read(settings: Any, where: str) -> Pieces:
    """Take a LLaVA-OneVision apart.

    Args:
        settings: A `LlavaOnevisionConfig` of transformers.
        where: The file it is from, for errors.

    Returns:
        The pieces.

    Raises:
        NotExpressibleError: A setting cannot be expressed.
    """
    return llava_pieces(
        settings,
        where,
        newline=True,
        pinpoints=pinpoints(settings),
        vision_aspect_ratio=settings.vision_aspect_ratio,
    )
