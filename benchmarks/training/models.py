"""One model for all three systems: transformers' LLaVA with seeded weights, and polymodal's around the same modules."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from benchmarks.training.setting import Shape
from polymodal.config import ImageConfig, LLMConfig, ModelConfig, TemplateConfig, VisionConfig
from polymodal.modeling.encoders.hf_vision import HFVisionEncoder
from polymodal.modeling.projectors import build_projector
from polymodal.modeling.vlm import MultimodalLM
from polymodal.training.sft.task import StageInputs

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"

_PARTS = (
    "{%- for part in message['content'] -%}{{- '<image>' if part['type'] == 'image' else part['text'] -}}{%- endfor -%}"
)

# `generation` marks what is trained: the answer and its end token, as in polymodal.
PLAIN = (
    "{%- for message in messages -%}{%- if message['role'] == 'user' -%}" + _PARTS + "{%- else -%}"
    "{%- generation -%}" + _PARTS + "{{- '<|im_end|>' -}}{%- endgeneration -%}{%- endif -%}{%- endfor -%}"
)
CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['role'] == 'user' -%}" + _PARTS + "{{- '<|im_end|>' -}}{%- else -%}"
    "{%- generation -%}" + _PARTS + "{{- '<|im_end|>' -}}{%- endgeneration -%}{%- endif -%}"
    "{{- '\n' -}}{%- endfor -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, the two roles and control tokens; the model's other rows are never read, but scored all the same."""
    merges = [(role[:end], role[end]) for role in ("user", "assistant") for end in range(1, len(role))]
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet()) + [start + last for start, last in merges]
    inner = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def build_llava(shape: Shape, image_id: int, seed: int) -> LlavaForConditionalGeneration:
    """The model, in float32.

    Args:
        shape: Its sizes.
        image_id: The placeholder's id.
        seed: Of the weights.

    Returns:
        The model, with nothing frozen.
    """
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        use_cache=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=shape.tower_width,
        intermediate_size=4 * shape.tower_width,
        num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads,
        image_size=shape.image,
        patch_size=shape.patch,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.tie_weights()
    # Fresh weights of the usual scale score all tokens alike, whatever they see, and then a system that lost its
    # images has the same loss as one that did not. These pass on what they see.
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, torch.nn.Linear | torch.nn.Conv2d):
                part.weight.normal_(std=1.5 / part.weight[0].numel() ** 0.5)
    return model


def build_processor(shape: Shape, stage: int) -> LlavaProcessor:
    """Transformers' side of the data: the short side is resized, the centre cut out."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": shape.image}, crop_size={"height": shape.image, "width": shape.image}
    )
    return LlavaProcessor(
        images,
        build_tokenizer(),
        chat_template=PLAIN if stage == 1 else CHATML,
        patch_size=shape.patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def freeze_for_stage(model: LlavaForConditionalGeneration, stage: int, shape: Shape) -> Any:
    """Mark what is trained, the way users of the Trainer do.

    Args:
        model: Changed in place.
        stage: 1 or 2.
        shape: Names the adapter's rank.

    Returns:
        What the Trainer is given: the model, or a peft model around it.
    """
    model.requires_grad_(False)
    trained: Any = model
    if stage == 2:
        from peft import LoraConfig, get_peft_model

        trained = get_peft_model(
            model, LoraConfig(r=shape.lora_r, lora_alpha=2 * shape.lora_r, target_modules=LORA_TARGETS)
        )
    for name, parameter in trained.named_parameters():
        if "multi_modal_projector" in name:
            parameter.requires_grad_(True)
    return trained


def build_inputs(shape: Shape, stage: int, seed: int) -> StageInputs:
    """polymodal's model out of the very modules of `build_llava`, nothing copied but the small projector.

    Args:
        shape: The sizes.
        stage: 1 or 2.
        seed: Of the weights.

    Returns:
        What `polymodal.training.train` takes.
    """
    tokenizer = build_tokenizer()
    image_id: int = tokenizer.convert_tokens_to_ids("<image>")
    theirs = build_llava(shape, image_id, seed)
    with torch.device("meta"):
        llm = LlamaForCausalLM(theirs.config.text_config)
    llm.model, llm.lm_head = theirs.model.language_model, theirs.lm_head
    encoder = HFVisionEncoder(theirs.model.vision_tower)
    config = ModelConfig(
        vision=VisionConfig(vision_tower="in memory", type="clip"),
        image=ImageConfig(
            image_aspect_ratio="crop", tile_size=(shape.image, shape.image), image_mean=MEAN, image_std=STD
        ),
        llm=LLMConfig(model_name_or_path="in memory"),
        template=TemplateConfig(chat_template="plain" if stage == 1 else "chatml"),
    )
    projector = build_projector(config.projector, encoder.embed_dim, encoder.grid, shape.width)
    with torch.no_grad():
        for ours, other in zip(projector.parameters(), theirs.model.multi_modal_projector.parameters(), strict=True):
            ours.copy_(other)
    model = MultimodalLM(encoder, projector, llm, image_id, image_mean=MEAN, image_std=STD)
    return StageInputs(model, tokenizer, config)
