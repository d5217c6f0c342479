"""The pictures of the web page in docs/: the default model asked about images of examples/, in headless Chromium.

python -m tools.page_pictures FOLDER [RUNS]     writes page.png, page-phone.png and more to FOLDER
"""

from __future__ import annotations

import io
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from tools.browser import Browser, Page, find_chromium

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "examples" / "pictures"


def ask(page: Page, view: str, text: str, *files: Path) -> None:
    """Drop files, type a question, send it, and wait for all answers."""
    if files:
        page.drop(*files)
        page.wait(f"document.querySelectorAll('#{view} .composer .medium').length === {len(files)}")
    page.js(f"document.querySelector('#{view} .composer textarea').focus()")
    page.type(text)
    page.key("Enter")
    page.wait(f"!talks.{view}.running && !document.querySelector('#{view} .waiting')", 120)


def keep(page: Page, path: Path) -> None:
    """Write what is seen, with few colours so that it stays small."""
    time.sleep(0.4)
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1024} KiB, complaints {page.complaints}")


def main(folder: Path, *runs: str) -> None:
    """Serve the default model, and take the pictures."""
    command = [sys.executable, "-m", "polymodal", "serve", "--port", "0", *(["--runs", *runs] if runs else [])]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert server.stderr is not None
    url = next(line for line in server.stderr if "is served at" in line).partition(" at ")[2].partition("/v1")[0]
    chromium = find_chromium()
    assert chromium is not None, "Chromium is missing"
    browser = Browser(chromium)
    try:
        for name, size, dark in (("", (1280, 800), False), ("-dark", (1280, 800), True), ("-phone", (390, 844), False)):
            page = browser.page(*size, dark=dark)
            page.open(f"{url}/#chat")
            page.wait("typeof talks === 'object' && talks.compare", 60)
            ask(page, "chat", "What is this?", PICTURES / "coffee.jpg")
            if not name:
                ask(page, "chat", "What color is it?")
            keep(page, folder / f"page{name}.png")
            page.click("#chat .turn .reply button[aria-label='What the model saw']")
            page.wait("document.querySelector('.saw img')?.naturalWidth")
            keep(page, folder / f"page{name}-saw.png")
            page.click("#tab-compare")
            ask(page, "compare", "Describe this image.", PICTURES / "penguin.png")
            keep(page, folder / f"page{name}-compare.png")
            page.click("#tab-runs")
            page.wait("document.querySelector('.chart svg') || !$('no-runs').hidden")
            keep(page, folder / f"page{name}-runs.png")
    finally:
        browser.close()
        server.terminate()
        server.wait(20)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:3])
