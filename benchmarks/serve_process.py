"""`polymodal serve` as a process that other programs ask: started, watched through /proc, ended."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import httpx2

from polymodal import PolymodalError


class Server:
    """A server's address and process."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: IO[bytes]) -> None:
        self.process, self.url, self._log = process, url, log

    @property
    def log(self) -> str:
        """All that it has written."""
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")

    @property
    def megabytes(self) -> float:
        """What it and its children hold in memory now."""
        return sum(_kibibytes(pid, "VmRSS") for pid in family(self.process.pid)) / 1024

    @property
    def peak(self) -> float:
        """The most megabytes that it and the children it has now have held."""
        return sum(_kibibytes(pid, "VmHWM") for pid in family(self.process.pid)) / 1024

    @property
    def kept(self) -> tuple[float, float]:
        """Megabytes that its caches hold, and that they may hold, as a server of ours tells Prometheus."""
        try:
            text = httpx2.get(f"{self.url}/metrics", timeout=60, trust_env=False).text
        except httpx2.HTTPError as error:
            raise PolymodalError(f"/metrics is not answered ({type(error).__name__} {error})") from None
        found = [re.findall(rf"^polymodal_\w+_cache{name}_bytes\S* (\S+)$", text, re.M) for name in ("", "_limit")]
        held, limit = (sum(map(float, values)) / 2**20 for values in found)
        return held, limit

    @property
    def files(self) -> int:
        """Its open files and connections."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    @property
    def threads(self) -> int:
        return _kibibytes(self.process.pid, "Threads")

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


def _kibibytes(pid: int, key: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


def family(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    for child in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [one for name in child.read_text().split() for one in family(int(name))]
        except OSError:  # it has ended
            continue
    return found


@contextmanager
def started(command: Sequence[str], url: str | None = None, patience: float = 300, **extra: str) -> Iterator[Server]:
    """Run a server until the block ends; where `url` is None, its own words say where it is."""
    with tempfile.NamedTemporaryFile(prefix="serving-", suffix=".log") as log:
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
            **extra,
        }
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        server = Server(process, url or "", log)
        try:
            end = time.monotonic() + patience
            while not _answers(server):
                if not server.alive or time.monotonic() > end:
                    lines = [line for line in server.log.splitlines() if line.strip()] or ["nothing was said"]
                    raise PolymodalError(f"does not start ({lines[-1][:300]})")
                time.sleep(0.2)
            yield server
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _answers(server: Server) -> bool:
    if not server.url and "is served at" in (log := server.log):
        server.url = log.partition("is served at ")[2].partition("/v1")[0]
    try:
        return bool(server.url) and httpx2.get(f"{server.url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


def ours(model: str, *flags: str) -> list[str]:
    """The command of our server, at a port of its own choice."""
    return [sys.executable, "-m", "polymodal", "serve", "--model", model, "--name", "model", "--port", "0", *flags]
