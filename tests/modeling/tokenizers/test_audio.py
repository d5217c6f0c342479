"""DAC, EnCodec and Mimi as codes [N, frames, codebooks], and back; random weights of their own classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from polymodal.errors import ConfigError
from polymodal.modeling.tokenizers.audio import CodecTokenizer, load_audio_tokenizer


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    if name == "dac":
        config = transformers.DacConfig(
            encoder_hidden_size=8, downsampling_ratios=[2, 4], decoder_hidden_size=16, n_codebooks=3, codebook_size=16,
            codebook_dim=4, sampling_rate=800,
        )  # fmt: skip
        return transformers.DacModel(config).eval()
    if name == "encodec":
        config = transformers.EncodecConfig(
            target_bandwidths=[0.4, 0.8], sampling_rate=800, num_filters=4, num_residual_layers=1,
            upsampling_ratios=[4, 2], codebook_size=16, codebook_dim=8, hidden_size=8, num_lstm_layers=1,
        )  # fmt: skip
        return transformers.EncodecModel(config).eval()
    config = transformers.MimiConfig(
        sampling_rate=800, frame_rate=50, hidden_size=16, num_filters=4, num_residual_layers=1,
        upsampling_ratios=[4, 2], codebook_size=16, codebook_dim=8, num_quantizers=3, num_semantic_quantizers=1,
        vector_quantization_hidden_dimension=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, intermediate_size=16, upsample_groups=16,
    )  # fmt: skip
    return transformers.MimiModel(config).eval()


NAMES = ("dac", "encodec", "mimi")


@pytest.mark.parametrize("name", NAMES)
def test_sounds_become_frames_of_codes_and_any_codes_sound(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    model.save_pretrained(tmp_path)
    tokenizer = load_audio_tokenizer(tmp_path)
    sounds = torch.rand(2, 320, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = tokenizer.encode(sounds)
    assert codes.dtype == torch.int64 and codes.shape[::2] == (2, tokenizer.num_codebooks)
    assert abs(codes.shape[1] - 320 / tokenizer.sampling_rate * tokenizer.frame_rate) <= 1
    assert int(codes.min()) >= 0 and int(codes.max()) < tokenizer.codebook_size == 16
    ids = torch.randint(16, codes.shape, generator=torch.Generator().manual_seed(1))
    sounded = tokenizer.decode(ids)
    assert sounded.shape[0] == 2 and sounded.isfinite().all() and sounded.dtype == torch.float32
    length = codes.shape[1] * tokenizer.sampling_rate / tokenizer.frame_rate
    assert 0.8 * length <= sounded.shape[1] <= length
    with torch.no_grad():
        if name == "encodec":
            given = model.encode(sounds[:, None], bandwidth=0.8)
            wanted = model.decode(given.audio_codes, given.audio_scales).audio_values
        else:
            wanted = model.decode(audio_codes=model.encode(sounds[:, None]).audio_codes).audio_values
    assert torch.allclose(tokenizer.decode(codes), wanted.view(2, -1), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_fewer_codebooks_are_the_coarsest_ones(name: str) -> None:
    model = tiny(name)
    sounds = torch.rand(1, 320, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, part = CodecTokenizer(model), CodecTokenizer(model, 1)
    assert part.num_codebooks == 1 < whole.num_codebooks
    assert torch.equal(part.encode(sounds), whole.encode(sounds)[..., :1])
    assert part.decode(part.encode(sounds)).isfinite().all()


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    tokenizer = CodecTokenizer(tiny("dac"))
    for ids, match in (
        (torch.full((1, 4, 3), 16), "there are 0 to 15"),
        (torch.zeros(1, 4, 5, dtype=torch.int64), "with C from 1 to 3"),
        (torch.zeros(4, 3, dtype=torch.int64), r"give \[N, F, C\]"),
    ):
        with pytest.raises(ConfigError, match=match):
            tokenizer.decode(ids)
    with pytest.raises(ConfigError, match="one channel each"):
        tokenizer.encode(torch.zeros(1, 2, 80))
    with pytest.raises(ConfigError, match="this dac has 1 to 3"):
        CodecTokenizer(tiny("dac"), 4)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="'llama' is no audio tokenizer"):
        load_audio_tokenizer(tmp_path)
