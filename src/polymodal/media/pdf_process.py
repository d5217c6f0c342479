"""The process that draws a PDF's pages: it alone runs pdfium on a stranger's bytes, and may be killed.

A PDF is a program: a few hundred bytes can ask for a drawing that takes years, or inflate to all the memory there is,
and pdfium cannot be interrupted. So it runs where memory is limited and where `media.document` ends it after a time.
Standard input is a line of JSON, what to draw, and the file; standard output is a line of JSON a page, `error` or what
was drawn, and its pixels, RGB.
"""

import json
import math
import re
import sys
from contextlib import suppress
from typing import Any

from polymodal.errors import MediaError, first_line

MAX_TEXT = 1_000_000  # characters of a page's text layer
_KNOWN = {0: "has no pages; give a whole file", 4: "is encrypted; give its password, or save it without"}  # pdfium's


def parse_pages(pages: str | None, total: int, most: int) -> list[int]:
    """The pages that "1-3,7" names, from 1, in that order; all of them where None."""
    if total < 1:
        raise MediaError("has no pages; give a whole file")
    chosen: list[int] = []
    for part in ("1-" if pages is None else pages).split(","):
        found = re.fullmatch(r"\s*([0-9]{1,9})\s*(?:(-)\s*([0-9]{1,9})?)?\s*", part)
        if found is None:
            raise MediaError(f'pages {pages!r}: {part!r} is no page or range; write them as "1-3,7" or "5-"')
        first, last = int(found[1]), int(found[3] or (total if found[2] else found[1]))
        if not 1 <= first <= last <= total:
            raise MediaError(f"pages {pages!r}: there are pages 1 to {total:,}, {part.strip()!r} is not among them")
        if len(chosen) + last - first + 1 > most:
            some = f'such as "1-{min(most, total)}", or allow more (max_pages)'
            raise MediaError(
                f"has {total:,} pages, at most {most:,} are opened at once; choose (--pages, pages), {some}"
            )
        chosen += range(first, last + 1)
    return chosen


def scale_of(height: float, width: float, dpi: float, max_side: int | None, max_pixels: int) -> float:
    """Pixels a point (1/72 inch) of a page."""
    if not (0 < height < math.inf and 0 < width < math.inf):
        raise MediaError("has no area; give a page with one")
    scale = min(dpi / 72, (max_side or math.inf) / max(height, width)) * (1 - 1e-9)  # pdfium rounds sides up
    if math.ceil(height * scale) * math.ceil(width * scale) > max_pixels:
        raise MediaError(
            f"{math.ceil(width * scale)}x{math.ceil(height * scale)} pixels (width x height), at most {max_pixels:,} "
            "are allowed; give a lower dpi, or max_side",
            "too-many-pixels",
        )
    return scale


def main() -> None:
    """Draw what standard input asks for."""
    job = json.loads(sys.stdin.buffer.readline())
    try:
        _limit(job["memory"], job["seconds"])
        _draw(sys.stdin.buffer.read(), job)
    except BrokenPipeError:  # nobody wants more pages
        pass
    except MediaError as error:
        _say({"error": str(error), "code": error.code})
    except MemoryError:
        _say({"error": "needs more memory than it may take; draw it smaller, or give another file"})
    except Exception as error:  # pdfium's own, and whatever ctypes makes of damaged bytes
        known = _KNOWN.get(getattr(error, "err_code", -1))
        _say({"error": known or f"is damaged or cut off ({first_line(error)[:160]}); give a whole file"})


def _draw(data: bytes, job: dict[str, Any]) -> None:
    """Draw the pages one after another."""
    import pypdfium2

    document = pypdfium2.PdfDocument(data, password=job["password"])
    with suppress(pypdfium2.PdfiumError):
        document.init_forms()  # what is filled into a form is on the page
    for number in parse_pages(job["pages"], len(document), job["max_pages"]):
        try:
            page = document[number - 1]
            width, height = page.get_size()
            scale = scale_of(height, width, job["dpi"], job["max_side"], job["max_pixels"])
            bitmap = page.render(scale=scale, rev_byteorder=True, force_bitmap_format=pypdfium2.raw.FPDFBitmap_BGR)
            text = page.get_textpage().get_text_range(count=-1)[:MAX_TEXT] if job["text"] else None
        except MediaError as error:
            raise MediaError(f"page {number}: {error}", error.code) from None
        except MemoryError:
            raise
        except Exception as error:
            raise MediaError(f"page {number}: is damaged ({first_line(error)[:160]}); give a whole file") from None
        rows = memoryview(bytes(bitmap.buffer))
        stride, wide = bitmap.stride, 3 * bitmap.width
        header = {"number": number, "height": bitmap.height, "width": bitmap.width, "text": text}
        _say(header, b"".join(rows[row * stride : row * stride + wide] for row in range(bitmap.height)))
        bitmap.close()
        page.close()


def _limit(memory: int, seconds: float) -> None:
    """Bound this process, so that it ends by itself too; Windows has no such limits."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds)))


def _say(header: dict[str, Any], body: bytes = b"") -> None:
    sys.stdout.buffer.write(json.dumps(header).encode() + b"\n" + body)
    sys.stdout.buffer.flush()
