"""A model from its configuration: the parts are loaded, the projector is made to fit between them.

Only these functions see a configuration; the parts themselves take plain arguments.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from polymodal.config import ModelConfig, TowerConfig
from polymodal.config.projector import PER_TOKEN
from polymodal.errors import ConfigError
from polymodal.media_plan import AudioWindow, Size, native_bounds
from polymodal.modeling.ctranslate2 import missing_whisper
from polymodal.modeling.encoders import audio as audio_towers
from polymodal.modeling.encoders.audio import AudioEncoder, build_audio_encoder
from polymodal.modeling.encoders.hf_vision import FAMILIES, HFVisionEncoder
from polymodal.modeling.encoders.video_temporal import TemporalEncoder, build_temporal
from polymodal.modeling.encoders.vision import VisionEncoder, build_tower, fingerprint, fuse
from polymodal.modeling.language_model import load_llm, load_tokenizer
from polymodal.modeling.own import measured_encoder, measured_projector
from polymodal.modeling.projectors import Projector, build_projector
from polymodal.modeling.projectors.qformer_files import check_stage1, load_context_tokenizer, start_projector
from polymodal.modeling.vlm import MultimodalLM
from polymodal.modeling.vocabulary import add_output
from polymodal.video_plan import temporal_output

if TYPE_CHECKING:  # whose module takes a second to load
    from transformers import PreTrainedModel


def build_model(
    config: ModelConfig,
    folder: Path | None = None,
    quantize: str | None = None,
    llm: Any = None,
    audio_known: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    encoder: Any = None,
    projector: Any = None,
) -> tuple[MultimodalLM, PreTrainedTokenizerBase]:
    """Compose a model: load the parts, make the projector (random weights).

    Args:
        config: The configuration.
        folder: The model folder that "bundled" parts and the tokenizer lie in.
        quantize: As in `load_llm`.
        llm: A language model that is there already, in place of the configuration's.
        audio_known: The fingerprint of the audio tower, where it need not be read before the first sound comes.
        tokenizer: One that is there already.
        encoder: Any module [N, 3, H, W] -> [N, P, E], in place of the configuration's tower; of several side by side
            one each, None for those that are loaded.
        projector: Any module [N, P, E] -> [N, Q, D], in place of the configuration's.

    Returns:
        The model in eval mode, and the tokenizer.

    Raises:
        ConfigError: A component is unknown or does not fit the next.
        CheckpointError: A part cannot be loaded.
    """
    llm = load_llm(config.llm, quantize) if llm is None else llm
    tokenizer = load_tokenizer(config.llm, folder) if tokenizer is None else tokenizer
    head, embeddings = llm.get_output_embeddings(), llm.get_input_embeddings()
    vocab_size, width = (head or embeddings).weight.shape[0], embeddings.weight.shape[1]
    encoder, projector = build_vision(config, folder, width, encoder, projector) or (None, None)
    if projector is not None and config.projector.pretrained is not None:
        check_stage1(Path(config.projector.pretrained).expanduser(), config, fingerprint(encoder))
        start_projector(projector, config.projector.pretrained)
    model = compose(config, llm, image_token_id_for(config, tokenizer, vocab_size), encoder, projector)
    add_senses(model, config, folder, audio_known)
    add_output(model, tokenizer, config, folder)
    if encoder is not None:
        model.context_tokenizer = load_context_tokenizer(config.projector, folder)
    return model, tokenizer


def build_vision(
    config: ModelConfig, folder: Path | None, llm_dim: int, encoder: Any = None, projector: Any = None
) -> tuple[VisionEncoder, Projector] | None:
    """Load the vision tower and make the projector that fits it (random weights), each unless it is given."""
    if config.vision is None:
        return None
    given = encoder if isinstance(encoder, list) else [encoder]

    def build(number: int, tower: TowerConfig, size: Size | None) -> VisionEncoder:
        if given[number:] and given[number] is not None:
            return measured_encoder(given[number], tower, size)
        built = build_tower(tower, folder, size, number)
        if config.llm.dtype == "float32" and next(built.parameters()).dtype == torch.float16:
            # Exact, and several times as fast on a CPU, which has no arithmetic in float16.
            built.to(torch.float32)
        return built

    image = config.image
    tile = Size(*image.tile_size) if image else None
    encoder = fuse(config.vision, build, tile, (image.image_mean, image.image_std) if image else None)
    if projector is None:
        return encoder, fit_projector(config, encoder, llm_dim)
    projector = measured_projector(projector, encoder, llm_dim)
    check_native(config, encoder, projector.output_grid)
    check_merge(config, projector.output_grid)
    return encoder, projector


def _audio_source(config: ModelConfig, folder: Path | None) -> str | None:
    """Where the audio tower is; None where there is none."""
    # A packaged tower that is not installed leaves a model that sees as before and hears nothing.
    if (audio := config.audio) is None or missing_whisper(audio.audio_tower) is not None:
        return None
    tower = audio.audio_tower
    if tower == "bundled":
        if folder is None or not (folder / "audio").is_dir():
            raise ConfigError(
                "audio_tower 'bundled' needs the model's folder with audio/ in it; give a folder or a name"
            )
        tower = str(folder / "audio")
    return tower


def build_audio(
    config: ModelConfig, folder: Path | None, llm_dim: int, known: str | None = None
) -> tuple[AudioEncoder, Projector] | None:
    """Load the audio tower and make the projector that fits it (random weights); None where there is none."""
    if (audio := config.audio) is None or (tower := _audio_source(config, folder)) is None:
        return None
    encoder = build_audio_encoder(audio.type, tower, stack=audio.stack, revision=audio.revision, known=known)
    if config.llm.dtype == "float32":
        encoder.to(torch.float32)
    return encoder, build_projector(audio.projector, encoder.embed_dim, Size(1, 1), llm_dim)


def fit_temporal(config: ModelConfig, encoder: VisionEncoder, projector: Projector) -> TemporalEncoder | None:
    """Make the temporal encoder between a vision tower and its projector (random weights)."""
    kind = config.projector.mm_projector_type if config.projector is not None else None
    if config.video is not None and config.video.tokens_per_frame is not None and kind != "summary":
        raise ConfigError(f"video.tokens_per_frame is for mm_projector_type 'summary'; this is {kind!r}, pool instead")
    if config.video is None or config.video.temporal is None:
        return None
    temporal = build_temporal(config.video.temporal, encoder.embed_dim, encoder.grid, config.video.max_frames)
    if temporal.output_grid != encoder.grid and not re.fullmatch(PER_TOKEN, config.projector.mm_projector_type):
        raise ConfigError(
            f"video.temporal pools in space, which {config.projector.mm_projector_type!r} cannot follow; use a linear "
            "or MLP projector, or a stride of (t, 1, 1)"
        )
    planned, _ = temporal_output(temporal.max_frames, config.video, projector.output_grid)
    assert planned == temporal.output_frames(temporal.max_frames)  # plan and encoder count alike
    return temporal


def add_senses(
    model: MultimodalLM, config: ModelConfig, folder: Path | None = None, audio_known: str | None = None
) -> None:
    """Give a model what its configuration has for videos and sounds and it has not yet (random weights)."""
    embeddings = model.llm.get_input_embeddings().weight
    if model.temporal_encoder is None and model.vision_encoder is not None and model.projector is not None:
        model.temporal_encoder = fit_temporal(config, model.vision_encoder, model.projector)
        if model.temporal_encoder is not None:
            model.temporal_encoder.to(embeddings.device, embeddings.dtype)
    if model.temporal_encoder is not None and config.video is not None:
        model.temporal_encoder.max_frames = config.video.max_frames  # which is no part of what it has learnt
    if (
        model.audio_encoder is None
        and (built := build_audio(config, folder, embeddings.shape[1], audio_known)) is not None
    ):
        model.audio_encoder, model.audio_projector = built
        model.audio_encoder.to(embeddings.device)
        model.audio_projector.to(embeddings.device, embeddings.dtype)
    model.eval()


def audio_window(config: ModelConfig, folder: Path | None) -> AudioWindow | None:
    """What a model's audio encoder takes at once; None for a model without one."""
    if (audio := config.audio) is None or (tower := _audio_source(config, folder)) is None:
        return None
    return audio_towers.audio_window(audio.type, tower, stack=audio.stack, revision=audio.revision)


