"""Log-mel spectrograms as Whisper takes them (arXiv:2212.04356): samples to features [N, F, L] and their true lengths.

    found = audio_features(sound.samples)       # 30-second windows of 3000 frames, 10 ms each
    found.features, found.frames                # float32 [N, 80, 3000] and int64 [N]: frames that are sound

The numbers are those of the `WhisperFeatureExtractor` of transformers on each window. Differences: what is longer than
a window becomes several windows where the reference cuts it off, and how many frames are sound comes along, so that an
encoder can leave out the rest.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from polymodal.errors import ConfigError, MediaError

N_FFT = 400
_FLOOR = 1e-10
_RANGE = 8.0  # log10 units under a window's loudest value that are kept


@dataclass(frozen=True)
class AudioFeatures:
    """The windows of a sound."""

    features: Tensor  # float32 [N, F, L]
    frames: Tensor  # int64 [N]: how many of a window's first frames have sound in them; the others pad


def audio_features(
    samples: np.ndarray,  # float [S], at `sample_rate`
    *,
    mel_bins: int = 80,
    sample_rate: int = 16_000,
    hop: int = 160,  # Samples between frames
    window: float | None = 30.0,  # Seconds; None for one window, as long as the sound
    pad: bool = True,  # Whether a sound shorter than a window is filled up with zeros
) -> AudioFeatures:
    """Turn a sound into windows of log-mel features; the last window is filled up where there are others."""
    if not (mel_bins >= 1 and hop >= 1 and sample_rate >= 1 and (window is None or window * sample_rate >= N_FFT)):
        raise ConfigError(
            f"mel_bins {mel_bins}, hop {hop}, sample_rate {sample_rate}, window {window}: they must be positive, and a "
            f"window hold {N_FFT} samples"
        )
    whole: Any = np.asarray(samples)
    if whole.ndim != 1 or not whole.size or whole.dtype.kind != "f":
        raise MediaError(
            f"a sound is a row of floats, got {whole.dtype} of shape {whole.shape}; `open_audio` gives one"
        )
    waves = torch.from_numpy(np.ascontiguousarray(whole, np.float32))
    if not bool(waves.isfinite().all()):
        raise MediaError("a sound has samples that are no numbers (NaN or infinite); decode it again")
    size = len(waves) if window is None else round(window * sample_rate)
    count = -(-len(waves) // size)
    lengths = torch.tensor([size] * (count - 1) + [len(waves) - size * (count - 1)])
    # Fewer samples than a transform takes have no spectrum.
    full = size if (pad or count > 1) and window is not None else max(len(waves), N_FFT)
    waves = F.pad(waves, (0, count * full - len(waves))).view(count, full)
    features = log_mel(waves, mel_filters(mel_bins, sample_rate), hop)
    return AudioFeatures(features, (-(-lengths // hop)).clamp(max=features.shape[-1]))


def log_mel(waves: Tensor, filters: Tensor, hop: int) -> Tensor:  # [N, S], [F, bins] -> [N, F, S // hop]
    """The spectrogram itself: 25-ms Hann windows, power, mel bands, log10, the range of each item squeezed to 2."""
    shape = torch.hann_window(N_FFT)
    spectra = (torch.stft(one, N_FFT, hop, window=shape, return_complex=True) for one in waves)  # not all at once
    # Whisper drops the last frame, which is centred on the end.
    bands = torch.stack([filters @ (one[:, :-1].abs() ** 2).contiguous() for one in spectra])
    logs = bands.clamp(min=_FLOOR).log10()
    logs = torch.maximum(logs, logs.amax(dim=(1, 2), keepdim=True) - _RANGE)
    return (logs + 4) / 4


@lru_cache(maxsize=8)
def mel_filters(mel_bins: int, sample_rate: int) -> Tensor:  # -> [F, 1 + N_FFT / 2]
    """Slaney's mel bands up to 8 kHz, or what the rate allows; transformers has them."""
    from transformers.audio_utils import mel_filter_bank

    highest = min(8000.0, sample_rate / 2)
    bank = mel_filter_bank(1 + N_FFT // 2, mel_bins, 0.0, highest, sample_rate, norm="slaney", mel_scale="slaney")
    return torch.from_numpy(bank.T.copy()).float()
