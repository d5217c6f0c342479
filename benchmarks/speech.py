"""Speech dialogue: how long the first sound takes, and whether what is spoken is understood.

    python -m benchmarks.speech [--runs 7] [--asr tiny.en]
    python -m benchmarks.speech --round-trip [--asr base]

The first asks a question of about three seconds, spoken by the voice itself, about an image, and prints what each part
took from the end of the question to the first sound of the answer: the median of the runs, after one that is not
counted. The second speaks sixteen questions, lets the default model answer each aloud, writes answer.wav, and has both
sides written down: the word error rate of the questions, and the share of the answers' words that come back (both after
Whisper's English normaliser).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import fields
from pathlib import Path

from polymodal import GenerationParams, Image, load
from polymodal.media.audio import open_audio
from polymodal.metrics.speech import corpus_cer, corpus_wer
from polymodal.speech import load_asr, load_tts, load_vad, speak, talk, transcribe, wav_bytes
from polymodal.speech.dialogue import Shares

IMAGES = Path(__file__).resolve().parents[1] / "examples" / "pictures"
BOUND = 2.0
"""Seconds to the first sound, with tiny.en on two idle cores."""
QUESTION = "What can you see here, and how many of them are there?"
QUESTIONS = (
    ("What is in this image?", "cat.jpg"),
    ("How many animals are there?", "cat.jpg"),
    ("What colour is the animal in this photograph?", "cat.jpg"),
    ("Describe this image in one sentence.", "butterfly.png"),
    ("Can you tell me which fruit this is?", "apple.png"),
    ("What do you see on the table?", "coffee.jpg"),
    ("Which bird is this, and what colour is it?", "penguin.png"),
    ("What kind of flower is shown here?", "sunflower.png"),
    ("Is there a boat in the image?", "sailing.png"),
    ("Please name the fruit in this image.", "strawberry.png"),
    ("What is the capital of France?", None),
    ("How many days are in a week?", None),
    ("Why is the sky blue?", None),
    ("What do bees make from flowers?", None),
    ("Which planet is closest to the sun?", None),
    ("What should I wear when it is cold outside?", None),
)
PARAMS = GenerationParams(max_new_tokens=48)


def measure(asr_name: str, tts_name: str, model_name: str, runs: int) -> list[Shares]:
    """What each part took in each run, after one that is not counted."""
    asr, tts, vad, model = load_asr(asr_name), load_tts(tts_name), load_vad(), load(model_name)
    shares = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "question.wav"
        path.write_bytes(wav_bytes(speak(QUESTION, tts)))
        for _ in range(runs + 1):
            answer = talk(path, model, parts=[Image(IMAGES / "cat.jpg")], asr=asr, tts=tts, vad=vad, params=PARAMS)
            spoken = sum(chunk.seconds for chunk in answer)
            shares.append(answer.shares)
        assert answer.transcript is not None
        print(f"question: {open_audio(path).seconds:.1f} s, written down as: {answer.transcript.text}")
    print(f"answer: {spoken:.1f} s: {answer.text}")
    return shares[1:]


def first_sound(asr_name: str, tts_name: str, model_name: str, runs: int) -> int:
    """Print the median of what each part took."""
    shares = measure(asr_name, tts_name, model_name, runs)
    medians = {field.name: statistics.median(_of(share, field.name) for share in shares) for field in fields(Shares)}
    for name, seconds in medians.items():
        print(f"{name[:-2].replace('_', ' '):16} {seconds:6.2f} s")
    total = medians["first_sound_s"]
    print(f"first sound after {total:.2f} s, the median of {runs} (at most {BOUND:g} s)")
    return int(total > BOUND)


def _of(run: Shares, name: str) -> float:
    value = getattr(run, name)
    assert value is not None, "the model said nothing that can be spoken"
    return float(value)


def round_trip(asr_name: str, tts_name: str, model_name: str) -> tuple[float, float]:
    """Print and give the word error rate of the questions, and the share of the answers' words that come back."""
    import onnxruntime

    onnxruntime.set_seed(0)  # a Piper voice draws noise
    asr, tts, vad, model = load_asr(asr_name), load_tts(tts_name), load_vad(), load(model_name)
    asked, heard, said, back = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for question, image in QUESTIONS:
            place, target = Path(folder) / "question.wav", Path(folder) / "answer.wav"
            place.write_bytes(wav_bytes(speak(question, tts)))
            parts = [Image(IMAGES / image)] if image else []
            answer = talk(place, model, parts=parts, asr=asr, tts=tts, vad=vad, params=PARAMS, language="en")
            target.write_bytes(wav_bytes(answer))
            assert answer.transcript is not None
            asked.append(question)
            heard.append(answer.transcript.text)
            said.append(answer.text)
            back.append(transcribe(target, asr, vad=vad, language="en").text)
            print(f"> {question} | {heard[-1]} | {said[-1]} | {back[-1]}", flush=True)
    questions = corpus_wer(heard, [[text] for text in asked])
    answers = 1 - corpus_wer(back, [[text] for text in said])
    letters = 1 - corpus_cer(back, [[text] for text in said])
    print(
        f"questions: word error rate {questions:.1%} (at most 8%); answers: {answers:.1%} of the words (at least 90%), "
        f"{letters:.1%} of the characters"
    )
    return questions, answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--asr", help='"tiny.en" for the first sound, "base" for the round trip')
    parser.add_argument("--tts", default="piper")
    parser.add_argument("--model", default="default")
    parser.add_argument("--round-trip", action="store_true")
    args = parser.parse_args()
    if args.round_trip:
        questions, answers = round_trip(args.asr or "base", args.tts, args.model)
        return int(questions >= 0.08 or answers <= 0.9)
    return first_sound(args.asr or "tiny.en", args.tts, args.model, args.runs)


if __name__ == "__main__":
    sys.exit(main())
