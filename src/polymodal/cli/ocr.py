"""Read the text of a page: lines with their places and confidences, in reading order.

Images, TIFFs and PDFs; the models (PP-OCRv6: Chinese, English, Japanese and 50 languages in Latin letters) come in the
wheel of rapidocr and run on the CPU; nothing is fetched. Examples:
  polymodal ocr page.png
  polymodal ocr paper.pdf --pages 1-3 --json
"""

import argparse

from polymodal.cli.common import print_json, printable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("file", metavar="FILE", nargs="+", help="an image, a TIFF or a PDF")
    parser.add_argument("--pages", metavar="WHICH", help='such as "1-3,7" or "5-" (all)')
    parser.add_argument("--dpi", type=float, default=200.0, help="pixels an inch of a PDF's pages (%(default)g)")
    parser.add_argument("--password", help="of an encrypted PDF")
    parser.add_argument("--json", action="store_true", help="print one JSON object a file: pages, lines, boxes")


def run(args: argparse.Namespace) -> int:
    """Read and print."""
    import numpy as np

    from polymodal.media.document import open_pages
    from polymodal.media.ocr import load_engine, read_lines

    engine = load_engine()
    for file in args.file:
        pages = []
        for page in open_pages(file, args.pages, dpi=args.dpi, password=args.password):
            lines = read_lines(engine, np.asarray(page.image))
            size = {"page": page.number, "height": page.image.height, "width": page.image.width}
            pages.append({**size, "lines": [line._asdict() for line in lines]})
            if not args.json:
                print("\n".join([printable(line.text) for line in lines]), end="\n\n", flush=True)
        if args.json:
            print_json({"file": file, "pages": pages})
    return 0
