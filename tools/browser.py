"""A headless Chromium, driven by its DevTools protocol over a pipe: nothing to install beside it."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--hide-scrollbars", "--lang=en-US",
    "--force-color-profile=srgb", "--remote-debugging-pipe",
)  # fmt: skip
KEYS = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9}


def find_chromium() -> str | None:
    """Where Chromium is, if it is here."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """A browser with an empty profile, which `close` takes away."""

    def __init__(self, path: str) -> None:
        self.profile = tempfile.mkdtemp()
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        spare = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_in, theirs_out)]  # clear of 3 and 4
        null = os.open(os.devnull, os.O_RDWR)
        actions = [(os.POSIX_SPAWN_DUP2, a, b) for a, b in ((null, 1), (null, 2), (spare[0], 3), (spare[1], 4))]
        command = [path, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self.pid = os.posix_spawn(path, command, os.environ, file_actions=actions)
        for end in (theirs_in, theirs_out, *spare, null):
            os.close(end)
        self._answers: dict[int, Any] = {}
        self._number, self._change = 0, threading.Condition()
        self._listeners: dict[str, Callable[[str, Any], None]] = {}
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        rest = b""
        while piece := os.read(self._from, 2**20):
            *whole, rest = (rest + piece).split(b"\0")
            for text in whole:
                told = json.loads(text)
                with self._change:
                    if "id" in told:
                        self._answers[told["id"]] = told
                        self._change.notify_all()
                    elif told.get("sessionId") in self._listeners:
                        self._listeners[told["sessionId"]](told["method"], told["params"])

    def post(self, method: str, params: dict[str, Any], session: str | None = None) -> int:
        """Give an order; its answer is not waited for."""
        with self._change:
            self._number += 1
            number = self._number
        order = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        os.write(self._to, json.dumps(order).encode() + b"\0")
        return number

    def send(self, method: str, params: dict[str, Any], session: str | None = None) -> Any:
        """Give an order and wait for its answer."""
        number = self.post(method, params, session)
        with self._change:
            if not self._change.wait_for(lambda: number in self._answers, 60):
                raise TimeoutError(method)
            told = self._answers.pop(number)
        if "error" in told:
            raise RuntimeError(f"{method}: {told['error']['message']}")
        return told["result"]

    def page(self, width: int = 1280, height: int = 800, scale: float = 1, dark: bool = False) -> Page:
        """A page of its own, with storage of its own."""
        context = self.send("Target.createBrowserContext", {})["browserContextId"]
        target = self.send("Target.createTarget", {"url": "about:blank", "browserContextId": context})["targetId"]
        session = self.send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        page = Page(self, session)
        self._listeners[session] = page.hear
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        phone = width < 640
        size = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        page.send("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.send("Emulation.setEmulatedMedia", features=[scheme])
        return page

    def close(self) -> None:
        """End the browser."""
        self.post("Browser.close", {})
        deadline = time.monotonic() + 5
        while os.waitpid(self.pid, os.WNOHANG)[0] == 0:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                break
            time.sleep(0.05)
        shutil.rmtree(self.profile, ignore_errors=True)


class Page:
    """A page, as a person uses it; what it complains of and what it asks for is kept."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.answer: dict[str, tuple[str, bytes]] = {}  # End of an address: type and body given instead of the server's

    def hear(self, method: str, params: Any) -> None:
        """Keep what the page complains of and asks for."""
        if method == "Network.requestWillBeSent":
            self.asked.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        elif method == "Fetch.requestPaused":
            kind, body = next(given for end, given in self.answer.items() if params["request"]["url"].endswith(end))
            order = {"requestId": params["requestId"], "responseCode": 200, "body": base64.b64encode(body).decode()}
            headers = [{"name": "Content-Type", "value": kind}]
            self.browser.post("Fetch.fulfillRequest", {**order, "responseHeaders": headers}, self.session)

    def send(self, method: str, **params: Any) -> Any:
        """Give an order about this page."""
        return self.browser.send(method, params, self.session)

    def replace(self, end: str, kind: str, body: bytes) -> None:
        """Answer requests for addresses that end so with this."""
        self.answer[end] = (kind, body)
        self.send("Fetch.enable", patterns=[{"urlPattern": f"*{each}"} for each in self.answer])

    def open(self, url: str) -> None:
        """Go to an address, and wait until it is there."""
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def js(self, code: str) -> Any:
        """What an expression gives."""
        told = self.send("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True, userGesture=True)
        if "exceptionDetails" in told:
            raise RuntimeError(f"{code}: {told['exceptionDetails']}")
        return told["result"].get("value")

    def wait(self, code: str, seconds: float = 20) -> Any:
        """Wait until an expression gives something."""
        deadline = time.monotonic() + seconds
        while (found := self.js(code)) in (None, False, "", 0):  # an element comes as an empty object
            if time.monotonic() > deadline:
                raise TimeoutError(f"{code}; complaints: {self.complaints}; {self.text('body')[-600:]}")
            time.sleep(0.02)
        return found

    def text(self, selector: str) -> str:
        """The text of an element as it is seen; nothing where there is none."""
        return str(self.js(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''"))

    def click(self, selector: str) -> None:
        """Click into the middle of an element that is seen."""
        self.wait(f"document.querySelector({json.dumps(selector)})?.checkVisibility()")
        box = self.js(
            f"(n => (n.scrollIntoView({{block: 'nearest'}}), n.getBoundingClientRect().toJSON()))"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2, "button": "left", "clickCount": 1}
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, **at)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.send("Input.insertText", text=text)

    def key(self, name: str, modifiers: int = 0) -> None:
        """Press a key."""
        code = {"key": name, "code": name, "windowsVirtualKeyCode": KEYS[name], "modifiers": modifiers}
        self.send("Input.dispatchKeyEvent", type="keyDown", **code, **({"text": "\r"} if name == "Enter" else {}))
        self.send("Input.dispatchKeyEvent", type="keyUp", **code)

    def drop(self, *files: Path) -> None:
        """Drop files onto the page, from outside."""
        data = {"items": [], "files": [str(file.resolve()) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.send("Input.dispatchDragEvent", type=kind, x=300, y=300, data=data)

    def screenshot(self) -> bytes:
        """What is seen, as PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
