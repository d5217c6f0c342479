"""What may truly be said of a planned picture, and whether two pictures can be told apart by what is said of them.

Captions are written from the plan: what is shown, how often, where, on which ground, whether it is a photograph. Each
names the thing itself; a caption that names only its group ("an animal") would be true of a fifth of the pictures it
is contrasted with, so groups stand behind the name ("A beagle, an animal.").
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from polymodal.errors import DataError
from recipes.default.dataset import questions, words
from recipes.default.dataset.questions import Scene
from recipes.default.dataset.sources import Source

_PLACES = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}


def captions_of(scene: Scene) -> list[str]:
    """Every caption of a picture.

    Args:
        scene: The picture's plan.

    Returns:
        True sentences, the shortest first, each once.
    """
    plain = _bare(questions.caption_of(scene))
    said = [plain]
    if scene.picture.card:
        colour = _ink(scene)
        said += [f"{plain} in {colour} letters"] if colour else []
        said += [f"A sign with {plain[0].lower()}{plain[1:]}"]
    elif len(scene.objects) > 1:
        said.append(_placed(scene))
    elif scene.layout == "side" and scene.side:
        said.append(f"{plain} {_PLACES[scene.side]}")
    if ground := scene.picture.ground.name:
        said += [f"{said[-1]} on {words.phrase('background', ground)}"] if not scene.picture.card else []
        said += [f"{plain} on {ground}"] if len(scene.objects) == 1 else []
    if len(scene.objects) == 1 and scene.count == 1:
        said += _of_one(scene.objects[0], plain)
    return list(dict.fromkeys(words.sentence(text) for text in said))


def full_caption(scene: Scene) -> str:
    """The caption that says most: places, and the ground where it has a name.

    Args:
        scene: The picture's plan.

    Returns:
        One sentence.
    """
    plain = _bare(questions.caption_of(scene))
    if len(scene.objects) > 1:
        plain = _placed(scene)
    elif scene.layout == "side" and scene.side:
        plain = f"{plain} {_PLACES[scene.side]}"
    ground = scene.picture.ground.name
    return words.sentence(f"{plain} on {words.phrase('background', ground)}" if ground and scene.objects else plain)


def confusable(first: Scene, second: Scene) -> bool:
    """Whether what is said of one picture could be said of the other.

    Args:
        first: A picture's plan.
        second: Another's.

    Returns:
        True unless they differ in the written word, the number of things, their places, what they are, or a named
        ground.
    """
    if first.picture.card or second.picture.card:
        return bool(
            first.picture.card
            and second.picture.card
            and first.picture.card.text.lower() == second.picture.card.text.lower()
        )
    if len(first.objects) != len(second.objects) or first.count != second.count:
        return False
    if len(first.objects) > 1 and first.layout != second.layout:
        return False
    if first.side and second.side and first.side != second.side:
        return False
    grounds = (first.picture.ground.name, second.picture.ground.name)
    if None not in grounds and grounds[0] != grounds[1]:
        return False
    return all(_alike(a, b) for a, b in zip(first.objects, second.objects, strict=True))


def translations(source: Source, languages: Sequence[str]) -> list[str]:
    """Captions in other languages, which only stamps have.

    Args:
        source: A picture source.
        languages: Codes of the stamps' files, such as "de" or "zh_CN".

    Returns:
        Short captions, in the order of the languages; a language that is missing is left out.

    Raises:
        DataError: A language is written as none is.
    """
    for language in languages:
        if not re.fullmatch(r"[a-z]{2,3}(_[A-Z]{2})?", language):
            raise DataError(f"language {language!r}: give codes as the stamps have them, such as de or zh_CN")
    if source.origin != "stamps" or not languages:
        return []
    lines = Path(source.path).with_suffix(".txt").read_text(encoding="utf-8", errors="replace").splitlines()
    told = dict(_TRANSLATED.findall("\n".join(lines)))
    short = [re.sub(r"\s*\([^)]*\)", "", told.get(language, "")).strip() for language in languages]
    return [text for text in short if 0 < len(text) <= 60]


_TRANSLATED = re.compile(r"^(\w+)(?:\.utf8)?=(.*)$", re.MULTILINE)


def _of_one(source: Source, plain: str) -> list[str]:
    """Further captions of one thing: its colour, other names, how it is made, the groups it belongs to."""
    said = []
    if source.origin != "shapes":
        said.append(f"A {'photo' if source.photo else 'drawing'} of {_lower(plain, source)}")
    noun = words.lexicon().get(source.noun or "")
    if noun is None:
        return [*said, f"{plain}, a shape"] if source.origin == "shapes" else said
    if source.colour and source.origin != "shapes" and source.colour not in plain.lower():
        said.append(words.phrase(noun.name, source.colour))
    said += [words.phrase(other) if noun.article == "a" else other for other in noun.synonyms[:2]]
    if noun.article == "a" and not plain.startswith(("Two ", "Some ")):
        said += [f"{plain}, {words.phrase(parent)}" for parent in words.ancestors(noun.name)[:1]]
    group = questions.category_phrase(source)
    return [*said, f"{plain}, {group}"] if group else said


def _placed(scene: Scene) -> str:
    """Several things and how they lie: left to right, or top to bottom."""
    names = [_name(source) for source in scene.objects]
    if len(names) == 2:
        text = f"{names[0]} above {names[1]}" if scene.layout == "above" else f"{names[0]} to the left of {names[1]}"
    else:
        order = "from top to bottom" if scene.layout == "above" else "from left to right"
        text = f"{', '.join(names[:-1])} and {names[-1]} {order}"
    return text[:1].upper() + text[1:]


def _alike(first: Source, second: Source) -> bool:
    """Whether one could be called the other."""
    if first.origin == second.origin == "shapes":
        return first.path == second.path
    if first.noun is None or second.noun is None:
        return first.caption == second.caption or first.group == second.group
    return words.related(first.noun, second.noun)


def _name(source: Source) -> str:
    if source.origin == "shapes":
        return words.phrase(source.noun or "", source.colour or "")
    return words.phrase(source.noun) if source.noun else _bare(source.caption).lower()


def _ink(scene: Scene) -> str | None:
    """The name of the letters' colour."""
    card = scene.picture.card
    return next((name for name, value in words.COLOURS.items() if card and value == card.ink), None)


def _lower(plain: str, source: Source) -> str:
    """A caption inside a sentence: its article is no longer a capital, a name still is."""
    first = plain.split(" ", 1)[0]
    common = first in ("A", "An", "Some", "Two", "The", "Our") or (source.noun or "").startswith(first.lower())
    return plain[0].lower() + plain[1:] if common else plain


def _bare(sentence: str) -> str:
    return sentence.rstrip(".!")
