"""A model without its weights: the same modules from the same configuration, on tensors that hold no data.

Everything is built on torch's meta device, so a 13B model takes a second and no memory, while names, shapes, types,
rules and adapters are the real ones, not a formula's. Only configurations are read: from a local folder, the Hugging
Face cache, or `PUBLISHED_SHAPES`, what the `config.json` of the models that the recipes name says of their shape (at
their pages on the Hugging Face hub). Nothing is fetched unless asked for.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from polymodal.config import AudioConfig, LLMConfig, ModelConfig, TowerConfig, tower_folder
from polymodal.errors import CheckpointError, PolymodalError, first_line, unknown_name
from polymodal.media_plan import AudioWindow, Size
from polymodal.modeling.build import audio_window, compose, fit_projector, fit_temporal
from polymodal.modeling.encoders.audio import AUDIO_ENCODERS, WhisperAudioEncoder
from polymodal.modeling.encoders.efficientnet import EfficientNetLite0
from polymodal.modeling.encoders.hf_vision import FAMILIES, HFVisionEncoder
from polymodal.modeling.encoders.vision import (
    BUNDLED,
    VISION_ENCODERS,
    VisionEncoder,
    check_type,
    fuse,
    wrap_efficientnet,
)
from polymodal.modeling.language_model import DEFAULT_LLM, SMOLLM2, model_class, positions_of, scale_positions
from polymodal.modeling.pretrained import building, config_json
from polymodal.modeling.projectors import Projector, build_projector
from polymodal.modeling.vlm import MultimodalLM
from polymodal.utils.files import home_path, shipped


def _shape(kind: str, width: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {"model_type": kind, **dict(zip(names, (width, inner, layers, heads), strict=True)), **more}


def _decoder(kind: str, *sizes: int, rows: int, positions: int, kv_heads: int, **more: bool) -> dict[str, Any]:
    table = {"vocab_size": rows, "max_position_embeddings": positions, "num_key_value_heads": kv_heads}
    return {**_shape(kind, *sizes), **table, **{f"{name}_word_embeddings": value for name, value in more.items()}}


WHISPER = "openai/whisper-base"
PUBLISHED_SHAPES: dict[str, dict[str, Any]] = {
    SMOLLM2: _decoder("llama", 576, 1536, 30, 9, kv_heads=3, rows=49152, positions=8192, tie=True),
    "lmsys/vicuna-7b-v1.5": _decoder("llama", 4096, 11008, 32, 32, kv_heads=32, rows=32000, positions=4096),
    "lmsys/vicuna-13b-v1.5": _decoder("llama", 5120, 13824, 40, 40, kv_heads=40, rows=32000, positions=4096),
    "Qwen/Qwen2.5-0.5B-Instruct": _decoder(
        "qwen2", 896, 4864, 24, 14, kv_heads=2, rows=151936, positions=32768, tie=True
    ),
    "Qwen/Qwen2.5-1.5B-Instruct": _decoder(
        "qwen2", 1536, 8960, 28, 12, kv_heads=2, rows=151936, positions=32768, tie=True
    ),
    "Qwen/Qwen2.5-7B-Instruct": _decoder(
        "qwen2", 3584, 18944, 28, 28, kv_heads=4, rows=152064, positions=32768, tie=False
    ),
    "openai/clip-vit-large-patch14-336": _shape(
        "clip_vision_model", 1024, 4096, 24, 16, image_size=336, patch_size=14, projection_dim=768
    ),
    WHISPER: {
        "model_type": "whisper",
        "d_model": 512,
        "encoder_layers": 6,
        "encoder_attention_heads": 8,
        "encoder_ffn_dim": 2048,
    },
    "google/siglip-base-patch16-224": _shape("siglip_vision_model", 768, 3072, 12, 12, image_size=224, patch_size=16),
    "google/siglip-so400m-patch14-384": _shape(
        "siglip_vision_model", 1152, 4304, 27, 16, image_size=384, patch_size=14
    ),
}
"""Hub id -> the part of `config.json` that decides shapes."""


@dataclass(frozen=True)
class Outline:
    """A model on tensors without data."""

    model: MultimodalLM  # The model, on the meta device
    config: ModelConfig  # Its configuration


def outline(config: ModelConfig, *, fetch: bool = False) -> Outline:
    """Build a model without weights."""
    settings, where = llm_settings(config.llm, fetch=fetch), f"language model {config.llm.model_name_or_path!r}"
    with torch.device("meta"):
        with building(where):
            llm = model_class(bool(settings.is_encoder_decoder)).from_config(
                settings, dtype=getattr(torch, config.llm.dtype), attn_implementation="sdpa"
            )
        if getattr(settings, "scale_decoder_outputs", True) is False:
            # T5 1.1 has a head of its own; transformers makes it tied and parts it when it reads the weights.
            head = llm.get_output_embeddings()
            head.weight = nn.Parameter(torch.empty_like(head.weight))
        embeddings = llm.get_input_embeddings().weight
        encoder, projector = _eyes(config, embeddings.shape[1], fetch)
        model = compose(config, llm, embeddings.shape[0], encoder, projector)
        if encoder is not None and projector is not None:
            model.temporal_encoder = fit_temporal(config, encoder, projector)
        if config.audio is not None:
            ears = model.audio_encoder = _audio_encoder(config.audio, fetch)
            model.audio_projector = build_projector(
                config.audio.projector, ears.embed_dim, Size(1, 1), embeddings.shape[1]
            )
        return Outline(model.eval(), config)


def media_counts(
    config: ModelConfig, folder: Path | None = None, *, fetch: bool = False
) -> tuple[Size | None, AudioWindow | None]:
    """What a processor must know of a model: the tokens of a tile, and what the audio encoder takes at once."""
    return tokens_per_tile(config, folder, fetch=fetch), audio_window(config, folder)


def tokens_per_tile(config: ModelConfig, folder: Path | None = None, *, fetch: bool = False) -> Size | None:
    """What a tile becomes; None for a model without a vision encoder."""
    config = config if folder is None else with_own_towers(config, folder)
    with torch.device("meta"):
        _, projector = _eyes(config, 1, fetch)
    return None if projector is None else projector.output_grid


def with_own_towers(config: ModelConfig, folder: Path) -> ModelConfig:
    """A folder's configuration with the places of the towers that lie in it."""
    places: dict[str, Any] = {}
    if config.vision is not None:
        named = enumerate(tower.vision_tower for tower in config.vision.towers)
        places["vision"] = config.vision.at([str(folder / tower_folder(n)) if t == BUNDLED else t for n, t in named])
    if config.audio is not None and config.audio.audio_tower == BUNDLED:
        places["audio"] = config.audio.model_copy(update={"audio_tower": str(folder / "audio")})
    return config.model_copy(update=places)


