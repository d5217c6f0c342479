"""One row through reader, decoder and processor, as in training; what is wrong with it comes back as findings.

Beyond what would stop training, this finds what would silently teach something wrong: empty answers, answers that
begin with a space, tokens of a chat template inside the text, images of one pixel.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from polymodal.data.readers.base import RawRow
from polymodal.data.readers.conversations import Record, read_record
from polymodal.errors import ConfigError, MediaError, PolymodalError
from polymodal.media.audio import open_audio
from polymodal.media.image import open_image
from polymodal.media.video import probe
from polymodal.messages import Audio, Image, Message, Part, Text, Video
from polymodal.processing.document_pages import MAX_PAGES, expand_documents
from polymodal.processing.processor import Processor

Severity = Literal["drop", "warn"]


@dataclass(frozen=True)
class Fault:
    """A kind of mistake."""

    severity: Severity  # Whether the row is dropped
    title: str  # What is wrong, in a few words
    advice: str  # What to do


@dataclass(frozen=True)
class Finding:
    """A mistake in a row."""

    code: str  # A key of `FAULTS`
    reason: str  # What was found there, in one line


# "drop" is a row that training cannot use, or that would teach something wrong; it must go or be repaired. "warn" is a
# row that trains, and that its owner should look at. Codes are stable: scripts may rely on them.
FAULTS: dict[str, Fault] = {
    # The text of the file.
    "broken-json": Fault("drop", "not valid JSON", "mend or remove the row; often the file was cut while copying"),
    "not-utf8": Fault("drop", "not UTF-8 text", "write the file again as UTF-8"),
    "broken-row": Fault("drop", "a row that cannot be read", "look at the reason given"),
    # The form of the row.
    "not-an-object": Fault("drop", "not a JSON object", "make every row an object with conversations or messages"),
    "unknown-form": Fault("drop", "no known form", "give exactly one of conversations (LLaVA) and messages"),
    "bad-field": Fault("drop", "a field of the wrong type", "give text where text is expected, a path for an image"),
    "no-turns": Fault("drop", "no turns", "give at least a question and an answer"),
    "unknown-role": Fault("drop", "unknown role", "use human and gpt, or user and assistant"),
    "role-order": Fault("drop", "roles not in turn", "start with the user, then let user and assistant take turns"),
    "placeholder-count": Fault("drop", "placeholders and media differ", "write <image>, <video>, ... once for each"),
    "unsupported-key": Fault("drop", "a key that cannot be followed", "write it into the text, or take it out"),
    "misplaced-medium": Fault(
        "drop", "a medium outside the user's turns", "move it to a question, or train a model that makes images"
    ),
    # What is said.
    "no-answer": Fault("drop", "no answer", "add the assistant's turn; there is nothing to learn from a question"),
    "empty-answer": Fault("drop", "an empty answer", "write the answer; training on it teaches the model to be silent"),
    "empty-question": Fault("drop", "an empty question", "write the question, or join the turns around it"),
    "unanswered": Fault("warn", "the last question has no answer", "add the answer or take the question out"),
    "outer-space": Fault("warn", "space around an answer", "trim it; the model learns to say it"),
    "control-token": Fault(
        "warn", "a chat template's token in the text", "take it out; it is read as plain text, never as the token"
    ),
    "other-placeholder": Fault("warn", "a placeholder of another tool", "write <image>; this is read as plain text"),
    "bad-characters": Fault("warn", "damaged or control characters", "convert the text from its true encoding"),
    # Media.
    "missing-file": Fault("drop", "a file is missing", "check the path and --image-root"),
    "outside-root": Fault("drop", "a path leaves the image root", "keep media inside --image-root, without `..`"),
    "remote-file": Fault("drop", "a URL", "download the file and give its path; nothing is fetched while training"),
    "empty-file": Fault("drop", "an empty file", "fetch the file again"),
    "damaged-image": Fault("drop", "a damaged image", "fetch the file again; it is cut off or changed"),
    "not-an-image": Fault("drop", "not an image", "often a saved error page or a Git LFS pointer; fetch it again"),
    "too-many-pixels": Fault("drop", "too many pixels or bytes", "scale the image down"),
    "unreadable-file": Fault("drop", "a file that cannot be read", "look at the reason given"),
    "damaged-video": Fault("drop", "a video that cannot be read", "fetch it again, or convert it to MP4 and cut it"),
    "damaged-sound": Fault("drop", "a sound that cannot be read", "fetch it again, or convert it to WAV and cut it"),
    "damaged-document": Fault("drop", "a document that cannot be read", "fetch it again, or name fewer `pages` of it"),
    "bad-setting": Fault("drop", "frames, times or pages that there are not", "look at the reason given"),
    "unsupported-medium": Fault("drop", "a medium that the model cannot take", "leave it out or choose another model"),
    "tiny-image": Fault("warn", "a side of 3 pixels or fewer", "often a tracking pixel in place of the image"),
    "thin-image": Fault("warn", "a side 100 times the other", "crop it; little is left of it at the model's size"),
    # As the model sees it.
    "template-refused": Fault("drop", "the chat template cannot show it", "look at the reason given"),
    "too-long": Fault("drop", "more tokens than allowed", "split the conversation or raise data.max_length"),
    "dropped-reasoning": Fault(
        "warn",
        "reasoning that the template leaves out",
        "it is not trained; end the row there and give the rest its own",
    ),
    "nothing-trained": Fault("drop", "no trained token", "give it an answer that the template trains"),
    # Beside the other rows.
    "duplicate-row": Fault("drop", "said before, about the same media", "keep the first; repeat in the recipe"),
    "duplicate-id": Fault("warn", "an id used before", "give every row an id of its own"),
}

OTHERS = re.compile(
    r"""(?:Picture\ \d+:\ ?)?<(?P<tag>img|image)>(?P<path>(?:(?!</?(?P=tag)>)[^\n]){0,999})</(?P=tag)>
    | </(?:img|image)> | <img(?:\s[^<>\n]{0,999})?/?> | (?!(?-i:<image>))<image\s*/?>
    | <(?:image|img)[\ _:-]?\d{1,4}\ ?/?> | <image[_-]?(?:here|token|placeholder|soft_token|pad)>
    | <\|(?:vision_start|image_start|begin_of_image)\|>(?:<\|(?:image|image_pad|patch)\|>)*
        <\|(?:vision_end|image_end|end_of_image)\|>
    | <\|(?:image|img|image_pad|image_placeholder)[\ _-]?\d{0,4}\|>
    | <start_of_image>(?:(?:<image_soft_token>)*<end_of_image>)?
    | <(?:img_context|__media__)> | \[(?:img|image)[\ _-]?\d{0,4}\](?:\[img_end\])?""",
    re.IGNORECASE | re.VERBOSE,
)
"""An image as other tools write it: Qwen, Phi, MiniCPM, Mistral, XComposer, Gemma, InternVL, HTML."""
TINY_SIDE = 3
THIN = 100
_BAD_CHARACTERS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd\ud800-\udfff]|\u00e2\u20ac[\u2122\u0153\u201c\u201d\u02dc]|\u00c3[\u0080-\u00bf]"
)


@dataclass(frozen=True)
class Row:
    """One row of a data file, read or not."""

    raw: RawRow  # As it stands in the file, or as it was repaired
    record: Record | None  # What was read; None where it could not be
    findings: tuple[Finding, ...] = ()  # Why not

    @property
    def id(self) -> str:
        """The row's id, as far as it is known."""
        if self.record is not None:
            return self.record.id
        given = self.raw.data.get("id") if isinstance(self.raw.data, dict) else None
        return "" if given is None else str(given)

    @property
    def where(self) -> str:
        """File and place, for people."""
        where, line = self.raw.where, f"line {self.raw.line}"
        return where if not self.raw.line or where.endswith(line) else f"{where}, {line}"


