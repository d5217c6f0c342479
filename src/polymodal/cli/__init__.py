"""The `polymodal` command: one module per verb, each with `add_arguments(parser)` and `run(args) -> int`.

Only the module of the verb that is asked for is imported, so `--help` answers at once. A mistake of the user's is one
line on standard error and exit status 2; `--debug`, before or after the verb, shows the traceback.
"""

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Container, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NoReturn

from polymodal.errors import ConfigError, PolymodalError

VERBS = {
    "chat": "talk with a model about images, videos, sounds and documents",
    "generate": "ask one question and print the answer",
    "inspect": "show what the model sees and hears: tiles, frames, sounds, tokens (runs no model)",
    "env": "print versions, devices, folders and whether the default language model is there",
    "fetch": "fetch the default language model and its ears once (about 230 MB)",
    "plan": "say what a recipe or model will need: tokens, memory, steps, hours (loads no weights)",
    "init": "begin a model of your own: recipes for your parts and data, to be changed",
    "config": "print every key of a recipe with its type, default and meaning",
    "check": "say what is wrong with a recipe, all of it at once (loads no weights)",
    "train": "run a training recipe or pipeline",
    "eval": "score a model on held-out questions, beside an image-blind control",
    "embed": "put images and texts into one space and say how close they are",
    "ocr": "read the text of images and PDFs: lines with boxes and confidences, in reading order",
    "talk": "ask a model aloud and hear its answer, from a file or a microphone",
    "transcribe": "write down what is said in sounds and videos",
    "speak": "speak a text into a WAV file",
    "draw": "draw an image from a prompt, with a pipeline of diffusers or an images endpoint",
    "animate": "make a video from a prompt, or of slides and a voice",
    "serve": "answer over HTTP as OpenAI's chat API does, on this machine or, with a key, for others",
    "describe": "say what a model folder holds: parts, sizes, template, images, history (loads no weights)",
    "convert": "turn a published model, such as an original LLaVA folder, into a model folder of ours",
    "export": "write a model as a stock folder of transformers, or whole, and prove that it is the same",
    "data": "check, prepare and look at training data",
}
"""Each verb and its line in `--help`; the module of the same name implements it."""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, as all our errors are."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see `{self.prog} --help`)")


class _Completion(argparse.Action):
    """Prints the script for a shell and ends, as `--version` does."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, shell: Any, option_string: Any = None) -> None:
        from polymodal.cli.completion import script

        print(script(build_parser(), shell), end="")
        parser.exit()


def build_parser(wanted: Container[str] = tuple(VERBS)) -> argparse.ArgumentParser:
    """Build the parser of the whole command; only the verbs that are wanted get their flags."""
    try:
        release = version("polymodal")
    except PackageNotFoundError:
        release = "(not installed)"
    shared = _Parser(add_help=False)
    add = partial(shared.add_argument, default=argparse.SUPPRESS)
    add("--debug", action="store_true", help="show the traceback of an error")
    add("--max-pixels", type=int, metavar="N", help="the largest image that is opened (64,000,000, or the model's)")
    about = "Compose, train and run multimodal language models."
    parser = _Parser(prog="polymodal", description=about, parents=[shared])
    parser.add_argument("--version", action="version", version=f"polymodal {release}")
    about = "print what makes a shell complete verbs and flags: bash, zsh or fish; append it to the shell's own file"
    parser.add_argument("--completion", action=_Completion, choices=("bash", "zsh", "fish"), help=about)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, line in VERBS.items():
        verb = verbs.add_parser(name, help=line, parents=[shared], formatter_class=argparse.RawDescriptionHelpFormatter)
        if name in wanted:
            module = importlib.import_module(f"polymodal.cli.{name}")
            verb.description = module.__doc__
            module.add_arguments(verb)
            verb.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    given = list(sys.argv[1:] if argv is None else argv)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller (`<&-`): nothing is read, and what is said goes nowhere
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # what their encoding lacks becomes an escape, no error in mid-answer
        if isinstance(stream, io.TextIOWrapper) and not stream.closed:
            stream.reconfigure(errors="backslashreplace")
    before = os.environ.get("POLYMODAL_MAX_PIXELS")
    try:
        try:
            return _run(given)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # The reader went away (`polymodal … | head`); keep Python from complaining when it flushes at exit.
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return 141
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO) or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python would flush at exit goes nowhere
        print(f"polymodal: error: standard output cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    finally:
        if before is None:
            os.environ.pop("POLYMODAL_MAX_PIXELS", None)
        else:
            os.environ["POLYMODAL_MAX_PIXELS"] = before


def _run(given: Sequence[str]) -> int:
    """Run a verb; what goes wrong becomes one line and a status."""
    try:
        args = build_parser(given).parse_args(given)
        if hasattr(args, "max_pixels"):
            os.environ["POLYMODAL_MAX_PIXELS"] = str(args.max_pixels)  # media.image reads it, in workers too
        return int(args.run(args))
    except PolymodalError as error:
        if "--debug" in given:
            raise
        from polymodal.cli.common import report

        report(error)
        return 2
    except ImportError as error:  # a package that is there in part
        if "--debug" in given or (error.name or "polymodal").startswith("polymodal"):
            raise
        from polymodal.cli.common import report

        report(PolymodalError(f"{error.name} cannot be imported ({error}); `polymodal env` lists versions"))
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
