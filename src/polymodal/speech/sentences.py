"""Sentences out of a text that comes piece by piece; how it was cut into pieces changes nothing.

    splitter = SentenceSplitter()
    for delta in stream:
        for sentence in splitter.push(delta): ...
    for sentence in splitter.finish(): ...

A place is decided only once enough of what follows is there. Where in doubt a sentence goes on: speech then lacks a
pause, which disturbs less than one too many.
"""

import re

LONGEST = 300
"""Characters of a sentence; a longer one is cut at a comma, else between words."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NEVER = _words(
    """
    mr mrs ms mx dr prof st gen sen rep gov capt lt col sgt rev hon mt messrs vs viz cf approx dept est ave blvd e.g
    i.e eg ie z.b d.h bzw ca u.a mme mlle
    """
)
"""Abbreviations that no sentence ends with."""
_BEFORE_NUMBER = _words(
    "no nos nr fig figs eq sec ch p pp vol art op ver jan feb mar apr jun jul aug sep sept oct nov dec"
)
"""Abbreviations where a number follows, and words or ends of sentences elsewhere."""
_MAYBE = _words("etc inc ltd co corp jr sr bros a.m p.m ph.d m.d b.a m.a d.c al ed")
"""Abbreviations that a sentence may end with; then a capital follows."""
_STARTERS = _words(
    """
    the a an it he she they we i you this that these those there but and so in on at if when what who why how then
    however its his her their our my is are was do does no yes as for to after before
    """
)
"""Words that begin a sentence after initials, where a capital may as well be a name."""

ABBREVIATIONS = _NEVER | _BEFORE_NUMBER
"""Words whose dot is none of a sentence."""

_MARK = re.compile(r"[.!?…‼⁇؟।۔。！？｡]{1,8}[\"'’”»)\]」』）】》]{0,4}|\n\n?")
_WIDE = re.compile(r"[।۔。！？｡]")
_ITEM = re.compile(r"(?:[-*•–]|\d{1,3}[.)])\s")
_CLAUSE = re.compile(r"[,;:—)]\s|[，；：、]")
_OPENING = "\"'“‘«„([{"
_WORD = re.compile(r"[^\W\d_]{1,12}")


class SentenceSplitter:
    """Cuts a stream of text into sentences."""

    def __init__(self, longest: int = LONGEST) -> None:
        self.longest = longest
        self._text = ""

    def push(self, delta: str) -> list[str]:
        """Take more text; the sentences that are whole with it."""
        return self._cut(delta, final=False)

    def finish(self) -> list[str]:
        """The sentences that are left at the end."""
        return self._cut("", final=True)

    def _cut(self, delta: str, final: bool) -> list[str]:
        # White space has one form, however it comes: a blank line, a line's end, or a space.
        text = re.sub(r"[^\S\n]+", " ", self._text + delta)
        text = re.sub(r" ?\n[ \n]*", lambda run: "\n\n" if run[0].count("\n") > 1 else "\n", text).lstrip()
        found = []
        while text and (end := self._end(text, final)) is not None:
            if sentence := " ".join(text[:end].split()):
                found.append(sentence)
            text = text[end:].lstrip()
        self._text = text
        return found

    def _end(self, text: str, final: bool) -> int | None:
        """Where the first sentence ends; None where that is not known yet."""
        for mark in _MARK.finditer(text, 0, self.longest):
            ends = _ends(text, mark, final)
            if ends is None:
                return None
            if ends:
                return mark.end()
        if len(text) > self.longest:
            cuts = [cut.end() for cut in _CLAUSE.finditer(text, self.longest // 2, self.longest)]
            return cuts[-1] if cuts else text.rfind(" ", 1, self.longest) + 1 or self.longest
        return len(text) if final else None


def _ends(text: str, mark: re.Match[str], final: bool) -> bool | None:
    """Whether a sentence ends with a mark; None where more text must be seen first."""
    rest = text[mark.end() :]
    if mark[0].startswith("\n"):  # a line: of a list, or wrapped
        if len(rest) < 5 and not final:
            return None
        return rest.startswith("\n") or mark[0] == "\n\n" or bool(_ITEM.match(rest))
    if not rest:
        return True if final else None
    if _WIDE.search(mark[0]):
        return True
    if not rest[0].isspace():
        return False
    after = rest.lstrip().lstrip(_OPENING)
    if not after:
        return True if final else None
    if rest.startswith("\n\n"):
        return True
    if mark[0][0] in "!?‼⁇؟":
        return not (after[0].islower() and mark[0][-1] not in ".!?…‼⁇؟")
    if after[0].islower():
        return False
    if mark[0][0] == "…" or len(mark[0]) > 1:
        return True
    before = text[: mark.start()]
    word = re.search(r"[\w.&]*$", before[-24:])
    token = word[0].lower() if word is not None else ""
    if token.isdecimal() and not before[: -len(token)].strip():
        return False  # the number of a list's item
    if token in _NEVER:
        return False
    if token in _BEFORE_NUMBER:
        return not after[0].isdecimal()
    if token in _MAYBE:
        return True  # no small letter follows
    if re.fullmatch(r"(?:[^\W\d_]\.)*[^\W\d_]", token):  # initials, U.S.
        following = _WORD.match(after)
        if following is None:
            return True
        if following.end() == len(after) and len(following[0]) < 12 and not final:
            return None
        return following[0].lower() in _STARTERS
    return True
