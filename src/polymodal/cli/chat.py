"""Talk with a model about images, videos, sounds and documents.

Files named on the command line go with the first question. In the chat: a file that is dropped on the terminal or
stands in a question goes with it, /image FILE adds one to the next (/video, /audio and /document likewise), /clear
starts over, /help lists the commands, /quit or Ctrl-D ends; Tab completes commands and paths. Ctrl-C stops an answer;
at the prompt it ends the chat.
"""

import argparse
import sys

from polymodal.backends.base import Backend, MediaEnd, Reply, TextDelta
from polymodal.cli import common
from polymodal.cli.terminal import dropped, edit_lines, kind_of, plain_path
from polymodal.errors import PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Audio, Document, Image, Media, Message, Video, assistant, system, user

HELP = """\
  FILE             a file dropped here, or named in a question, goes with it
  /image FILE      add an image to the next question
  /video FILE      add a video, with the flags of the command line (--num-frames, --start, ...)
  /audio FILE      add a sound
  /document FILE   add a document, with the flags of the command line (--pages, --text)
  /clear           forget the conversation and its media
  /help            this list
  /quit            end (also Ctrl-D, or Ctrl-C here)
Ctrl-C while the model answers stops the answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("files", nargs="*", metavar="FILE", help="images and other media for the first question")
    parser.add_argument("--system", help="a system message")
    common.add_media_arguments(parser)
    common.add_model_argument(parser)
    common.add_loading_arguments(parser, "auto")
    common.add_sampling_arguments(parser)
    common.add_making_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the conversation until the input ends."""
    params = common.sampling_params(args)
    files = [(kind_of(path) or "image", path) for path in map(plain_path, args.files)]
    given = [(kind, path, common.medium(kind, path, args)) for kind, path in [*files, *args.media]]
    common.check_media([part for *_, part in given])
    chat = Chat(common.open_with_experts(args), params, args.system, args)
    for kind, path, _ in given:
        chat.add(kind, path)
    return chat.run()


COMMANDS = (*(f"/{kind}" for kind in common.KINDS), "/clear", "/help", "/quit")


