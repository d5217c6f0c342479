"""Ask one question about any number of images and print the answer.

Example: polymodal generate --image cat.jpg --prompt "What is this?"
         polymodal generate --model openai:gpt-4o --image cat.jpg --prompt "What is this?"
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from polymodal.cli import common
from polymodal.errors import ConfigError

if TYPE_CHECKING:
    from polymodal.backends.base import Reply


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="an image; give the flag again for more"
    )
    parser.add_argument("--prompt", required=True, help="the question; images come before it, in order")
    parser.add_argument("--system", help="a system message")
    parser.add_argument("--json", action="store_true", help="print one JSON object with usage and timing")
    parser.add_argument("--stream", action="store_true", help="print the answer as it is made")
    common.add_model_argument(parser)
    common.add_device_argument(parser)
    common.add_quantize_argument(parser)
    common.add_endpoint_arguments(parser)
    common.add_sampling_arguments(parser, max_new_tokens=256)


def run(args: argparse.Namespace) -> int:
    """Answer, print, done."""
    if args.json and args.stream:
        raise ConfigError("--json and --stream cannot be combined; leave one out")
    params = common.sampling_params(args)

    from polymodal.backends.base import TextDelta
    from polymodal.messages import system, user

    model = common.open_model(args)
    messages = [system(args.system)] if args.system else []
    messages.append(user(*common.images(args.image), args.prompt))
    if args.stream:
        for event in model.stream(messages, params):
            if isinstance(event, TextDelta):
                sys.stdout.write(common.printable(event.text))
                sys.stdout.flush()
        print()
        return 0
    reply = model.generate(messages, params)
    if args.json:
        print(json.dumps(reply_json(reply), ensure_ascii=False))
    else:
        print(common.printable(reply.text))
    return 0


def reply_json(reply: Reply) -> dict[str, Any]:
    """The object that `--json` prints."""
    return {
        "text": reply.text,
        "usage": asdict(reply.usage),
        "timing": {name: round(value, 4) for name, value in asdict(reply.timing).items()},
        "model": reply.model,
        "finish_reason": reply.finish_reason,
    }