def fit_projector(config: ModelConfig, encoder: VisionEncoder, llm_dim: int) -> Projector:
    """Make the projector that leads from a vision tower to a language model (random weights)."""
    projector = build_projector(config.projector, encoder.embed_dim, encoder.grid, llm_dim)
    check_native(config, encoder, projector.output_grid)
    check_merge(config, projector.output_grid)
    return projector


def check_merge(config: ModelConfig, tokens: Size) -> None:
    """Make sure that tokens which are to be laid out in space have an order in space."""
    merge = config.image.mm_patch_merge_type if config.image is not None else "flat"
    if merge != "flat" and tokens.height == 1 < tokens.width:
        raise ConfigError(
            f"image.mm_patch_merge_type {merge!r} lays tokens out in rows and columns, but "
            f"{config.projector.mm_projector_type!r} gives {tokens.width} of them in no order; set it to flat"
        )


def check_native(config: ModelConfig, encoder: VisionEncoder, tokens: Size) -> None:
    """Make sure that tower and projector can follow images of any shape, where the image rules give them such."""
    image, vision, name = config.image, config.vision, config.projector.mm_projector_type
    if image is None or vision is None or image.image_aspect_ratio != "native":
        return
    way = "image.image_aspect_ratio 'native'"
    if vision.fused:
        raise ConfigError(f"{way}: towers side by side (vision.fused) take tiles of one size; take one tower")
    if not isinstance(encoder, HFVisionEncoder):
        raise ConfigError(f"{way}: {vision.type} takes tiles of one size; take one of {', '.join(FAMILIES)}")
    if vision.mm_vision_select_feature != "patch":
        raise ConfigError(f"{way} lays patches out in rows; set vision.mm_vision_select_feature to 'patch'")
    if not ((re.fullmatch(PER_TOKEN, name) and tokens == encoder.grid) or re.match("pixel_shuffle|avg_pool", name)):
        raise ConfigError(
            f"{way} gives each image a grid of its own, and projector {name!r} makes {tokens.area} tokens of one of "
            f"{encoder.grid.height}x{encoder.grid.width}; take linear, an MLP, pixel_shuffle<r> or avg_pool<r>"
        )
    tile, whole = encoder.tile, encoder.patch_grid * encoder.patch
    if tile != whole:
        raise ConfigError(
            f"{way} steps by whole patches, and image.tile_size {tile.height}x{tile.width} is not made of these; set "
            f"it to {whole.height}x{whole.width}"
        )
    native_bounds(image, tile, tokens)