@dataclass(frozen=True)
class Inspected:
    """What one record comes to."""

    findings: tuple[Finding, ...] = ()  # What is wrong with it
    tokens: int = 0  # Tokens after tiling; 0 where it could not be tokenised
    targets: int = 0  # Trained tokens
    tiles: int = 0  # Tiles of all its images
    sizes: tuple[tuple[int, int], ...] = ()  # Height and width of each image
    videos: tuple[tuple[int, float], ...] = ()  # Frames and seconds of each video
    sounds: tuple[tuple[float, int], ...] = ()  # Seconds and samples a second of each sound
    pages: tuple[int, ...] = ()  # Pages that are read of each document
    content: bytes = b""  # Hash of its text and decoded images; b"" where it could not be tokenised


def read_row(raw: RawRow) -> Row:
    """Read a row's data; what the reader complains about becomes a finding."""
    try:
        if raw.error is not None:
            raise raw.error
        record = read_record(raw.data, raw.root, raw.where, default_id=raw.id, form=raw.form)
    except PolymodalError as error:
        return Row(raw, None, (Finding(error.code, str(error).removeprefix(f"{raw.where}: ")),))
    return Row(raw, replace(record, kind=record.kind or raw.kind))


def make_inspector(processor: Processor, max_length: int) -> Callable[[Record], Inspected]:
    """Prepare the inspection of records as one model would see them."""
    tokenizer = processor.tokenizer
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    tokens = sorted((re.escape(token) for token in added if len(token) > 2), key=len, reverse=True)
    control = re.compile("|".join(tokens)) if tokens else None

    def inspect(record: Record) -> Inspected:
        findings = list(_text_findings(record.messages, control))
        messages, media = _decode(record.messages, processor)
        findings += media.findings
        for height, width in media.sizes:
            short, long = sorted((height, width))
            if short <= TINY_SIDE:
                findings.append(Finding("tiny-image", f"{width} × {height} pixels"))
            elif long >= THIN * short:
                findings.append(Finding("thin-image", f"{width} × {height} pixels"))
        if media.findings:
            return replace(media, findings=tuple(findings))
        try:
            sample = processor(messages, id=record.id, pixels=False)
        except PolymodalError as error:
            kinds = {type(part) for message in messages for part in message.media} - {Image}
            is_sound, is_config = kinds == {Audio}, isinstance(error, ConfigError)
            code = _code_of(error, "audio" if is_sound else "video") if kinds and not is_config else ""
            code = code or ("bad-setting" if kinds and is_config else error.code or "template-refused")
            return replace(media, findings=(*findings, Finding(code, str(error))))
        if any("reasoning_content" in message.fields or "</think>" in message.text for message in messages[:-1]):
            seen = processor.seen(messages)
            dropped = processor.template.render(seen, [plan.num_tokens for plan in sample.plans]).dropped
            if dropped:
                reason = f"turn {dropped[0] + 1}: its reasoning is left out, since a question follows"
                findings.append(Finding("dropped-reasoning", reason))
        length, targets = sample.input_ids.numel(), int(sample.loss_mask[1:].sum())
        if length > max_length:
            findings.append(Finding("too-long", f"{length} tokens, at most {max_length} are allowed"))
        elif length > processor.longest(max_length):
            findings.append(Finding("too-long", f"{length} tokens, the model has {processor.positions} positions"))
        # A row without an answer has been found already; here is one whose answer the template does not train.
        if not targets and not any(f.code == "no-answer" for f in findings):
            findings.append(Finding("nothing-trained", f"{length} tokens, none of them trained"))
        return replace(
            media,
            findings=tuple(findings),
            tokens=length,
            targets=targets,
            tiles=sum(plan.num_tiles for plan in sample.plans),
            content=_content(record.messages, sample.media_keys),
        )

    return inspect


