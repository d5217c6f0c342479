"""The README of an exported folder: what it is, how to ask it, what is different, how it was made."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.utils.files import write_text

if TYPE_CHECKING:
    from polymodal.checkpoints.model_folder import Loaded

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
    """Write the card.

    Args:
        folder: Where to.
        name: The model's name.
        kind: The stock class.
        loaded: The model.
        notes: What is different, or was done on the way.
        chat: It has a chat template.
    """
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
