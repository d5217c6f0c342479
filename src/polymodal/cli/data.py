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
    build = actions.add_parser("build", help="write a generated data set")
    build.add_argument("name", choices=("default",), help="which data set")
    build.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or unfinished folder")
    build.add_argument("--size", type=int, metavar="N", help="pictures to compose; the data set's own number if absent")
    build.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    build.add_argument("--workers", type=int, default=2, metavar="N", help="processes; default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Build, and print the report."""
    raise NotImplementedError
