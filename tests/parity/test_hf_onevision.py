"""Published LLaVA-OneVision folders: as `LlavaOnevisionForConditionalGeneration`, images alone and together.

The stock processor insists on a part for videos, which needs torchvision; its class is used here without that part.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

from polymodal.errors import CheckpointError
from polymodal.interop.huggingface.load import load_hf
from polymodal.messages import Image, user
from polymodal.safety.model_folder import check_folder

TILE, PATCH = 28, 7
PINPOINTS = [[28 * rows, 28 * columns] for rows in range(1, 5) for columns in range(1, 5)]
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": TILE,
    "patch_size": PATCH, "initializer_range": 0.1, "vision_use_head": False,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.3, "pad_token_id": None,
}  # fmt: skip
QWEN = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Images(LlavaOnevisionProcessor):
    """The stock processor without its part for videos."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]

    def __init__(self, image_processor: Any, tokenizer: Any, **options: Any) -> None:
        attributes = LlavaOnevisionProcessor.__init__
        attributes(self, image_processor, tokenizer, None, **options)


@pytest.fixture(scope="module")
def stock(hf: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    tokenizer = hf.byte_tokenizer(["<|end|>", "<|im_start|>", "<|im_end|>"], bos=None, eos="<|im_end|>", adds_bos=False)
    image_id = hf.add_placeholder(tokenizer)
    tokenizer.add_tokens(["<video>"], special_tokens=True)
    text = Qwen2Config(**TEXT, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True)
    settings = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER), text_config=text, image_token_index=image_id,
        video_token_index=image_id + 1, image_grid_pinpoints=PINPOINTS, vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    pixels = LlavaOnevisionImageProcessorPil(
        size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    processor = Images(
        pixels, tokenizer, chat_template=QWEN, num_image_tokens=(TILE // PATCH) ** 2,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    model = hf.lively(LlavaOnevisionForConditionalGeneration(settings))
    folder = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    # The class without videos does not write what the stock one does.
    document = json.loads((folder / "processor_config.json").read_text())
    options = {"vision_aspect_ratio": "anyres_max_2", "num_image_tokens": (TILE // PATCH) ** 2}
    (folder / "processor_config.json").write_text(json.dumps(document | options))

    def inputs(row: list[int]) -> Any:
        parts = [*({"type": "image", "image": hf.image(i)} for i in row), {"type": "text", "text": hf.QUESTION}]
        return processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip

    return SimpleNamespace(model=model, inputs=inputs, folder=folder)


def test_same_as_the_stock_class(stock: Any, hf: SimpleNamespace) -> None:
    ours = hf.backend(stock.folder)
    for rows in ([[0]], [[1], [0, 1, 2]]):
        hf.same_chat(stock.model, stock.inputs, ours, rows)


def test_it_can_be_saved_as_a_folder_of_ours(stock: Any, hf: SimpleNamespace, tmp_path: Path) -> None:
    again = hf.saved_as_ours(stock.folder, tmp_path / "ours", [0, 1])
    assert again.config.image.several_images == "pad"
    assert again.model.llm.lm_head.weight is again.model.llm.model.embed_tokens.weight


def test_older_spelling_in_several_files_is_the_same_model(stock: Any, hf: SimpleNamespace, tmp_path: Path) -> None:
    older = hf.older(
        stock.folder,
        tmp_path / "older",
        lambda n: n.replace("vision_tower.", "vision_tower.vision_model."),
        # The head that pools: the configuration says it is not there, some folders hold it all the same.
        {"vision_tower.vision_model.head.probe": torch.ones(1, 1, 32)},
    )
    hf.same_weights(load_hf(check_folder(stock.folder)), load_hf(check_folder(older)))


def test_several_images_are_one_tile_and_a_newline_each(stock: Any, hf: SimpleNamespace) -> None:
    ours = hf.backend(stock.folder)
    alone, first, _ = (
        plan for row in ([0], [0, 1]) for plan in ours.processor([user(*(Image(hf.image(i)) for i in row), "?")]).plans
    )
    assert (first.num_tiles, first.num_tokens) == (1, (TILE // PATCH) ** 2 + 1)
    assert alone.num_tiles > 2
    keys = [ours.processor([user(*(Image(hf.image(i)) for i in row), "?")]).media_keys[0] for row in ([0], [0, 1])]
    assert keys[0] != keys[1]


def test_model_and_processor_must_count_alike(stock: Any, tmp_path: Path) -> None:
    for key, value in (("vision_aspect_ratio", "anyres_max_9"), ("image_grid_pinpoints", [[28, 28]])):
        folder = tmp_path / key
        shutil.copytree(stock.folder, folder)
        document = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**document, key: value}))
        with pytest.raises(CheckpointError, match=f"{key}.*make them agree"):
            load_hf(check_folder(folder))
