"""What a finished model needs to answer: visual tokens of each image, weights, key-value cache.

Reads configurations only, like `planning.train_plan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polymodal.config import LLMConfig, ModelConfig
from polymodal.errors import CheckpointError
from polymodal.media_plan import Size
from polymodal.modeling.meta_device import outline
from polymodal.planning.starting_point import resolve_bundled
from polymodal.planning.train_plan import kv_bytes_per_token, visual_tokens
from polymodal.utils.files import shipped_folder


@dataclass(frozen=True)
class ModelPlan:
    """What a model needs; plain numbers."""

    name: str  # As it was asked for
    parameters: dict[str, int]  # Parameters of each part
    weight_bytes: int  # Bytes of all weights in memory
    dtype: str  # Of the language model
    images: tuple[tuple[int, int], ...]  # Height and width of each image
    visual_tokens: tuple[int, ...]  # Positions of each image
    tiles: tuple[int, ...]  # Tiles of each image
    tokens: int  # Positions of the prompt
    context: int | None  # Positions that the language model was made for; None where it has no limit
    kv_bytes_per_token: int  # Of the key-value cache
    kv_bytes: int  # Of the cache that holds the prompt

    @property
    def too_long(self) -> bool:
        """Whether the prompt does not fit the context."""
        return self.context is not None and self.tokens > self.context

    def plain(self) -> dict[str, Any]:
        """The plan as plain data."""
        return {**asdict(self), "too_long": self.too_long}


def plan_model(name: str, images: Sequence[Size], text_tokens: int, *, fetch: bool = False) -> ModelPlan:
    """Plan one prompt for a model."""
    config = _config(name)
    built = outline(config, fetch=fetch)
    tokens, tiles = visual_tokens(config, built, images)
    parameters: dict[str, int] = {}
    for full, parameter in built.model.named_parameters():
        part = full.split(".")[0]
        parameters[part] = parameters.get(part, 0) + parameter.numel()
    tensors = [*built.model.parameters(), *built.model.buffers()]
    llm: Any = built.model.llm.config.get_text_config()
    a_token = kv_bytes_per_token(llm, next(built.model.llm.parameters()).element_size())
    length = sum(tokens) + text_tokens
    return ModelPlan(
        name=name,
        parameters=parameters,
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        dtype=config.llm.dtype,
        images=tuple((size.height, size.width) for size in images),
        visual_tokens=tokens,
        tiles=tiles,
        tokens=length,
        context=getattr(llm, "max_position_embeddings", None),
        kv_bytes_per_token=a_token,
        kv_bytes=a_token * length,
    )


def _config(name: str) -> ModelConfig:
    """The configuration of a model of ours, or of a language model alone."""
    from polymodal.checkpoints.model_folder import CONFIG_NAME, read_config

    for folder in (shipped_folder() / name, Path(name).expanduser()):
        if (folder / CONFIG_NAME).is_file():
            return resolve_bundled(read_config(folder), folder)
    folder = Path(name).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: neither a polymodal.json nor a config.json in it")
    if not folder.is_dir() and name.count("/") != 1:
        raise CheckpointError(f"{name}: no such model folder, and no hub id (owner/name)")
    return ModelConfig(llm=LLMConfig(model_name_or_path=str(folder) if folder.is_dir() else name))
