"""Speak a text into a WAV file.

Examples:
  polymodal speak "The cat sits on the mat." -o out.wav
  polymodal speak - -o page.wav < page.txt
"""

import argparse
import sys

from polymodal.cli import common
from polymodal.errors import DataError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("text", metavar="TEXT", help='what to speak; "-" reads standard input')
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="the WAV file to write")
    parser.add_argument(
        "--tts", default="piper", metavar="NAME", help='"piper", an .onnx of Piper, a folder or hub id (%(default)s)'
    )


def run(args: argparse.Namespace) -> int:
    """Speak and write."""
    from polymodal.speech import speak, wav_bytes
    from polymodal.speech.tts import MOST_TEXT

    common.check_files(args, "output")
    common.check_wav(args.output)
    try:
        text = sys.stdin.read(MOST_TEXT + 1) if args.text == "-" else args.text
    except UnicodeDecodeError as error:
        raise DataError(f"standard input is not {error.encoding} ({error.reason}); convert it") from None
    chunks = list(speak(text, args.tts))
    data = wav_bytes(chunks)
    common.write_file(args.output, data)
    common.note(f"{sum(chunk.seconds for chunk in chunks):.2f} s of speech")
    return 0
