"""Vision encoders against `transformers`: hidden states, class tokens, tiles, loading."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from polymodal.config import TowerConfig, VisionConfig
from polymodal.errors import CheckpointError, ConfigError, PolymodalError
from polymodal.media_plan import Size
from polymodal.modeling.encoders.efficientnet import EfficientNetEncoder, EfficientNetLite0, save_efficientnet_lite0
from polymodal.modeling.encoders.hf_vision import FAMILIES, HFVisionEncoder
from polymodal.modeling.encoders.pixel_norm import PixelNorm
from polymodal.modeling.encoders.vision import FusedEncoder, build_vision_encoder, fingerprint
from polymodal.training.distributed import unreached
from polymodal.training.sft.class_prototypes import class_head_of
from polymodal.utils.modules import blocks

WIDTHS = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
VIT = {**WIDTHS, "intermediate_size": 64, "image_size": 28, "patch_size": 7}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64}
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "clip": transformers.CLIPVisionConfig(**VIT),
    "siglip": transformers.SiglipVisionConfig(**VIT),
    "siglip2": transformers.Siglip2VisionConfig(**WIDTHS, intermediate_size=64, num_patches=16, patch_size=7),
    "dinov2": transformers.Dinov2Config(**WIDTHS, mlp_ratio=2, image_size=28, patch_size=7),
    "dinov2_with_registers": transformers.Dinov2WithRegistersConfig(
        **WIDTHS, mlp_ratio=2, image_size=28, patch_size=7, num_register_tokens=3
    ),
    "eva_clip": transformers.Blip2VisionConfig(**VIT),
}
PREFIX = {"clip": 1, "siglip": 0, "siglip2": 0, "dinov2": 1, "dinov2_with_registers": 4, "eva_clip": 1}


def tiny(family: str, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    config = type(CONFIGS[family]).from_dict({**CONFIGS[family].to_dict(), "_attn_implementation": attention})
    config._attn_implementation = attention
    model = getattr(transformers, FAMILIES[family].model_class)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # fresh class tokens, registers and biases are zero: they would hide
            parameter.normal_(std=0.3)
    return model


def pixels(height: int = 28, width: int = 28) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def reference(family: str, model: Any, tiles: Tensor, interpolate: bool = False) -> tuple[Tensor, ...]:
    """All hidden states, by the model's own forward."""
    if family == "siglip2":
        from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches

        rows, columns = tiles.shape[2] // 7, tiles.shape[3] // 7
        patches = torch.from_numpy(np.stack([convert_image_to_patches(tile.numpy(), 7) for tile in tiles]))
        mask = torch.ones(len(tiles), rows * columns, dtype=torch.long)
        shapes = torch.tensor([[rows, columns]] * len(tiles))
        return model(patches, mask, shapes, output_hidden_states=True).hidden_states
    extra = {"interpolate_pos_encoding": interpolate} if not family.startswith("dinov2") else {}
    return model(tiles, output_hidden_states=True, **extra).hidden_states


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_every_layer_equals_transformers(family: str, attention: str) -> None:
    model = tiny(family, attention)
    states = reference(family, model, pixels())
    assert len(states) == 4
    for layer in range(-4, 4):
        encoder = HFVisionEncoder(model, select_layer=layer)
        torch.testing.assert_close(encoder(pixels()), states[layer][:, PREFIX[family] :], rtol=1e-5, atol=1e-5)
        assert (encoder.grid, encoder.tile, encoder.embed_dim) == (Size(4, 4), Size(28, 28), 32)
    assert not torch.allclose(states[-1], states[-2], atol=0.1)


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_several_layers_are_concatenated_in_the_order_given(family: str) -> None:
    model = tiny(family)
    states = reference(family, model, pixels())
    encoder = HFVisionEncoder(model, select_layer=(-2, 0, 3))
    wanted = torch.cat([states[index][:, PREFIX[family] :] for index in (-2, 0, 3)], dim=-1)
    assert encoder.embed_dim == 96
    torch.testing.assert_close(encoder(pixels()), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", [name for name in CONFIGS if PREFIX[name]])
@torch.no_grad()
def test_class_token(family: str) -> None:
    model = tiny(family)
    state = reference(family, model, pixels())[-2]
    kept, alone = (HFVisionEncoder(model, select_feature=feature) for feature in ("cls_patch", "cls"))
    assert (kept.grid, alone.grid) == (Size(1, 17), Size(1, 1))
    without_registers = torch.cat([state[:, :1], state[:, PREFIX[family] :]], dim=1)
    torch.testing.assert_close(kept(pixels()), without_registers, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone(pixels()), state[:, :1], rtol=1e-5, atol=1e-5)


class Untouchable(nn.Module):
    def forward(self, *args: Any) -> Tensor:
        raise AssertionError("a layer that nobody needs was run")


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_layers_above_the_selected_one_are_not_run(family: str) -> None:
    model = tiny(family)
    encoder = HFVisionEncoder(model, select_layer=-3)
    before = encoder(pixels())
    layers = getattr(model.encoder, FAMILIES[family].layers)
    layers[1], layers[2] = Untouchable(), Untouchable()
    torch.testing.assert_close(encoder(pixels()), before)
    with pytest.raises(AssertionError, match="nobody needs"):
        HFVisionEncoder(model, select_layer=-2)(pixels())


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_other_tiles_interpolate_the_positions(family: str) -> None:
    model = tiny(family)
    encoder = HFVisionEncoder(model, tile=Size(21, 42))
    assert (encoder.grid, encoder.tile) == (Size(3, 6), Size(21, 42))
    state = reference(family, model, pixels(21, 42), interpolate=True)[-2][:, PREFIX[family] :]
    torch.testing.assert_close(encoder(pixels(21, 42)), state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strategy, feature", [("default", "patch"), ("full", "cls_patch")])
@pytest.mark.parametrize("layer", [-2, -1, 0, [-1, 1]])
@torch.no_grad()
def test_selection_is_llavas(layer: int | list[int], strategy: str, feature: Any) -> None:
    model = tiny("clip")
    llama = transformers.LlamaConfig(**TEXT, num_key_value_heads=4)
    config = transformers.LlavaConfig(vision_config=CONFIGS["clip"], text_config=llama, vision_feature_layer=layer)
    llava = transformers.LlavaModel(config).eval()
    llava.vision_tower.load_state_dict(model.state_dict())
    llava.multi_modal_projector = nn.Identity()
    theirs = llava.get_image_features(
        pixels(), vision_feature_layer=layer, vision_feature_select_strategy=strategy, output_hidden_states=True
    ).pooler_output
    ours = HFVisionEncoder(model, tuple(layer) if isinstance(layer, list) else layer, feature)
    torch.testing.assert_close(ours(pixels()), torch.stack(list(theirs)), rtol=1e-5, atol=1e-5)


def test_pixels_follow_the_weights_dtype() -> None:
    encoder = HFVisionEncoder(tiny("clip").to(torch.bfloat16))
    assert encoder(pixels()).dtype == torch.bfloat16


def test_gradients_reach_the_tower() -> None:
    model = tiny("clip")
    HFVisionEncoder(model)(pixels()).sum().backward()
    assert model.embeddings.patch_embedding.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.encoder.layers[2].parameters())


@pytest.mark.parametrize("feature", ["cls", "cls_patch"])
@pytest.mark.parametrize("family", ["siglip", "siglip2"])
def test_siglip_has_no_class_token(family: str, feature: Any) -> None:
    with pytest.raises(ConfigError, match=f"{feature}.*{family} has no class token"):
        HFVisionEncoder(tiny(family), select_feature=feature)


@pytest.mark.parametrize("layer", [4, -5, (0, 9)])
def test_a_layer_that_does_not_exist(layer: Any) -> None:
    with pytest.raises(ConfigError, match=r"mm_vision_select_layer -?[0-9]: the encoder has 3 layers, so -4 to 3"):
        HFVisionEncoder(tiny("clip"), select_layer=layer)


def test_impossible_requests_are_refused() -> None:
    model = tiny("clip")
    with pytest.raises(ConfigError, match="empty"):
        HFVisionEncoder(model, select_layer=())
    with pytest.raises(ConfigError, match="smaller than a patch of clip"):
        HFVisionEncoder(model, tile=Size(6, 28))
    with pytest.raises(ConfigError, match=r"takes tiles of 28x28 .* was given 28x35"):
        HFVisionEncoder(model)(pixels(28, 35))
    with pytest.raises(ConfigError, match="unknown vision model 'vit'"):
        HFVisionEncoder(transformers.ViTModel(transformers.ViTConfig(**VIT)))
    square = {**CONFIGS["dinov2"].to_dict(), "image_size": [14, 56]}
    with pytest.raises(ConfigError, match="image_size 14x56"):
        HFVisionEncoder(transformers.Dinov2Model(transformers.Dinov2Config.from_dict(square)))


def whole_model(family: str) -> Any:
    """The published form of some families: the vision tower beside a text tower."""
    vision = CONFIGS[family]
    if family == "eva_clip":
        qformer = {**TEXT, "encoder_hidden_size": 32}
        language = transformers.OPTConfig(
            vocab_size=64,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            ffn_dim=32,
            word_embed_proj_dim=32,
        )
        config = transformers.Blip2Config(
            vision_config=vision.to_dict(), qformer_config=qformer, text_config=language.to_dict(), num_query_tokens=2
        )
        return transformers.Blip2ForConditionalGeneration(config)
    name = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[family]
    config = getattr(transformers, f"{name}Config")(vision_config=vision.to_dict(), text_config=TEXT)
    return getattr(transformers, f"{name}Model")(config)


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2", "eva_clip"])
@torch.no_grad()
def test_the_vision_part_of_a_whole_model_is_read(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = whole_model(family).eval()
    whole.save_pretrained(tmp_path)
    encoder = build_vision_encoder(VisionConfig(vision_tower=str(tmp_path), type=family))
    vision = getattr(whole, "vision_model", None) or whole.model.vision_model
    torch.testing.assert_close(encoder(pixels()), HFVisionEncoder(vision)(pixels()))


def test_bundled_lies_in_the_models_folder(tmp_path: Path) -> None:
    tiny("siglip").save_pretrained(tmp_path / "vision")
    config = VisionConfig(vision_tower="bundled", type="siglip", mm_vision_select_layer=-1)
    encoder = build_vision_encoder(config, tmp_path, tile=Size(14, 28))
    torch.testing.assert_close(
        encoder(pixels(14, 28)), HFVisionEncoder(tiny("siglip"), -1, tile=Size(14, 28))(pixels(14, 28))
    )
    with pytest.raises(ConfigError, match="'bundled' needs the model's folder"):
        build_vision_encoder(config)
    with pytest.raises(CheckpointError, match="vision is missing"):
        build_vision_encoder(config, tmp_path / "elsewhere")


def test_a_folder_of_another_family_is_named(tmp_path: Path) -> None:
    tiny("siglip").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"'siglip_vision_model' but vision.type is 'clip'; set type to 'siglip'"):
        build_vision_encoder(VisionConfig(vision_tower=str(tmp_path), type="clip"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ConfigError, match=r"'llama' but vision.type is 'clip'; it takes 'clip_vision_model' or 'clip'"):
        build_vision_encoder(VisionConfig(vision_tower=str(tmp_path), type="clip"))


def test_missing_weights_are_not_left_random(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny("siglip").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    unused = {key: value for key, value in weights.items() if "head." not in key and "post_layernorm" not in key}
    assert len(unused) < len(weights)
    save_file(unused, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = VisionConfig(vision_tower=str(tmp_path), type="siglip")
    build_vision_encoder(config)
    del unused[next(key for key in unused if key.endswith("layers.1.mlp.fc1.bias"))]
    save_file(unused, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 missing: .*layers\.1\.mlp\.fc1\.bias"):
        build_vision_encoder(config)


def test_pickle_and_broken_folders_are_refused(tmp_path: Path) -> None:
    model = tiny("clip")
    model.save_pretrained(tmp_path)
    config = VisionConfig(vision_tower=str(tmp_path), type="clip")
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: weights in a pickle"):
        build_vision_encoder(config)
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged, or no safetensors file"):
        build_vision_encoder(config)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        build_vision_encoder(config)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json that names a model_type"):
        build_vision_encoder(config)


def test_names_that_lead_nowhere() -> None:
    with pytest.raises(ConfigError, match="no such folder, and not a hub id"):
        build_vision_encoder(VisionConfig(vision_tower="./no/such/folder", type="clip"))
    with pytest.raises(ConfigError, match="unknown vision encoder type 'cilp'; did you mean 'clip'"):
        build_vision_encoder(VisionConfig(vision_tower="a/b", type="cilp"))
    with pytest.raises(ConfigError, match="belong to efficientnet_lite0, not to clip"):
        build_vision_encoder(VisionConfig(vision_tower="a/b", type="clip", pool=4))


def test_a_hub_id_is_asked_for_at_its_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, bool]] = []

    def from_pretrained(source: str, revision: str, use_safetensors: bool, **rest: Any) -> Any:
        asked.append((source, revision, use_safetensors))
        nothing = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), ())
        return (tiny("clip"), nothing) if "output_loading_info" in rest else tiny("clip")

    def get_config_dict(source: str, revision: str) -> tuple[dict[str, Any], dict[str, Any]]:
        asked.append((source, revision, True))
        return {"model_type": "clip"}, {}

    monkeypatch.setattr(transformers.CLIPVisionModel, "from_pretrained", from_pretrained)
    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", get_config_dict)
    encoder = build_vision_encoder(VisionConfig(vision_tower="owner/clip-14", type="clip", revision="abc123"))
    assert set(asked) == {("owner/clip-14", "abc123", True)}
    assert encoder.grid == Size(4, 4)


def test_efficientnet_from_file_folder_and_bundle(tmp_path: Path) -> None:
    torch.manual_seed(0)
    (tmp_path / "vision").mkdir()
    weights = tmp_path / "vision" / "efficientnet_lite0.safetensors"
    save_efficientnet_lite0(EfficientNetLite0().eval(), weights)
    image = pixels(64, 64)
    towers = [str(weights), str(weights.parent), "bundled"]
    features = []
    for tower in towers:
        config = VisionConfig(vision_tower=tower, type="efficientnet_lite0", pool=3, stages=("stride8", "stride16"))
        encoder = build_vision_encoder(config, tmp_path, tile=Size(64, 64))
        assert (encoder.grid, encoder.embed_dim, encoder.tile) == (Size(3, 3), 152, Size(64, 64))
        features.append(encoder(image.double()))
    assert features[0].shape == (2, 9, 152) and torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])
    default = build_vision_encoder(VisionConfig(vision_tower=str(weights), type="efficientnet_lite0"))
    assert default.tile == Size(224, 224)


