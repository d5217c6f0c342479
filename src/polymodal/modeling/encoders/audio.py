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

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import logging

from polymodal.errors import CheckpointError, ConfigError, unknown_name
from polymodal.modeling.ctranslate2 import PACKAGED, find_whisper
from polymodal.modeling.pretrained import attention_of, config_json, load_checked, look_over
from polymodal.utils.files import home_path
from polymodal.utils.modules import ModuleLike
from polymodal.utils.safetensors_io import check_finite

MOST_POSITIONS = 2**26
"""Numbers in the table of positions; Whisper large has 1,920,000."""


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
        config: Any = model.config
        if not 1 <= stack <= config.max_source_positions:
            raise ConfigError(f"stack is {stack}; it must be from 1 to {config.max_source_positions} frames a token")
        self.model = model
        self.train(model.training)
        self.stack = stack
        self.stride = model.conv1.stride[0] * model.conv2.stride[0]
        self.frames_per_token = self.stride * stack
        self.embed_dim = config.d_model * stack
        self.mel_bins = config.num_mel_bins
        self.max_frames = config.max_source_positions * self.stride

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
        there = there[:, :: self.stride]  # [N, P]
        hidden = hidden + model.embed_positions.weight[: hidden.shape[1]]
        hidden = F.dropout(hidden, model.dropout, self.training)
        mask = create_bidirectional_mask(model.config, hidden, None if frames is None or bool(there.all()) else there)
        for layer in model.layers:
            if not (self.training and model.layerdrop and float(torch.rand(())) < model.layerdrop):
                hidden = layer(hidden, mask)
        hidden = model.layer_norm(hidden).where(there[..., None], 0)
        hidden = F.pad(hidden, (0, 0, 0, -hidden.shape[1] % self.stack))
        return hidden.reshape(count, -1, self.embed_dim)


def check_positions(settings: Mapping[str, Any], where: str) -> None:
    """Refuse a table of positions that no Whisper has."""
    # transformers computes it from the configuration alone, before any file is looked at.
    table = [settings.get(key, usual) for key, usual in (("max_source_positions", 1500), ("d_model", 384))]
    if not all(isinstance(side, int) and side >= 1 for side in table) or table[0] * table[1] > MOST_POSITIONS:
        raise CheckpointError(
            f"{where}: max_source_positions {table[0]!r} and d_model {table[1]!r} must be whole numbers above 0, their "
            f"product at most {MOST_POSITIONS:,}"
        )


def _build_whisper(source: str, revision: str | None, stack: int) -> WhisperAudioEncoder:
    """Load the encoder of a Whisper from a folder or the hub; a decoder beside it is left out."""
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


def build_audio_encoder(kind: str, source: str | Path, *, stack: int = 1, revision: str | None = None) -> AudioEncoder:
    """Build an audio encoder with its weights.

    Args:
        kind: A name of `AUDIO_ENCODERS`.
        source: A folder of transformers, a hub id, or a package's Whisper by its name, such as "whisper_base".
        stack: How many frames in a row become one token.
        revision: Of the hub id.

    Returns:
        The encoder on the CPU, in eval mode, in the weights' own type.

    Raises:
        ConfigError: An unknown kind, a folder of another model, or an impossible `stack`.
        CheckpointError: The weights are missing, incomplete or unreadable.
    """
    if kind not in AUDIO_ENCODERS:
        raise unknown_name("audio encoder type", kind, AUDIO_ENCODERS)
    return AUDIO_ENCODERS[kind](str(source), revision, stack)
