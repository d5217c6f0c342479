"""What several verbs share: flags, opening a model, numbers and rows for people, printing safely on a terminal."""

import argparse
import base64
import io
import itertools
import json
import mimetypes
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

from polymodal.backends import load, load_renderer
from polymodal.backends.base import Backend
from polymodal.checkpoints.locate import USES, folder_here
from polymodal.checkpoints.parts import PARTS
from polymodal.cli.terminal import loading
from polymodal.config import parse_config
from polymodal.errors import ConfigError, MediaError, PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Audio, Image, Media, Message, as_messages, system, user, with_ocr
from polymodal.utils.extras import extra
from polymodal.utils.files import check_writable, home_path, regular_size, write_bytes

RESET, DIM, BOLD = "\x1b[0m", "\x1b[2m", "\x1b[1m"
DECIMAL = {" B": 10**9, " M": 10**6, " k": 10**3, "": 1}
BINARY = {" GiB": 2**30, " MiB": 2**20, " KiB": 2**10, " B": 1}
KINDS = {"image": ("image",), "video": ("video",), "audio": ("audio", "video"), "document": ("document", "image")}
"""Flags of media, and the kinds of files, by their names, that each takes."""
CHOICES = {"video": ("num_frames", "fps", "start", "end", "with_sound"), "document": ("pages", "text")}
"""What flags say of the videos and documents that are given."""
IMAGE_SAMPLING = ("guidance", "temperature", "top_k", "top_p")
PART_FLAGS = {"llm": "llm", "vision": "vision", "audio-tower": "audio"}
SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop")


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--model`."""
    parser.add_argument(
        "--model",
        default="default",
        metavar="NAME",
        help='"default", a model folder, or a hub id (default: the model that comes with polymodal)',
    )


def add_loading_arguments(parser: argparse.ArgumentParser, quantize: str | None = None) -> None:
    """Add the flags that `open_model` reads besides the model's name."""
    parser.add_argument("--device", help='"cpu", "cuda", "cuda:1" or "mps"; a GPU where there is one (default)')
    about = "float32, bfloat16 or float16, of the weights in memory (the folder's own choice, or what suits the device)"
    parser.add_argument("--dtype", metavar="TYPE", help=about)
    parser.add_argument("--revision", metavar="REV", help="of a hub id: a commit, tag or branch (the newest)")
    add_part_arguments(parser)
    # The values are those of `polymodal.modeling.quantization`, which loads torch.
    parser.add_argument(
        "--quantize",
        metavar="HOW",
        type=lambda how: None if how == "none" else how,
        default=quantize,
        help="on a CPU: auto, int8, int4, float32 (a graph: extra `fast`); on a GPU: nf4, int8-gpu; none leaves the "
        f"weights as they are (default: {quantize or 'none'})",
    )
    # The key has no flag, since command lines are seen by others.
    group = parser.add_argument_group(
        "endpoints", "a model named openai:MODEL is asked over the network; its key is read from OPENAI_API_KEY"
    )
    group.add_argument("--base-url", metavar="URL", help="the server, such as http://localhost:8000/v1")
    group.add_argument("--allow-http", action="store_true", help="send the key over http to another host")


def add_part_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say where the parts are that a model folder refers to."""
    group = parser.add_argument_group("parts", "of a model folder that was moved away from the parts it refers to")
    for flag, what in PART_FLAGS.items():
        about = f"where the {PARTS[what][1]} is now" + "; again for the next beside it" * (what == "vision")
        group.add_argument(f"--{flag}", dest=f"{what}_part", action="append", metavar="DIR", help=about)


def parts(args: argparse.Namespace) -> dict[str, str]:
    """The parts that the flags of `add_part_arguments` name; a flag that comes again is of the next vision tower."""
    given = {what: getattr(args, f"{what}_part", None) or [] for what in PART_FLAGS.values()}
    return {
        what if number == 1 else f"{what}_{number}": place
        for what, places in given.items()
        for number, place in enumerate(places, 1)
    }


def open_model(args: argparse.Namespace) -> Backend:
    """Open the model that the flags name."""
    options = {name: getattr(args, name) for name in ("revision", "dtype", "quantize", "base_url", "allow_http")}
    with loading(args.model) if folder_here(args.model).is_dir() else nullcontext():  # a download shows its own bars
        return load(args.model, args.device, parts=parts(args), **options)


def add_sampling_arguments(parser: argparse.ArgumentParser, max_new_tokens: int = 256) -> None:
    """Add the flags that become `GenerationParams`."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help="default: %(default)s")
    group.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    group.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens up to this share")
    group.add_argument("--top-k", type=int, default=0, help="sample from the K likeliest tokens; 0 for all (default)")
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 discourages repetition")
    group.add_argument("--seed", type=int, help="makes sampling repeatable")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="ends the answer; again for more")


def sampling_params(args: argparse.Namespace) -> GenerationParams:
    """Read the flags of `add_sampling_arguments`; a value out of range is a `ConfigError` that names its key."""
    given: dict[str, Any] = {name: getattr(args, name) for name in SAMPLING}
    if getattr(args, "modalities", None) is not None:
        image = {name: getattr(args, f"image_{name}") for name in IMAGE_SAMPLING}
        given["image"] = {name: value for name, value in image.items() if value is not None}
        given["modalities"] = [name.strip() for name in args.modalities.split(",")]
    return parse_config(GenerationParams, given, "command line")


def add_making_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of answers that hold images and sounds, and of where these go."""
    group = parser.add_argument_group("images and sounds", "what the model does not make, a renderer and a voice do")
    about = 'what the answer holds, in order: "text", "text,image,audio", "image,text", "image" (text)'
    group.add_argument("--modalities", metavar="LIST", help=about)
    group.add_argument("-o", "--output", metavar="FOLDER", help="where images and sounds are saved (this folder)")
    group.add_argument("--renderer", metavar="NAME", help="as for `polymodal draw` (the drawer of the package)")
    group.add_argument("--voice", metavar="NAME", help="as for `polymodal speak` (piper)")
    group.add_argument("--guidance", dest="image_guidance", type=float, metavar="G", help="1 for none (the model's)")
    group.add_argument("--image-temperature", type=float, metavar="T", help="0: the likeliest code (the model's)")
    group.add_argument("--image-top-k", type=int, metavar="K", help="of the likeliest codes (all)")
    group.add_argument("--image-top-p", type=float, metavar="P", help="of the likeliest codes up to this share (1)")


def open_with_experts(args: argparse.Namespace) -> Backend:
    """Open the model that the flags name, with the renderer and the voice that they name."""
    model = open_model(args)
    if args.renderer is not None:
        model.experts = {**model.experts, "image": load_renderer(args.renderer)}
    if args.voice is not None:
        from polymodal.speech import load_tts

        model.experts = {**model.experts, "audio": load_tts(args.voice)}
    return model


class SavedMedia:
    """Images and sounds of answers: saved as numbered files, images shown where the terminal can."""

    def __init__(self, args: argparse.Namespace | None) -> None:
        self.folder = Path(getattr(args, "output", None) or ".")

    def add(self, part: Media) -> str:
        """Save an image as PNG or a sound as WAV, under the next name that is free."""
        source: Any = part.source  # what was made: an image of Pillow, or a WAV file's bytes
        buffer = io.BytesIO(source if isinstance(part, Audio) else b"")
        name, ending = ("audio", "wav") if isinstance(part, Audio) else ("image", "png")
        if isinstance(part, Image):
            source.save(buffer, ending)
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = (self.folder / f"{name}-{number}.{ending}" for number in itertools.count(1))
        path = next(path for path in paths if not path.exists())
        write_file(str(path), buffer.getvalue())
        if isinstance(part, Image) and sys.stdout.isatty() and (shown := inline_image(buffer.getvalue(), os.environ)):
            print(shown)
        return str(path)


def inline_image(png: bytes, environment: Mapping[str, str]) -> str:
    """The characters that show an image in kitty's or iTerm2's protocol; none for other terminals."""
    data = base64.b64encode(png).decode()
    if environment.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"):
        return f"\x1b]1337;File=inline=1;size={len(png)}:{data}\a"
    if "KITTY_WINDOW_ID" not in environment and environment.get("TERM_PROGRAM") != "ghostty":
        return ""
    chunks = [data[start : start + 4096] for start in range(0, len(data), 4096)]
    heads = ["a=T,f=100," if not number else "" for number in range(len(chunks))]
    lasts = [int(number + 1 < len(chunks)) for number in range(len(chunks))]
    return "".join(f"\x1b_G{h}m={m};{chunk}\x1b\\" for h, m, chunk in zip(heads, lasts, chunks, strict=True))


class _AddMedium(argparse.Action):
    """Keeps media in the order in which their flags were given: (kind, file)."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), (self.const, values)])


def add_media_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `media` reads."""
    about = {
        "image": "an image; give the flag again for more",
        "video": "a video (its frames)",
        "audio": "a sound, or a video's",
        "document": "a PDF, TIFF or image, page by page",
    }
    for kind, text in about.items():
        parser.add_argument(
            f"--{kind}", action=_AddMedium, dest="media", const=kind, default=[], metavar="FILE", help=text
        )
    videos = parser.add_argument_group("videos", "which frames are taken; the model's own choice where nothing is said")
    videos.add_argument("--num-frames", type=int, metavar="N", help="as many, evenly spread, first and last among them")
    videos.add_argument("--fps", type=float, metavar="F", help="so many a second")
    videos.add_argument("--start", type=float, metavar="S", help="only from this second on")
    videos.add_argument("--end", type=float, metavar="S", help="only before this second")
    videos.add_argument("--with-sound", action="store_true", help="the video's sound too")
    documents = parser.add_argument_group("documents")
    documents.add_argument("--pages", metavar="WHICH", help='such as "1-3,7" or "5-" (all)')
    documents.add_argument("--text", choices=("layer", "ocr"), help="beside each page: the PDF's own text, or by OCR")
    reads = "beside each image and page what is read on it, as in TextVQA's prompts (extra `ocr`)"
    documents.add_argument("--ocr", action="store_true", help=reads)


def media(args: argparse.Namespace) -> list[Media]:
    """The media that the flags name, in order."""
    given = {kind for kind, _ in args.media}
    for kind, flags in CHOICES.items():
        for flag in flags if kind not in given else ():
            if (said := getattr(args, flag)) is not None and said is not False:  # 0 is said too
                raise ConfigError(f"--{flag.replace('_', '-')} is for {kind}s, and no --{kind} was given")
    if args.ocr and not given & {"image", "document"}:
        raise ConfigError("--ocr is for images and documents, and none was given")
    return [medium(kind, file, args) for kind, file in args.media]


def medium(kind: str, file: str, args: argparse.Namespace | None = None) -> Media:
    """One medium as the flags want it; a file of another kind is refused by its name."""
    part = _medium(kind, file, args)
    if getattr(args, "ocr", False) and kind in ("image", "document"):
        extra("rapidocr", "--ocr needs", "polymodal[ocr]")  # said before a model is opened
        return with_ocr(part)
    return part


def _medium(kind: str, file: str, args: argparse.Namespace | None) -> Media:
    found = (mimetypes.guess_type(file)[0] or "").replace("application/pdf", "document/pdf").partition("/")
    if use := USES.get(Path(file).suffix.lower()):
        raise ConfigError(f"{file}: no {kind}, but {use}")
    if os.path.isdir(home_path(file)):
        raise ConfigError(f"{file}: no {kind}, but a folder; a model is named with --model {file}")
    moving = kind == "video" and found[2] in ("gif", "webp", "apng", "png")
    if found[0] in KINDS and found[0] not in KINDS[kind] and not moving:
        what = {"image": "an image", "audio": "a sound"}.get(found[0], f"a {found[0]}")
        raise ConfigError(f"{file}: is {what}; give it with --{found[0]}")
    if kind in ("image", "audio"):
        return Image(file) if kind == "image" else Audio(file)
    asked = {name: getattr(args, name, None) for name in CHOICES[kind]}
    part = {"type": kind, kind: file, **{name: value for name, value in asked.items() if name != "with_sound"}}
    if asked.get("with_sound"):
        part["audio"] = True
    try:
        (message,) = as_messages([{"role": "user", "content": [part]}])
    except PolymodalError as error:
        raise ConfigError(f"{file}: {str(error).partition(f'part {kind!r}: ')[2]}") from None
    return message.media[0]


def add_question_arguments(parser: argparse.ArgumentParser, prompt_required: bool = True) -> None:
    """Add the flags that `question` reads."""
    goes_on = "" if prompt_required else "; a captioner goes on from it, and needs none"
    about = f"the question; media come before it, in the order of their flags{goes_on}"
    parser.add_argument("--prompt", required=prompt_required, help=about)
    parser.add_argument("--system", help="a system message")
    add_media_arguments(parser)


def sort_given(args: argparse.Namespace) -> None:
    """Put what stands without a flag in its place: files by their kind, and what is no file as the question."""
    found = []
    for item in args.given:
        kind = (mimetypes.guess_type(item)[0] or "").replace("application/pdf", "document").partition("/")[0]
        is_file = os.path.isfile(os.path.expanduser(item))  # of a long question too, unlike `Path.is_file`
        if is_file or (kind in KINDS and " " not in item) or os.path.isdir(os.path.expanduser(item)):
            if kind in KINDS and not is_file:
                raise ConfigError(f"{item}: no such file")
            if Path(item).suffix.lower() in USES or not is_file:
                medium("image", item)  # which says what it is
            if kind not in KINDS:
                raise ConfigError(f"{item}: is no image, video, sound or document by its name; say which with a flag")
            found.append((kind, item))
        elif args.prompt is not None:
            raise ConfigError(f"two questions were given, {args.prompt!r:.60} and {item!r:.60}; put one in quotes")
        else:
            args.prompt = item
    args.media = [*args.media, *found]


def question(args: argparse.Namespace) -> list[Message]:
    """The conversation that the flags ask for; the model opens and checks its media."""
    if args.prompt is None and not args.media:
        raise ConfigError("nothing is asked: give --prompt, --image or both; or --video, --audio or --document")
    text = [] if args.prompt is None else [args.prompt]
    return [*([system(args.system)] if args.system else []), user(*media(args), *text)]


def scaled(number: int, units: Mapping[str, int], digits: int = 4) -> str:
    """A number in the largest of `DECIMAL` or `BINARY` units that it reaches."""
    return next(f"{number / unit:.{digits}g}{name}" for name, unit in units.items() if number >= unit or unit == 1)


def aligned(rows: Sequence[tuple[str, str]], before: str = "", after: str = "") -> str:
    """Names and texts, a row a line, the texts under each other; the names stand between two styles."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{before}{name.ljust(width)}{after}  {text}" for name, text in rows)


def colour_wanted(choice: str, stream: TextIO) -> bool:
    """Whether to write colours: as told, else on a terminal that has not asked for none (NO_COLOR)."""
    if choice == "auto":
        return stream.isatty() and not os.environ.get("NO_COLOR")
    return choice == "always"


def printable(text: str) -> str:
    """Make control characters visible, newlines and tabs aside, so that text cannot steer the terminal."""
    return "".join(c if c in "\n\t" or not _steers(c) else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """A text as one line that cannot steer the terminal."""
    return printable(" ".join(text.split()))


def _steers(char: str) -> bool:
    code = ord(char)
    return code < 0x20 or 0x7F <= code < 0xA0 or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069


def print_json(document: Any) -> None:
    """Print a document as one line, as the characters that standard output has."""
    print(json.dumps(document, ensure_ascii="utf" not in (sys.stdout.encoding or "utf-8").lower()))


def stream_text(text: str) -> None:
    """Print a piece of an answer at once."""
    print(printable(text), end="", flush=True)


def check_files(args: argparse.Namespace, *flags: str) -> None:
    """Make sure that the files that flags name can be written, before anything is loaded for them."""
    for flag in flags:
        if (path := getattr(args, flag)) is not None:
            check_writable(Path(path), f"--{flag}: ", parents=False)


def check_media(parts: Sequence[Any]) -> None:
    """Make sure that the files of media are there, before anything is loaded or listened to for them."""
    for part in parts:
        source = getattr(part, "source", None)
        if isinstance(source, str) and ":" not in source:  # which URLs have
            regular_size(home_path(source), source, MediaError)


def check_wav(path: str) -> None:
    """Make sure that a file of speech is called what it is."""
    if Path(path).suffix.lower() != ".wav":
        raise ConfigError(f"{path}: speech is written as WAV; give the file a name that ends in .wav")


def write_file(path: str, data: bytes) -> None:
    """Write a file that a flag named."""
    write_bytes(Path(path), data)
    note(f"wrote {path}")


def report(error: Exception) -> None:
    """Print a mistake as its one line on standard error."""
    note(f"polymodal: error: {one_line(str(error))}")


def note(text: str) -> None:
    """Print a remark for a person on standard error, so that standard output stays clean."""
    print(text, file=sys.stderr, flush=True)
