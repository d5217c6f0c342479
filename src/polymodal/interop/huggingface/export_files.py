"""The README of an exported folder: what it is, how to ask it, what is different, how it was made."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from polymodal.errors import CheckpointError
from polymodal.interop.huggingface.weight_names import Place, to_stock
from polymodal.interop.huggingface.weights import INDEX_NAME, WEIGHTS_NAME
from polymodal.utils.files import write_text

if TYPE_CHECKING:
    from polymodal.checkpoints.model_folder import Loaded
    from polymodal.modeling.vlm import MultimodalLM


_CHAT = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor, model = AutoProcessor.from_pretrained(FOLDER), AutoModelForImageTextToText.from_pretrained(FOLDER)
question = [{"type": "image", "url": "cat.jpg"}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=True,
    return_tensors="pt",
)
made = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(made[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```
"""
_PLAIN = """\
```python
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

processor, model = AutoProcessor.from_pretrained(FOLDER), AutoModelForImageTextToText.from_pretrained(FOLDER)
inputs = processor(images=Image.open("cat.jpg").convert("RGB"), text="What is this?", return_tensors="pt")
print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0], skip_special_tokens=True))
```
"""


def write_card(folder: Path, name: str, kind: str, loaded: Loaded, notes: Sequence[str], *, chat: bool) -> None:
    """Write the card."""
    model, config = loaded.model, loaded.config
    assert config.vision is not None
    parts = {
        f"vision tower ({config.vision.type})": model.vision_encoder,
        f"projector ({config.projector.mm_projector_type})": model.projector,
        f"language model ({model.llm.config.model_type})": model.llm,
    }
    rows = [f"| {part} | {sum(p.numel() for p in module.parameters()):,} |" for part, module in parts.items() if module]
    history = [f"- `{json.dumps(entry, ensure_ascii=False, sort_keys=True)}`" for entry in loaded.history]
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: image-text-to-text",
        "---",
        "",
        f"# {name}",
        "",
        f"A `{kind}` of transformers, written by polymodal. Licence files, where there were any, lie beside this page.",
        "",
        "| Part | Parameters |",
        "|---|--:|",
        *rows,
        "",
        "## Use",
        "",
        (_CHAT if chat else _PLAIN).rstrip(),
        "",
        "## What is different from the model it was written from",
        "",
        *[f"- {note}" for note in notes],
        "",
        "## How it was made",
        "",
        *(history or ["- (no history)"]),
        "",
    ]
    write_text(folder / "README.md", "\n".join(lines))


# ---- A LoRA adapter of ours for the stock class: the same weights under the names that peft gives them there ----


def write_adapter(folder: Path, model: MultimodalLM, family: str) -> None:
    """Write the language model's adapter beside a stock folder."""
    # Modules are named in full, so that the adapter cannot stray into the vision tower, whose layers are called
    # alike.
    import torch
    from peft import get_peft_model_state_dict
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import save_file

    had: Any = model.llm.peft_config["default"]  # type: ignore[index,union-attr]
    for name in ("trainable_token_indices", "modules_to_save", "rank_pattern", "alpha_pattern", "target_parameters"):
        if getattr(had, name, None):
            raise CheckpointError(f"the adapter has {name}, which stock loading does not take; merge it")
    targets = [name for name, module in model.llm.named_modules() if isinstance(module, LoraLayer)]
    settings = deepcopy(had)
    settings.target_modules = {_name(family, target) for target in targets}
    settings.base_model_name_or_path = None
    settings.inference_mode = True
    tensors: dict[str, torch.Tensor] = {
        f"base_model.model.{_name(family, name)}": tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(model.llm).items()
    }
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} holds NaN or infinity; nothing was written")
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings.save_pretrained(str(folder))


def _name(family: str, name: str) -> str:
    found = to_stock(family, Place("llm", name), style="memory")
    assert found is not None  # every weight of a language model has a name
    return found


# ---- Weights as safetensors in the layout of transformers: one file, or several with an index ----


MAX_SHARD_BYTES = 5_000_000_000
"""The largest file, as transformers cuts them; a single larger tensor has a file of its own."""


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype | None = None,
    max_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write tensors, no more than one file of them in memory besides their sources."""
    files: list[list[str]] = []
    sizes: list[int] = []
    held: dict[str, torch.Tensor] = {}
    seen: set[str] = set()
    size = 0

    def flush() -> None:
        nonlocal held, size
        _save(held, folder / f".part-{len(files):05d}.safetensors")
        files.append(list(held))
        sizes.append(size)
        held, size = {}, 0

    for name, tensor in tensors:
        if name in seen:
            raise CheckpointError(f"two tensors are called {name}; nothing was written")
        seen.add(name)
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        value = tensor.detach().to("cpu", kind).contiguous()
        if held and size + value.nbytes > max_bytes:
            flush()
        # A tensor that shares its memory with one before it cannot be written twice by safetensors.
        held[name] = value.clone() if value.data_ptr() == tensor.data_ptr() else value
        size += value.nbytes
    if held:
        flush()
    if not files:
        raise CheckpointError(f"{folder}: there are no tensors to write")
    if len(files) == 1:
        (folder / ".part-00000.safetensors").rename(folder / WEIGHTS_NAME)
        return sizes[0]
    weight_map: dict[str, str] = {}
    for number, names in enumerate(files):
        file = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f".part-{number:05d}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    return sum(sizes)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})  # transformers asks for this