class Chat:
    """One conversation on a terminal or a pipe."""

    def __init__(
        self, model: Backend, params: GenerationParams, system: str | None, asked: argparse.Namespace | None = None
    ) -> None:
        self.model = model
        self.params = params
        self.asked = asked  # The flags that say which frames and pages are taken
        self.system = system
        self.saved = common.SavedMedia(asked)
        self.interactive = sys.stdin.isatty()
        self.messages: list[Message] = []
        self.pending: list[Media] = []
        self.failed = False
        self.clear()

    def run(self) -> int:
        """Read and answer until the end of input."""
        if self.interactive:
            edit_lines(COMMANDS)
            common.note("Ask about your files. /help lists the commands.")
        while (line := self._read()) is not None:
            try:
                if not self._take(line.strip()):
                    break
            except PolymodalError as error:
                self.failed = True
                common.report(error)
        return 2 if self.failed and not self.interactive else 0

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = [system(self.system)] if self.system else []
        self.pending = []

    def add(self, kind: str, path: str) -> None:
        """Check a file and keep it for the next question."""
        part = common.medium(kind, path, self.asked)
        common.note(f"  {path}: {_size(self.model, part)}")
        self.pending.append(part)

    def _read(self) -> str | None:
        try:
            return input("> ") if self.interactive else sys.stdin.readline() or None
        except UnicodeDecodeError as error:
            raise PolymodalError(f"standard input is not {error.encoding} ({error.reason}); convert it") from None
        except (EOFError, KeyboardInterrupt):
            print()
            return None

    def _take(self, line: str) -> bool:
        """Obey one line; False ends the chat."""
        command, _, rest = line.partition(" ")
        if command in ("/quit", "/exit"):
            return False
        if command == "/help":
            common.note(HELP)
        elif command == "/clear":
            self.clear()
            common.note("  a new conversation")
        elif command[1:] in common.KINDS and command[0] == "/":
            if not rest.strip():
                raise PolymodalError(f"{command} needs a file: {command} FILE")
            self.add(command[1:], plain_path(rest))
        elif (given := dropped(line))[0]:
            for kind, path in given[0]:
                self.add(kind, path)
            if given[1]:
                self._answer(given[1])
            else:
                common.note("  goes with the next question")
        elif command.startswith("/") and "/" not in command[1:]:
            raise PolymodalError(f"no command {command}; /help lists them")
        elif line:
            self._answer(line)
        return True

    def _answer(self, question: str) -> None:
        asked = [*self.messages, user(*self.pending, question)]
        pieces: list[str] = []
        reply: Reply | None = None
        try:
            for event in self.model.respond(asked, self.params):
                if isinstance(event, TextDelta):
                    pieces.append(event.text)
                    common.stream_text(event.text)
                elif isinstance(event, MediaEnd):
                    print()
                    self.saved.add(event.part)
                elif isinstance(event, Reply):
                    print()
                    reply = event
                    self._report(event)
        except KeyboardInterrupt:
            print()
            common.note("  (stopped)")
        except PolymodalError:
            if pieces:
                print()  # the error begins a line of its own
            raise
        drawn = reply is not None and bool(reply.message.media)
        if not "".join(pieces).strip() and not drawn:
            # Servers refuse a conversation with an empty answer in it, and would refuse all that follows.
            common.note(
                "  (no answer; the question is forgotten, its files go with the next one)"
                if asked[-1].media
                else "  (no answer; the question is forgotten)"
            )
            return
        self.messages = [*asked, reply.message if reply is not None and drawn else assistant("".join(pieces))]
        self.pending = []

    def _report(self, reply: Reply) -> None:
        if not self.interactive:
            return
        usage, timing = reply.usage, reply.timing
        media = "" if usage.image_tokens is None else f" ({usage.image_tokens} of media)"
        counts = "" if usage.prompt_tokens is None else f"{usage.prompt_tokens} tokens in{media}, "
        counts += "" if usage.completion_tokens is None else f"{usage.completion_tokens} out, "
        speed = "" if timing.tokens_per_s is None else f", {timing.tokens_per_s:.1f} tokens/s"
        line = f"  {counts}first after {timing.first_token_s:.2f} s{speed}"
        colour = common.colour_wanted("auto", sys.stderr)
        common.note(f"{common.DIM}{line}{common.RESET}" if colour else line)


def _size(model: Backend, part: Media) -> str:
    """Check a file; its size, and what it takes where the model is ours and its rules are known."""
    from polymodal.backends.local import LocalBackend
    from polymodal.media_plan import ImagePlan

    kind = type(part).__name__.lower()
    if ("image" if kind == "document" else kind) not in model.takes:
        raise PolymodalError(f"{model.name} takes {' and '.join(model.takes)}, and no {kind}")
    plans = model.processor([user(part)], pixels=False).plans if isinstance(model, LocalBackend) else ()
    taken = f", {sum(plan.num_tokens for plan in plans)} tokens" if plans else ""
    match part:
        case Image(source):
            from polymodal.media.image import open_image

            plan = plans[0] if plans else None
            found = plan.source if isinstance(plan, ImagePlan) else open_image(source)
            return f"{found.width} × {found.height} pixels{taken}"
        case Video(source):
            from polymodal.media.video import probe

            info = probe(source)
            return f"{info.width} × {info.height} pixels, {info.frames} frames, {info.duration:.1f} s{taken}"
        case Audio(source):
            from polymodal.media.audio import open_audio

            return f"{open_audio(source, video=True).seconds:.1f} s{taken}"
        case Document():
            from polymodal.processing.document_pages import expand_documents

            (message,) = expand_documents([user(part)])
            number = sum(isinstance(each, Image) for each in message.parts)
            return f"{number} page{'s' * (number != 1)}{taken}"