def test_efficientnet_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no layers or class token to select"):
        build_vision_encoder(VisionConfig(vision_tower="x", type="efficientnet_lite0", mm_vision_select_layer=-1))
    with pytest.raises(ConfigError, match="no such file or folder"):
        build_vision_encoder(VisionConfig(vision_tower="x/y", type="efficientnet_lite0"))
    with pytest.raises(PolymodalError, match=r"efficientnet_lite0\.safetensors"):
        build_vision_encoder(VisionConfig(vision_tower=str(tmp_path), type="efficientnet_lite0"))


def test_the_layer_before_the_last_is_the_default_everywhere() -> None:
    assert VisionConfig(vision_tower="x", type="clip").mm_vision_select_layer == -2
    torch.manual_seed(0)
    model = tiny("clip").eval()
    pixels = torch.randn(1, 3, 28, 28)
    hidden = model(pixels, output_hidden_states=True).hidden_states
    found = HFVisionEncoder(model)(pixels)
    assert torch.allclose(found, hidden[-2][:, 1:], atol=1e-5) and not torch.allclose(
        found, hidden[-1][:, 1:], atol=1e-3
    )


HALF, CLIP_NORM = ((0.5,) * 3, (0.5,) * 3), ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@torch.no_grad()
def test_towers_side_by_side_are_each_tower_on_pixels_of_its_own_norm(tmp_path: Path) -> None:
    families = ("siglip", "dinov2_with_registers", "clip")
    for family in families:
        tiny(family).save_pretrained(tmp_path / family)
    config = VisionConfig(
        vision_tower=str(tmp_path / "siglip"), type="siglip",
        fused=(
            {"vision_tower": str(tmp_path / "dinov2_with_registers"), "type": "dinov2_with_registers",
             "mm_vision_select_layer": -1, "image_mean": IMAGENET[0], "image_std": IMAGENET[1]},
            {"vision_tower": str(tmp_path / "clip"), "type": "clip", "mm_vision_select_layer": (1, -2)},
        ),
    )  # fmt: skip
    encoder = build_vision_encoder(config, norm=HALF)
    assert (encoder.embed_dim, encoder.grid, encoder.tile) == (32 + 32 + 64, Size(4, 4), Size(28, 28))
    tiles = torch.randint(0, 256, (3, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    own = [build_vision_encoder(tower.model_copy(update={"fused": ()})) for tower in config.towers]
    norms = [PixelNorm(*norm) for norm in (HALF, IMAGENET, HALF)]
    expected = torch.cat([tower(norm(tiles)) for tower, norm in zip(own, norms, strict=True)], dim=-1)
    torch.testing.assert_close(encoder(norms[0](tiles)), expected, atol=1e-5, rtol=1e-5)
    encoder.save(tmp_path / "model/vision")
    whole = config.at(["bundled"] * 3)
    torch.testing.assert_close(build_vision_encoder(whole, tmp_path / "model", norm=HALF)(norms[0](tiles)), expected)
    with pytest.raises(CheckpointError, match="model/vision_3 is missing"):
        shutil.rmtree(tmp_path / "model/vision_3")
        build_vision_encoder(whole, tmp_path / "model", norm=HALF)
    # Layers are found in every tower (to be checkpointed, compiled, sharded), and those that nobody reads are known.
    assert len(blocks(encoder)) == 3 * 3  # type: ignore[arg-type]
    unread = unreached(SimpleNamespace(vision_encoder=encoder.requires_grad_(True)))  # type: ignore[arg-type, attr-defined]
    assert any(name.startswith("towers.0.model.encoder.layers.2.") for name in unread)
    assert not any(name.startswith("towers.1.model.encoder.") for name in unread)
    # All see the same tile, and the weights of every one have a say in what is known of the whole.
    assert build_vision_encoder(config, norm=HALF, tile=Size(21, 35))(pixels(21, 35)).shape == (2, 15, 128)
    before = fingerprint(encoder)
    next(encoder.towers["2"].model.encoder.parameters()).add_(1.0)  # type: ignore[attr-defined]
    assert fingerprint(encoder) != before


@torch.no_grad()
def test_a_tower_of_another_grid_is_resized_to_the_firsts() -> None:
    fine, coarse = HFVisionEncoder(tiny("siglip")), EfficientNetEncoder(pool=1).eval()
    coarse.tile = fine.tile
    for towers in ((fine, coarse), (coarse, fine)):
        encoder, tiles = FusedEncoder(towers), pixels()
        found, width = encoder(tiles), towers[0].embed_dim
        torch.testing.assert_close(found[..., :width], towers[0](tiles))
        second = towers[1](tiles).transpose(1, 2).unflatten(2, (towers[1].grid.height, -1))
        grid = (encoder.grid.height, encoder.grid.width)
        resized = nn.functional.interpolate(second, grid, mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
        torch.testing.assert_close(found[..., width:], resized)


@torch.no_grad()
def test_the_class_head_of_a_tower_beside_others_keeps_its_meaning() -> None:
    network = EfficientNetLite0().eval()
    torch.nn.init.normal_(network.classifier.weight)
    alone, other = EfficientNetEncoder(network, ("stride16", "head"), pool=4), HFVisionEncoder(tiny("clip"))
    alone.tile, tiles = other.tile, pixels()
    encoder = FusedEncoder((other, alone))
    head = class_head_of(SimpleNamespace(vision_encoder=encoder))  # type: ignore[arg-type]
    assert head is not None and FusedEncoder((other, other)).class_head() is None
    scores = encoder(tiles)[..., head.channels].mean(dim=1) @ head.weight.T + head.bias
    torch.testing.assert_close(scores, network.logits(network(tiles)["head"]), atol=1e-4, rtol=1e-4)


def test_what_cannot_stand_side_by_side_is_one_line(tmp_path: Path) -> None:
    for family in ("siglip", "clip"):
        tiny(family).save_pretrained(tmp_path / family)

    def fused(**settings: Any) -> Any:
        further = {"vision_tower": str(tmp_path / "clip"), "type": "clip", **settings}
        return build_vision_encoder(
            VisionConfig(vision_tower=str(tmp_path / "siglip"), type="siglip", fused=(further,))
        )

    with pytest.raises(ConfigError, match="tower 2 of 2: mm_vision_select_feature 'cls_patch' keeps a class token"):
        fused(mm_vision_select_feature="cls_patch")
    with pytest.raises(ConfigError, match="how pixels are normalised must be known; give `norm`"):
        fused(image_mean=CLIP_NORM[0], image_std=CLIP_NORM[1])
    with pytest.raises(ConfigError, match="image_mean and image_std come together"):
        fused(image_mean=CLIP_NORM[0])
    with pytest.raises(ConfigError, match="unknown key 'fused'"):
        TowerConfig(vision_tower="a/b", type="clip", fused=())  # type: ignore[call-arg]
    rows, line = EfficientNetEncoder(pool=3), EfficientNetEncoder(pool=3)
    line.grid = Size(1, 7)
    with pytest.raises(ConfigError, match="tower 2 of 2: 7 features and 9 of the first, not all in rows and columns"):
        FusedEncoder((rows, line))
    with pytest.raises(ConfigError, match="tower 2 of 2: takes tiles of 14x14 pixels and the first 28x28"):
        FusedEncoder((HFVisionEncoder(tiny("siglip")), HFVisionEncoder(tiny("clip"), tile=Size(14, 14))))