def _eyes(config: ModelConfig, width: int, fetch: bool) -> tuple[VisionEncoder | None, Projector | None]:
    """A vision tower and the projector behind it."""
    if config.vision is None:
        return None, None
    image = config.image
    encoder = fuse(
        config.vision,
        lambda _, tower, tile: _vision_encoder(tower, tile, fetch),
        Size(*image.tile_size) if image else None,
        (image.image_mean, image.image_std) if image else None,
    )
    return encoder, fit_projector(config, encoder, width)


def on_no_device(model: nn.Module, mode: FakeTensorMode) -> None:
    """Move a model from the meta device, where a policy can be applied, to tensors that can be computed with."""
    moved: dict[int, Tensor] = {}

    def move(tensor: Tensor) -> Tensor:
        if id(tensor) not in moved:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            moved[id(tensor)] = nn.Parameter(new, requires_grad=tensor.requires_grad) if is_parameter else new
        return moved[id(tensor)]

    with mode:
        for module in model.modules():
            for store in (module._parameters, module._buffers):
                for name, tensor in store.items():
                    if tensor is not None:
                        store[name] = move(tensor)  # type: ignore[assignment]


def _llm_name(config: LLMConfig) -> str:
    return SMOLLM2 if config.model_name_or_path == DEFAULT_LLM else config.model_name_or_path


