"""EfficientNet-Lite0: shapes, TensorFlow padding and weight conversion."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from polymodal.errors import PolymodalError
from polymodal.media_plan import Size
from polymodal.modeling.encoders.efficientnet import (
    FEATURES,
    PIXEL_MEAN,
    PIXEL_STD,
    STAGES,
    EfficientNetEncoder,
    EfficientNetLite0,
    FrozenBatchNorm2d,
    SameConv2d,
    convert_efficientnet_lite0,
    load_efficientnet_lite0,
    save_efficientnet_lite0,
)


@pytest.fixture(scope="module")
def network() -> EfficientNetLite0:
    torch.manual_seed(0)
    return EfficientNetLite0().eval().requires_grad_(False)


def published_names(network: EfficientNetLite0) -> dict[str, torch.Tensor]:
    """The network's weights under the names of the published file, written out independently of the converter."""
    state = network.state_dict()
    norm_of = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}
    first = [sum(spec.blocks for spec in STAGES[:index]) for index in range(len(STAGES))]
    result = {}
    for name, value in state.items():
        parts = name.split(".")
        if parts[0] == "classifier":
            key = f"_fc.{parts[1]}"
        elif parts[0] in ("stem", "head"):
            norm = "_bn0" if parts[0] == "stem" else "_bn1"
            key = f"_conv_{parts[0]}.weight" if parts[1] == "0" else f"{norm}.{parts[2]}"
        else:
            block = first[int(parts[1])] + int(parts[2])
            inner = f"_{parts[3]}_conv.weight" if parts[4] == "0" else f"{norm_of[parts[3]]}.{parts[5]}"
            key = f"_blocks.{block}.{inner}"
        result[key] = value
        if key.endswith("running_mean"):
            result[key.replace("running_mean", "num_batches_tracked")] = torch.tensor(7)
    return result


def test_maps_have_the_stated_strides_and_channels(network: EfficientNetLite0) -> None:
    maps = network(torch.randn(2, 3, 224, 224))
    assert list(maps) == list(FEATURES)
    sides = {"stride4": 56, "stride8": 28, "stride16": 14, "stride32": 7, "head": 7}
    for name, value in maps.items():
        assert value.shape == (2, FEATURES[name][1], sides[name], sides[name])
    assert network.logits(maps["head"]).shape == (2, 1000)


def test_parameter_count_is_that_of_lite0(network: EfficientNetLite0) -> None:
    norms = [module for module in network.modules() if isinstance(module, FrozenBatchNorm2d)]
    trained = sum(value.numel() for value in network.parameters())
    trained += sum(norm.weight.numel() + norm.bias.numel() for norm in norms)
    assert trained == 4_652_008


@pytest.mark.parametrize("size", [5, 6, 7, 8])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_same_padding_puts_the_extra_row_last(size: int, kernel: int, stride: int) -> None:
    conv = SameConv2d(1, 1, kernel, stride)
    torch.nn.init.ones_(conv.weight)
    outputs = math.ceil(size / stride)
    before = max((outputs - 1) * stride + kernel - size, 0) // 2
    counts = [sum(0 <= index * stride - before + tap < size for tap in range(kernel)) for index in range(outputs)]
    expected = torch.tensor([[float(row * column) for column in counts] for row in counts])
    assert torch.equal(conv(torch.ones(1, 1, size, size))[0, 0], expected)


def test_training_mode_does_not_move_the_statistics() -> None:
    torch.manual_seed(1)
    network = EfficientNetLite0()
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = network.eval()(pixels)["head"]
        network.train()(pixels * 3)
        assert torch.equal(network(pixels)["head"], before)


def test_published_names_convert_to_the_same_network(network: EfficientNetLite0) -> None:
    converted = convert_efficientnet_lite0(published_names(network))
    state = network.state_dict()
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[name], state[name]) for name in state)


def test_conversion_names_the_missing_tensor(network: EfficientNetLite0) -> None:
    weights = published_names(network)
    del weights["_fc.bias"]
    with pytest.raises(PolymodalError, match=r"1 missing: _fc\.bias"):
        convert_efficientnet_lite0(weights)


def test_conversion_names_the_wrong_shape(network: EfficientNetLite0) -> None:
    weights = published_names(network)
    weights["_fc.bias"] = torch.zeros(10)
    with pytest.raises(PolymodalError, match=r"classifier.bias \(10,\) for \(1000,\)"):
        convert_efficientnet_lite0(weights)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.0), (torch.float16, 2e-2)])
