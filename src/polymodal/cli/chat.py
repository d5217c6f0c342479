"""Talk with a model about images.

Images named on the command line go with the first question. In the chat: /image FILE adds an image to the next
question, /clear starts over, /help lists the commands, /quit or Ctrl-D ends. Ctrl-C stops an answer; at the prompt it
ends the chat.
"""

import argparse
import os
import sys
from contextlib import suppress

from polymodal.backends.base import Backend, Reply, TextDelta
from polymodal.cli import common
from polymodal.errors import PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Image, Message, assistant, system, user

HELP = """\
  /image FILE   add an image to the next question
  /clear        forget the conversation and its images
  /help         this list
  /quit         end (also Ctrl-D, or Ctrl-C here)
Ctrl-C while the model answers stops the answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="images for the first question")
    parser.add_argument("--system", help="a system message")
    common.add_model_argument(parser)
    common.add_loading_arguments(parser)
    common.add_sampling_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the conversation until the input ends."""
    params = common.sampling_params(args)
    chat = Chat(common.open_model(args), params, args.system)
    for path in args.images:
        chat.add_image(path)
    return chat.run()


class Chat:
    """One conversation on a terminal or a pipe."""

    def __init__(self, model: Backend, params: GenerationParams, system: str | None) -> None:
        self.model = model
        self.params = params
        self.system = system
        self.interactive = sys.stdin.isatty()
        self.messages: list[Message] = []
        self.pending: list[Image] = []
        self.failed = False
        self.clear()

    def run(self) -> int:
        """Read and answer until the end of input."""
        if self.interactive:
            with suppress(ImportError):  # line editing and history, where Python has it
                import readline  # noqa: F401
            common.note("Ask about your images. /help lists the commands.")
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

    def add_image(self, path: str) -> None:
        """Check an image and keep it for the next question."""
        image = Image(path)
        common.note(f"  {path}: {_size(self.model, image)}")
        self.pending.append(image)

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
        elif command == "/image":
            if not rest.strip():
                raise PolymodalError("/image needs a file: /image photo.jpg")
            self.add_image(os.path.expanduser(rest.strip().strip("'\"")))
        elif command.startswith("/") and "/" not in command[1:]:
            raise PolymodalError(f"no command {command}; /help lists them")
        elif line:
            self._answer(line)
        return True

    def _answer(self, question: str) -> None:
        asked = [*self.messages, user(*self.pending, question)]
        pieces: list[str] = []
        try:
            for event in self.model.stream(asked, self.params):
                if isinstance(event, TextDelta):
                    pieces.append(event.text)
                    common.stream_text(event.text)
                else:
                    print()
                    self._report(event)
        except KeyboardInterrupt:
            print()
            common.note("  (stopped)")
        except PolymodalError:
            if pieces:
                print()  # the error begins a line of its own
            raise
        if not "".join(pieces).strip():
            # Servers refuse a conversation with an empty answer in it, and would refuse all that follows.
            common.note(
                "  (no answer; the question is forgotten, its images go with the next one)"
                if asked[-1].media
                else "  (no answer; the question is forgotten)"
            )
            return
        self.messages = [*asked, assistant("".join(pieces))]
        self.pending = []

    def _report(self, reply: Reply) -> None:
        if not self.interactive:
            return
        usage, timing = reply.usage, reply.timing
        images = "" if usage.image_tokens is None else f" ({usage.image_tokens} of images)"
        counts = "" if usage.prompt_tokens is None else f"{usage.prompt_tokens} tokens in{images}, "
        counts += "" if usage.completion_tokens is None else f"{usage.completion_tokens} out, "
        speed = "" if timing.tokens_per_s is None else f", {timing.tokens_per_s:.1f} tokens/s"
        line = f"  {counts}first after {timing.first_token_s:.2f} s{speed}"
        colour = common.colour_wanted("auto", sys.stderr)
        common.note(f"{common.DIM}{line}{common.RESET}" if colour else line)


def _size(model: Backend, image: Image) -> str:
    """Check an image; its size, and what it takes where the model is ours and its rules are known."""
    from polymodal.backends.local import LocalBackend
    from polymodal.media.image import open_image
    from polymodal.media_plan import ImagePlan

    if not isinstance(model, LocalBackend):
        width, height = open_image(image.source).size
        return f"{width} × {height} pixels"
    (plan,) = model.processor([user(image)], pixels=False).plans
    assert isinstance(plan, ImagePlan)
    return f"{plan.source.width} × {plan.source.height} pixels, {plan.num_tokens} tokens"
