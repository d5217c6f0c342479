"""A batch without images, where other processes may have some: every trained media part takes part, with zero."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from polymodal.config import ImageConfig, ModelConfig, ProjectorConfig
from polymodal.errors import PolymodalError
from polymodal.media_plan import Size, plan_image
from polymodal.messages import Image, user
from polymodal.modeling.build import build_model
from polymodal.modeling.encoders.hf_vision import HFVisionEncoder
from polymodal.modeling.projectors import build_projector
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Sample, Slot, collate, collate_packed
from polymodal.processing.image_transform import normalise
from polymodal.processing.processor import Processor

IMAGE = ImageConfig(
    image_aspect_ratio="squash", tile_size=(28, 28), image_mean=(0.48, 0.46, 0.41), image_std=(0.27, 0.26, 0.28)
)


@pytest.fixture
def model() -> MultimodalLM:
    torch.manual_seed(0)
    tower = CLIPVisionModel(
        CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                         image_size=28, patch_size=14)
    )  # fmt: skip
    encoder = HFVisionEncoder(tower)
    llm = LlamaForCausalLM(
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    projector = build_projector(ProjectorConfig(), encoder.embed_dim, encoder.grid, 16)
    return MultimodalLM(
        encoder, projector, llm, 40, True, image_mean=IMAGE.image_mean, image_std=IMAGE.image_std
    ).train()


def test_text_alone_gives_zero_gradients_rather_than_none(model: MultimodalLM) -> None:
    ids = torch.tensor([[1, 2, 3, 4]])
    usual = model(ids, labels=ids)
    usual.loss_sum.backward()
    media = [*model.projector.named_parameters(), ("image_newline", model.image_newline)]
    assert all(parameter.grad is None for _, parameter in media)
    expected = {name: p.grad.clone() for name, p in model.llm.named_parameters()}
    model.zero_grad(set_to_none=True)

    touched = model(ids, labels=ids, touch_media=True)
    touched.loss_sum.backward()
    assert torch.equal(touched.losses, usual.losses)
    used = {name for name, p in model.vision_encoder.named_parameters() if p.grad is not None}
    assert any("layers.0" in name for name in used)
    for name, parameter in [*media, *((n, p) for n, p in model.vision_encoder.named_parameters() if n in used)]:
        assert parameter.grad is not None and parameter.grad.abs().sum() == 0, name
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.llm.named_parameters())
    assert model.vision_encoder.training


def test_with_everything_but_the_projector_frozen_there_is_still_a_backward_pass(model: MultimodalLM) -> None:
    model.requires_grad_(False)
    model.projector.requires_grad_(True)
    calls = []
    model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.tensor([[1, 2, 3, 4]])
    assert not model(ids, labels=ids).loss_sum.requires_grad
    out = model(ids, labels=ids, touch_media=True)
    out.loss_sum.backward()
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in model.projector.parameters())
    assert not calls  # a frozen tower that lies whole on every process takes part in nothing


def test_images_are_not_encoded_twice(model: MultimodalLM) -> None:
    plan = plan_image(Size(28, 28), IMAGE, model.tokens_per_tile)
    ids = torch.tensor([[1] + [40] * plan.num_tokens + [2, 3]])
    labels = torch.where(ids == 40, -100, ids)
    calls = []
    model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    pixels = torch.randn(1, 3, 28, 28)
    usual = model(ids, None, labels, [plan], [0], pixels)
    touched = model(ids, None, labels, [plan], [0], pixels, touch_media=True)
    assert len(calls) == 2 and torch.equal(usual.losses, touched.losses)
    touched.loss_sum.backward()
    assert model.image_newline.grad is not None and model.image_newline.grad.abs().sum() == 0
    assert all(p.grad.abs().sum() > 0 for p in model.projector.parameters())


def test_bytes_are_normalised_as_on_the_host(model: MultimodalLM) -> None:
    tiles = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    seen = []
    model.vision_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.encode_images(tiles)
    expected = torch.from_numpy(normalise(tiles.numpy(), IMAGE))
    assert torch.equal(seen[0], expected)
    assert not any("pixel" in name for name in model.state_dict())


def test_bytes_without_a_rule_are_refused(model: MultimodalLM) -> None:
    bare = MultimodalLM(model.vision_encoder, model.projector, model.llm, 40)
    with pytest.raises(PolymodalError, match="uint8 tiles: this model was built without image_mean"):
        bare.encode_images(torch.zeros(1, 3, 28, 28, dtype=torch.uint8))


def test_the_processor_hands_out_bytes_that_become_the_same_features(
    tiny_model_config: ModelConfig, image_folder: Path
) -> None:
    built, tokenizer = build_model(tiny_model_config)
    processor = Processor(tiny_model_config, tokenizer, built.tokens_per_tile, built.image_token_id)
    message = user(Image(sorted(image_folder.glob("*.jpg"))[0]), "What is this?")
    usual, raw = (processor([message], pixels=kind) for kind in (True, "uint8"))
    assert raw.pixels[0].dtype == torch.uint8 and raw.media_keys == usual.media_keys
    features = [built.encode_images(sample.pixels[0]) for sample in (usual, raw)]
    assert torch.equal(features[0], features[1])
    assert collate([raw, raw], 0).pixel_values.dtype == torch.uint8


class Waits(TorchDispatchMode):
    """Notes operations whose result the host must wait for on an accelerator."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("nonzero", "_local_scalar_dense", "is_nonzero", "equal", "masked_select"):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def conversation(model: MultimodalLM, length: int, image: bool, id: str) -> Sample:
    plan = plan_image(Size(28, 28), IMAGE, model.tokens_per_tile)
    count = plan.num_tokens if image else 0
    ids = torch.tensor([1, *[40] * count, *range(2, 2 + length)])
    mask = torch.arange(len(ids)) > count
    slots, plans = ((Slot("image", 1, count, 0),), (plan,)) if image else ((), ())
    return Sample(ids, mask, slots, plans, (torch.randn(1, 3, 28, 28),) if image else (), id=id)


@pytest.mark.parametrize("way", ["right", "left", "packed"])
def test_a_training_step_never_waits_for_the_device(model: MultimodalLM, way: str) -> None:
    samples = [conversation(model, length, image, f"s{length}") for length, image in ((5, True), (9, False), (3, True))]
    batch = collate_packed(samples) if way == "packed" else collate(samples, 0, side=way)
    assert batch.left_padded == (way == "left")
    inputs = batch.inputs()
    model.prepare_packing()
    looked_up = model(**{**inputs, "target_places": None, "media_places": None})
    with Waits() as waits:
        out = model(**inputs)
        out.loss_sum.backward()
    if way == "packed":
        assert waits.found == []
    elif way == "right":  # transformers itself looks once whether positions start anew
        assert len(waits.found) <= 1
    assert torch.equal(out.losses, looked_up.losses) and torch.equal(out.targets, looked_up.targets)
    alone = torch.cat([model(**collate([sample], 0).inputs()).losses for sample in samples])
    assert torch.allclose(out.losses, alone, atol=1e-5)


def test_places_that_do_not_fit_are_an_error_that_names_the_sample(model: MultimodalLM) -> None:
    batch = collate([conversation(model, 5, False, "a"), conversation(model, 5, True, "b")], 0)
    short = dataclasses.replace(batch, media_places=batch.media_places[1:], pixel_values=None, plans=())
    with pytest.raises(PolymodalError, match="media: sample 1 has 4 placeholders but 0 features"):
        model(**{**short.inputs(), "sample_of_image": ()})
