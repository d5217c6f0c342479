"""Put images and texts into one space, and say how close they are: CLIP, SigLIP, BLIP or any dual encoder.

Prints cosines: of images with texts, or among images or texts where there is only one kind. `--json` has the vectors
too. Examples:
  polymodal embed cat.jpg dog.jpg --text "a cat" --text "a dog"
  polymodal embed *.jpg --model openai/clip-vit-base-patch32 --json > vectors.json
"""

import argparse
import json

from polymodal.cli.common import one_line
from polymodal.errors import ConfigError

DEFAULT = "vit_small"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("image", nargs="*", metavar="IMAGE", help="image files")
    parser.add_argument("--text", action="append", default=[], help="a text; give the flag again for more")
    parser.add_argument(
        "--model", default=DEFAULT, metavar="NAME", help="a model folder or hub id (default: %(default)s, which ships)"
    )
    parser.add_argument("--device", help='"cpu" or "cuda"; a GPU where there is one (default)')
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="print one JSON object with vectors and cosines")


def run(args: argparse.Namespace) -> int:
    """Embed and print."""
    if not args.image and not args.text:
        raise ConfigError("nothing to embed: give images, or texts with --text")
    if args.batch_size < 1:
        raise ConfigError(f"--batch-size {args.batch_size}: at least 1")
    from polymodal.evaluation.embedder import load_embedder
    from polymodal.metrics.retrieval import similarities
    from polymodal.metrics.text import markdown_table
    from polymodal.utils.devices import best_device

    embedder = load_embedder(args.model, args.device or best_device())
    images = embedder.images(args.image, batch_size=args.batch_size) if args.image else None
    texts = embedder.texts(args.text, batch_size=args.batch_size) if args.text else None
    rows, columns = args.image or args.text, args.text or args.image
    left, right = texts if images is None else images, images if texts is None else texts
    assert left is not None and right is not None
    if right.ndim == 3:  # a Q-Former gives an image several vectors, of which the nearest count
        cosines = similarities(left, right.flatten(0, 1)).unflatten(1, right.shape[:2]).amax(dim=2)
    else:
        cosines = similarities(left, right)
    if args.json:
        document = {
            "model": args.model,
            "images": [] if images is None else _named("image", args.image, images.tolist()),
            "texts": [] if texts is None else _named("text", args.text, texts.tolist()),
            "rows": rows,
            "columns": columns,
            "cosines": cosines.tolist(),
        }
        print(json.dumps(document, ensure_ascii=False))
        return 0
    numbers = ([one_line(name), *(f"{cosine:.3f}" for cosine in row)] for name, row in zip(rows, cosines, strict=True))
    print(markdown_table(["", *map(one_line, columns)], numbers))
    return 0


def _named(kind: str, names: list[str], vectors: list[object]) -> list[dict[str, object]]:
    return [{kind: name, "vector": vector} for name, vector in zip(names, vectors, strict=True)]
