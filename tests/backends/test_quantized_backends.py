"""`load(..., quantize="int8")` of published models: those that are composed here, and those that transformers runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polymodal.backends import load
from polymodal.backends.local import LocalBackend
from polymodal.backends.transformers import TransformersBackend
from polymodal.generation.params import GenerationParams
from polymodal.modeling.quantization import Int8Linear


@pytest.mark.parametrize(("family", "kind"), [("llava_next", LocalBackend), ("smolvlm", TransformersBackend)])
def test_a_published_model_answers_with_8_bit_weights(
    family: str, kind: type, tiny_vlm: Callable[[str], Path], image_folder: Path
) -> None:
    backend = load(tiny_vlm(family), quantize="int8")
    assert isinstance(backend, kind)
    layers = [name for name, part in backend.model.named_modules() if isinstance(part, Int8Linear)]
    assert layers and not any("vision" in name or "projector" in name or "connector" in name for name in layers)
    assert any(name.endswith("lm_head") for name in layers)
    plain: Any = load(tiny_vlm(family)).model
    for name in layers:  # each weight is the nearest of 127 steps to either side
        weight, rounded = plain.get_submodule(name).weight, backend.model.get_submodule(name).dequantized()
        steps = weight.abs().amax(dim=1, keepdim=True) / 127
        assert ((weight - rounded).abs() <= steps * 0.51).all(), name
    answer = backend.ask("What is this?", next(image_folder.glob("*.jpg")), params=GenerationParams(max_new_tokens=3))
    assert isinstance(answer, str)
