"""The Whisper encoder against `transformers`: full windows, stacking, what loading refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from polymodal.errors import CheckpointError, ConfigError
from polymodal.media_plan import AudioWindow
from polymodal.modeling.encoders.audio import AudioEncoder, WhisperAudioEncoder, audio_window, build_audio_encoder
from polymodal.modeling.encoders.vision import fingerprint

SMALL: dict[str, Any] = {
    "d_model": 24, "encoder_layers": 3, "encoder_attention_heads": 3, "encoder_ffn_dim": 48, "decoder_layers": 1,
    "decoder_attention_heads": 3, "decoder_ffn_dim": 48, "vocab_size": 20, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module", params=[80, 128])
def whisper(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(request.param)
    folder = tmp_path_factory.mktemp("whisper")
    config = transformers.WhisperConfig(**SMALL, num_mel_bins=request.param)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_full_windows_equal_transformers(whisper: Path, attention: str) -> None:
    stock = transformers.WhisperModel.from_pretrained(whisper, attn_implementation=attention).encoder.eval()
    encoder = build_audio_encoder("whisper", whisper)
    features = torch.randn(2, encoder.mel_bins, 3000)
    wanted = stock(features).last_hidden_state
    for found in (
        encoder(features),
        encoder(features, torch.tensor([3000, 3000])),
        WhisperAudioEncoder(stock)(features),
    ):
        assert found.shape == (2, 1500, 24)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_is_not_encoded_as_sound(whisper: Path) -> None:
    encoder = build_audio_encoder("whisper", whisper)
    features, frames = torch.randn(2, encoder.mel_bins, 3000), torch.tensor([3000, 501])
    found = encoder(features, frames)
    features[1, :, 501:] = 100.0
    assert torch.equal(encoder(features, frames), found)
    torch.testing.assert_close(found[1, :251], encoder(features[1:, :, :501])[0], atol=1e-5, rtol=0)
    assert not found[1, 251:].any()
    # Stock Whisper does encode it.
    assert (encoder(features)[1, :251] - found[1, :251]).abs().max() > 0.01


@torch.no_grad()
def test_frames_in_a_row_are_stacked(whisper: Path) -> None:
    features = torch.randn(1, json.loads((whisper / "config.json").read_text())["num_mel_bins"], 22)
    plain = build_audio_encoder("whisper", whisper)(features)[0]  # [11, E]
    encoder = build_audio_encoder("whisper", whisper, stack=4)
    found = encoder(features)[0]
    assert found.shape == (3, 4 * 24) and encoder.embed_dim == 96
    assert [encoder.output_tokens(frames) for frames in (1, 8, 9, 22, 3000)] == [1, 1, 2, 3, 375]
    assert torch.equal(found.reshape(12, 24)[:11], plain) and not found.reshape(12, 24)[11].any()


def test_it_trains(whisper: Path) -> None:
    encoder: Any = build_audio_encoder("whisper", whisper)
    encoder.train()
    encoder(torch.randn(2, encoder.mel_bins, 50), torch.tensor([50, 9])).square().sum().backward()
    lacking = [name for name, p in encoder.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []


def changed(folder: Path, source: Path, **config: Any) -> dict[str, torch.Tensor]:
    folder.mkdir()
    settings = json.loads((source / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return load_file(source / "model.safetensors")


def test_weights_are_checked(whisper: Path, tmp_path: Path) -> None:
    weights = changed(tmp_path / "lacking", whisper)
    del weights["model.encoder.layers.1.fc1.weight"]
    save_file(weights, tmp_path / "lacking" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.fc1\.weight"):
        build_audio_encoder("whisper", tmp_path / "lacking")
    save_file(changed(tmp_path / "more", whisper, encoder_layers=2), tmp_path / "more" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.2\."):
        build_audio_encoder("whisper", tmp_path / "more")
    weights = changed(tmp_path / "nan", whisper)
    weights["model.encoder.conv1.bias"][0] = float("nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"conv1\.bias"):
        build_audio_encoder("whisper", tmp_path / "nan")
    save_file(changed(tmp_path / "huge", whisper, d_model=2**20 * 3), tmp_path / "huge" / "model.safetensors")
    with pytest.raises(CheckpointError, match="d_model 3145728 must be"):
        build_audio_encoder("whisper", tmp_path / "huge")


def test_what_is_no_whisper_is_refused(whisper: Path, tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8, patch_size=4
        )
    ).save_pretrained(tmp_path / "clip")
    with pytest.raises(ConfigError, match="model_type 'clip_vision_model', not 'whisper'"):
        build_audio_encoder("whisper", tmp_path / "clip")
    with pytest.raises(ConfigError, match="no such folder, and not a hub id"):
        build_audio_encoder("whisper", tmp_path / "none")
    with pytest.raises(ConfigError, match="unknown audio encoder type 'wisper'; did you mean 'whisper'"):
        build_audio_encoder("wisper", whisper)
    with pytest.raises(ConfigError, match="stack is 0; it must be from 1 to 1500"):
        build_audio_encoder("whisper", whisper, stack=0)


@pytest.mark.parametrize(
    ("shape", "frames"),
    [((1, 8, 40), None), ((1, 0, 3001), None), ((1, 0, 0), None), ((2, 0, 40), [40, 41]), ((2, 0, 9), [9, 0])],
)
def test_features_that_do_not_fit(whisper: Path, shape: tuple[int, int, int], frames: list[int] | None) -> None:
    encoder: AudioEncoder = build_audio_encoder("whisper", whisper)
    features = torch.zeros(shape[0], shape[1] or encoder.mel_bins, shape[2])
    with pytest.raises(ConfigError, match=r"takes|frames must be"):
        encoder(features, None if frames is None else torch.tensor(frames))


@torch.no_grad()
def test_a_tower_whose_weights_are_known_is_opened_at_the_first_sound(whisper: Path, tmp_path: Path) -> None:
    plain: Any = build_audio_encoder("whisper", whisper, stack=2)
    later: Any = build_audio_encoder("whisper", whisper, stack=2, known=fingerprint(plain))
    sizes = ("embed_dim", "mel_bins", "max_frames", "frames_per_token")
    assert [getattr(later, name) for name in sizes] == [getattr(plain, name) for name in sizes]
    assert not list(later.parameters()) and later.output_tokens(9) == plain.output_tokens(9) == 3
    features = torch.randn(1, plain.mel_bins, 90)
    assert torch.equal(later(features), plain(features)) and torch.equal(later(features), plain(features))
    assert not list(later.parameters())  # what tells models apart is not changed by a sound
    assert audio_window("whisper", whisper, stack=2) == AudioWindow(plain.mel_bins, 3000, 4)
    other: Any = build_audio_encoder("whisper", whisper, known="00" * 8)
    with pytest.raises(CheckpointError, match=r"behind another audio tower than '.*whisper.*' is now"):
        other(features)
    with pytest.raises(CheckpointError, match="the audio tower was not read"):
        other.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
