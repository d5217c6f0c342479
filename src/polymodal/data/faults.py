"""What can be wrong with a row of training data: one code each, how grave it is, and what to do about it.

"drop" is a row that training cannot use, or that would teach something wrong; it must go or be repaired. "warn" is a
row that trains, and that its owner should look at. Codes are stable: scripts may rely on them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Severity = Literal["drop", "warn"]


@dataclass(frozen=True)
class Fault:
    """A kind of mistake.

    Attributes:
        severity: Whether the row is dropped.
        title: What is wrong, in a few words.
        advice: What to do.
    """

    severity: Severity
    title: str
    advice: str


@dataclass(frozen=True)
class Finding:
    """A mistake in a row.

    Attributes:
        code: A key of `FAULTS`.
        reason: What was found there, in one line.
    """

    code: str
    reason: str


FAULTS: dict[str, Fault] = {
    # The text of the file.
    "broken-json": Fault("drop", "not valid JSON", "mend or remove the row; often the file was cut while copying"),
    "not-utf8": Fault("drop", "not UTF-8 text", "write the file again as UTF-8"),
    "broken-row": Fault("drop", "a row that cannot be read", "look at the reason given"),
    # The form of the row.
    "not-an-object": Fault("drop", "not a JSON object", "make every row an object with conversations or messages"),
    "unknown-form": Fault("drop", "no known form", "give exactly one of conversations (LLaVA) and messages"),
    "bad-field": Fault("drop", "a field of the wrong type", "give text where text is expected, a path for a picture"),
    "no-turns": Fault("drop", "no turns", "give at least a question and an answer"),
    "unknown-role": Fault("drop", "unknown role", "use human and gpt, or user and assistant"),
    "role-order": Fault("drop", "roles not in turn", "start with the user, then let user and assistant take turns"),
    "placeholder-count": Fault("drop", "placeholders and pictures differ", "write <image> once for each picture"),
    "misplaced-medium": Fault("drop", "a picture outside the user's turns", "move <image> to a question"),
    # What is said.
    "no-answer": Fault("drop", "no answer", "add the assistant's turn; there is nothing to learn from a question"),
    "empty-answer": Fault("drop", "an empty answer", "write the answer; training on it teaches the model to be silent"),
    "empty-question": Fault("drop", "an empty question", "write the question, or join the turns around it"),
    "unanswered": Fault("warn", "the last question has no answer", "add the answer or take the question out"),
    "outer-space": Fault("warn", "space around an answer", "trim it; the model learns to say it"),
    "control-token": Fault(
        "warn", "a chat template's token in the text", "take it out; it is read as plain text, never as the token"
    ),
    "bad-characters": Fault("warn", "damaged or control characters", "convert the text from its true encoding"),
    # Media.
    "missing-file": Fault("drop", "a file is missing", "check the path and --image-root"),
    "outside-root": Fault("drop", "a path leaves the image root", "keep media inside --image-root, without `..`"),
    "remote-file": Fault("drop", "a URL", "download the file and give its path; nothing is fetched while training"),
    "empty-file": Fault("drop", "an empty file", "fetch the file again"),
    "damaged-picture": Fault("drop", "a damaged picture", "fetch the file again; it is cut off or changed"),
    "not-a-picture": Fault("drop", "not a picture", "often a saved error page or a Git LFS pointer; fetch it again"),
    "too-many-pixels": Fault("drop", "too many pixels or bytes", "scale the picture down"),
    "unreadable-file": Fault("drop", "a file that cannot be read", "look at the reason given"),
    "unsupported-medium": Fault("drop", "a medium that the model cannot take", "leave it out or choose another model"),
    "tiny-picture": Fault("warn", "a side of 3 pixels or fewer", "often a tracking pixel in place of the picture"),
    "thin-picture": Fault("warn", "a side 100 times the other", "crop it; little is left of it at the model's size"),
    # As the model sees it.
    "template-refused": Fault("drop", "the chat template cannot show it", "look at the reason given"),
    "too-long": Fault("drop", "more tokens than allowed", "split the conversation or raise data.max_length"),
    "nothing-trained": Fault("drop", "no trained token", "give it an answer that the template trains"),
    # Beside the other rows.
    "duplicate-row": Fault("drop", "said before, about the same pictures", "keep the first; repeat in the recipe"),
    "duplicate-id": Fault("warn", "an id used before", "give every row an id of its own"),
}

# Readers and decoders say what is wrong in words for people; these words decide the code.
_READER_CODES = (
    ("expected a JSON object, found", "not-an-object"),
    ("has both `conversations` and `messages`", "unknown-form"),
    ("expected `conversations`", "unknown-form"),
    ("must be a list of turns", "no-turns"),
    ("unknown role", "unknown-role"),
    ("placeholders but", "placeholder-count"),
    ("media can only be in the user's turns", "misplaced-medium"),
    ("must take turns|starts with the assistant|only a system message", "role-order"),
    ("leaves the folder", "outside-root"),
    ("", "bad-field"),
)
_MEDIA_CODES = (
    ("no such file", "missing-file"),
    ("remote fetch is off", "remote-file"),
    (r"\(0 bytes\)", "empty-file"),
    ("is damaged", "damaged-picture"),
    ("are allowed; (scale it down|make the file smaller)", "too-many-pixels"),
    ("not a picture|allowed are PNG|convert it to|web page|LFS pointer", "not-a-picture"),
    ("no vision encoder|not supported yet", "unsupported-medium"),
    ("", "unreadable-file"),
)


def reader_code(error: str) -> str:
    """The code of what `formats.read_record` complained about."""
    return _first(_READER_CODES, error)


def media_code(error: str) -> str:
    """The code of what a medium's decoder complained about."""
    return _first(_MEDIA_CODES, error)


def _first(codes: tuple[tuple[str, str], ...], error: str) -> str:
    return next(code for pattern, code in codes if re.search(pattern, error))
