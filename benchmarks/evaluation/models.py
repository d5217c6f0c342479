"""Folders of transformers' own models with seeded weights, whose answers are short: LLaVA-1.5 and Idefics3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from benchmarks.training.models import build_llava
from benchmarks.training.setting import SHAPES, Shape

TOKENIZER = Path(__file__).resolve().parents[2] / "src" / "polymodal" / "models" / "default" / "tokenizer.json"
SIZES = {"small": Shape(4, 256, 704, 4, 2, 0, 2, 128, 2, 224, 16, 0), **SHAPES}


def _tokenizer(image: str, more: list[str]) -> PreTrainedTokenizerFast:
    """SmolLM2's tokenizer, which the default model carries, with a model's own tokens."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{% if p['type'] == 'image' %}"
        + image
        + "{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(TOKENIZER), eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left",
        chat_template=template,
    )  # fmt: skip
    tokenizer.add_tokens(more, special_tokens=True)
    return tokenizer


def _save(model: Any, tokenizer: Any, folder: Path, ends: float) -> None:
    """Let answers end early, and write. The head gets weights of its own: a longer row must change no input."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        weight = head.weight.clone()
        weight[tokenizer.eos_token_id] *= ends
        head.weight = torch.nn.Parameter(weight)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False
    model.config.text_config.use_cache = True
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)


def write_llava(folder: Path, shape: Shape, ends: float, seed: int = 0) -> None:
    """A CLIP tower, two layers, Llama; polymodal composes it of its own parts."""
    tokenizer = _tokenizer("<image>\n", ["<image>"])
    images = CLIPImageProcessorPil(
        size={"shortest_edge": shape.image}, crop_size={"height": shape.image, "width": shape.image}
    )
    LlavaProcessor(
        images, tokenizer, chat_template=tokenizer.chat_template, patch_size=shape.patch,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    shape = Shape(**{**vars(shape), "vocab": len(tokenizer)})
    _save(build_llava(shape, tokenizer.convert_tokens_to_ids("<image>"), seed), tokenizer, folder, ends)


def write_idefics3(folder: Path, shape: Shape, ends: float, seed: int = 0) -> None:
    """A SigLIP tower, four patches a token, Llama; polymodal runs transformers' own class."""
    tokenizer = _tokenizer("<image>", ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"])
    side = {"longest_edge": shape.image}
    images = Idefics3ImageProcessorPil(size=side, max_image_size=side)
    Idefics3Processor(
        images, tokenizer, image_seq_len=shape.image_tokens // 4, chat_template=tokenizer.chat_template
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    config = Idefics3Config(
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": shape.width,
            "intermediate_size": shape.inner, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads, "max_position_embeddings": 8192, "bos_token_id": None,
        },
        vision_config={
            "hidden_size": shape.tower_width, "intermediate_size": 4 * shape.tower_width,
            "num_hidden_layers": shape.tower_layers, "num_attention_heads": shape.tower_heads,
            "image_size": shape.image, "patch_size": shape.patch,
        },
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Idefics3ForConditionalGeneration(config)
    with torch.no_grad():  # so that what is seen matters, as in `build_llava`
        for part in model.modules():
            if isinstance(part, torch.nn.Linear | torch.nn.Conv2d):
                part.weight.normal_(std=1.5 / part.weight[0].numel() ** 0.5)
    _save(model, tokenizer, folder, ends)


FAMILIES: dict[str, Callable[..., None]] = {"llava": write_llava, "idefics3": write_idefics3}


def write_model(family: str, folder: Path, shape: str = "small", ends: float = 8.0) -> Path:
    """Write a model of a family, unless it is there; the end token's row of its head is `ends` times as long."""
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        FAMILIES[family](folder, SIZES[shape], ends)
    return folder