def _text_findings(messages: Sequence[Message], control: re.Pattern[str] | None) -> Iterator[Finding]:
    """What is wrong with what is said."""
    if not any(message.role == "assistant" for message in messages):
        yield Finding("no-answer", "no turn of the assistant")
    elif messages[-1].role != "assistant":
        yield Finding("unanswered", f"turn {len(messages)} is the {messages[-1].role}'s and the last")
    codes = set()
    for number, message in enumerate(messages, start=1):
        spot, text = f"turn {number} ({message.role})", message.text
        whole = f"{text}{message.reasoning_content}"
        found = []
        if message.role == "assistant" and message.train and text != text.strip():
            found.append(Finding("outer-space", f"{spot} begins or ends with space: {short(text)}"))
        if message.role == "user" and (match := OTHERS.search(text)):
            found.append(Finding("other-placeholder", f"{spot} contains {short(match[0])}"))
        if control is not None and (match := control.search(whole)):
            found.append(Finding("control-token", f"{spot} contains {match[0]}"))
        if match := _BAD_CHARACTERS.search(whole):
            found.append(Finding("bad-characters", f"{spot} contains {match[0]!a} at character {match.start() + 1}"))
        yield from (finding for finding in found if finding.code not in codes)
        codes |= {finding.code for finding in found}


