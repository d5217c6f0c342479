"""Write down what is said in sounds and videos; of silence, nothing.

Whisper, found in an installed package or given as a folder, on what is speech. Examples:
  polymodal transcribe a.mp3
  polymodal transcribe lecture.mp4 --asr base --timestamps
"""

import argparse
from dataclasses import asdict

from polymodal.cli import common
from polymodal.cli.talk import add_listening_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("file", metavar="FILE", nargs="+", help="a sound, or a video with one")
    parser.add_argument("--timestamps", action="store_true", help="print a line for each piece, with its begin and end")
    parser.add_argument("--json", action="store_true", help="print one JSON object a file: text, language, segments")
    parser.add_argument(
        "--max-seconds", type=float, default=7200.0, metavar="N", help="the longest sound (%(default)g)"
    )
    add_listening_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Listen and print."""
    from polymodal.speech import load_asr, load_vad, transcribe

    vad, asr = load_vad(args.vad), load_asr(args.asr)
    for file in args.file:
        found = transcribe(file, asr, vad=vad, language=args.language, max_seconds=args.max_seconds)
        if args.json:
            segments = [
                {key: round(value, 2) if isinstance(value, float) else value for key, value in asdict(segment).items()}
                for segment in found.segments
            ]
            common.print_json({"file": file, "language": found.language, "text": found.text, "segments": segments})
        elif args.timestamps:
            for segment in found.segments:
                print(f"[{_clock(segment.start)} - {_clock(segment.end)}] {common.one_line(segment.text)}")
        else:
            print(common.one_line(found.text))
    return 0


def _clock(seconds: float) -> str:
    """Hours where there are some, minutes, seconds and hundredths."""
    minutes, rest = divmod(round(seconds * 100), 6000)
    hours, minutes = divmod(minutes, 60)
    return f"{f'{hours}:' if hours else ''}{minutes:02d}:{rest // 100:02d}.{rest % 100:02d}"
