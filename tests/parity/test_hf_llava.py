"""Published LLaVA-1.5 folders: the same ids, pixels, logits and greedy text as `LlavaForConditionalGeneration`."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from polymodal.interop.huggingface.load import load_hf
from polymodal.interop.huggingface.weight_names import to_ours, to_stock
from polymodal.safety.model_folder import check_folder

METADATA = {"format": "pt"}
TILE, PATCH = 28, 7
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": TILE,
    "patch_size": PATCH, "initializer_range": 0.1,
}  # fmt: skip
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.3,
}  # fmt: skip
LLAVA_15 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build(hf: SimpleNamespace, kind: str) -> tuple[Any, Any]:
    """A stock model and its processor."""
    torch.manual_seed(0)
    if kind == "siglip":
        tokenizer = hf.byte_tokenizer(["<|end|>"], bos=None, eos="<|end|>", adds_bos=False)
    else:
        tokenizer = hf.spiece_tokenizer(["<s>", "</s>"], bos="<s>", eos="</s>", scheme="legacy")
    image_id = hf.add_placeholder(tokenizer)
    text = {**TEXT, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    if kind == "siglip":
        vision: Any = SiglipVisionConfig(**TOWER)
        options = {"vision_feature_layer": [-1, 1], "vision_feature_select_strategy": "full",
                   "multimodal_projector_bias": False}  # fmt: skip
        llm: Any = Qwen2Config(**text, tie_word_embeddings=True)
        pixels: Any = SiglipImageProcessorPil(size={"height": TILE, "width": TILE})
        extra = 0
    else:
        vision = CLIPVisionConfig(**TOWER, projection_dim=16)
        strategy = "full" if kind == "with_class_token" else "default"
        options = {"vision_feature_layer": -2, "vision_feature_select_strategy": strategy}
        llm = LlamaConfig(**text)
        pixels = CLIPImageProcessorPil(size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE})
        extra = 1
    settings = LlavaConfig(vision_config=vision, text_config=llm, image_token_index=image_id, **options)
    processor = LlavaProcessor(
        pixels, tokenizer, chat_template=LLAVA_15, patch_size=PATCH, num_additional_image_tokens=extra,
        vision_feature_select_strategy=options["vision_feature_select_strategy"],
    )  # fmt: skip
    return hf.lively(LlavaForConditionalGeneration(settings)), processor


def inputs_of(hf: SimpleNamespace, processor: Any) -> Any:
    """Numbers of images to what the stock processor gives."""

    def inputs(row: list[int]) -> Any:
        parts = [*({"type": "image", "image": hf.image(i)} for i in row), {"type": "text", "text": hf.QUESTION}]
        return processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip

    return inputs


@pytest.fixture(scope="module", params=["vicuna", "with_class_token", "siglip"])
def stock(request: pytest.FixtureRequest, hf: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, processor = build(hf, request.param)
    folder = tmp_path_factory.mktemp("hf") / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return SimpleNamespace(kind=request.param, model=model, inputs=inputs_of(hf, processor), folder=folder)


def test_same_as_the_stock_class(stock: Any, hf: SimpleNamespace) -> None:
    ours = hf.backend(stock.folder)
    for rows in ([[0]], [[1], [0, 1, 2]]):
        hf.same_chat(stock.model, stock.inputs, ours, rows)


def test_it_can_be_saved_as_a_folder_of_ours(stock: Any, hf: SimpleNamespace, tmp_path: Path) -> None:
    again = hf.saved_as_ours(stock.folder, tmp_path / "ours", [0, 1])
    assert again.history[0]["model_type"] == "llava"
    tied = stock.kind == "siglip"
    assert (again.model.llm.lm_head.weight is again.model.llm.model.embed_tokens.weight) is tied


def test_older_spellings_in_several_files_are_the_same_model(stock: Any, hf: SimpleNamespace, tmp_path: Path) -> None:
    extra = {
        "vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    older = hf.older(
        stock.folder, tmp_path / "older", lambda n: n.replace("vision_tower.", "vision_tower.vision_model."), extra
    )
    hf.same_weights(load_hf(check_folder(stock.folder)), load_hf(check_folder(older)))
    memory = tmp_path / "memory"
    hf.older(older, memory, str, {}, stock.model.state_dict())
    assert "model.language_model.layers.0.mlp.up_proj.weight" in (memory / "model.safetensors.index.json").read_text()
    hf.same_weights(load_hf(check_folder(stock.folder)), load_hf(check_folder(memory)))


def test_the_stock_class_reads_the_names_we_write(stock: Any, tmp_path: Path) -> None:
    tensors = load_file(stock.folder / "model.safetensors")
    places = {name: to_ours("llava", name) for name in tensors}
    tower = "siglip" if stock.kind == "siglip" else "clip"
    for style in ("hub", "transformers", "memory"):
        folder = tmp_path / style
        folder.mkdir()
        names = {name: to_stock("llava", place, style=style, tower=tower) for name, place in places.items() if place}
        assert (style == "transformers") == (list(names) == list(names.values()))
        save_file(
            {str(names[name]): tensor for name, tensor in tensors.items()}, folder / "model.safetensors", METADATA
        )
        (folder / "config.json").write_bytes((stock.folder / "config.json").read_bytes())
        again, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in stock.model.state_dict().items())


def test_a_stage_starts_from_a_published_folder(stock: Any, hf: SimpleNamespace, tmp_path: Path) -> None:
    """`init.from` names it; what is trained changes, the rest is what was published."""
    from polymodal.checkpoints.model_folder import load_model
    from polymodal.config import parse_config
    from polymodal.training import train
    from polymodal.training.recipes.sft import Recipe

    rows = []
    for number in range(3):
        hf.image(number).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "an image"}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(rows))
    plain = {
        "name": "tuned",
        "init": {"from": str(stock.folder)},
        "data": {"mix": [{"path": str(tmp_path / "data.json")}]},
        "train": [{"match": "projector.*", "train": True}],
        "batch": {"global_size": 3},
        "run": {"max_steps": 2, "epochs": 2, "precision": "fp32", "threads": 1, "eval_generations": 0},
        "output_dir": str(tmp_path / "run"),
    }
    tuned = load_model(train(parse_config(Recipe, plain, "test")))
    start = load_hf(check_folder(stock.folder))
    before, after = start.model.state_dict(), tuned.model.state_dict()
    changed = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"projector"}
    assert [entry["stage"] for entry in tuned.history] == ["published", "tuned"]
