"""Sounds as codes: DAC, EnCodec and Mimi of transformers behind one face, `AudioTokenizer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from polymodal.errors import ConfigError
from polymodal.modeling.pretrained import config_json, load_checked

AUDIO_TOKENIZERS = {"dac": "DacModel", "encodec": "EncodecModel", "mimi": "MimiModel"}
"""`model_type` -> class of transformers."""


class CodecTokenizer(nn.Module):
    """See `AudioTokenizer`."""

    def __init__(self, model: Any, num_codebooks: int | None = None) -> None:
        super().__init__()
        self.model: Any = model.eval()
        config, self.kind = model.config, model.config.model_type
        most = {
            "dac": lambda: config.n_codebooks,
            "encodec": lambda: model.quantizer.get_num_quantizers_for_bandwidth(max(config.target_bandwidths)),
            "mimi": lambda: config.num_quantizers,
        }[self.kind]()
        self.num_codebooks = num_codebooks or most
        if not 1 <= self.num_codebooks <= most:
            raise ConfigError(f"num_codebooks {num_codebooks}: this {self.kind} has 1 to {most}")
        if self.kind == "encodec" and config.normalize:
            raise ConfigError("an encodec that normalises (the 48 kHz one) needs scales beside its codes; use 24 kHz")
        self.codebook_size: int = config.codebook_size
        self.sampling_rate: int = config.sampling_rate
        hop = config.hop_length if self.kind == "dac" else config.sampling_rate / config.frame_rate
        self.frame_rate = self.sampling_rate / hop

    @torch.no_grad()
    def encode(self, waveform: Tensor) -> Tensor:  # [N, S] -> [N, F, C]
        """Give the codes of sounds of one channel, -1 to 1."""
        if waveform.ndim != 2:
            raise ConfigError(f"a waveform of shape {list(waveform.shape)}: give [N, S], one channel each")
        sounds = waveform[:, None].float()
        if self.kind == "dac":
            codes = self.model.encode(sounds, n_quantizers=self.num_codebooks).audio_codes
        elif self.kind == "mimi":
            codes = self.model.encode(sounds, num_quantizers=self.num_codebooks).audio_codes
        else:
            codes = self.model.encode(sounds, bandwidth=max(self.model.config.target_bandwidths)).audio_codes
            codes = codes.permute(1, 2, 0, 3).flatten(2)  # chunks, N, C, F: a whole sound is one chunk
        return codes[:, : self.num_codebooks].transpose(1, 2).contiguous()

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:  # [N, F, C] -> [N, S]
        """Make sounds of codes."""
        if ids.ndim != 3 or not 1 <= ids.shape[2] <= self.num_codebooks:
            raise ConfigError(f"codes of shape {list(ids.shape)}: give [N, F, C] with C from 1 to {self.num_codebooks}")
        if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= self.codebook_size):
            raise ConfigError(f"codes {int(ids.min())} to {int(ids.max())}: there are 0 to {self.codebook_size - 1}")
        codes = ids.transpose(1, 2)
        if self.kind == "encodec":
            sounds = self.model.decode(codes[None], [None]).audio_values
        else:
            sounds = self.model.decode(audio_codes=codes).audio_values
        return sounds.view(len(ids), -1).float()


def load_audio_tokenizer(source: str | Path, num_codebooks: int | None = None) -> CodecTokenizer:
    """Load DAC, EnCodec or Mimi.

    Args:
        source: A folder, or a hub id.
        num_codebooks: How many of its codebooks are used, the coarsest first; all when None.

    Returns:
        The tokenizer, on the CPU, in eval mode.

    Raises:
        CheckpointError: There is no such model, or its weights do not fit.
        ConfigError: It is none of the three, or has fewer codebooks.
    """
    import transformers

    where = f"{source}: cannot be opened as an audio tokenizer"
    found = config_json(str(source), where).get("model_type")
    if found not in AUDIO_TOKENIZERS:
        raise ConfigError(f"{source}: {found!r} is no audio tokenizer known here; known are dac, encodec and mimi")
    kind = getattr(transformers, AUDIO_TOKENIZERS[found])
    return CodecTokenizer(load_checked(kind, str(source), where, dtype=torch.float32), num_codebooks)
