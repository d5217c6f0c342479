"""Audio encoders: log-mel features [N, F, L] to features [N, P, E]; every family in one table.

`AUDIO_ENCODERS` names one: "whisper", the encoder of Whisper (arXiv:2212.04356) from any folder or hub id of
transformers that holds it, alone or with its decoder, or from an installed package ("whisper_base"). Two convolutions
halve the frames, transformer layers follow; then `stack` frames in a row are laid side by side as one token, as
Ultravox does: [N, P, E] to [N, P / k, k E].

Differences from stock Whisper. There every sound is filled up with silence to 30 seconds, and the silence is encoded
as sound: each true frame attends to it. Here, with `frames` given, padding is left out: it is zero to the convolutions,
as what lies beyond a sound's end is, and hidden from attention, so what comes out of true frames depends neither on
what stands in the padding nor on how much of it there is; the tokens of padding are zeros. Any length up to 30 seconds
is taken. On full windows, and on any window of 30 seconds where `frames` is left out, the numbers are those of
transformers; a model that was trained on Whisper's padded features is run that way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from polymodal.errors import CheckpointError, ConfigError, unknown_name
from polymodal.media_plan import AudioWindow
from polymodal.modeling.ctranslate2 import PACKAGED, find_whisper
from polymodal.modeling.encoders.vision import check_fingerprint
from polymodal.modeling.pretrained import attention_of, config_json, load_checked, look_over
from polymodal.utils.files import home_path
from polymodal.utils.modules import ModuleLike
from polymodal.utils.safetensors_io import check_finite

if TYPE_CHECKING:  # whose module takes a second to load
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

STRIDE = 2
"""Frames of the spectrogram that become one, in the second convolution of every Whisper."""
MOST_POSITIONS = 2**26
"""Numbers in the table of positions; Whisper large has 1,920,000."""
USUAL = {"num_mel_bins": 80, "max_source_positions": 1500, "d_model": 384}
"""What a `config.json` may leave out."""


class AudioEncoder(ModuleLike, Protocol):
    """What an audio encoder offers.

    Attributes:
        embed_dim: E, the width of the features.
        mel_bins: F, the mel bands of the features it takes.
        max_frames: The most frames L it takes at once.
        frames_per_token: How many of them become one token.
    """

    embed_dim: int
    mel_bins: int
    max_frames: int
    frames_per_token: int

    def output_tokens(self, frames: int) -> int:
        """Count what comes out.

        Args:
            frames: True frames of a window.

        Returns:
            How many of its tokens have sound in them.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write the encoder into a folder that `build_audio_encoder` reads.

        Args:
            folder: Made where it is missing.
        """

    def __call__(self, features: Tensor, frames: Tensor | None = None) -> Tensor:
        """Encode [N, F, L], of which `frames` [N] are true (all by default), to [N, P, E]."""
        ...


class WhisperAudioEncoder(nn.Module):
    """The encoder of Whisper as an `AudioEncoder`."""

    def __init__(self, model: WhisperEncoder, stack: int = 1) -> None:
        super().__init__()
        self.model = model
        self.train(model.training)
        self.stack = stack
        assert model.conv1.stride[0] * model.conv2.stride[0] == STRIDE
        self.embed_dim, self.mel_bins, self.max_frames, self.frames_per_token = whisper_sizes(
            model.config.to_dict(), stack
        )

    def output_tokens(self, frames: int) -> int:
        """How many tokens have sound in them, of so many true frames."""
        return -(-frames // self.frames_per_token)

    def save(self, folder: Path) -> None:
        """Write the encoder as a standard Hugging Face folder."""
        self.model.save_pretrained(folder, save_original_format=False)  # under its own names, not the loaded file's

    def forward(
        self,
        features: Tensor,  # [N, F, L]
        frames: Tensor | None = None,  # int [N]: how many of the first frames are true; all where None
    ) -> Tensor:
        """Encode windows; tokens of padding come out as zeros."""
        from transformers.masking_utils import create_bidirectional_mask

        model: Any = self.model
        count, bins, length = features.shape
        if bins != self.mel_bins or not 1 <= length <= self.max_frames:
            raise ConfigError(
                f"the audio encoder takes {self.mel_bins} mel bands and 1 to {self.max_frames} frames, and was given "
                f"{bins} and {length}: make the features agree with it"
            )
        there = torch.ones((count, length), dtype=torch.bool, device=features.device)  # [N, L]
        if frames is not None:
            frames = frames.to(features.device)
            if frames.shape != (count,) or bool(((frames < 1) | (frames > length)).any()):
                raise ConfigError(f"frames must be {count} counts from 1 to {length}, got {frames.tolist()}")
            there = torch.arange(length, device=features.device) < frames[:, None]
        hidden = features.to(model.conv1.weight.dtype).where(there[:, None], 0)
        hidden = F.gelu(model.conv1(hidden)).where(there[:, None], 0)
        hidden = F.gelu(model.conv2(hidden)).transpose(1, 2)
        there = there[:, ::STRIDE]  # [N, P]
        hidden = hidden + model.embed_positions.weight[: hidden.shape[1]]
        hidden = F.dropout(hidden, model.dropout, self.training)
        mask = create_bidirectional_mask(model.config, hidden, None if frames is None or bool(there.all()) else there)
        for layer in model.layers:
            if not (self.training and model.layerdrop and float(torch.rand(())) < model.layerdrop):
                hidden = layer(hidden, mask)
        hidden = model.layer_norm(hidden).where(there[..., None], 0)
        hidden = F.pad(hidden, (0, 0, 0, -hidden.shape[1] % self.stack))
        return hidden.reshape(count, -1, self.embed_dim)


class DeferredAudioEncoder(nn.Module):
    """A tower that is opened when the first sound comes, for a model that only answers; its weights are known."""

    def __init__(self, sizes: tuple[int, int, int, int], open_tower: Callable[[], Any], name: str, known: str) -> None:
        super().__init__()
        self.embed_dim, self.mel_bins, self.max_frames, self.frames_per_token = sizes
        self._open, self.name, self.known = open_tower, name, known
        self._opened: list[AudioEncoder] = []  # no part of this module, whose state says which weights are meant
        self.key: Tensor
        self.register_buffer("key", torch.tensor([*bytes.fromhex(known)]))

    def output_tokens(self, frames: int) -> int:
        """How many tokens have sound in them, of so many true frames."""
        return -(-frames // self.frames_per_token)

    def save(self, folder: Path) -> None:
        """Refuse; what is opened for answers is not saved."""
        raise CheckpointError(f"{folder}: the audio tower was not read; save what was loaded without quantize")

    def forward(self, features: Tensor, frames: Tensor | None = None) -> Tensor:
        """Encode windows as the tower does."""
        if not self._opened:
            tower = self._open()
            check_fingerprint(tower, self.known, f"the model was trained behind another audio tower than {self.name!r}")
            self._opened.append(tower)
        return self._opened[0](features, frames)


def whisper_sizes(settings: Mapping[str, Any], stack: int) -> tuple[int, int, int, int]:
    """Width of the features, mel bands, most frames at once and frames a token, by a Whisper's `config.json`."""
    bins, positions, width = (settings.get(key, usual) for key, usual in USUAL.items())
    if not 1 <= stack <= positions:
        raise ConfigError(f"stack is {stack}; it must be from 1 to {positions} frames a token")
    return width * stack, bins, positions * STRIDE, STRIDE * stack


