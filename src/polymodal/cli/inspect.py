"""Show what the model sees and hears: every token by kind, the counts, tiles on images, frames with times, sounds.

Runs no language model. With --answer the conversation is shown as it is trained on, the answer's tokens marked.
Example: polymodal inspect --image cat.jpg --prompt "What is this?" --answer "A cat." --html seen.html
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from polymodal.backends import load_processor
from polymodal.cli import common
from polymodal.errors import ConfigError
from polymodal.messages import Message, assistant

if TYPE_CHECKING:
    from polymodal.processing.processor import Processor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    common.add_question_arguments(parser)
    parser.add_argument("--answer", help="an answer, shown as trained tokens")
    parser.add_argument("--html", metavar="FILE", help="write the view as one self-contained page")
    parser.add_argument("--png", metavar="FILE", help="write the drawings: tiles, frames, sounds")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="default: %(default)s")
    common.add_model_argument(parser)
    common.add_part_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Process the conversation, print the view, write the files asked for."""
    common.check_files(args, "html", "png")
    processor, messages = load_processor(args.model, common.parts(args)), common.question(args)
    if args.answer is not None:
        messages.append(assistant(args.answer))
    asks = args.answer is None
    show(processor, messages, html=args.html, png=args.png, color=args.color, add_generation_prompt=asks)
    return 0


def show(
    processor: Processor,
    messages: Sequence[Message],
    *,
    html: str | None,
    png: str | None,
    color: str,
    add_generation_prompt: bool = False,
) -> None:
    """Print the view of a conversation, and write the files asked for."""
    from polymodal.processing.document_pages import expand_documents
    from polymodal.viewer.draw import draw_media, stack
    from polymodal.viewer.view import to_html, to_terminal, view_sample

    if png and not any(message.media for message in messages):
        raise ConfigError("--png draws what is seen and heard, and nothing of that was given; add --image or --video")
    messages = expand_documents(messages)  # once, for the sample and for the drawings
    sample = processor(messages, add_generation_prompt=add_generation_prompt, pixels=False)
    view = view_sample(sample, processor.tokenizer, draw_media(processor, messages) if html or png else ())
    if png and not view.drawings:
        raise ConfigError("--png draws what an encoder is given, and this model reads these images as codes")
    colour = common.colour_wanted(color, sys.stdout)
    print(to_terminal(view, colour=colour, clean=common.printable))
    if html:
        common.write_file(html, to_html(view).encode("utf-8"))
    if png:
        buffer = io.BytesIO()
        stack([drawing for drawing in view.drawings if drawing is not None]).save(buffer, "PNG")
        common.write_file(png, buffer.getvalue())
