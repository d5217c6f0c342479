"""Make a video: from a prompt with a pipeline of diffusers, or of slides and a voice.

The file is .mp4 (H.264, AAC), .webm (VP9, Opus) or .gif (no sound). Examples:
  polymodal animate "a red circle moves right" -o out.mp4 --renderer pipelines/wan --frames 33 --fps 16
  polymodal animate --slides a.png b.png --say "This is the beach. This is our hut." -o holidays.mp4
"""

import argparse
import time
from pathlib import Path

from polymodal.cli import common
from polymodal.cli.draw import add_drawing_arguments, drawn, opened
from polymodal.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="?", help="what is to be seen; none with --slides")
    add("-o", "--output", required=True, metavar="FILE", help="a .mp4, .webm or .gif to write")
    add("--slides", nargs="+", metavar="FILE", help="images that are shown while --say is spoken")
    add("--say", nargs="+", metavar="TEXT", help="what is spoken: one text, or one for each slide")
    add("--tts", default="piper", metavar="NAME", help='the voice: "piper", an .onnx of Piper, a folder (%(default)s)')
    add("--frames", type=int, metavar="N", help="how many (the renderer's own)")
    add("--fps", type=float, metavar="F", help="frames a second (the renderer's own)")
    add_drawing_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Make the video and write it."""
    from polymodal.media.video_writer import check_format, write_video

    common.check_files(args, "output")
    ending = check_format(Path(args.output))
    if args.slides is not None:
        return _slides(args)
    if args.prompt is None:
        raise ConfigError("nothing is asked: give a prompt, or --slides with --say")
    if args.say is not None and ending == ".gif":
        raise ConfigError(f"{args.output}: a GIF has no sound; write .mp4 or .webm, or leave --say out")
    request, renderer = opened(args, "video")
    begin = time.perf_counter()
    frames = renderer.render(request)
    seconds = time.perf_counter() - begin
    sound, rate = None, 16_000
    if args.say is not None:
        import numpy as np

        from polymodal.speech import speak

        chunks = list(speak(" ".join(args.say), args.tts))
        sound, rate = np.concatenate([chunk.samples for chunk in chunks]), chunks[0].sample_rate
    fps = request.fps or renderer.rate
    lasts = write_video(args.output, frames, fps, sound, rate)
    common.note(f"wrote {args.output}")
    count, height, width = frames.shape[:3]
    if args.json:
        more = {"output": args.output, "width": width, "height": height, "frames": count, "fps": fps, "lasts": lasts}
        common.print_json(drawn(request, renderer, seconds, **more))
    return 0


def _slides(args: argparse.Namespace) -> int:
    """Show images while a voice speaks."""
    from polymodal.speech.narrate import narrate

    given = [
        name for name in ("prompt", "renderer", "rewrite", "frames", "fps", "size") if getattr(args, name) is not None
    ]
    if given:
        raise ConfigError(f"--slides are shown as they are; leave {given[0]} out")
    if args.say is None:
        raise ConfigError("--slides need --say, what is spoken while they are shown")
    said = narrate(args.slides, args.say, args.output, args.tts)
    common.note(f"wrote {args.output}")
    seconds = round(len(said.sound) / said.sample_rate, 3)
    if args.json:
        starts = [round(start, 3) for start in said.starts]
        common.print_json({"output": args.output, "slides": len(args.slides), "starts": starts, "lasts": seconds})
    return 0
