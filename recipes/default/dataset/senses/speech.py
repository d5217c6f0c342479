"""What is said: sentences and words to repeat, questions to answer, questions about an image.

A sentence is made of a few hundred words by a few patterns; those of validation are never said in training, and are
said by other voices too (`media.voices`).
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from recipes.default.dataset import smalltalk, words
from recipes.default.dataset.questions import QA
from recipes.default.dataset.senses.media import Voice, roughen, speak, write_sound

REPEAT = ("Repeat what is said.", "What is said?", "Write down what is said.", "What does the voice say?",
          "Write down the words.")  # fmt: skip
WORD = ("Which word is said?", "What word do you hear?", "Which word do you hear?")
QUESTION = ("Is a question asked?", "Is this a question?", "Does the voice ask a question?")
NOTHING = "Nothing is said."


@functools.cache
def lists() -> dict[str, list[str]]:
    """The lists of `speech.txt`: entries between bars, or words."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in Path(__file__).with_name("speech.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            name = line.strip("[]")
        elif not line.startswith("#"):
            found.setdefault(name, []).extend(entry.strip() for entry in line.split("|" if "|" in line else None))
    return found


@dataclass
class Library:
    """What has to be said, each text by each voice once; a file's name follows from both."""

    prefix: str
    said: dict[tuple[str, Voice], str] = field(default_factory=dict)

    def file(self, text: str, voice: Voice) -> str:
        """The sound's path inside the dataset."""
        return self.said.setdefault((text, voice), f"sounds/{self.prefix}{len(self.said):05d}.flac")


def record_speech(job: tuple[str, str, Voice], root: Path) -> str:
    """Write one file of a library; returns its SHA-256."""
    file, text, voice = job
    seed = int.from_bytes(hashlib.sha256(f"{file} {text} {voice}".encode()).digest()[:8])
    write_sound(root / file, roughen(speak(text, voice), seed, bend=0.1 if voice.engine == "piper" else 0.04))
    return hashlib.sha256((root / file).read_bytes()).hexdigest()


def vocabulary() -> list[str]:
    """Single words."""
    known = lists()
    named = [name.lower() for name in known["names"]]
    return sorted({*known["nouns"], *known["adjectives"], *known["verbs"], *known["numbers"], *words.COLOURS, *named})


def sentence(rng: random.Random) -> str:
    """Two to seven words, with a capital and a full stop or question mark."""
    known, numbers = lists(), lists()["numbers"]
    noun, adjective, verb = rng.choice(known["nouns"]), rng.choice(known["adjectives"]), rng.choice(known["verbs"])
    colour, name, number = rng.choice(list(words.COLOURS)), rng.choice(known["names"]), rng.randint(2, 12)
    an = words.phrase(noun)
    patterns: list[Callable[[], str]] = [
        lambda: f"the {adjective} {noun} {verb}.",
        lambda: f"the {colour} {noun} {verb} {rng.choice(known['places'])}.",
        lambda: f"{words.phrase(noun, colour)}.",
        lambda: f"{words.phrase(noun, adjective)} and {words.phrase(rng.choice(known['nouns']))}.",
        lambda: f"{numbers[number]} {words.plural(noun)}.",
        lambda: f"{name} {verb} {rng.choice(known['places'])}.",
        lambda: f"I see {an} {rng.choice(known['places'])}.",
        lambda: f"{name} has {words.phrase(noun, rng.choice([colour, adjective]))}.",
        lambda: f"the {noun} is {adjective}.",
        lambda: f"this {noun} is {colour}.",
        lambda: f"{rng.choice(['we', 'they', 'I'])} like the {adjective} {noun}.",
        lambda: f"please {rng.choice(known['commands'])} the {noun}.",
        lambda: f"{rng.choice(known['commands'])} {numbers[number]} {words.plural(noun)}.",
        lambda: f"where is my {rng.choice([colour, adjective])} {noun}?",
        lambda: f"is the {noun} {adjective}?",
        lambda: f"do you like the {colour} {noun}?",
        lambda: f"who has {numbers[number]} {words.plural(noun)}?",
    ]
    text = rng.choice(patterns)()
    return text[:1].upper() + text[1:]


def ask_repeat(rng: random.Random, text: str) -> QA:
    """To repeat a sentence."""
    return QA("repeat", rng.choice(REPEAT), text, text, (text.rstrip(".?!").lower(), text))


def ask_word(rng: random.Random, word: str) -> QA:
    """Which word is said, sometimes one of two."""
    question = rng.choice(WORD)
    if rng.random() < 0.3:
        other = word
        while other == word:
            other = rng.choice(vocabulary())
        question = "Which word is said, " + " or ".join(rng.sample([word, other], 2)) + "?"
    return QA("word", question, word.capitalize() + ".", word.capitalize(), (word,))


def ask_question(rng: random.Random, text: str) -> QA:
    """Whether something is a question."""
    yes = text.endswith("?")
    long = "Yes, it is a question." if yes else "No, it is not a question."
    return QA("is_question", rng.choice(QUESTION), long, "Yes" if yes else "No", ("yes",) if yes else ("no",))


def facts() -> list[QA]:
    """Questions that need nothing but the language model: opposites, sums, counting, capitals, everyday facts."""
    found, numbers = [], lists()["numbers"]
    for pair in lists()["opposites"]:
        for one, other in (pair.split(), pair.split()[::-1]):
            found.append(QA("fact", f"What is the opposite of {one}?", f"The opposite of {one} is {other}.",
                            other.capitalize(), (other,)))  # fmt: skip
    for first in range(1, 11):
        for second in range(1, 11):
            total = numbers[first + second]
            asked = f"What is {numbers[first]} plus {numbers[second]}?"
            long = f"{numbers[first].capitalize()} plus {numbers[second]} is {total}."
            found.append(QA("fact", asked, long, total.capitalize(), (total, str(first + second))))
    for number in range(1, 20):
        after = numbers[number + 1]
        asked = f"Which number comes after {numbers[number]}?"
        found.append(QA("fact", asked, f"{after.capitalize()}.", after.capitalize(), (after, str(number + 1))))
    known, capitals = smalltalk.facts()
    for country, city in capitals.items():
        long = f"The capital of {country} is {city}."
        found.append(QA("fact", f"What is the capital of {country}?", long, city, (city.lower(), city)))
    found += [QA("fact", asked, long, long, (long,)) for asked, long in known if asked.isascii() and len(long) < 90]
    return found
