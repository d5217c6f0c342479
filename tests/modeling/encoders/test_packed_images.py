"""Images of several sizes through one tower at once: the numbers are those of each image alone in `transformers`."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from polymodal.errors import ConfigError
from polymodal.media_plan import Size
from polymodal.modeling.encoders.hf_vision import HFVisionEncoder
from polymodal.training.activation_checkpointing import checkpoint_layers, compile_layers
from tests.modeling.encoders.test_vision import CONFIGS, PREFIX, reference, tiny

SIZES = [Size(14, 42), Size(28, 28), Size(35, 21), Size(14, 42), Size(7, 7), Size(21, 14)]


def images(count: int = len(SIZES)) -> list[Tensor]:
    drawn = torch.Generator().manual_seed(1)
    return [torch.randn(1, 3, size.height, size.width, generator=drawn) for size in SIZES[:count]]


def native(family: str, **more: Any) -> HFVisionEncoder:
    encoder = HFVisionEncoder(tiny(family), **more)
    encoder.take_any_size()
    return encoder


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_each_image_is_encoded_as_alone_in_transformers(family: str, attention: str) -> None:
    encoder = HFVisionEncoder(tiny(family, attention), select_layer=(-2, 0))
    encoder.take_any_size()
    for image, found in zip(images(), encoder(images()), strict=True):
        states = reference(family, tiny(family, attention), image, interpolate=True)
        expected = torch.cat([states[index][:, PREFIX[family] :] for index in (-2, 0)], dim=-1)
        assert found.shape == (1, image.shape[2] * image.shape[3] // 49, 64)
        assert torch.allclose(found, expected, atol=2e-5)
        assert torch.allclose(encoder(image), expected, atol=2e-5)  # one tensor of another size than the tower's own


@torch.no_grad()
def test_naflex_equals_the_padded_batch_of_transformers() -> None:
    """All shapes in one batch, with the class's own padding, mask and shapes."""
    from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

    model = tiny("siglip2")
    flat = [torch.from_numpy(np.array(convert_image_to_patches(image[0].numpy(), 7))) for image in images()]
    most = max(len(patches) for patches in flat)
    padded = torch.stack([torch.cat((part, part.new_zeros(most - len(part), part.shape[1]))) for part in flat])
    mask = torch.tensor([[1] * len(part) + [0] * (most - len(part)) for part in flat])
    shapes = torch.tensor([[size.height // 7, size.width // 7] for size in SIZES])
    out = model(pixel_values=padded, pixel_attention_mask=mask, spatial_shapes=shapes, output_hidden_states=True)
    encoder = native("siglip2", select_layer=-1)
    for row, length, found in zip(out.hidden_states[-1], mask.sum(dim=1).tolist(), encoder(images()), strict=True):
        assert torch.allclose(row[:length], found[0], atol=2e-5)


@torch.no_grad()
def test_an_image_has_no_say_in_its_neighbours() -> None:
    encoder = native("clip")
    before = encoder(images())
    changed = images()
    changed[2] = changed[2] + 5
    for number, (old, new) in enumerate(zip(before, encoder(changed), strict=True)):
        assert torch.equal(old, new) == (number != 2)


@torch.no_grad()
def test_frames_of_one_size_beside_images() -> None:
    encoder = native("dinov2_with_registers")
    frames = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    still, video = encoder([images(1)[0], frames])
    assert torch.allclose(video, encoder(frames), atol=2e-5)
    assert torch.allclose(still, encoder(images(1)[0]), atol=2e-5)


@pytest.mark.parametrize("family", ["siglip2", "clip", "eva_clip"])
def test_gradients_and_recomputation(family: str) -> None:
    """The layers see the same lengths when activation checkpointing runs them again."""

    def gradients(encoder: HFVisionEncoder, packed: bool) -> list[Tensor]:
        encoder.zero_grad()
        encoder.train()
        found = encoder(images()) if packed else [encoder(image) for image in images()]
        sum(part.square().mean() for part in found).backward()
        return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    encoder = native(family)
    alone, packed = gradients(encoder, False), gradients(encoder, True)
    other = copy.deepcopy(encoder)
    checkpoint_layers(list(other._layers))
    again = gradients(other, True)
    for one, two, three in zip(alone, packed, again, strict=True):
        assert torch.allclose(one, two, rtol=1e-4, atol=1e-5) and torch.equal(two, three)


@torch.no_grad()
def test_compiled_layers_take_other_images() -> None:
    encoder = native("siglip2")
    expected = [encoder(images()), encoder(images(3))]
    compile_layers(list(encoder._layers), backend="eager")
    for wanted, found in zip(expected, [encoder(images()), encoder(images(3))], strict=True):
        assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(wanted, found, strict=True))


def test_a_copy_runs_its_own_layers() -> None:
    encoder = native("clip")
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        before = encoder(images())
        for parameter in other.parameters():
            parameter.zero_()
        assert all(not part.any() for part in other(images()))
        assert all(torch.equal(a, b) for a, b in zip(before, encoder(images()), strict=True))


def test_no_layer_pads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer runs once, on as many positions as there are patches and class tokens."""
    encoder, seen = native("clip"), []
    for layer in encoder._layers:
        layer.register_forward_pre_hook(lambda _layer, args: seen.append(tuple(args[0].shape[:2])))
    encoder(images())
    assert seen == [(1, sum(size.area // 49 + 1 for size in SIZES))] * 2


def test_what_is_no_whole_patches_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"whole patches of 7x7 pixels .* was given 30x28"):
        native("clip")([torch.zeros(1, 3, 30, 28)])
    with pytest.raises(ConfigError, match=r"tiles of 28x28 pixels .* was given 14x28"):
        HFVisionEncoder(tiny("clip"))(torch.zeros(1, 3, 14, 28))
