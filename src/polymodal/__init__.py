"""polymodal: compose, train, run, serve and evaluate multimodal LLMs.

    import polymodal
    from polymodal import Image, user

    model = polymodal.load("default")
    print(model.ask("What is this?", "picture.jpg"))

Names are loaded on first use, so that importing the package stays instant.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from polymodal.errors import PolymodalError
from polymodal.messages import Audio, Document, Image, Message, Text, Video, assistant, system, user

if TYPE_CHECKING:
    from polymodal import metrics, speech
    from polymodal.backends import load
    from polymodal.backends.compose import compose
    from polymodal.backends.local import LocalBackend
    from polymodal.backends.reply import Reply
    from polymodal.config import ModelConfig
    from polymodal.generation.params import GenerationParams
    from polymodal.modeling.build import build_model
    from polymodal.modeling.vlm import MultimodalLM
    from polymodal.processing.processor import Processor
    from polymodal.training.quick import train

__version__ = "0.1.0"

# Threads of torch spin for some 50 microseconds while they wait for each other, then they sleep: with OpenMP's own 3
# milliseconds an answer beside another program cost twice as much and more, and without any 8-bit layers were half as
# fast on an idle machine. Read once, when torch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

_LAZY = {
    "load": "polymodal.backends",
    "compose": "polymodal.backends.compose",
    "train": "polymodal.training.quick",
    "LocalBackend": "polymodal.backends.local",
    "Reply": "polymodal.backends.reply",
    "ModelConfig": "polymodal.config",
    "GenerationParams": "polymodal.generation.params",
    "MultimodalLM": "polymodal.modeling.vlm",
    "build_model": "polymodal.modeling.build",
    "Processor": "polymodal.processing.processor",
    "metrics": "polymodal.metrics",
    "speech": "polymodal.speech",
}

__all__ = [
    "Audio",
    "Document",
    "GenerationParams",
    "Image",
    "LocalBackend",
    "Message",
    "ModelConfig",
    "MultimodalLM",
    "PolymodalError",
    "Processor",
    "Reply",
    "Text",
    "Video",
    "assistant",
    "build_model",
    "compose",
    "load",
    "metrics",
    "speech",
    "system",
    "train",
    "user",
]


if not TYPE_CHECKING:  # a type checker that saw this would take any name for one that is there

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module 'polymodal' has no attribute {name!r}")
        module = import_module(_LAZY[name])
        return module if name in ("metrics", "speech") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