def llm_settings(config: LLMConfig, *, fetch: bool = False) -> Any:
    """Read a language model's configuration, as transformers has it."""
    name = _llm_name(config)
    path, where = home_path(name), f"language model {name!r}"
    with building(where):
        if path.suffix == ".gguf":
            return transformers.AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        settings = _config_json(name, config.revision, fetch)
        if settings.get("model_type") not in transformers.CONFIG_MAPPING:
            raise CheckpointError(f"{where}: transformers knows no model_type {str(settings.get('model_type'))[:80]!r}")
        if zero := next((key for key in ("vocab_size", "hidden_size") if settings.get(key) == 0), None):
            raise CheckpointError(f"{where}: {zero} is 0; more is expected")
        found = transformers.AutoConfig.for_model(**settings)
        scale_positions(found, config)
        return found


def llm_positions(config: LLMConfig) -> int | None:
    """The positions of a language model; None where its configuration is not on this machine."""
    try:
        if config.rope_scaling is None and home_path(_llm_name(config)).suffix != ".gguf":
            settings = _config_json(_llm_name(config), config.revision, fetch=False)
            found = settings.get("max_position_embeddings")
            if isinstance(found, int) and found > 0 and "text_config" not in settings:
                return found  # it says so itself; the classes of transformers take a second to load
        return positions_of(llm_settings(config))
    except PolymodalError:
        return None


def _config_json(name: str, revision: str | None, fetch: bool) -> dict[str, Any]:
    """A `config.json` as plain data: from a folder, the hub's cache, the table of known shapes, or the hub."""
    path = shipped(name) or home_path(name)
    if path.is_dir():
        return config_json(str(path), str(path / "config.json"))
    if path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") != 1:
        raise PolymodalError(f"{name}: no such folder; its config.json is read first of all")
    try:
        return config_json(name, name, revision=revision, local_files_only=not fetch)
    except CheckpointError as error:
        if not isinstance(error.__cause__, OSError | ValueError):
            raise  # it is here, and says what no model can be
        if name in PUBLISHED_SHAPES and not fetch:
            return dict(PUBLISHED_SHAPES[name])
        if fetch:
            raise CheckpointError(f"{name}: its config.json cannot be had: {first_line(error)}") from error
        raise CheckpointError(
            f"{name}: its shape is not known on this machine; --fetch asks the hub for its config.json (a few kB), or "
            "name a local folder"
        ) from error


def _audio_encoder(audio: AudioConfig, fetch: bool) -> WhisperAudioEncoder:
    """Build an audio tower from its configuration; a Whisper's encoder, whether or not its decoder lies beside it."""
    if audio.type not in AUDIO_ENCODERS:
        raise unknown_name("audio encoder type", audio.type, AUDIO_ENCODERS)
    name = WHISPER if audio.audio_tower == "whisper_base" else audio.audio_tower  # which a package has
    settings, where = _config_json(name, audio.revision, fetch), f"audio tower {audio.audio_tower!r}"
    if (found := settings.get("model_type")) != "whisper":
        raise CheckpointError(f"{where} has model_type {found!r}, not 'whisper'; give a Whisper's folder")
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    with building(where):
        model = WhisperEncoder(WhisperConfig(**{key: value for key, value in settings.items() if key != "model_type"}))
    return WhisperAudioEncoder(model, audio.stack)


def _vision_encoder(vision: TowerConfig, tile: Size | None, fetch: bool) -> VisionEncoder:
    """Build a vision tower from its configuration; of a whole model, from its vision part."""
    if vision.type not in VISION_ENCODERS:
        raise unknown_name("vision encoder type", vision.type, VISION_ENCODERS)
    if vision.type not in FAMILIES:
        return wrap_efficientnet(EfficientNetLite0().requires_grad_(False), vision, tile)
    family, settings = FAMILIES[vision.type], _config_json(vision.vision_tower, vision.revision, fetch)
    check_type(family, vision, settings.get("model_type"))
    settings = settings.get("vision_config", settings)
    tower = getattr(transformers, family.model_class)
    with building(f"vision tower {vision.vision_tower!r}"):
        model = tower(tower.config_class(**{key: value for key, value in settings.items() if key != "model_type"}))
    return HFVisionEncoder(model, vision.mm_vision_select_layer, vision.mm_vision_select_feature, tile)
