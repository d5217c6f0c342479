"""Speech: what was said as text, text as speech, and both around any model as a dialogue.

    from polymodal.speech import talk

    answer = talk("question.wav")              # finds the speech, writes it down
    print(answer.transcript.text)
    for chunk in answer:                       # the model's answer, sentence by sentence
        play(chunk.samples, chunk.sample_rate)

Engines are small: `ASR`, `TTS` and `VAD` have one method each that must be given.
"""

from polymodal.speech.asr import load_asr, transcribe
from polymodal.speech.base import ASR, TTS, VAD, AudioChunk, Segment, Transcript, wav_bytes
from polymodal.speech.dialogue import Answer, talk
from polymodal.speech.tts import load_tts, speak
from polymodal.speech.vad import load_vad

__all__ = [
    "ASR",
    "TTS",
    "VAD",
    "Answer",
    "AudioChunk",
    "Segment",
    "Transcript",
    "load_asr",
    "load_tts",
    "load_vad",
    "speak",
    "talk",
    "transcribe",
    "wav_bytes",
]
