"""LLaVA-1.5 and LLaVA-NeXT: the same ids, pixels, logits and greedy text as transformers' own classes.

Tiny random models are built by transformers; their weights are put into ours; the same conversations go through both
processors and both models.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from polymodal.backends.local import LocalBackend
from polymodal.config import ImageConfig, LLMConfig, ModelConfig, TemplateConfig, VisionConfig
from polymodal.generation.generate import generate_ids
from polymodal.generation.params import GenerationParams
from polymodal.messages import Image, Message, user
from polymodal.modeling.encoders.hf_vision import HFVisionEncoder
from polymodal.modeling.projectors import build_projector
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import collate

TILE, PATCH = 56, 14
PINPOINTS = ((56, 112), (112, 56), (112, 112), (168, 56), (56, 168))
VICUNA = (
    "{% for m in messages %}{{ 'USER: ' if m['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for part in m['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{{ ' ' if m['role'] == 'user' else '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SHAPES = [(75, 100), (31, 150), (140, 60)]  # height, width: one wide, one very wide, one tall


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"]
    )
    raw.train_from_iterator(["USER: What is this? ASSISTANT: a picture of a cat"], trainer)
    raw.add_special_tokens([AddedToken("<image>", special=True)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>", chat_template=VICUNA
    )


def text_config(vocab: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048,
    )  # fmt: skip


def vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=TILE,
        patch_size=PATCH, projection_dim=16,
    )  # fmt: skip


def build(family: str, tokenizer: PreTrainedTokenizerFast) -> tuple[Any, Any, LocalBackend]:
    """One random model: transformers' model and processor, and ours with the same weights."""
    torch.manual_seed(0)
    image_id, vocab = tokenizer.convert_tokens_to_ids("<image>"), len(tokenizer)
    common = {"text_config": text_config(vocab), "vision_config": vision_config(), "image_token_id": image_id}
    pixels = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
    size = {"size": {"shortest_edge": TILE}, "crop_size": {"height": TILE, "width": TILE}}
    strategy = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if family == "llava":
        theirs = LlavaForConditionalGeneration(LlavaConfig(**common, vision_feature_layer=-2)).eval()
        processor = LlavaProcessor(CLIPImageProcessorPil(**size), tokenizer, chat_template=VICUNA, **strategy)
        image = ImageConfig(image_aspect_ratio="crop", tile_size=(TILE, TILE), **pixels)
    else:
        pinpoints = [list(p) for p in PINPOINTS]
        theirs = LlavaNextForConditionalGeneration(
            LlavaNextConfig(**common, vision_feature_layer=-2, image_grid_pinpoints=pinpoints)
        ).eval()
        processor = LlavaNextProcessor(
            LlavaNextImageProcessorPil(**size, image_grid_pinpoints=pinpoints), tokenizer,
            chat_template=VICUNA, **strategy,
        )  # fmt: skip
        image = ImageConfig(
            image_aspect_ratio="anyres", tile_size=(TILE, TILE), image_grid_pinpoints=PINPOINTS,
            mm_patch_merge_type="spatial_unpad", **pixels,
        )  # fmt: skip
    theirs.lm_head.weight.data.mul_(50)  # sharp logits: greedy text that no rounding can turn
    llm = LlamaForCausalLM(theirs.config.text_config).eval()
    llm.model.load_state_dict(theirs.model.language_model.state_dict())
    llm.lm_head.load_state_dict(theirs.lm_head.state_dict())
    config = ModelConfig(
        vision=VisionConfig(vision_tower="in memory", type="clip"), image=image,
        llm=LLMConfig(model_name_or_path="in memory"),
        template=TemplateConfig(chat_template="tokenizer"),
    )  # fmt: skip
    encoder = HFVisionEncoder(theirs.model.vision_tower)
    projector = build_projector(config.projector, encoder.embed_dim, encoder.grid, 32)
    for ours, hf in zip(list(projector.parameters()), theirs.model.multi_modal_projector.parameters(), strict=True):
        ours.data.copy_(hf.data)
    newline = family == "llava_next"
    model = MultimodalLM(encoder, projector, llm, image_id, image_newline=newline)
    if newline:
        model.image_newline.data.copy_(theirs.model.image_newline.data)
    return theirs, processor, LocalBackend(model.eval(), tokenizer, config)


def image(height: int, width: int) -> PILImage.Image:
    noise = np.random.default_rng(height * 1000 + width).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3))
    return PILImage.fromarray(noise.astype(np.uint8)).resize((width, height), PILImage.Resampling.BICUBIC)


def their_inputs(processor: Any, conversations: list[list[PILImage.Image]], question: str) -> dict[str, torch.Tensor]:
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [*({"type": "image"} for _ in shown), {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for shown in conversations
    ]
    processor.tokenizer.padding_side = "left"
    flat = [p for shown in conversations for p in shown]
    return processor(text=texts, images=flat, padding=True, return_tensors="pt")


def our_messages(images: list[PILImage.Image], question: str) -> list[Message]:
    return [user(*map(Image, images), question)]


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize("rows", [[[0]], [[0, 1, 2]], [[1], [0, 1, 2], [2, 0]]], ids=["one", "three", "batch"])
def test_same_ids_logits_and_greedy_text(
    family: str, rows: list[list[int]], tokenizer: PreTrainedTokenizerFast
) -> None:
    theirs, processor, ours = build(family, tokenizer)
    conversations = [[image(*SHAPES[i]) for i in row] for row in rows]
    question = "What is this?"
    expected = their_inputs(processor, conversations, question)
    samples = [ours.processor(our_messages(images, question), add_generation_prompt=True) for images in conversations]
    batch = collate(samples, ours.processor.pad_id, side="left")

    assert torch.equal(batch.input_ids, expected["input_ids"])
    assert torch.equal(batch.attention_mask, expected["attention_mask"].bool())
    with torch.inference_mode():
        positions = (batch.attention_mask.long().cumsum(1) - 1).clamp(min=0)
        reference = theirs(**expected, position_ids=positions).logits
        logits = ours.model(
            batch.input_ids, batch.attention_mask, None, batch.plans, batch.sample_of_image, batch.pixel_values
        ).logits
    real = batch.attention_mask
    assert (logits[real] - reference[real]).abs().max() < 1e-4

    with torch.inference_mode():
        their_ids = theirs.generate(**expected, max_new_tokens=12, do_sample=False, suppress_tokens=[
            ours.model.image_token_id]).tolist()  # fmt: skip
    our_ids = generate_ids(
        ours.model, batch, GenerationParams(max_new_tokens=12), [tokenizer.eos_token_id], len(tokenizer)
    )
    length = batch.input_ids.shape[1]
    for mine, whole in zip(our_ids, their_ids, strict=True):
        assert mine == whole[length : length + len(mine)]
        assert len(mine) == 12 or mine[-1] == tokenizer.eos_token_id
