"""Log-mel features equal those of transformers, and say how much of them is sound."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import WhisperFeatureExtractor

from polymodal.errors import ConfigError, MediaError
from polymodal.processing.audio_features import audio_features

LENGTHS = [201, 400, 1600, 12_345, 16_000, 100_000, 480_000 - 1, 480_000]


def sound(length: int, seed: int = 0) -> np.ndarray:
    """Noise and a tone that swell and fade, with a silent stretch."""
    chance, time = np.random.default_rng(seed), np.arange(length) / 16_000
    wave = chance.standard_normal(length) * 0.1 + np.sin(2 * np.pi * chance.uniform(80, 4000) * time) * 0.4
    wave *= np.abs(np.sin(time * 2))
    wave[length // 3 : length // 2] = 0
    return wave.astype(np.float32)


def reference(wave: np.ndarray, mel_bins: int, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    extractor = WhisperFeatureExtractor(feature_size=mel_bins)
    found = extractor(wave, sampling_rate=16_000, return_tensors="pt", return_attention_mask=True, **options)
    return found["input_features"], found["attention_mask"].sum(-1)


@pytest.mark.parametrize("mel_bins", [80, 128])
@pytest.mark.parametrize("length", [1, *LENGTHS])
def test_a_padded_window_equals_transformers(mel_bins: int, length: int) -> None:
    wave = sound(length, seed=length)
    found = audio_features(wave, mel_bins=mel_bins)
    features, frames = reference(wave, mel_bins)
    assert found.features.shape == (1, mel_bins, 3000) and found.features.dtype == torch.float32
    torch.testing.assert_close(found.features, features, atol=1e-5, rtol=0)
    assert found.frames.tolist() == frames.tolist() == [-(-length // 160)]


@pytest.mark.parametrize("mel_bins", [80, 128])
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_an_unpadded_sound_equals_transformers(mel_bins: int, length: int) -> None:
    wave = sound(length, seed=length)
    found = audio_features(wave, mel_bins=mel_bins, pad=False)
    features, frames = reference(wave, mel_bins, padding=False)
    torch.testing.assert_close(found.features, features, atol=1e-5, rtol=0)
    assert found.frames.tolist() == frames.tolist() == [length // 160]


@pytest.mark.parametrize("pad", [True, False])
def test_a_long_sound_is_windows_of_its_own(pad: bool) -> None:
    wave = sound(2 * 480_000 + 40_001)
    found = audio_features(wave, pad=pad)
    assert found.frames.tolist() == [3000, 3000, 251]
    for index in range(3):
        part = wave[index * 480_000 : (index + 1) * 480_000]
        torch.testing.assert_close(found.features[index : index + 1], reference(part, 80)[0], atol=1e-5, rtol=0)


def test_one_window_of_any_length_equals_transformers() -> None:
    wave = sound(700_000)
    found = audio_features(wave, window=None)
    features, _ = reference(wave, 80, padding=False, truncation=False)
    torch.testing.assert_close(found.features, features, atol=1e-5, rtol=0)
    assert found.frames.tolist() == [4375]


def test_a_sound_shorter_than_a_transform_is_filled_up() -> None:
    assert audio_features(sound(7), pad=False).features.shape == (1, 80, 2)
    assert audio_features(sound(7), pad=False).frames.tolist() == [1]


def test_shorter_windows_and_silence() -> None:
    found = audio_features(np.zeros(20_000, np.float32), window=1.0)
    assert found.features.shape == (2, 80, 100) and found.frames.tolist() == [100, 25]
    assert bool(torch.isfinite(found.features).all())


@pytest.mark.parametrize(
    "wave", [np.zeros(0, np.float32), np.zeros((2, 9), np.float32), np.zeros(9, np.int16), np.array([0, np.nan])]
)
def test_what_is_no_sound_is_refused(wave: np.ndarray) -> None:
    with pytest.raises(MediaError, match="a sound"):
        audio_features(wave)


@pytest.mark.parametrize("options", [{"mel_bins": 0}, {"hop": 0}, {"window": 0.01}, {"sample_rate": 0}])
def test_arguments_that_make_no_sense(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        audio_features(sound(1000), **options)  # type: ignore[arg-type]
