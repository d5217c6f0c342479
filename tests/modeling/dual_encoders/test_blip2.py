"""Stage 1 of BLIP-2 in micro-batches, with kept features and padding, and what evaluation uses of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from polymodal.errors import ConfigError
from polymodal.modeling.dual_encoders.base import Embedded, Everyone, PairBatch
from polymodal.modeling.dual_encoders.blip2_stage1 import COLDEST, Blip2Stage1
from polymodal.modeling.dual_encoders.gradient_cache import cached_backward
from polymodal.modeling.projectors.qformer import QFormer

Make = Callable[..., Any]


def part(batch: PairBatch, start: int, stop: int) -> PairBatch:
    assert batch.pixel_values is not None
    return PairBatch(
        batch.input_ids[start:stop],
        batch.attention_mask[start:stop],
        batch.image_ids[start:stop],
        batch.pixel_values[start:stop],
    )


def gradients(model: Blip2Stage1) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys() and found
    scale = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (found[name].double() - gradient.double()).abs().max() <= 1e-5 * max(scale, 1.0), name


def test_negatives_are_never_of_the_same_image(blip2_model: Make, blip2_batch: Make, blip2_step: Make) -> None:
    model = blip2_model()
    batch = blip2_batch(model, ids=[0, 0, 0, 1, 1, 2])
    _, everyone = blip2_step(model, batch)
    drawn = set()
    for seed in range(40):
        turned = Everyone(**{**vars(everyone), "seed": seed})
        images, texts = model.negatives(turned, 6)
        ids = batch.image_ids
        assert not bool((ids[images[6:12]] == ids).any()) and not bool((ids[texts[12:]] == ids).any())
        drawn |= {(tuple(images[6:12].tolist()), tuple(texts[12:].tolist()))}
    assert len(drawn) > 10
    assert any(images != texts for images, texts in drawn)


def test_the_closest_are_drawn_when_it_is_cold(blip2_model: Make, blip2_batch: Make, blip2_everyone: Make) -> None:
    """The closest other text of each image, and the closest other image of each text, which differ."""
    model = blip2_model()
    batch = blip2_batch(model)
    everyone = blip2_everyone(model, batch, model.embed(batch))
    with torch.no_grad():
        model.temperature.fill_(1e-6)
    close = torch.stack([everyone.image[:, q] @ everyone.text.T for q in range(4)]).amax(0).fill_diagonal_(-9)
    images, texts = model.negatives(everyone, 6)
    assert texts[12:].tolist() == close.argmax(1).tolist()
    assert images[6:12].tolist() == close.argmax(0).tolist() != close.argmax(1).tolist()


def test_negatives_are_never_of_the_same_text(blip2_model: Make, blip2_batch: Make, blip2_everyone: Make) -> None:
    model = blip2_model()
    batch = blip2_batch(model)
    texts = torch.tensor([0, 0, 2, 3, 3, 3])
    batch = PairBatch(batch.input_ids[texts], batch.attention_mask[texts], batch.image_ids, batch.pixel_values)
    everyone = blip2_everyone(model, batch, model.embed(batch))
    for seed in range(40):
        images, others = model.negatives(Everyone(**{**vars(everyone), "seed": seed}), 6)
        assert not bool((texts[images[6:12]] == texts).any()) and not bool((texts[others[12:]] == texts).any())
    alike = PairBatch(batch.input_ids[:1].expand(6, -1), batch.attention_mask[:1].expand(6, -1), batch.image_ids)
    same = Everyone(**{**vars(everyone), "input_ids": alike.input_ids, "attention_mask": alike.attention_mask})
    images, others = model.negatives(same, 6)
    assert not bool((images[6:12] == images[:6]).any()) and not bool((others[12:] == others[:6]).any())


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_give_the_whole_step(
    size: int, blip2_model: Make, blip2_batch: Make, blip2_everyone: Make, blip2_step: Make
) -> None:
    model = blip2_model()
    batch = blip2_batch(model, ids=[0, 1, 2, 0, 4, 5])
    terms, _ = blip2_step(model, batch)
    wanted = gradients(model)
    model.zero_grad()
    parts = [part(batch, start, min(6, start + size)) for start in range(0, 6, size)]
    seen: list[Everyone] = []

    def embed(item: PairBatch) -> tuple[list[Tensor], Embedded]:
        embedded = model.embed(item)
        return [embedded.image, embedded.text], embedded

    def contrast(image: Tensor, text: Tensor) -> dict[str, Tensor]:
        seen.append(blip2_everyone(model, batch, Embedded(image, text)))
        return model.contrast(Embedded(image, text), batch.image_ids, image, text, batch.image_ids, 0)

    def extra(start: int, item: PairBatch, tensors: Any, embedded: Embedded) -> dict[str, Tensor]:
        return model.extra(item, embedded, Everyone(**{**vars(seen[0]), "offset": start}))

    found = cached_backward(embed, contrast, extra, parts)
    for name in ("itc", "itm", "itg"):
        assert abs(float(found[name]) - float(terms[name])) <= 1e-5
    assert_same_gradients(gradients(model), wanted)


def test_padding_changes_nothing(blip2_model: Make, blip2_batch: Make, blip2_step: Make) -> None:
    model = blip2_model()
    batch = blip2_batch(model)
    terms, _ = blip2_step(model, batch)
    wanted = gradients(model)
    longer = PairBatch(
        torch.nn.functional.pad(batch.input_ids, (0, 5), value=3),
        torch.nn.functional.pad(batch.attention_mask, (0, 5)),
        batch.image_ids,
        batch.pixel_values,
    )
    again, _ = blip2_step(model, longer)
    for name in ("itc", "itm", "itg"):
        assert abs(float(terms[name]) - float(again[name])) <= 1e-5
    assert_same_gradients(gradients(model), wanted)


def test_kept_features_stand_for_pixels(blip2_model: Make, blip2_batch: Make) -> None:
    model = blip2_model()
    batch = blip2_batch(model)
    assert batch.pixel_values is not None
    kept = PairBatch(
        batch.input_ids, batch.attention_mask, batch.image_ids, features=model.encode(batch.pixel_values).half()
    )
    one, other = model.embed(batch), model.embed(kept)
    assert (one.image - other.image).abs().max() < 2e-3 and bool((one.text == other.text).all())
    assert model.features_shape == (5, 24)
    assert model.encode(batch.pixel_values).shape[1:] == torch.Size(model.features_shape)


def test_one_pass_gives_the_contrastive_features_of_the_queries_alone(blip2_model: Make, blip2_batch: Make) -> None:
    model = blip2_model()
    batch = blip2_batch(model)
    assert batch.pixel_values is not None
    embedded = model.embed(batch)
    alone = model.embed_images(model.encode(batch.pixel_values))
    assert (embedded.image - alone).abs().max() <= 1e-6
    assert embedded.image.shape == (6, 4, 8) and embedded.text.shape == (6, 8)
    assert (embedded.image.norm(dim=-1) - 1).abs().max() < 1e-6 and (embedded.text.norm(dim=-1) - 1).abs().max() < 1e-6


def test_dropout_is_on_in_training_and_off_in_evaluation(blip2_model: Make, blip2_batch: Make) -> None:
    model = blip2_model(dropout=0.3)
    batch = blip2_batch(model)
    assert bool((model.embed(batch).image != model.embed(batch).image).any())
    model.eval()
    assert bool((model.embed(batch).image == model.embed(batch).image).all())


def test_the_tower_gets_no_gradient_and_ln_vision_does(blip2_model: Make, blip2_batch: Make, blip2_step: Make) -> None:
    model = blip2_model()
    blip2_step(model, blip2_batch(model))
    assert all(p.grad is None for p in model.vision_encoder.parameters())
    found = gradients(model)
    assert float(found["qformer.ln_vision.weight"].abs().max()) > 0
    assert float(found["qformer.query_tokens"].abs().max()) > 0
    assert float(found["temperature"].abs()) > 0


def test_the_temperature_stays_above_zero(blip2_model: Make) -> None:
    model = blip2_model()
    with torch.no_grad():
        model.temperature.fill_(-1)
    model.after_step()
    assert model.facts() == {"temperature": pytest.approx(COLDEST)}


def test_what_does_not_fit_is_refused(blip2_model: Make, blip2_batch: Make) -> None:
    model = blip2_model()
    batch = blip2_batch(model, size=1)
    embedded = model.embed(batch)
    with pytest.raises(ConfigError, match="a step of one pair"):
        model.contrast(embedded, batch.image_ids, embedded.image, embedded.text, batch.image_ids, 0)
    tower, tokenizer = model.vision_encoder, model.tokenizer
    blind = QFormer(24, model.qformer.config, text=False)
    with pytest.raises(ConfigError, match="needs a Q-Former with its text path"):
        Blip2Stage1(tower, model.vision, blind, tokenizer, model.image)
    with pytest.raises(ConfigError, match="features of width 20, the vision tower gives 24"):
        Blip2Stage1(tower, model.vision, QFormer(20, model.qformer.config, text=True), tokenizer, model.image)
    few = model.qformer.config.model_copy(update={"vocab_size": 10})
    with pytest.raises(ConfigError, match="the Q-Former knows 10"):
        Blip2Stage1(tower, model.vision, QFormer(24, few, text=True), tokenizer, model.image)
