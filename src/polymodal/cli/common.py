"""What several verbs share: flags, opening a model, numbers and rows for people, printing safely on a terminal."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from polymodal.backends import load
from polymodal.backends.base import Backend
from polymodal.config import parse_config
from polymodal.errors import ConfigError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Image, Message, system, user
from polymodal.utils.files import check_writable, write_bytes

RESET, DIM, BOLD = "\x1b[0m", "\x1b[2m", "\x1b[1m"
DECIMAL = {" B": 10**9, " M": 10**6, " k": 10**3, "": 1}
BINARY = {" GiB": 2**30, " MiB": 2**20, " KiB": 2**10, " B": 1}
SAMPLING = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--model`."""
    parser.add_argument(
        "--model",
        default="default",
        metavar="NAME",
        help='"default", a model folder, or a hub id (default: the model that comes with polymodal)',
    )


def add_loading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `open_model` reads besides the model's name."""
    parser.add_argument("--device", help='"cpu" or "cuda"; a GPU where there is one (default)')
    # The values are those of `polymodal.modeling.quantization`, which loads torch.
    parser.add_argument(
        "--quantize",
        metavar="HOW",
        help="int8 rounds the language model to 8 bits on a CPU; nf4 (bitsandbytes) and int8-gpu (torchao) on a GPU",
    )
    # The key has no flag, since command lines are seen by others.
    group = parser.add_argument_group(
        "endpoints", "a model named openai:MODEL is asked over the network; its key is read from OPENAI_API_KEY"
    )
    group.add_argument("--base-url", metavar="URL", help="the server, such as http://localhost:8000/v1")
    group.add_argument("--allow-http", action="store_true", help="send the key over http to another host")


def open_model(args: argparse.Namespace) -> Backend:
    """Open the model that the flags name."""
    return load(args.model, args.device, quantize=args.quantize, base_url=args.base_url, allow_http=args.allow_http)


def add_sampling_arguments(parser: argparse.ArgumentParser, max_new_tokens: int = 256) -> None:
    """Add the flags that become `GenerationParams`."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help="default: %(default)s")
    group.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    group.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens up to this share")
    group.add_argument("--top-k", type=int, default=0, help="sample from the K likeliest tokens; 0 for all (default)")
    group.add_argument("--repetition-penalty", type=float, default=1.0, help="above 1 discourages repetition")
    group.add_argument("--seed", type=int, help="makes sampling repeatable")


def sampling_params(args: argparse.Namespace) -> GenerationParams:
    """Read the flags of `add_sampling_arguments`; a value out of range is a `ConfigError` that names its key."""
    return parse_config(GenerationParams, {name: getattr(args, name) for name in SAMPLING}, "command line")


def add_question_arguments(parser: argparse.ArgumentParser, prompt_required: bool = True) -> None:
    """Add the flags that `question` reads."""
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image; give the flag again for more"
    )
    goes_on = "" if prompt_required else "; a captioner goes on from it, and needs none"
    about = f"the question; images come before it, in order{goes_on}"
    parser.add_argument("--prompt", required=prompt_required, help=about)
    parser.add_argument("--system", help="a system message")


def question(args: argparse.Namespace) -> list[Message]:
    """The conversation that the flags ask for; the processor opens and checks its images."""
    if args.prompt is None and not args.image:
        raise ConfigError("nothing is asked: give --prompt, --image or both")
    text = [] if args.prompt is None else [args.prompt]
    return [*([system(args.system)] if args.system else []), user(*map(Image, args.image), *text)]


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
