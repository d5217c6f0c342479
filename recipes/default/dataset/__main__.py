"""Write a generated dataset: the default model's, more of it, its other senses', pairs, or the demo benchmark.

python -m recipes.default.dataset default --output data/default
python -m recipes.default.dataset more --output data/default_more
python -m recipes.default.dataset senses --output data/default_senses
python -m recipes.default.dataset pairs --output data/pairs --languages de,fr
python -m recipes.default.dataset judges --output data/default_judges
python -m recipes.default.dataset demo --output src/polymodal/evaluation/demo --force

Images are composed from packages of stamps, drawings and emoji that are installed on this machine; for the default
model with captions, questions and dialogues about them, for contrastive training with captions; `senses` adds moving
clips, speech and sounds; `judges` writes what the default model is judged by and no training may show. The others hold
out the same images, given the same seed and size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from polymodal.errors import ConfigError, PolymodalError
from recipes.default.dataset import build_default
from recipes.default.dataset.build_more import build_more
from recipes.default.dataset.demo import build_demo
from recipes.default.dataset.generate import Packages
from recipes.default.dataset.judges import GCOMPRIS as RCC
from recipes.default.dataset.judges import build_judges
from recipes.default.dataset.pairs import build_pairs
from recipes.default.dataset.senses import build_senses
from recipes.default.dataset.senses.sounds import GCOMPRIS


def main(argv: Sequence[str] | None = None) -> int:
    """Build what the command line names; 2 and one line where that cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.default.dataset",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=("default", "more", "senses", "pairs", "judges", "demo"), help="which dataset")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a folder that is new or empty")
    parser.add_argument("--size", default="full", help="full, small (a smoke run) or tiny (needs no packages)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="processes; default: %(default)s")
    parser.add_argument("--packages", type=Path, metavar="ROOT", help="where the Debian packages were unpacked")
    parser.add_argument(
        "--npm", type=Path, default=Path("data/packages/npm"), metavar="DIR", help="of more: npm's packages, unpacked"
    )
    parser.add_argument(
        "--languages",
        default="",
        metavar="CODES",
        help="of pairs: other languages that a share of the captions are in, such as de,fr,zh_CN",
    )
    parser.add_argument(
        "--default",
        type=Path,
        metavar="DIR",
        help="of judges: the default dataset; its held-out images are asked about",
    )
    parser.add_argument("--force", action="store_true", help="replace a folder that is not empty")
    args = parser.parse_args(argv)
    try:
        print(build(args))
    except PolymodalError as error:
        print(f"dataset: {error}", file=sys.stderr)
        return 2
    return 0


def build(args: argparse.Namespace) -> object:
    """Build the dataset; what comes back prints its counts."""
    places = Packages.under(args.packages or Path("/"))
    options = {"seed": args.seed, "size": args.size, "workers": args.workers, "force": args.force}
    languages = tuple(filter(None, (code.strip() for code in args.languages.split(","))))
    if args.name == "pairs":
        return build_pairs(args.output, packages=places, languages=languages, **options)
    if languages:
        raise ConfigError(f"--languages belongs to `pairs`; {args.name} has its own Chinese")
    root = args.packages or Path("/")
    if args.name == "senses":
        return build_senses(args.output, packages=places, gcompris=root / GCOMPRIS.relative_to("/"), **options)
    if args.name == "more":
        return build_more(args.output, packages=args.packages or Path("/"), npm=args.npm, **options)
    if args.name == "judges":
        beside = args.default or args.output.with_name("default")
        return build_judges(
            args.output, default=beside, packages=places, gcompris=root / RCC.relative_to("/"), force=args.force
        )
    if args.name == "demo":
        return build_demo(args.output, packages=places, **options)
    folders = {name: getattr(places, name) for name in ("stamps", "openclipart", "emoji_font", "fonts")}
    return build_default(args.output, **folders, **options)


if __name__ == "__main__":
    sys.exit(main())
