"""BLIP-2 (arXiv:2301.12597) as `Blip2ForConditionalGeneration`: EVA-CLIP, a Q-Former, OPT or T5.

The norm that transformers calls the tower's `post_layernorm` is the Q-Former's here; see `modeling.projectors.qformer`.
"""

from __future__ import annotations

from typing import Any

from polymodal.config import ProjectorConfig, QFormerConfig, VisionConfig, parse_config
from polymodal.interop.huggingface.families import Pieces, must_be, tower_family

_SAME_NAMES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "cross_attention_frequency",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "vocab_size",
    "max_position_embeddings",
    "pad_token_id",
)
"""Settings of a Q-Former that are called alike there and here."""


def read(settings: Any, where: str) -> Pieces:
    """Take a BLIP-2 apart.

    Args:
        settings: A `Blip2Config` of transformers.
        where: The file it is from, for errors.

    Returns:
        The pieces.

    Raises:
        NotExpressibleError: A setting cannot be expressed.
    """
    return blip_pieces(settings, where, text_context=False)


def blip_pieces(settings: Any, where: str, *, text_context: bool) -> Pieces:
    """Take a BLIP-2 or InstructBLIP apart.

    Args:
        settings: The configuration of transformers.
        where: The file it is from, for errors.
        text_context: The Q-Former reads the question.

    Returns:
        The pieces.

    Raises:
        NotExpressibleError: A setting cannot be expressed.
    """
    qformer, vision = settings.qformer_config, settings.vision_config
    must_be(where, "qformer_config.hidden_act", qformer.hidden_act, "gelu")
    must_be(where, "qformer_config.use_qformer_text_input", getattr(qformer, "use_qformer_text_input", False), False)
    found = {
        **{name: getattr(qformer, name) for name in _SAME_NAMES},
        "num_query_tokens": settings.num_query_tokens,
        "vision_norm_eps": vision.layer_norm_eps,
        # transformers cuts a question only where it is asked to; no more than this has a place.
        "max_text_length": qformer.max_position_embeddings,
        "text_context": text_context,
    }
    return Pieces(
        model_type=settings.model_type,
        vision=VisionConfig(
            vision_tower="bundled",
            type=tower_family(where, vision),
            mm_vision_select_layer=-1,
            mm_vision_select_feature="cls_patch",
        ),
        projector=ProjectorConfig(
            mm_projector_type="qformer", qformer=parse_config(QFormerConfig, found, f"{where}: qformer_config")
        ),
        vision_settings=_tower_settings(vision),
        text_settings=settings.text_config,
        image_token_id=settings.image_token_id,
        prompt="plain",
    )


def _tower_settings(vision: Any) -> Any:
    """The tower's settings as BLIP-2's class takes them; InstructBLIP's tower is the same under another name."""
    from transformers import Blip2VisionConfig

    if isinstance(vision, Blip2VisionConfig):
        return vision
    values = vision.to_dict()
    shared = Blip2VisionConfig().to_dict().keys() & values.keys() - {"model_type", "transformers_version"}
    return Blip2VisionConfig(**{name: values[name] for name in shared})
