"""A tiny stage 1 of BLIP-2 with random weights, and pairs for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

if TYPE_CHECKING:
    from polymodal.modeling.dual_encoders.base import Embedded, Everyone, PairBatch
    from polymodal.modeling.dual_encoders.blip2_stage1 import Blip2Stage1

CAPTIONS = ["a red apple", "two apples on a wooden table", "the car", "a cat and a dog in the rain", "a dog", "rain"]


def make_model(dropout: float = 0.0, seed: int = 0, queries: int = 4) -> Blip2Stage1:
    """A tiny stage 1 with weights large enough that everything matters."""
    from transformers import Blip2VisionConfig, Blip2VisionModel

    from polymodal.config import ImageConfig, QFormerConfig, VisionConfig
    from polymodal.modeling.dual_encoders.blip2_stage1 import Blip2Stage1
    from polymodal.modeling.dual_encoders.blip2_stage1_folder import train_wordpiece
    from polymodal.modeling.encoders.hf_vision import HFVisionEncoder
    from polymodal.modeling.projectors.qformer import QFormer

    torch.manual_seed(seed)
    tokenizer = train_wordpiece(CAPTIONS * 2)
    tower = Blip2VisionModel(
        Blip2VisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            initializer_range=0.2,
        )
    )
    encoder = HFVisionEncoder(tower.eval(), -1, "cls_patch").requires_grad_(False)
    config = QFormerConfig(
        num_query_tokens=queries,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        vocab_size=len(tokenizer),
        max_position_embeddings=40,
        initializer_range=0.3,
    )
    qformer = QFormer(encoder.embed_dim, config, text=True)
    vision = VisionConfig(
        vision_tower="tower", type="eva_clip", mm_vision_select_layer=-1, mm_vision_select_feature="cls_patch"
    )
    image = ImageConfig(tile_size=(28, 28), image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
    model = Blip2Stage1(encoder, vision, qformer, tokenizer, image, projection_dim=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("vision_encoder.") and parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def make_batch(model: Blip2Stage1, size: int = 6, seed: int = 1, ids: list[int] | None = None) -> PairBatch:
    from polymodal.modeling.dual_encoders.base import PairBatch

    torch.manual_seed(seed)
    texts = model.tokenizer(CAPTIONS[:size], padding=True, return_tensors="pt")
    pixels = torch.randn(size, 3, 28, 28)
    image_ids = torch.tensor(ids if ids is not None else list(range(size)))
    for row, number in enumerate(image_ids.tolist()):
        pixels[row] = pixels[image_ids.tolist().index(number)]
    return PairBatch(texts["input_ids"], texts["attention_mask"].bool(), image_ids, pixel_values=pixels)


def everyone_of(model: Blip2Stage1, batch: PairBatch, embedded: Embedded, offset: int = 0, seed: int = 5) -> Everyone:
    from polymodal.modeling.dual_encoders.base import Everyone

    assert batch.pixel_values is not None
    return Everyone(
        embedded.image.detach(),
        embedded.text.detach(),
        batch.image_ids,
        batch.input_ids,
        batch.attention_mask,
        model.encode(batch.pixel_values),
        offset,
        seed,
    )


def run(model: Blip2Stage1, batch: PairBatch) -> tuple[dict[str, Tensor], Everyone]:
    """One whole step; leaves gradients."""
    model.zero_grad()
    embedded = model.embed(batch)
    everyone = everyone_of(model, batch, embedded)
    terms = model.contrast(embedded, batch.image_ids, embedded.image, embedded.text, batch.image_ids, 0)
    terms |= model.extra(batch, embedded, everyone)
    loss: Any = sum(term for name, term in terms.items() if not name.startswith("metric/"))
    loss.backward()
    return {name: term.detach() for name, term in terms.items()}, everyone


@pytest.fixture
def blip2_model() -> Callable[..., Blip2Stage1]:
    """See `make_model`."""
    return make_model


@pytest.fixture
def blip2_batch() -> Callable[..., PairBatch]:
    """See `make_batch`."""
    return make_batch


@pytest.fixture
def blip2_everyone() -> Callable[..., Everyone]:
    """See `everyone_of`."""
    return everyone_of


@pytest.fixture
def blip2_step() -> Callable[..., tuple[dict[str, Tensor], Everyone]]:
    """See `run`."""
    return run