_DAMAGED = {"video": "damaged-video", "audio": "damaged-sound", "document": "damaged-document"}


def _code_of(error: PolymodalError, kind: str) -> str:
    """The code of an error about a medium, where it says no more than that it cannot be read."""
    return _DAMAGED.get(kind, error.code) if error.code == MediaError.code else error.code


def _decode(messages: Sequence[Message], processor: Processor) -> tuple[list[Message], Inspected]:
    """Open every medium once: the messages with images and pages in memory, and what was found and could not be."""
    config = processor.config
    rules = {"image": config.image, "video": config.video, "audio": config.audio, "document": config.image}
    sizes, videos, sounds, pages, broken = [], [], [], [], []  # type: ignore[var-annotated]

    def opened(part: Part) -> tuple[Part, ...]:
        kind = type(part).__name__.lower()
        if isinstance(part, Text) or rules[kind] is None:
            return (part,)
        try:
            if isinstance(part, Image) and config.image is not None:
                image = open_image(part.source, background=config.image.background, max_pixels=config.image.max_pixels)
                sizes.append((image.height, image.width))
                return (Image(image),)
            if isinstance(part, Video):
                film = probe(part.source)
                videos.append((film.frames or 0, film.duration or 0.0))
            elif isinstance(part, Audio) and config.audio is not None:
                sound = open_audio(part.source, video=True, max_seconds=config.audio.max_seconds)
                sounds.append((sound.seconds, sound.source_rate))
            else:
                read = expand_documents([Message("user", (part,))], max_pages=MAX_PAGES - sum(pages))[0]
                pages.append(len(read.media))
                return read.parts
        except MediaError as error:
            broken.append(Finding(_code_of(error, kind), str(error)))
        except ConfigError as error:
            broken.append(Finding("bad-setting", str(error)))
        return (part,)

    result = [replace(each, parts=tuple(new for part in each.parts for new in opened(part))) for each in messages]
    kinds = {type(part).__name__.lower() for message in messages for part in message.media}
    if refused := sorted(kind for kind in kinds if rules[kind] is None):
        broken.append(Finding("unsupported-medium", f"the model takes no {' and no '.join(refused)}"))
    found = (tuple(sizes), tuple(videos), tuple(sounds), tuple(pages))
    return result, Inspected(tuple(broken), 0, 0, 0, *found)


def _content(messages: Sequence[Message], media_keys: Sequence[str]) -> bytes:
    """Hash what a row says and shows; the names of its files do not count."""
    said = [
        [m.role, m.train, [part.text if isinstance(part, Text) else None for part in m.parts], m.fields]
        for m in messages
    ]
    return hashlib.sha256(json.dumps([said, list(media_keys)]).encode()).digest()[:16]


def short(text: str, limit: int = 60) -> str:
    """Cut a text for a report."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
