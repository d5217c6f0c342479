"""Build a data set: `polymodal data build default --output data/default`.

"default" is what the default model is trained on: pictures composed from packages of stamps, drawings and emoji that
are installed on this machine, with captions, questions and dialogues about them.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser("build", help="write a generated data set", description=__doc__)
    build.add_argument("name", choices=("default",), help="which data set")
    build.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder that is new or empty")
    build.add_argument("--size", default="full", help="full, small (a smoke run) or tiny (needs no packages)")
    build.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    build.add_argument("--workers", type=int, default=2, metavar="N", help="processes; default: %(default)s")
    build.add_argument(
        "--packages", type=Path, metavar="ROOT", help="where the Debian packages were unpacked; / if absent"
    )
    build.add_argument("--force", action="store_true", help="replace a folder that is not empty")


def run(args: argparse.Namespace) -> int:
    """Build, and print the report."""
    from polymodal.data.default import build_default

    share = (args.packages or Path("/")) / "usr" / "share"
    report = build_default(
        args.output,
        seed=args.seed,
        size=args.size,
        stamps=share / "tuxpaint" / "stamps",
        openclipart=share / "openclipart" / "png",
        emoji_font=share / "fonts" / "truetype" / "noto" / "NotoColorEmoji.ttf",
        fonts=share / "fonts" / "truetype",
        workers=args.workers,
        force=args.force,
    )
    print(report)
    return 0