def check_positions(settings: Mapping[str, Any], where: str) -> None:
    """Refuse a table of positions that no Whisper has."""
    # transformers computes it from the configuration alone, before any file is looked at.
    table = [settings.get(key, usual) for key, usual in USUAL.items()]
    if not all(isinstance(side, int) and side >= 1 for side in table) or table[1] * table[2] > MOST_POSITIONS:
        raise CheckpointError(
            f"{where}: num_mel_bins {table[0]!r}, max_source_positions {table[1]!r} and d_model {table[2]!r} must be "
            f"whole numbers above 0, the product of the last two at most {MOST_POSITIONS:,}"
        )


def _whisper_settings(source: str, revision: str | None) -> tuple[str, dict[str, Any], int]:
    """Look a Whisper over: where it lies, its `config.json`, and how many parts it may have."""
    where = f"audio_tower {source!r}"
    path = find_whisper(source) if source in PACKAGED else home_path(source)
    if path.exists():
        source = str(path)
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ConfigError(f"{where}: no such folder, and not a hub id (owner/name)")
    most = look_over(source, where, revision=revision)
    settings = config_json(source, where, revision=revision)
    if (found := settings.get("model_type")) != "whisper":
        raise ConfigError(f"{where} has model_type {found!r}, not 'whisper'; give a Whisper's folder")
    check_positions(settings, where)
    return source, settings, most


