"""InstructBLIP (arXiv:2305.06500) as `InstructBlipForConditionalGeneration`: a BLIP-2 that reads the question twice.

The Q-Former sees the question too, so that its queries fetch what is asked for. Vicuna, another Llama, or T5 behind it.
The Q-Former's tokenizer lies in `qformer_tokenizer/` of the folder.
"""

from __future__ import annotations

from typing import Any

from polymodal.checkpoints.hf.blip2 import blip_pieces
from polymodal.interop.huggingface.families import Pieces


def read(settings: Any, where: str) -> Pieces:
    """Take an InstructBLIP apart.

    Args:
        settings: An `InstructBlipConfig` of transformers.
        where: The file it is from, for errors.

    Returns:
        The pieces.

    Raises:
        NotExpressibleError: A setting cannot be expressed.
    """
    return blip_pieces(settings, where, text_context=True)
