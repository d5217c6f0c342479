"""Published BLIP-2 folders over OPT and T5: as `Blip2ForConditionalGeneration`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2Processor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from polymodal.errors import PolymodalError
from polymodal.interop.huggingface.load import load_hf
from polymodal.messages import Image, assistant, system, user
from polymodal.safety.model_folder import check_folder

LAYERS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.2}
VISION: dict[str, Any] = {**LAYERS, "hidden_size": 24, "intermediate_size": 48, "image_size": 28, "patch_size": 7}
QFORMER: dict[str, Any] = {
    **LAYERS, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 60, "max_position_embeddings": 40
}  # fmt: skip
OPT: dict[str, Any] = {
    "model_type": "opt", "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "word_embed_proj_dim": 32, "max_position_embeddings": 256, "init_std": 0.3, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 9,
}  # fmt: skip
T5: dict[str, Any] = {
    "model_type": "t5", "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
    "pad_token_id": 0,
}  # fmt: skip
QUERIES = 6


def build(hf: SimpleNamespace, kind: str) -> tuple[Any, Any]:
    """A stock model and its processor; the processor adds the placeholder to the tokenizer."""
    torch.manual_seed(0)
    if kind.startswith("opt"):
        tokenizer = hf.byte_tokenizer(["</s>", "<pad>"], bos="</s>", eos="</s>", adds_bos=True)
    else:
        tokenizer = hf.unigram_tokenizer()
    pixels = BlipImageProcessorPil(size={"height": 28, "width": 28})
    processor = Blip2Processor(pixels, tokenizer, num_query_tokens=QUERIES)
    image_id = len(tokenizer) - 1
    assert tokenizer.convert_ids_to_tokens(image_id) == "<image>"
    text = {**(OPT if kind.startswith("opt") else T5), "vocab_size": len(tokenizer)}
    text["tie_word_embeddings"] = kind == "opt"
    settings = Blip2Config(
        vision_config=VISION, qformer_config=QFORMER, text_config=text, num_query_tokens=QUERIES,
        image_token_index=image_id,
    )  # fmt: skip
    return hf.lively(Blip2ForConditionalGeneration(settings)), processor


@pytest.fixture(scope="module", params=["opt", "t5"])
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
    compare = hf.same_chat if stock.kind == "opt" else hf.same_answer
    for rows in ([[0]], [[1], [2]]):
        compare(stock.model, stock.inputs, ours, rows)


def test_it_can_be_saved_as_a_folder_of_ours(stock: Any, hf: SimpleNamespace, tmp_path: Path) -> None:
    again = hf.saved_as_ours(stock.folder, tmp_path / "ours", [0])
    norm = stock.model.vision_model.post_layernorm.weight
    assert torch.equal(again.model.projector.qformer.ln_vision.weight, norm)
    assert torch.equal(again.model.vision_encoder.model.post_layernorm.weight, norm)


def test_older_folders_in_several_files_are_the_same_model(stock: Any, hf: SimpleNamespace, tmp_path: Path) -> None:
    table = stock.model.language_model.get_input_embeddings().weight.detach()
    # Tensors that are tied were written twice, and T5's three times.
    tied = ("encoder", "decoder") if stock.kind == "t5" else ("model.decoder",)
    extra = {f"language_model.{part}.embed_tokens.weight": table for part in tied}
    older = hf.older(stock.folder, tmp_path / "older", str, extra)
    # Its tokenizer did not know the placeholder; the processor adds it.
    document = json.loads((older / "tokenizer.json").read_text())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] != "<image>"]
    (older / "tokenizer.json").write_text(json.dumps(document))
    settings = json.loads((older / "tokenizer_config.json").read_text())
    names = ("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder", "image_token")
    (older / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k not in names}))
    first, second = load_hf(check_folder(stock.folder)), load_hf(check_folder(older))
    hf.same_weights(first, second)
    assert second.tokenizer.convert_tokens_to_ids("<image>") == first.model.image_token_id


def test_a_conversation_goes_on_without_another_beginning(stock: Any, hf: SimpleNamespace) -> None:
    processor = hf.backend(stock.folder).processor
    turns = [user(Image(hf.image(0)), "What is this?"), assistant("a cat"), user("What do you see here?")]
    text = processor.tokenizer.decode(processor(turns, add_generation_prompt=True).input_ids[QUERIES:])
    assert text.count("What") == 2
    assert "a cat</s>" in text
    with pytest.raises(PolymodalError, match="no system message"):
        processor([system("Be short."), *turns[:1]])