def _whisper_sizes(source: str, revision: str | None, stack: int) -> tuple[int, int, int, int]:
    """The numbers of a Whisper that is not opened."""
    return whisper_sizes(_whisper_settings(source, revision)[1], stack)


def _build_whisper(source: str, revision: str | None, stack: int) -> WhisperAudioEncoder:
    """Load the encoder of a Whisper from a folder or the hub; a decoder beside it is left out."""
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    where = f"audio_tower {source!r}"
    source, settings, most = _whisper_settings(source, revision)
    verbosity = logging.get_verbosity()
    try:
        logging.set_verbosity_error()  # that a decoder was left out is what was asked for, no news
        model = load_checked(
            WhisperEncoder,
            source,
            where,
            most,
            revision=revision,
            use_safetensors=True,
            trust_remote_code=False,
            key_mapping={r"^(model\.)?encoder\.": ""},
            no_more=r"^(layers|conv\d|layer_norm|embed_positions)\b",
            **attention_of(settings, where),
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where} cannot be loaded: {' '.join(str(error).split())}") from error
    finally:
        logging.set_verbosity(verbosity)
    check_finite(dict(model.named_parameters()), where)
    return WhisperAudioEncoder(model.eval(), stack)


AUDIO_ENCODERS: dict[str, Callable[[str, str | None, int], AudioEncoder]] = {"whisper": _build_whisper}
AUDIO_SIZES = {"whisper": _whisper_sizes}


def build_audio_encoder(
    kind: str, source: str | Path, *, stack: int = 1, revision: str | None = None, known: str | None = None
) -> AudioEncoder:
    """Build an audio encoder with its weights.

    Args:
        kind: A name of `AUDIO_ENCODERS`.
        source: A folder of transformers, a hub id, or a package's Whisper by its name, such as "whisper_base".
        stack: How many frames in a row become one token.
        revision: Of the hub id.
        known: The fingerprint of its weights, where they need not be read before the first sound comes.

    Returns:
        The encoder on the CPU, in eval mode, in the weights' own type; float32 where they are read later.

    Raises:
        ConfigError: An unknown kind, a folder of another model, or an impossible `stack`.
        CheckpointError: The weights are missing, incomplete or unreadable.
    """
    if kind not in AUDIO_ENCODERS:
        raise unknown_name("audio encoder type", kind, AUDIO_ENCODERS)
    given = (str(source), revision, stack)
    if known is None:
        return AUDIO_ENCODERS[kind](*given)
    sizes, name = AUDIO_SIZES[kind](*given), str(source)
    return DeferredAudioEncoder(sizes, lambda: AUDIO_ENCODERS[kind](*given).to(torch.float32), name, known)


def audio_window(kind: str, source: str | Path, *, stack: int = 1, revision: str | None = None) -> AudioWindow:
    """What an audio encoder takes at once, its weights unread."""
    _, *window = AUDIO_SIZES[kind](str(source), revision, stack)
    return AudioWindow(*window)
