"""Talking: order, streaming, interruption, silence, the way without an ASR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import polymodal
from polymodal import Audio, Image, Text, assistant, user
from polymodal.errors import ConfigError, MediaError
from polymodal.generation.params import GenerationParams
from polymodal.media.audio import Sound, open_audio
from polymodal.speech import Answer, talk
from polymodal.speech.dialogue import INSTRUCTION
from tests.speech.engines import RATE, CountingASR, LetterTTS, LevelVAD, ScriptBackend, sound

PIECES = ["It ", "is a c", "at. It sl", "eeps. ", "Good", " night."]
QUESTION = Sound(sound((0.5, 0), (2, 0.2), (0.5, 0)), RATE, RATE, 1)


def ask(model: ScriptBackend, voice: LetterTTS, **options: Any) -> Answer:
    return talk(QUESTION, model, **{"asr": CountingASR("What is it?"), "tts": voice, "vad": LevelVAD(), **options})


def test_the_name_is_reached_from_the_package() -> None:
    assert polymodal.speech.talk is talk


def test_a_question_is_heard_asked_and_answered() -> None:
    model, voice, params = ScriptBackend(PIECES), LetterTTS(), GenerationParams(max_new_tokens=7)
    before = [user("Hello"), assistant("Hi")]
    pieces: list[str] = []
    image = Image("cat.jpg")
    answer = ask(model, voice, parts=[image, Text("Be brief.")], history=before, params=params, on_text=pieces.append)
    assert answer.transcript is not None and answer.transcript.text == "What is it?"
    assert model.asked == []  # until the first piece of sound is asked for
    chunks = list(answer)
    asked = f"What is it?\n{INSTRUCTION}"
    assert model.asked == [([*before, user(image, "Be brief.", asked)], params)]
    assert voice.said == ["It is a cat.", "It sleeps.", "Good night."]
    assert [chunk.text for chunk in chunks] == ["It is a cat."] * 2 + ["It sleeps."] + ["Good night."] * 2
    assert sum(len(chunk.samples) for chunk in chunks) == 100 * len("It is a cat.It sleeps.Good night.")
    assert "".join(pieces) == answer.text == "".join(PIECES) and answer.reply is not None and not answer.stopped


def test_the_question_alone_is_asked_where_there_is_no_instruction() -> None:
    model = ScriptBackend(PIECES)
    list(ask(model, LetterTTS(), instruction=""))
    assert model.asked[0][0] == [user("What is it?")]


def test_a_sentence_is_spoken_before_the_model_has_said_the_next() -> None:
    model, voice = ScriptBackend(PIECES), LetterTTS()
    answer = ask(model, voice)
    next(answer)
    assert (voice.said, model.made, answer.text) == (["It is a cat."], 3, "It is a cat. It sl")
    assert answer.reply is None


def test_closing_the_answer_stops_the_model_and_the_voice() -> None:
    model, voice = ScriptBackend(PIECES), LetterTTS()
    with ask(model, voice) as answer:
        next(answer)  # in the middle of the first sentence
    assert (model.closed, voice.closed, model.made) == (1, 1, 3)
    assert list(answer) == []
    ask(model, voice).close()  # before it began
    assert len(model.asked) == 1


def test_an_interruption_stops_the_model_and_the_voice() -> None:
    for allowed in range(12):
        model, voice = ScriptBackend(PIECES), LetterTTS()
        calls = iter(range(100))
        answer = ask(model, voice, stop=lambda calls=calls, allowed=allowed: next(calls) >= allowed)
        chunks = list(answer)
        assert (answer.stopped and model.closed == 1 and model.made < len(PIECES)) or allowed > 8
        if chunks and chunks[-1].text != "It sleeps." and answer.stopped and len(chunks) < 2:
            assert voice.closed == 1
        assert answer.reply is None or not model.closed
    model, voice = ScriptBackend(PIECES), LetterTTS()
    answer = ask(model, voice, stop=lambda: len(voice.said) >= 2)
    assert [chunk.text for chunk in answer] == ["It is a cat."] * 2  # what was being made is not given
    assert answer.stopped and model.closed == 1 and voice.closed == 1


def test_silence_asks_no_model() -> None:
    model, voice = ScriptBackend(PIECES), LetterTTS()
    quiet = Sound(sound((3, 0.001)), RATE, RATE, 1)
    answer = talk(quiet, model, asr=CountingASR("Thank you."), tts=voice, vad=LevelVAD())
    assert answer.transcript is not None and answer.transcript.text == "" and list(answer) == []
    assert model.asked == [] and voice.said == []
    answer.close()


def test_without_an_asr_the_sound_itself_is_asked(tmp_path: Path) -> None:
    model, voice = ScriptBackend(PIECES), LetterTTS()
    answer = ask(model, voice, asr=None, parts=[Text("What do you hear?")])
    assert answer.transcript is None and len(list(answer)) == 5
    (((message,), _),) = model.asked
    text, part = message.parts
    assert text == Text("What do you hear?") and isinstance(part, Audio)
    assert np.abs(open_audio(part.source).samples - QUESTION.samples).max() < 1e-4
    path = tmp_path / "question.wav"
    list(talk(path, model, asr=None, tts=voice))
    assert model.asked[1][0] == [user(Audio(path))]  # which the model opens
    model.takes = ("image",)  # type: ignore[misc]
    with pytest.raises(ConfigError, match="script: takes no sounds"):
        ask(model, voice, asr=None)


def test_what_cannot_be_spoken_is_passed_over() -> None:
    model, voice = ScriptBackend(["🙂. ", "*** \n\n", "Yes. ", "..."]), LetterTTS()
    assert [chunk.text for chunk in ask(model, voice)] == ["Yes."]
    model = ScriptBackend([])
    answer = ask(model, LetterTTS())
    assert list(answer) == [] and answer.reply is not None and answer.shares.first_sound_s is None


def test_the_time_to_the_first_sound_is_the_sum_of_its_parts() -> None:
    answer = ask(ScriptBackend(PIECES), LetterTTS())
    list(answer)
    shares = answer.shares
    assert shares.first_token_s is not None and shares.first_sentence_s is not None and shares.tts_s is not None
    parts = (
        shares.decode_s + shares.vad_s + shares.asr_s + shares.first_token_s + shares.first_sentence_s + shares.tts_s
    )
    assert shares.first_sound_s is not None and parts <= shares.first_sound_s < parts + 0.1


def test_questions_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no such file"):
        talk(tmp_path / "no.wav", ScriptBackend([]), asr=CountingASR(), tts=LetterTTS(), vad=LevelVAD())
    long = Sound(np.zeros(RATE * 2, np.float32), RATE, RATE, 1)
    from polymodal.speech import AudioChunk, wav_bytes

    data = wav_bytes([AudioChunk(long.samples, RATE, "")])
    with pytest.raises(MediaError, match="lasts longer"):
        talk(data, ScriptBackend([]), asr=CountingASR(), tts=LetterTTS(), vad=LevelVAD(), max_seconds=1)


def test_a_model_of_ours_answers(tiny_model_folder: Path) -> None:
    voice = LetterTTS()
    answer = talk(
        QUESTION,
        tiny_model_folder,
        asr=CountingASR("Hi"),
        tts=voice,
        vad="energy",
        params=GenerationParams(max_new_tokens=4),
    )
    list(answer)
    assert answer.reply is not None and answer.reply.text == answer.text
