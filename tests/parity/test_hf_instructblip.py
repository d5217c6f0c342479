"""Published InstructBLIP folders over Llama and T5: as `InstructBlipForConditionalGeneration`."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, InstructBlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from polymodal.config import VisionConfig
from polymodal.interop.huggingface.load import load_hf
from polymodal.messages import Image, user
from polymodal.modeling.encoders.vision import build_vision_encoder
from polymodal.safety.model_folder import check_folder

LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
VISION: dict[str, Any] = {**LAYERS, "hidden_size": 24, "intermediate_size": 48, "image_size": 28, "patch_size": 7}
QFORMER: dict[str, Any] = {
    **LAYERS, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 40
}  # fmt: skip
LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3,
    "pad_token_id": None,
}  # fmt: skip
T5: dict[str, Any] = {
    "model_type": "t5", "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
QUERIES = 6


def build(hf: SimpleNamespace, kind: str) -> tuple[Any, Any]:
    """A stock model and its processor; "first" and "legacy" are two ages of Llama's tokenizer."""
    torch.manual_seed(0)
    if kind == "t5":
        tokenizer = hf.unigram_tokenizer()
    else:
        tokenizer = hf.spiece_tokenizer(["<s>", "</s>"], bos="<s>", eos="</s>", scheme=kind)
    pixels = BlipImageProcessorPil(size={"height": 28, "width": 28})
    processor = InstructBlipProcessor(pixels, tokenizer, hf.word_tokenizer(), num_query_tokens=QUERIES)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    text = {**(T5 if kind == "t5" else {**LLAMA, "eos_token_id": 2}), "vocab_size": len(tokenizer)}
    settings = InstructBlipConfig(
        vision_config=VISION, qformer_config=QFORMER, text_config=text, num_query_tokens=QUERIES,
        image_token_index=image_id,
    )  # fmt: skip
    return hf.lively(InstructBlipForConditionalGeneration(settings)), processor


@pytest.fixture(scope="module", params=["legacy", "first", "t5"])
def stock(request: pytest.FixtureRequest, hf: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, processor = build(hf, request.param)
    folder = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)

    def inputs(row: list[int]) -> Any:
        return processor(images=[hf.image(i) for i in row], text=hf.QUESTION, return_tensors="pt")

    return SimpleNamespace(kind=request.param, model=model, inputs=inputs, folder=folder)


def test_same_as_the_stock_class(stock: Any, hf: SimpleNamespace) -> None:
    ours = hf.backend(stock.folder)
    compare = hf.same_answer if stock.kind == "t5" else hf.same_chat
    for rows in ([[0]], [[1], [2]]):
        compare(stock.model, stock.inputs, ours, rows)


def test_it_can_be_saved_as_a_folder_of_ours(stock: Any, hf: SimpleNamespace, tmp_path: Path) -> None:
    again = hf.saved_as_ours(stock.folder, tmp_path / "ours", [0])
    assert again.model.context_tokenizer("a cat")["input_ids"][0] == 2


def test_several_files_are_the_same_model(stock: Any, hf: SimpleNamespace, tmp_path: Path) -> None:
    extra = {"qformer.embeddings.position_ids": torch.arange(40)[None]}
    hf.same_weights(
        load_hf(check_folder(stock.folder)),
        load_hf(check_folder(hf.older(stock.folder, tmp_path / "older", str, extra))),
    )


def test_the_question_reaches_the_q_former(stock: Any, hf: SimpleNamespace) -> None:
    ours = hf.backend(stock.folder)
    for question in ("What is this?", "a dog, a tree."):
        sample = ours.processor([user(Image(hf.image(0)), question)], add_generation_prompt=True)
        assert sample.contexts[0].tolist() == ours.model.context_tokenizer(question)["input_ids"]


def test_its_tower_is_a_component(stock: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(stock.folder, folder)
    encoder = build_vision_encoder(VisionConfig(vision_tower=str(folder), type="eva_clip", mm_vision_select_layer=-1))
    loaded = stock.model.vision_model.encoder.layers[1].mlp.fc1.weight
    assert torch.equal(encoder.model.encoder.layers[1].mlp.fc1.weight, loaded)  # type: ignore[attr-defined]