def test_file_round_trip(network: EfficientNetLite0, tmp_path: Path, dtype: torch.dtype, tolerance: float) -> None:
    path = tmp_path / "weights.safetensors"
    save_efficientnet_lite0(network, path, dtype)
    again = load_efficientnet_lite0(path)
    assert not again.training
    assert not any(value.requires_grad for value in again.parameters())
    pixels = torch.randn(1, 3, 96, 96)
    expected = network.logits(network(pixels)["head"])
    found = again.logits(again(pixels)["head"])
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def test_loading_refuses_other_files(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(PolymodalError, match=r"absent\.safetensors"):
        load_efficientnet_lite0(tmp_path / "absent.safetensors")
    junk = tmp_path / "junk.safetensors"
    junk.write_bytes(b"not tensors at all")
    with pytest.raises(PolymodalError, match=r"junk\.safetensors"):
        load_efficientnet_lite0(junk)
    other = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(1)}, other)
    with pytest.raises(PolymodalError, match="1 not expected: a"):
        load_efficientnet_lite0(other)


@pytest.mark.parametrize("pool", [1, 4, 7])
@pytest.mark.parametrize("stages", [("head",), ("stride8", "stride16", "head"), ("stride32", "stride4")])
def test_encoder_tokens(network: EfficientNetLite0, stages: tuple[str, ...], pool: int) -> None:
    encoder = EfficientNetEncoder(network, stages, pool)
    assert encoder.grid == Size(pool, pool)
    tokens = encoder(torch.randn(2, 3, 224, 224))
    assert tokens.shape == (2, pool * pool, encoder.embed_dim)
    assert encoder.embed_dim == sum(FEATURES[name][1] for name in stages)


def test_encoder_tokens_are_row_major_and_in_stage_order(network: EfficientNetLite0) -> None:
    pixels = torch.randn(1, 3, 224, 224)
    tokens = EfficientNetEncoder(network, ("stride32", "head"), 7)(pixels)
    maps = network(pixels)
    for row, column in ((0, 1), (3, 5), (6, 0)):
        cell = torch.cat([maps["stride32"][0, :, row, column], maps["head"][0, :, row, column]])
        assert torch.allclose(tokens[0, row * 7 + column], cell, atol=1e-6)


def test_detail_keeps_the_cells_of_shallow_stages_apart(network: EfficientNetLite0) -> None:
    pixels = torch.randn(1, 3, 224, 224)
    encoder = EfficientNetEncoder(network, ("head", "stride16", "stride8"), 4, detail=2)
    tokens, maps = encoder(pixels), network(pixels)
    assert encoder.embed_dim == tokens.shape[-1] == 1280 + 4 * (112 + 40) and encoder.grid == Size(4, 4)
    coarse = EfficientNetEncoder(network, ("head",), 4)(pixels)
    assert torch.equal(tokens[..., :1280], coarse)
    fine = F.adaptive_avg_pool2d(maps["stride16"], (8, 8))
    for row, column in ((0, 0), (1, 3), (3, 2)):
        cell = fine[0, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].reshape(-1)
        assert torch.allclose(tokens[0, 4 * row + column, 1280 : 1280 + 448], cell, rtol=1e-4, atol=1e-9)


def test_the_classifier_is_found_behind_detailed_stages(network: EfficientNetLite0) -> None:
    encoder = EfficientNetEncoder(network, ("stride8", "head"), 1, detail=3)
    head = encoder.class_head()
    assert head is not None and head.channels == slice(9 * 40, 9 * 40 + 1280)
    pixels = torch.randn(1, 3, 96, 96)
    own = encoder(pixels)[:, 0, head.channels] @ network.classifier.weight.T + network.classifier.bias
    assert torch.allclose(own, network.logits(network(pixels)["head"]), atol=1e-4)


def test_encoder_refuses_no_cells(network: EfficientNetLite0) -> None:
    with pytest.raises(PolymodalError, match="detail is 0"):
        EfficientNetEncoder(network, detail=0)


@pytest.mark.parametrize("stages", [(), ("head", "head"), ("block9",)])
def test_encoder_refuses_bad_stages(network: EfficientNetLite0, stages: tuple[str, ...]) -> None:
    with pytest.raises(PolymodalError, match="stride16"):
        EfficientNetEncoder(network, stages)


def test_encoder_refuses_an_empty_grid(network: EfficientNetLite0) -> None:
    with pytest.raises(PolymodalError, match="pool is 0"):
        EfficientNetEncoder(network, pool=0)


def test_normalisation_maps_the_byte_range_onto_the_trained_range() -> None:
    for mean, std in zip(PIXEL_MEAN, PIXEL_STD, strict=True):
        assert (0.0 - mean) / std == pytest.approx(-127 / 128)
        assert (1.0 - mean) / std == pytest.approx(1.0)
