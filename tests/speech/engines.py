"""Engines that stand in for real ones, and small random ones of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from polymodal.backends.base import Backend, Reply, TextDelta, Timing, Usage
from polymodal.messages import assistant
from polymodal.speech import ASR, TTS, VAD, Segment, Transcript
from polymodal.speech.base import FRAME

RATE = 16_000


def sound(*pieces: tuple[float, float], seed: int = 0) -> np.ndarray:
    """Noise and silence: (seconds, loudness) of each piece, float32 at 16 kHz."""
    noise = np.random.default_rng(seed)
    return np.concatenate([noise.normal(0, level, round(s * RATE)) for s, level in pieces]).astype(np.float32)


class LevelVAD(VAD):
    """What is louder than 0.05 is speech."""

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        padded = np.pad(samples, (0, -len(samples) % FRAME)).reshape(-1, FRAME)
        return (np.sqrt((padded**2).mean(axis=1)) > 0.05).astype(np.float32)


class CountingASR(ASR):
    """Writes down how many seconds it was given."""

    name = "counting"

    def __init__(self, text: str | None = None, window: float = 28.0) -> None:
        self.text, self.window = text, window
        self.given: list[tuple[float, str | None]] = []

    def listen(self, samples: np.ndarray, language: str | None = None) -> Transcript:
        seconds = len(samples) / RATE
        self.given.append((seconds, language))
        text = f"{seconds:.1f} s" if self.text is None else self.text
        return Transcript((Segment(0.0, seconds + 1.0, f" {text} "), Segment(0.1, 0.2, "  ")), language or "en")


class LetterTTS(TTS):
    """A hundred samples a letter; several pieces a sentence."""

    name, sample_rate = "letters", 8000

    def __init__(self) -> None:
        self.said: list[str] = []
        self.closed = 0

    def synthesize(self, sentence: str) -> Iterator[np.ndarray]:
        self.said.append(sentence)
        try:
            for start in range(0, len(sentence), 10):
                yield np.full(100 * len(sentence[start : start + 10]), 0.5, np.float32)
        except GeneratorExit:
            self.closed += 1
            raise


class ToneTTS(LetterTTS):
    """The same in tones, which codecs leave as they are; each sentence has its own."""

    def synthesize(self, sentence: str) -> Iterator[np.ndarray]:
        at, pitch = 0, 300 + 100 * len(self.said)
        for piece in super().synthesize(sentence):
            times = np.arange(at, at + len(piece)) / self.sample_rate
            at += len(piece)
            yield (piece * np.sin(2 * np.pi * pitch * times)).astype(np.float32)


class ScriptBackend(Backend):
    """Says what it is told to, a piece at a time."""

    name, takes = "script", ("image", "audio")

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces
        self.asked: list[Any] = []
        self.made = self.closed = 0

    def stream(self, messages: Any, params: Any = None) -> Iterator[TextDelta | Reply]:
        self.asked.append((messages, params))
        try:
            for piece in self.pieces:
                self.made += 1
                yield TextDelta(piece)
        except GeneratorExit:
            self.closed += 1
            raise
        yield Reply(assistant("".join(self.pieces)), Usage(1, 0, 1), Timing(0, 0, 0, 0, 0), "stop", self.name)


class Stage:
    """What the verbs open while it stands in the place of the real engines."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asr = CountingASR("What is it?\x1b[31m")
        self.voice = LetterTTS()
        self.model = ScriptBackend(["It is\x1b[0m ", "a cat. Go", "od."])
        self.names: list[Any] = []

        def opening(kind: str, what: Any) -> Any:
            def load(name: Any = "") -> Any:
                if isinstance(name, str):
                    self.names.append((kind, name))
                return what

            return load

        for module in ("asr", "dialogue"):
            monkeypatch.setattr(f"polymodal.speech.{module}.load_vad", opening("vad", LevelVAD()))
            monkeypatch.setattr(f"polymodal.speech.{module}.load_asr", opening("asr", self.asr))
        for module in ("tts", "dialogue", "narrate"):
            monkeypatch.setattr(f"polymodal.speech.{module}.load_tts", opening("tts", self.voice))
        for kind, what in (("asr", self.asr), ("vad", LevelVAD()), ("tts", self.voice)):
            monkeypatch.setattr(f"polymodal.speech.load_{kind}", opening(kind, what))
        monkeypatch.setattr("polymodal.speech.dialogue.load", opening("model", self.model))
        monkeypatch.setattr("polymodal.cli.common.open_model", lambda args: self.model)


def write_vits(folder: Path, phonemize: bool = False) -> None:
    """A random VITS that knows the small letters."""
    import torch
    from transformers import VitsConfig, VitsModel, VitsTokenizer

    folder.mkdir(parents=True)
    letters = " abcdefghijklmnopqrstuvwxyz'-"
    vocabulary = {letter: number for number, letter in enumerate(letters)} | {"<unk>": len(letters)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    VitsTokenizer(
        str(folder / "vocab.json"), pad_token=" ", unk_token="<unk>", phonemize=phonemize, is_uroman=False
    ).save_pretrained(folder)
    torch.manual_seed(0)
    VitsModel(
        VitsConfig(
            vocab_size=30,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            window_size=2,
            ffn_dim=16,
            flow_size=16,
            spectrogram_bins=8,
            prior_encoder_num_flows=2,
            duration_predictor_num_flows=2,
            depth_separable_num_layers=1,
            duration_predictor_filter_channels=16,
            upsample_initial_channel=16,
            upsample_rates=[8, 4],
            upsample_kernel_sizes=[16, 8],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
            posterior_encoder_num_wavenet_layers=1,
            prior_encoder_num_wavenet_layers=1,
            sampling_rate=16_000,
        )
    ).save_pretrained(folder)


def write_speecht5(folder: Path) -> None:
    """A random SpeechT5 with its vocoder and a speaker."""
    import sentencepiece
    import torch
    from transformers import (
        SpeechT5Config,
        SpeechT5ForTextToSpeech,
        SpeechT5HifiGan,
        SpeechT5HifiGanConfig,
        SpeechT5Tokenizer,
    )

    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog."] * 20),
        model_prefix=str(folder / "spm_char"),
        vocab_size=35,
        model_type="char",
        hard_vocab_limit=False,
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    tokenizer = SpeechT5Tokenizer(str(folder / "spm_char.model"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    small = {"hidden_size": 16, "encoder_layers": 1, "decoder_layers": 1, "conv_dim": [8], "conv_stride": [2]}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    SpeechT5ForTextToSpeech(
        SpeechT5Config(
            vocab_size=len(tokenizer),
            num_mel_bins=8,
            speaker_embedding_dim=4,
            speech_decoder_prenet_units=8,
            speech_decoder_postnet_units=8,
            speech_decoder_postnet_layers=2,
            conv_kernel=[2],
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
            **small,
            **heads,
        )
    ).save_pretrained(folder)
    SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=8,
            upsample_initial_channel=8,
            upsample_rates=[4, 4],
            upsample_kernel_sizes=[8, 8],
            resblock_kernel_sizes=[3],
            resblock_dilation_sizes=[[1, 3]],
        )
    ).save_pretrained(folder / "vocoder")
    np.save(folder / "speaker.npy", np.ones(4, np.float32))


def write_whisper(folder: Path, timed: bool = True) -> None:
    """A random Whisper of windows of two seconds; without the settings of its timestamps where not `timed`."""
    import torch
    from tokenizers import AddedToken
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperTokenizer

    folder.mkdir(parents=True)
    vocabulary = {char: number for number, char in enumerate([*sorted(ByteLevel.alphabet()), "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = WhisperTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    names = ["startoftranscript", "en", "de", "translate", "transcribe", "startoflm", "startofprev", "nospeech"]
    special = [f"<|{name}|>" for name in [*names, "notimestamps"]]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens([AddedToken(f"<|{step * 0.02:.2f}|>", special=False) for step in range(101)])
    tokenizer.save_pretrained(folder)
    ids = tokenizer.get_vocab()
    end, start = ids["<|endoftext|>"], ids["<|startoftranscript|>"]
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(ids),
            num_mel_bins=8,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=16,
            decoder_ffn_dim=16,
            max_source_positions=100,
            max_target_positions=40,
            decoder_start_token_id=start,
            eos_token_id=end,
            bos_token_id=end,
            pad_token_id=end,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )
    times: dict[str, Any] = {
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "is_multilingual": True,
        "lang_to_id": {name: ids[name] for name in ("<|en|>", "<|de|>")},
        "task_to_id": {"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
    }
    model.generation_config = GenerationConfig(
        decoder_start_token_id=start, eos_token_id=end, pad_token_id=end, max_length=20, **(times if timed else {})
    )
    model.save_pretrained(folder)
