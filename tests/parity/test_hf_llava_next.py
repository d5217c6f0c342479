"""Published LLaVA-NeXT folders over four language models: as `LlavaNextForConditionalGeneration`."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
    Qwen2Config,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from polymodal.interop.huggingface.load import load_hf
from polymodal.safety.model_folder import check_folder

TILE, PATCH = 28, 7
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": TILE,
    "patch_size": PATCH, "projection_dim": 16, "initializer_range": 0.1,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.3, "pad_token_id": None,
}  # fmt: skip
IMAGES = "{% for part in m['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
TEXTS = "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
TEMPLATES = {
    "mistral": "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}" + IMAGES + TEXTS
    + "{{ ' [/INST]' }}{% else %}{{ ' ' }}" + TEXTS + "{{ eos_token }}{% endif %}{% endfor %}",
    "vicuna": "{{ 'A chat.' }}{% for m in messages %}{{ ' USER: ' if m['role'] == 'user' else ' ASSISTANT: ' }}"
    + IMAGES + TEXTS + "{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}",
    "llama3": "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|sep|>\n\n' }}" + IMAGES + TEXTS
    + "{{ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|sep|>\n\n' }}{% endif %}",
    "qwen2": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}" + IMAGES + TEXTS
    + "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
}  # fmt: skip


def tokenizer_of(hf: SimpleNamespace, kind: str) -> Any:
    if kind in ("mistral", "vicuna"):
        scheme = "first" if kind == "mistral" else "legacy"
        return hf.spiece_tokenizer(["<s>", "</s>"], bos="<s>", eos="</s>", scheme=scheme)
    if kind == "llama3":
        names = ["<|begin|>", "<|end|>", "<|start|>", "<|sep|>", "<|eot|>"]
        return hf.byte_tokenizer(names, bos="<|begin|>", eos="<|eot|>", adds_bos=True)
    return hf.byte_tokenizer(["<|end|>", "<|im_start|>", "<|im_end|>"], bos=None, eos="<|im_end|>", adds_bos=False)


def build(hf: SimpleNamespace, kind: str) -> tuple[Any, Any]:
    """A stock model and its processor."""
    torch.manual_seed(0)
    tokenizer = tokenizer_of(hf, kind)
    image_id = hf.add_placeholder(tokenizer)
    llm = {"mistral": MistralConfig, "vicuna": LlamaConfig, "llama3": LlamaConfig, "qwen2": Qwen2Config}[kind]
    text: Any = llm(**TEXT, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    settings = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER), text_config=text, image_token_index=image_id,
        image_grid_pinpoints=PINPOINTS,
    )  # fmt: skip
    pixels = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS
    )
    processor = LlavaNextProcessor(
        pixels, tokenizer, chat_template=TEMPLATES[kind], patch_size=PATCH, num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    model = hf.lively(LlavaNextForConditionalGeneration(settings))
    # As Llama 3 has it: one more token ends an answer, and only generation_config.json says so.
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    return model, processor


@pytest.fixture(scope="module", params=list(TEMPLATES))
def stock(request: pytest.FixtureRequest, hf: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, processor = build(hf, request.param)
    folder = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)

    def inputs(row: list[int]) -> Any:
        parts = [*({"type": "image", "image": hf.image(i)} for i in row), {"type": "text", "text": hf.QUESTION}]
        return processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip

    return SimpleNamespace(kind=request.param, model=model, inputs=inputs, folder=folder)


def test_same_as_the_stock_class(stock: Any, hf: SimpleNamespace) -> None:
    ours = hf.backend(stock.folder)
    assert 7 in ours.processor.template.stop_ids
    for rows in ([[0]], [[1], [0, 1, 2]]):
        hf.same_chat(stock.model, stock.inputs, ours, rows)


def test_it_can_be_saved_as_a_folder_of_ours(stock: Any, hf: SimpleNamespace, tmp_path: Path) -> None:
    again = hf.saved_as_ours(stock.folder, tmp_path / "ours", [0, 1])
    assert torch.equal(again.model.image_newline, stock.model.model.image_newline)


def test_older_spelling_in_several_files_is_the_same_model(stock: Any, hf: SimpleNamespace, tmp_path: Path) -> None:
    older = hf.older(
        stock.folder, tmp_path / "older", lambda n: n.replace("vision_tower.", "vision_tower.vision_model."), {}
    )
    hf.same_weights(load_hf(check_folder(stock.folder)), load_hf(check_folder(older)))
    memory = hf.older(stock.folder, tmp_path / "memory", str, {}, stock.model.state_dict())
    hf.same_weights(load_hf(check_folder(stock.folder)), load_hf(check_folder(memory)))
