"""A spoken question answered in speech: VAD -> ASR -> model -> sentences -> TTS, each sentence as soon as it is there.

Without an ASR the sound itself goes to the model, where the model takes sounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from polymodal.backends import load
from polymodal.backends.base import Backend, Reply, TextDelta
from polymodal.errors import ConfigError
from polymodal.generation.params import GenerationParams
from polymodal.media.audio import Sound
from polymodal.messages import Audio, Message, Part, Source, user
from polymodal.speech.asr import listen, load_asr, samples_of
from polymodal.speech.base import ASR, TTS, VAD, AudioChunk, Transcript, closed, wav_bytes
from polymodal.speech.sentences import SentenceSplitter
from polymodal.speech.tts import load_tts, speak_sentence
from polymodal.speech.vad import load_vad

INSTRUCTION = "Answer in a whole sentence."
"""A voice that says one word alone is hard to understand."""


@dataclass
class Shares:
    """Seconds from the end of the question to the first sound, by who took them; None where it did not come to that."""

    decode_s: float = 0.0  # The file
    vad_s: float = 0.0
    asr_s: float = 0.0
    first_token_s: float | None = None  # From the model's start to its first text
    first_sentence_s: float | None = None  # From there to the end of the first sentence
    tts_s: float | None = None  # The first sound of it
    first_sound_s: float | None = None  # All of it


class Answer(Iterator[AudioChunk]):
    """The answer as pieces of sound, made while they are asked for; closing it stops the model and the voice."""

    def __init__(self, messages: Sequence[Message], transcript: Transcript | None, shares: Shares) -> None:
        self.messages = list(messages)  # What the model is asked
        self.transcript = transcript  # What was heard; None where the sound itself goes to the model
        self.shares = shares
        self.text = ""  # What the model has said so far
        self.reply: Reply | None = None  # The whole of it, once it is there
        self.stopped = False  # Whether it was interrupted
        self._chunks: Generator[AudioChunk] = (chunk for chunk in list[AudioChunk]())

    def __next__(self) -> AudioChunk:
        """The next piece of sound."""
        return next(self._chunks)

    def close(self) -> None:
        """Stop the model and the voice."""
        self._chunks.close()

    def __enter__(self) -> Answer:
        """Close it at the end of a `with`."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _say(
        self,
        model: Backend,
        params: GenerationParams | None,
        tts: TTS,
        stop: Callable[[], bool] | None,
        on_text: Callable[[str], None],
    ) -> Generator[AudioChunk]:
        """Ask the model and speak what it says."""
        before = self.shares.decode_s + self.shares.vad_s + self.shares.asr_s
        begin = time.perf_counter()
        with closed(self._sentences(model, params, stop, on_text)) as sentences:
            for sentence in sentences:
                asked = time.perf_counter()
                with closed(speak_sentence(sentence, tts)) as chunks:
                    for chunk in chunks:
                        if self.shares.first_sound_s is None:
                            now = time.perf_counter()
                            self.shares.tts_s, self.shares.first_sound_s = now - asked, before + now - begin
                        if self._interrupted(stop):
                            return
                        yield chunk
                        if self._interrupted(stop):
                            return

    def _sentences(
        self,
        model: Backend,
        params: GenerationParams | None,
        stop: Callable[[], bool] | None,
        on_text: Callable[[str], None],
    ) -> Generator[str]:
        """The sentences of the model's answer, each as soon as it is whole."""
        splitter, begin, token = SentenceSplitter(), time.perf_counter(), 0.0
        with closed(model.stream(self.messages, params)) as events:
            for event in events:
                if self._interrupted(stop):
                    return
                if isinstance(event, Reply):
                    self.reply, found = event, splitter.finish()
                elif not isinstance(event, TextDelta):
                    continue  # images, which are not spoken
                else:
                    if not token:
                        token = time.perf_counter()
                        self.shares.first_token_s = token - begin
                    self.text += event.text
                    on_text(event.text)
                    found = splitter.push(event.text)
                for sentence in found:
                    if self.shares.first_sentence_s is None:
                        self.shares.first_sentence_s = time.perf_counter() - token
                    yield sentence

    def _interrupted(self, stop: Callable[[], bool] | None) -> bool:
        self.stopped = self.stopped or (stop is not None and stop())
        return self.stopped


def talk(
    question: Source | Sound,
    model: str | Path | Backend = "default",
    *,
    parts: Sequence[Part] = (),
    history: Sequence[Message] = (),
    asr: str | Path | ASR | None = "tiny.en",
    tts: str | Path | TTS = "piper",
    vad: str | VAD = "silero",
    language: str | None = None,
    params: GenerationParams | None = None,
    instruction: str = INSTRUCTION,
    stop: Callable[[], bool] | None = None,
    on_text: Callable[[str], None] = lambda text: None,
    max_seconds: float = 120.0,
) -> Answer:
    """Answer a spoken question in speech.

    Args:
        question: The sound: a file (a path, bytes, a `data:` URL; of a video its sound), or one that is open already.
        model: What answers: a model's name as for `polymodal.load`, or any backend.
        parts: What goes with the question, before it, such as an `Image`; a `Text` too.
        history: The messages before it.
        asr: What writes the question down, as for `load_asr`. None gives the sound itself to the model, which has to
            take sounds.
        tts: The voice, as for `load_tts`.
        vad: What finds the speech in the question, as for `load_vad`.
        language: The question's language, such as "en"; found out where None.
        params: How the answer is generated; the model's own settings where None.
        instruction: What the model is told after the question that was written down: how to answer so that it can be
            spoken; "" for nothing.
        stop: Asked between any two pieces of text and of sound; the answer ends where it says yes, as when somebody
            begins to speak.
        on_text: Given the answer's text as it comes.
        max_seconds: The longest question.

    Returns:
        The answer, which makes its pieces of sound while it is iterated. The question is written down by then, in its
        `transcript`; where nobody speaks in it, the model is not asked and the answer has no pieces.

    Raises:
        MediaError: The question is no sound that can be read, or too long.
        ConfigError: An unknown name, a package or program is not installed, or the model takes no sounds.
        CheckpointError: A model's folder cannot be used.
    """
    backend = model if isinstance(model, Backend) else load(model)
    voice, hears = load_tts(tts), None if asr is None else (load_asr(asr), load_vad(vad))
    if hears is None and "audio" not in backend.takes:
        raise ConfigError(f"{backend.name}: takes no sounds; have the question written down first (asr)")
    shares, begin = Shares(), time.perf_counter()
    if hears is None:
        heard = None
        if isinstance(question, Sound):
            question = wav_bytes([AudioChunk(question.samples, question.sample_rate, "")])
        asked = user(*parts, Audio(question))
    else:
        samples = samples_of(question, max_seconds)
        decoded = time.perf_counter()
        spans = hears[1].spans(samples, hears[0].window)
        found = time.perf_counter()
        heard = listen(samples, spans, hears[0], language)
        shares = Shares(decoded - begin, found - decoded, time.perf_counter() - found)
        asked = user(*parts, f"{heard.text}\n{instruction}" if instruction else heard.text)
    answer = Answer([*history, asked], heard, shares)
    if heard is None or heard.text:
        answer._chunks = answer._say(backend, params, voice, stop, on_text)
    return answer
