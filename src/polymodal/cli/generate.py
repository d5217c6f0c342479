"""Ask one question about images, videos, sounds and documents and print the answer; a captioner needs none.

Example: polymodal generate cat.jpg "What is this?"
         polymodal generate --image cat.jpg --prompt "What is this?"
         polymodal generate --video clip.mp4 --num-frames 8 --prompt "What happens?"
         polymodal generate --document paper.pdf --pages 1-3 --text layer --prompt "Who wrote it?"
         polymodal generate --model Salesforce/blip-image-captioning-base --image cat.jpg [--prompt "a picture of"]
         polymodal generate --model openai:gpt-4o --image cat.jpg --prompt "What is this?"
         polymodal generate --modalities text,image,audio --prompt "Draw a red circle." -o folder/
"""

import argparse
from dataclasses import asdict

from polymodal.backends.base import MediaEnd, TextDelta
from polymodal.cli import common
from polymodal.errors import ConfigError
from polymodal.messages import Audio, Image

FILES = {"images": Image, "sounds": Audio}
"""What `--json` calls the files of each kind of part."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("given", nargs="*", metavar="FILE|QUESTION", help="files of any kind, and the question")
    common.add_question_arguments(parser, prompt_required=False)
    parser.add_argument("--json", action="store_true", help="print one JSON object with usage and timing")
    parser.add_argument("--stream", action="store_true", help="print the answer as it is made")
    common.add_model_argument(parser)
    common.add_loading_arguments(parser, "auto")
    common.add_sampling_arguments(parser)
    common.add_making_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answer, print, done."""
    if args.json and args.stream:
        raise ConfigError("--json and --stream cannot be combined; leave one out")
    params = common.sampling_params(args)
    saved = common.SavedMedia(args)
    common.sort_given(args)
    messages = common.question(args)
    model = common.open_with_experts(args)
    if args.stream:
        for event in model.respond(messages, params):
            if isinstance(event, TextDelta):
                common.stream_text(event.text)
            elif isinstance(event, MediaEnd):
                print()
                saved.add(event.part)
        print()
        return 0
    reply = model.generate(messages, params)
    media = [(part, saved.add(part)) for part in reply.message.media]
    if not args.json:
        if reply.text or not media:
            print(common.printable(reply.text))
        return 0
    document = {
        "text": reply.text,
        **{
            name: files
            for name, kind in FILES.items()
            if (files := [file for part, file in media if type(part) is kind])
        },
        "usage": asdict(reply.usage),
        "timing": {name: value if value is None else round(value, 4) for name, value in asdict(reply.timing).items()},
        "model": reply.model,
        "finish_reason": reply.finish_reason,
    }
    common.print_json(document)
    return 0
