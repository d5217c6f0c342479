"""What a person at a terminal types: files dropped or pasted into a line, Tab, and a sign that something is loading."""

import glob
import mimetypes
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from urllib.parse import unquote, urlsplit

MEDIA = ("image", "video", "audio", "document")
WORD = re.compile(r"""'[^']*'|"[^"]*"|(?:\\.|[^\s\\])+|\\""")
"""A word as shells read one: quoted, or with escaped spaces."""
ENDS = "?.,;:!)"


def plain_path(word: str) -> str:
    """A path as terminals paste it (quoted, escaped, as a file:// URL) the way `open` takes it."""
    word = word.strip()
    if os.path.exists(os.path.expanduser(word)):
        return os.path.expanduser(word)
    if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"":
        word = word[1:-1]
    elif os.name != "nt":
        word = re.sub(r"\\(.)", r"\1", word)
    if word.startswith("file://"):
        word = unquote(urlsplit(word).path)
        word = word[1:] if re.match(r"/[A-Za-z]:/", word) else word
    return os.path.expanduser(word)


def kind_of(path: str) -> str | None:
    """The kind of medium that a file is by its name; None for others."""
    kind = (mimetypes.guess_type(path)[0] or "").replace("application/pdf", "document").partition("/")[0]
    return kind if kind in MEDIA else None


def dropped(line: str) -> tuple[list[tuple[str, str]], str]:
    """The files of media in a line, as (kind, path), and the question; of one named in passing the name stays."""
    found: list[tuple[str, str]] = []

    def take(match: re.Match[str]) -> str:
        word = match[0]
        ends = "" if word[0] in "'\"" else word[len(word.rstrip(ENDS)) :]
        for tail in dict.fromkeys(("", ends)):
            path = plain_path(word.removesuffix(tail))
            if (kind := kind_of(path)) is not None and os.path.isfile(path):
                found.append((kind, path))
                placed = word[0] in "'\"" or os.sep in word or "/" in word
                return "" if placed and not tail else os.path.basename(path) + tail
        return word

    whole = plain_path(line)  # a path with spaces that nobody quoted
    if (kind := kind_of(whole)) is not None and os.path.isfile(whole):
        return [(kind, whole)], ""
    text = WORD.sub(take, line)
    return found, " ".join(text.split()) if found else line


def completions(line: str, commands: Sequence[str]) -> list[str]:
    """What may stand in the place of the last word of a line: commands where it begins with one, else paths."""
    word = re.search(r"(?:\\.|[^\s\\])*$", line)
    last = word[0] if word else ""
    names = [f"{command} " for command in commands if command.startswith(line)] if line == last and line else []
    path = re.sub(r"\\(.)", r"\1", last)
    for found in sorted(glob.glob(glob.escape(os.path.expanduser(path)) + "*")) if path or line else ():
        shown = path + found[len(os.path.expanduser(path)) :]
        shown += "/" if os.path.isdir(found) else " "
        names.append(re.sub(r"([\s'\"\\])(?=.)", r"\\\1", shown))
    return names


def edit_lines(commands: Sequence[str]) -> None:
    """Line editing, history, and completion with Tab, where Python has them."""
    with suppress(ImportError):
        import readline

        def complete(_: str, number: int) -> str | None:
            line = readline.get_line_buffer()[: readline.get_endidx()]
            names = completions(line, commands)
            begin = len(re.search(r"(?:\\.|[^\s\\])*$", line)[0])  # type: ignore[index]
            kept = begin - (
                readline.get_endidx() - readline.get_begidx()
            )  # of the word, what stands before its delimiter
            return names[number][kept:] if number < len(names) else None

        readline.set_completer(complete)
        readline.set_completer_delims(" \t\n")
        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


@contextmanager
def loading(name: str) -> Iterator[None]:
    """On a terminal, a line with the seconds that something takes, which goes when it is done."""
    if not sys.stderr.isatty():
        yield
        return
    done, began = threading.Event(), time.monotonic()

    def tell() -> None:
        signs = "|/-\\"
        while True:
            seconds = time.monotonic() - began
            sys.stderr.write(f"\r\x1b[2m{signs[int(8 * seconds) % 4]} loading {name}, {seconds:.0f} s\x1b[0m\x1b[K")
            sys.stderr.flush()
            if done.wait(0.12):
                return

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
