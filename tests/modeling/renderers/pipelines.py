"""Tiny pipelines of diffusers with random weights, built from their configuration classes and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def clip_tokenizer() -> Any:
    """CLIP's tokenizer over the 256 bytes: a letter is an id, and 77 is the most."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def _clip_parts(width: int = 32) -> dict[str, Any]:
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = clip_tokenizer()
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 32), in_channels=3, out_channels=3, latent_channels=4, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)
    return {"tokenizer": tokenizer, "text_encoder": CLIPTextModel(text), "vae": vae, "scheduler": scheduler}


def stable_diffusion(folder: Path) -> None:
    """Write a tiny StableDiffusionPipeline that draws 64 × 64 pixels where nothing is said."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    parts = _clip_parts()
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=32, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, norm_num_groups=8, attention_head_dim=8,
    )  # fmt: skip
    StableDiffusionPipeline(
        **parts, unet=unet, safety_checker=None, feature_extractor=None, image_encoder=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def animate_diff(folder: Path) -> None:
    """Write a tiny AnimateDiffPipeline."""
    from diffusers import AnimateDiffPipeline, MotionAdapter, UNet2DConditionModel

    parts = _clip_parts()
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, norm_num_groups=8, attention_head_dim=8,
    )  # fmt: skip
    motion = MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4
    )
    AnimateDiffPipeline(**parts, unet=unet, motion_adapter=motion).save_pretrained(folder)


def wan(folder: Path) -> None:
    """Write a tiny WanPipeline, which reads prompts with a T5."""
    import torch
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    from tests.conftest import make_byte_tokenizer

    tokenizer = make_byte_tokenizer()
    torch.manual_seed(0)
    text = UMT5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2,
        rope_max_seq_len=32,
    )  # fmt: skip
    WanPipeline(
        tokenizer=tokenizer, text_encoder=UMT5EncoderModel(text), vae=vae, transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    ).save_pretrained(folder)  # fmt: skip


PIPELINES = {"stable_diffusion": stable_diffusion, "animate_diff": animate_diff, "wan": wan}
