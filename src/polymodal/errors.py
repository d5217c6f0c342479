"""The one exception that a user's mistake raises.

Everything that a person can put right (a missing file, a wrong key, an image that is no image) raises
`PolymodalError` with one line that names the thing at fault and what to do. The command line prints that line and
exits with status 2; `--debug` shows the traceback. Anything else that escapes is a bug of ours.

What is wrong with a row of training data has a code too (`data.check.rows.FAULTS`), given where the fault is found.
"""

import difflib
from collections.abc import Iterable


class PolymodalError(Exception):
    """A mistake the user can mend; the message is one line and says how."""

    code = ""  # What `polymodal data check` calls the fault

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code or self.code


class MediaError(PolymodalError):
    """An image, sound or video that cannot be read."""

    code = "unreadable-file"


class ConfigError(PolymodalError):
    """A configuration, recipe or command line that cannot be used."""


class CheckpointError(PolymodalError):
    """A model folder that is incomplete, damaged or made under another contract."""


class DataError(PolymodalError):
    """A data file or record that cannot be used."""

    code = "bad-field"


class EndpointError(PolymodalError):
    """A server that does not answer, or not with what was asked for."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> ConfigError:
    """Build the error for a name that is not in a table, with the closest names that are."""
    names = sorted(choices)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(repr(c) for c in close)}?" if close else f"known: {', '.join(names) or 'none'}"
    return ConfigError(f"unknown {kind} {name!r}; {hint}")
