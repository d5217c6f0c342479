"""Print versions, devices, folders and whether the default language model is there; paste it into a bug report."""

import argparse
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from polymodal.cli.common import print_json

PACKAGES = (
    "polymodal", "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "peft", "accelerate", "gguf",
    "numpy", "pillow", "pydantic", "matplotlib",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Gather and print."""
    facts = gather()
    if args.json:
        print_json(facts)
        return 0
    for section, values in facts.items():
        print("\n".join([section, *(f"  {name:<18}{value}" for name, value in values.items())]))
    return 0


def gather() -> dict[str, dict[str, Any]]:
    """Look at this environment."""
    import torch

    devices: dict[str, Any] = {"cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        devices["mps"] = "available"
    return {
        "system": {"python": f"{platform.python_version()} ({sys.executable})", "platform": platform.platform()},
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": devices,
        "models": _models(),
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _models() -> dict[str, str]:
    from polymodal.modeling.language_model import converted_folder, in_hub_cache, packaged_gguf
    from polymodal.utils.files import cache_folder

    folder, gguf = converted_folder(), packaged_gguf()
    if (folder / "model.safetensors").is_file():
        status = f"ready in {folder}"
    elif gguf is not None:
        status = f"{gguf} (converted on first use)"
    elif in_hub_cache():
        status = "ready in the Hugging Face cache"
    else:
        status = "missing: run `polymodal fetch`"
    return {"cache folder": str(cache_folder()), "default LLM": status}
