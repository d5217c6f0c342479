"""Write the sets: `python -m benchmarks.evaluation.mini FOLDER [--count N]`."""

import argparse
from collections.abc import Callable
from pathlib import Path

from benchmarks.evaluation.mini import choices, open_answers

WRITERS: dict[str, Callable[[Path, int], None]] = {**open_answers.OFFICIAL, **choices.WRITERS}
"""Name of a task -> what writes its set into a folder, with so many questions."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=8, help="questions of each set (default: %(default)s)")
    args = parser.parse_args()
    for name, write in WRITERS.items():
        write(args.folder / name, args.count)
        print(args.folder / name)


if __name__ == "__main__":
    main()
