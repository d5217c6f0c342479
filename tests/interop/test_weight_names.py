"""The table of tensor names: read both ways, in every spelling."""

from __future__ import annotations

import pytest

from polymodal.errors import ConfigError
from polymodal.interop.huggingface.weight_names import RULES, Place, to_ours, to_stock

LLAVA = [
    ("llm", "model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
    ("llm", "model.layers.1.mlp.up_proj.weight", "language_model.model.layers.1.mlp.up_proj.weight"),
    ("llm", "lm_head.weight", "language_model.lm_head.weight"),
    ("llm", "transformer.h.0.ln_1.bias", "language_model.transformer.h.0.ln_1.bias"),
    ("vision", "embeddings.class_embedding", "vision_tower.vision_model.embeddings.class_embedding"),
    ("vision", "post_layernorm.bias", "vision_tower.vision_model.post_layernorm.bias"),
    ("projector", "layers.0.weight", "multi_modal_projector.linear_1.weight"),
    ("projector", "layers.2.bias", "multi_modal_projector.linear_2.bias"),
]
NEXT = [*LLAVA, ("newline", "image_newline", "image_newline")]
BLIP2 = [
    ("llm", "model.decoder.layers.0.fc1.weight", "language_model.model.decoder.layers.0.fc1.weight"),
    ("llm", "shared.weight", "language_model.shared.weight"),
    ("vision", "encoder.layers.0.self_attn.qkv.bias", "vision_model.encoder.layers.0.self_attn.qkv.bias"),
    ("projector", "qformer.query_tokens", "query_tokens"),
    ("projector", "qformer.ln_vision.weight", "vision_model.post_layernorm.weight"),
    ("projector", "qformer.transformer.layernorm.weight", "qformer.layernorm.weight"),
    ("projector", "language_projection.bias", "language_projection.bias"),
]
INSTRUCT = [
    *(entry for entry in BLIP2 if "layernorm.weight" not in entry[2]),
    ("projector", "qformer.ln_vision.weight", "vision_model.post_layernorm.weight"),
    ("projector", "qformer.transformer.layernorm.weight", "qformer.embeddings.layernorm.weight"),
    ("projector", "qformer.embeddings.word_embeddings.weight", "qformer.embeddings.word_embeddings.weight"),
    ("projector", "qformer.transformer.encoder.layer.0.output.dense.bias", "qformer.encoder.layer.0.output.dense.bias"),
]
GOLDEN = {"llava": LLAVA, "llava_next": NEXT, "llava_onevision": NEXT, "blip-2": BLIP2, "instructblip": INSTRUCT}


@pytest.mark.parametrize("model_type", RULES)
def test_names_of_the_hub(model_type: str) -> None:
    for component, name, stock in GOLDEN[model_type]:
        place = Place(component, name)  # type: ignore[arg-type]
        assert to_stock(model_type, place) == stock
        assert to_ours(model_type, stock) == place
        for style in ("transformers", "memory"):
            again = to_stock(model_type, place, style=style)  # type: ignore[arg-type]
            assert again is not None
            assert to_ours(model_type, again) == place


@pytest.mark.parametrize(
    ("spelling", "place"),
    [
        ("vision_tower.encoder.layers.0.mlp.fc1.bias", Place("vision", "encoder.layers.0.mlp.fc1.bias")),
        ("model.vision_tower.encoder.layers.0.mlp.fc1.bias", Place("vision", "encoder.layers.0.mlp.fc1.bias")),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", Place("vision", "pre_layrnorm.bias")),
        ("model.language_model.norm.weight", Place("llm", "model.norm.weight")),
        ("lm_head.weight", Place("llm", "lm_head.weight")),
        ("model.multi_modal_projector.linear_2.bias", Place("projector", "layers.2.bias")),
        ("model.image_newline", Place("newline", "image_newline")),
    ],
)
def test_other_spellings_are_read(spelling: str, place: Place) -> None:
    assert to_ours("llava_next", spelling) == place


def test_a_tower_without_the_wrapper_keeps_its_names() -> None:
    place = Place("vision", "embeddings.cls_token")
    assert to_stock("llava", place, tower="dinov2") == "vision_tower.embeddings.cls_token"
    assert to_stock("llava", place, style="memory", tower="dinov2") == "model.vision_tower.embeddings.cls_token"


def test_what_has_no_place() -> None:
    assert to_ours("llava", "mm_projector.0.weight") is None
    assert to_ours("llava", "image_newline") is None  # LLaVA-1.5 has none
    assert to_ours("llava", "vision_tower.vision_model.embeddings.position_ids") is None
    assert to_ours("llava", "language_model.model.layers.0.self_attn.rotary_emb.inv_freq") is None
    # The tower's copy is not written: the Q-Former's norm stands there.
    assert to_stock("blip-2", Place("vision", "post_layernorm.weight")) is None
    with pytest.raises(ConfigError, match="did you mean 'llava"):
        to_ours("llavas", "x")
