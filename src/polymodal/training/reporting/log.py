"""What a run says: a JSONL line every few steps, a progress bar on a terminal, plain lines elsewhere, `env.json`."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from polymodal.errors import PolymodalError
from polymodal.utils.files import write_text

PACKAGES = ("polymodal", "torch", "transformers", "peft", "accelerate", "tokenizers", "numpy", "pillow", "safetensors")


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL log; a last line cut by a crash is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines


def start_log(path: Path, step: int) -> None:
    """Keep only the log's lines up to a step, so that a resumed run writes each step once.

    Args:
        path: The JSONL file.
        step: The step that the run goes on from; 0 empties the log.
    """
    kept = [line for line in read_log(path) if line["step"] <= step]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def append_log(path: Path, line: dict[str, Any]) -> None:
    """Append one JSONL line.

    Args:
        path: The file.
        line: Plain data.

    Raises:
        PolymodalError: It cannot be written, as on a full disk.
    """
    try:
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise PolymodalError(
            f"{path}: cannot be written ({error.strerror or error}); make room and run the same command again to go on "
            "from the last checkpoint"
        ) from error


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware, for `env.json`."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "packages": packages,
    }