def fit_native(model: MultimodalLM, config: ModelConfig) -> None:
    """Let a model's tower take images of any shape, where the image rules give it such."""
    if config.image is not None and config.image.image_aspect_ratio == "native":
        encoder: Any = model.vision_encoder
        assert model.projector is not None  # as in every model with image rules
        check_native(config, encoder, model.projector.output_grid)
        encoder.take_any_size()


def compose(
    config: ModelConfig,
    llm: PreTrainedModel,
    image_token_id: int,
    encoder: VisionEncoder | None,
    projector: Projector | None,
) -> MultimodalLM:
    """Put the parts together, in eval mode."""
    embeddings, image = llm.get_input_embeddings().weight, config.image
    if encoder is not None and projector is not None:
        # A language model that a device map has placed decides where the rest goes.
        encoder.to(embeddings.device)
        projector.to(embeddings.device, embeddings.dtype)
    model = MultimodalLM(
        encoder,
        projector,
        llm,
        image_token_id,
        image_newline=image is not None and image.mm_patch_merge_type == "spatial_unpad",
        image_mean=image.image_mean if image is not None else None,
        image_std=image.image_std if image is not None else None,
    )
    if model.pixel_norm is not None:
        model.pixel_norm.to(embeddings.device)
    fit_native(model, config)
    return model.eval()


def image_token_id_for(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """Choose the placeholder's id."""
    given = config.image_token_id
    if given is None:
        own = tokenizer.get_added_vocab().get("<image>")
        return own if own is not None else max(vocab_size, len(tokenizer))
    if given < len(tokenizer) and given not in tokenizer.added_tokens_decoder:
        raise ConfigError(f"image_token_id {given} is an ordinary token of the tokenizer")
    return given
