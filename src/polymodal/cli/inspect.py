"""Show what the model sees: every token by kind, the counts, and the tiles drawn on the images.

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
from polymodal.messages import Image, Message, Source, assistant

if TYPE_CHECKING:
    from PIL import Image as PILImage

    from polymodal.processing.processor import Processor
    from polymodal.viewer.view import View


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    common.add_question_arguments(parser)
    parser.add_argument("--answer", help="an answer, shown as trained tokens")
    parser.add_argument("--html", metavar="FILE", help="write the view as one self-contained page")
    parser.add_argument("--png", metavar="FILE", help="write the tiles drawn on the images")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="default: %(default)s")
    common.add_model_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Process the conversation, print the view, write the files asked for."""
    if args.png and not args.media:
        raise ConfigError("--png draws images, and no --image was given")
    common.check_files(args, "html", "png")
    processor, messages = load_processor(args.model), common.question(args)
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
    from polymodal.viewer.draw import stack
    from polymodal.viewer.view import to_html, to_terminal, view_sample

    sources = [part.source for message in messages for part in message.media if isinstance(part, Image)]
    if png and not sources:
        raise ConfigError("--png draws images, and there are none")
    sample = processor(messages, add_generation_prompt=add_generation_prompt, pixels=False)
    view = view_sample(sample, processor.tokenizer)
    colour = common.colour_wanted(color, sys.stdout)
    print(to_terminal(view, colour=colour, clean=common.printable))
    if not html and not png:
        return
    drawings = _drawings(processor, view, sources)
    if html:
        common.write_file(html, to_html(view, drawings).encode("utf-8"))
    if png:
        buffer = io.BytesIO()
        stack(drawings).save(buffer, "PNG")
        common.write_file(png, buffer.getvalue())


def _drawings(processor: Processor, view: View, sources: Sequence[Source]) -> list[PILImage.Image]:
    """Decode the images again, for the eye this time, and draw their plans."""
    from polymodal.media.image import open_image
    from polymodal.media_plan import ImagePlan
    from polymodal.processing.image_transform import tile_images
    from polymodal.viewer.draw import draw_plan

    rules = processor.config.image
    if rules is None:
        return []
    drawings = []
    plans = [plan for plan in view.plans if isinstance(plan, ImagePlan)]
    for source, plan in zip(sources, plans, strict=True):
        image = open_image(source, background=rules.background, max_pixels=rules.max_pixels)
        drawings.append(draw_plan(image, plan, tile_images(image, plan, rules)))
    return drawings
