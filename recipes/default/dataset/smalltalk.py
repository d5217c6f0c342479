"""Short text-only conversations, so that training on picture questions does not spoil the language model's manners."""

from __future__ import annotations

import functools
import random
from pathlib import Path


@functools.cache
def _texts() -> tuple[list[list[tuple[str, str]]], list[tuple[str, str]], dict[str, str]]:
    """Read `smalltalk.txt`: whole conversations, single facts, capitals by country."""
    chat: list[list[tuple[str, str]]] = []
    facts: list[tuple[str, str]] = []
    capitals: dict[str, str] = {}
    section, asked, open_chat = "", "", False
    for line in Path(__file__).with_name("smalltalk.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line.startswith("> "):
            asked = line[2:]
        elif line.startswith("< "):
            if section == "chat" and not open_chat:
                chat.append([])
                open_chat = True
            (chat[-1] if section == "chat" else facts).append((asked, line[2:]))
        elif not line:
            open_chat = False
        elif section == "capitals":
            country, _, capital = line.partition(" = ")
            capitals[country] = capital
    return chat, facts, capitals


def facts() -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Single questions with their answers, and capitals by country."""
    _, single, capitals = _texts()
    return list(single), dict(capitals)


def conversation(rng: random.Random) -> list[tuple[str, str]]:
    """Draw a text-only conversation of one to four turns.

    Args:
        rng: Draws it.

    Returns:
        (user, assistant) turns.
    """
    chat, facts, capitals = _texts()
    style = rng.random()
    if style < 0.4:
        return list(rng.choice(chat))
    turns: list[tuple[str, str]] = [("Hello!", "Hello! What would you like to know?")] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        draw = rng.random()
        if draw < 0.25:
            country = rng.choice(list(capitals))
            turns.append((f"What is the capital of {country}?", f"The capital of {country} is {capitals[country]}."))
        elif draw < 0.45:
            a, b = rng.randint(1, 10), rng.randint(1, 10)
            turns.append((f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."))
        else:
            turns.append(rng.choice(facts))
    if rng.random() < 0.3:
        turns.append(("Thanks!", "You are welcome!"))
    return turns
