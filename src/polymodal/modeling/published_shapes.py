"""The shapes of published models that the recipes name, so that a plan needs neither weights nor a network.

Each entry is what the model's own `config.json` says of its shape, at the model's page on the Hugging Face hub. A copy
in the Hugging Face cache or a local folder goes first; `polymodal plan --fetch` asks the hub instead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polymodal.config import LLMConfig
from polymodal.errors import CheckpointError, PolymodalError, first_line
from polymodal.modeling.language_model import DEFAULT_LLM

_LLAMA: dict[str, Any] = {"model_type": "llama"}
_QWEN: dict[str, Any] = {"model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768}


def _decoder(
    base: dict[str, Any], width: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any
) -> dict[str, Any]:
    return {
        **base,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"

PUBLISHED_SHAPES: dict[str, dict[str, Any]] = {
    SMOLLM2: _decoder(
        _LLAMA, 576, 1536, 30, 9, 3, vocab_size=49152, max_position_embeddings=8192, tie_word_embeddings=True
    ),
    "lmsys/vicuna-7b-v1.5": _decoder(_LLAMA, 4096, 11008, 32, 32, 32, vocab_size=32000, max_position_embeddings=4096),
    "lmsys/vicuna-13b-v1.5": _decoder(_LLAMA, 5120, 13824, 40, 40, 40, vocab_size=32000, max_position_embeddings=4096),
    "Qwen/Qwen2.5-0.5B-Instruct": _decoder(_QWEN, 896, 4864, 24, 14, 2, tie_word_embeddings=True),
    "Qwen/Qwen2.5-1.5B-Instruct": _decoder(_QWEN, 1536, 8960, 28, 12, 2, tie_word_embeddings=True),
    "Qwen/Qwen2.5-7B-Instruct": _decoder(_QWEN, 3584, 18944, 28, 28, 4, vocab_size=152064, tie_word_embeddings=False),
    "openai/clip-vit-large-patch14-336": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    },
    "google/siglip-base-patch16-224": {
        "model_type": "siglip_vision_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
    },
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
"""Hub id -> the part of `config.json` that decides shapes."""

DEVICES: dict[str, tuple[float, float]] = {
    "v100-32gb": (125e12, 32),
    "a100-40gb": (312e12, 40),
    "a100-80gb": (312e12, 80),
    "h100-80gb": (989e12, 80),
    "h200-141gb": (989e12, 141),
    "l40s-48gb": (362e12, 48),
    "rtx4090-24gb": (165e12, 24),
    "rtx3090-24gb": (71e12, 24),
}
"""Device -> dense half-precision matmul FLOP/s (tensor cores, float32 accumulation) and memory in GB, as its maker
states them."""


def llm_settings(config: LLMConfig, *, fetch: bool = False) -> Any:
    """Read a language model's configuration, as transformers has it."""
    from transformers import AutoConfig

    name = SMOLLM2 if config.model_name_or_path == DEFAULT_LLM else config.model_name_or_path
    path = Path(name).expanduser()
    try:
        if path.suffix == ".gguf":
            return AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
        settings = _settings(name, config.revision, fetch)
        return AutoConfig.for_model(**settings)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"language model {name!r}: no readable configuration: {first_line(error)}") from error


def _settings(name: str, revision: str | None, fetch: bool) -> dict[str, Any]:
    """A `config.json` as plain data: from a folder, the hub's cache, the table of known shapes, or the hub."""
    from transformers import PreTrainedConfig

    path = Path(name).expanduser()
    if path.is_dir():
        return dict(PreTrainedConfig.get_config_dict(str(path))[0])
    if path.is_absolute() or name.startswith(("./", "../", "~")) or name.count("/") != 1:
        raise PolymodalError(f"{name}: no such folder; a plan reads its config.json")
    try:
        found = PreTrainedConfig.get_config_dict(name, revision=revision, local_files_only=not fetch)[0]
    except (OSError, ValueError) as error:
        if name in PUBLISHED_SHAPES and not fetch:
            return dict(PUBLISHED_SHAPES[name])
        if fetch:
            raise CheckpointError(f"{name}: its config.json cannot be had: {first_line(error)}") from error
        raise CheckpointError(
            f"{name}: its shape is not known on this machine; --fetch asks the hub for its config.json (a few kB), or "
            "name a local folder"
        ) from error
    return dict(found)
