"""Vision encoders: tiles of pixels [N, 3, H, W] to features [N, P, E]; every family in one table.

`VISION_ENCODERS` names them: the towers of `transformers` (see `modeling.encoders.hf_vision` for what is read from
them) and the small EfficientNet-Lite0 of `modeling.encoders.efficientnet`. Weights come with the package (the bare
names "efficientnet_lite0" and "vit_small"), from a folder, from the model's own folder ("bundled") or from the hub, as
safetensors only. Unlike a bare `from_pretrained`, loading is refused where the folder holds another family than
configured or lacks weights, which would otherwise stay at random values. Several side by side are a `FusedEncoder`.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import logging

from polymodal.config import TowerConfig, VisionConfig, tower_folder
from polymodal.errors import CheckpointError, ConfigError, unknown_name
from polymodal.media_plan import Size
from polymodal.modeling.encoders import efficientnet
from polymodal.modeling.encoders.hf_vision import FAMILIES, Family, HFVisionEncoder, family_of
from polymodal.modeling.encoders.pixel_norm import Renorm
from polymodal.modeling.pretrained import attention_of, load_checked, look_over
from polymodal.safety.config_json import check_settings
from polymodal.utils.files import home_path, shipped
from polymodal.utils.modules import ModuleLike
from polymodal.utils.safetensors_io import check_finite

BUNDLED = "bundled"
OWN = "module"
"""The `type` of a tower that is a user's module."""
# Parts of a tower that lie behind every hidden state: nothing of ours reads them, so weights may lack them.
UNUSED_PARTS = ("head.", "post_layernorm.", "layernorm.", "embeddings.mask_token")
# A tower may lie in the files of a whole model; layers that are its own and have no place are another tower's.
OWN_LAYERS = r"^(?!text_|language_|qformer).*\bencoder\.layers?\.\d+\."


class VisionEncoder(ModuleLike, Protocol):
    """What a vision encoder offers.

    Attributes:
        embed_dim: E, the width of the features.
        grid: Rows and columns of the features; `Size(1, P)` where a class token is among them.
        tile: Height and width of the images it takes, in pixels.
    """

    embed_dim: int
    grid: Size
    tile: Size

    def save(self, folder: Path) -> None:
        """Write the tower into a folder that `build_vision_encoder` reads.

        Args:
            folder: Made where it is missing.
        """

    def __call__(self, pixels: Tensor) -> Tensor:
        """Encode tiles [N, 3, H, W] to features [N, P, E]."""
        ...


Norm = tuple[Sequence[float], Sequence[float]]
"""Mean and standard deviation of each channel that pixels are normalised with."""


class FusedEncoder(nn.Module):
    """Several `VisionEncoder`s side by side: [N, 3, H, W] -> [N, P, E], E the sum of theirs and P the first's."""

    # As in Prismatic (arXiv:2402.07865) all see the same tile, positions interpolated where it is not a tower's own,
    # and features are concatenated along the channels; those of another grid are resized to the first's bilinearly, as
    # in Cambrian-1 (arXiv:2406.16860); unlike there, a grid that shrinks loses no patch (antialias). Pixels come
    # normalised for the first tower and are normalised anew for others.

    def __init__(self, towers: Sequence[Any], norms: Sequence[Norm | None] = (), norm: Norm | None = None) -> None:
        super().__init__()
        first = towers[0]
        for number, tower in enumerate(towers, 1):
            where = f"vision tower {number} of {len(towers)}"
            if (kept := getattr(tower, "select_feature", "patch")) != "patch":
                raise ConfigError(
                    f"{where}: mm_vision_select_feature {kept!r} keeps a class token, which has no place beside the "
                    "patches of another tower; set it to 'patch'"
                )
            if tower.tile != first.tile:
                raise ConfigError(
                    f"{where}: takes tiles of {tower.tile.height}x{tower.tile.width} pixels and the first "
                    f"{first.tile.height}x{first.tile.width}; build them with the same `tile`"
                )
            if tower.grid != first.grid and any(grid.height == 1 < grid.width for grid in (tower.grid, first.grid)):
                raise ConfigError(
                    f"{where}: {tower.grid.area} features and {first.grid.area} of the first, not all in rows and "
                    "columns, cannot be brought onto one grid; give both as many"
                )
        if norm is None and any(wanted is not None for wanted in norms):
            raise ConfigError("towers side by side: how pixels are normalised must be known; give `norm`")
        # A dict, since a list of two equal towers would pass for repeated layers (`utils.modules.blocks`).
        self.towers = nn.ModuleDict({str(number): tower for number, tower in enumerate(towers)})
        self.norms = nn.ModuleDict(
            {str(n): Renorm(norm, wanted) for n, wanted in enumerate(norms) if norm is not None and wanted is not None}
        )
        self.tile, self.grid = first.tile, first.grid
        self.embed_dim = sum(tower.embed_dim for tower in towers)
        self.train(first.training)

    def forward(self, pixels: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, P, E]
        """Encode tiles."""
        return torch.cat([self._features(name, pixels) for name in self.towers], dim=-1)

    def _features(self, name: str, pixels: Tensor) -> Tensor:
        """The features of one tower on the first's grid."""
        tower: Any = self.towers[name]
        found: Tensor = tower(self.norms[name](pixels) if name in self.norms else pixels)
        if tower.grid == self.grid:
            return found
        square = found.transpose(1, 2).unflatten(2, (tower.grid.height, tower.grid.width)).float()
        resized = F.interpolate(square, (self.grid.height, self.grid.width), mode="bilinear", antialias=True)
        return resized.flatten(2).transpose(1, 2).to(found.dtype)

    def save(self, folder: Path) -> None:
        """Write the first tower into a folder and each of the others into one beside it."""
        for number, tower in enumerate(towers_of(self)):
            tower.save(folder.with_name(tower_folder(number)) if number else folder)

    def class_head(self) -> efficientnet.ClassHead | None:
        """The classifier of the first tower that has one, as seen from all channels."""
        start = 0
        for tower in towers_of(self):
            if isinstance(tower, efficientnet.EfficientNetEncoder) and (head := tower.class_head()) is not None:
                return head._replace(channels=slice(start + head.channels.start, start + head.channels.stop))
            start += int(tower.embed_dim)
        return None


def towers_of(encoder: Any) -> list[Any]:
    """The towers of an encoder: those side by side, or itself alone."""
    return list(encoder.towers.values()) if isinstance(encoder, FusedEncoder) else [encoder]


def fuse(
    vision: VisionConfig, build: Callable[[int, TowerConfig, Size | None], Any], tile: Size | None, norm: Norm | None
) -> VisionEncoder:
    """The towers of a configuration, each built by its number and for the tile of the first, as one encoder."""
    towers: list[Any] = [build(0, vision, tile)]
    towers += [build(number, tower, towers[0].tile) for number, tower in enumerate(vision.fused, 1)]
    norms = [None, *((t.image_mean, t.image_std) if t.image_mean and t.image_std else None for t in vision.fused)]
    return FusedEncoder(towers, norms, norm) if vision.fused else towers[0]


def _build_hf(config: TowerConfig, own: Path | None, tile: Size | None) -> VisionEncoder:
    """Load a tower of `transformers` from a folder or the hub."""
    if (config.pool, config.stages, config.detail) != (None, None, None):
        raise ConfigError(f"vision.pool, stages and detail belong to efficientnet_lite0, not to {config.type}")
    path = _local(config, own)
    if path is None and not re.fullmatch(r"[\w.-]+/[\w.-]+", config.vision_tower):
        raise ConfigError(f"vision_tower {config.vision_tower!r}: no such folder, and not a hub id (owner/name)")
    model = _load_tower(FAMILIES[config.type], config, config.vision_tower if path is None else str(path))
    return HFVisionEncoder(model, config.mm_vision_select_layer, config.mm_vision_select_feature, tile)


def _load_tower(family: Family, config: TowerConfig, source: str) -> nn.Module:
    """Read a tower's weights (safetensors only) and make sure that none was left at random values."""
    verbosity, where = logging.get_verbosity(), f"vision_tower {source!r}"
    most = look_over(source, where, revision=config.revision)
    try:
        settings, _ = transformers.PreTrainedConfig.get_config_dict(source, revision=config.revision)
        if "model_type" not in settings:
            raise CheckpointError(f"vision_tower {source!r} has no config.json that names a model_type")
        check_settings(settings, f"vision_tower {source!r}")
        check_type(family, config, settings["model_type"])
        # The report that a text tower was left out is what was asked for, no news.
        logging.set_verbosity_error()
        model: nn.Module = load_checked(
            getattr(transformers, family.model_class),
            source,
            where,
            most,
            revision=config.revision,
            use_safetensors=True,
            trust_remote_code=False,
            key_mapping=family.key_mapping,
            may_lack=UNUSED_PARTS,
            no_more=OWN_LAYERS,
            **attention_of(settings, where),
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"vision_tower {source!r} cannot be loaded: {' '.join(str(error).split())}") from error
    finally:
        logging.set_verbosity(verbosity)
    check_finite(dict(model.named_parameters()), f"vision_tower {source!r}")
    return model


def fingerprint(encoder: Any) -> str:
    """A short hash of a tower's weights, of some numbers of each tensor; what nothing reads has no say."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        if not re.sub(r"^(towers\.\d+\.)?(model\.)?", "", name).startswith(UNUSED_PARTS) and tensor.is_floating_point():
            some = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)].float().cpu()
            digest.update(some.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_fingerprint(encoder: Any, known: str | None, trained: str) -> None:
    """Refuse a tower whose weights are not those that a model was trained behind."""
    if known not in (None, fingerprint(encoder)):
        raise CheckpointError(f"{trained} is now (its weights differ); put the tower back, or train again")


def check_type(family: Family, config: TowerConfig, found: str | None) -> None:
    """Raise unless a tower's `model_type` is one that the configured family reads."""
    if found in family.model_types:
        return
    fitting = family_of(found)
    hint = f"set type to {fitting!r}" if fitting else f"it takes {' or '.join(map(repr, family.model_types))}"
    raise ConfigError(
        f"vision_tower {config.vision_tower!r} has model_type {found!r} but vision.type is {config.type!r}; {hint}"
    )


def _local(config: TowerConfig, own: Path | None) -> Path | None:
    """The folder or file that `vision_tower` names, None where there is none on this machine."""
    if config.vision_tower == BUNDLED:
        if own is None:
            raise ConfigError("vision_tower 'bundled' needs the model's folder; give a folder or a hub id instead")
        if not own.exists():
            raise CheckpointError(f"{own} is missing: the model's vision_tower is 'bundled'")
        return own
    path = shipped(config.vision_tower) or home_path(config.vision_tower)
    return path if path.exists() else None


def _build_efficientnet(config: TowerConfig, own: Path | None, tile: Size | None) -> VisionEncoder:
    """Load EfficientNet-Lite0 from its safetensors file or the folder that holds it."""
    if config.mm_vision_select_layer != -2 or config.mm_vision_select_feature != "patch":
        raise ConfigError(
            "efficientnet_lite0 has no layers or class token to select: leave mm_vision_select_layer and "
            "mm_vision_select_feature out and choose vision.stages"
        )
    path = _local(config, own)
    if path is None:
        raise ConfigError(f"vision_tower {config.vision_tower!r}: no such file or folder")
    network = efficientnet.load_efficientnet_lite0(path / efficientnet.WEIGHTS_FILE if path.is_dir() else path)
    return wrap_efficientnet(network, config, tile).eval()


def wrap_efficientnet(
    network: efficientnet.EfficientNetLite0, config: TowerConfig, tile: Size | None
) -> efficientnet.EfficientNetEncoder:
    """EfficientNet-Lite0 as an encoder, pooled as a config says."""
    options: dict[str, Any] = {"stages": config.stages, "pool": config.pool, "detail": config.detail}
    encoder = efficientnet.EfficientNetEncoder(network, **{k: v for k, v in options.items() if v is not None})
    encoder.tile = tile or efficientnet.IMAGE_SIZE
    return encoder


VISION_ENCODERS: dict[str, Callable[[TowerConfig, Path | None, Size | None], VisionEncoder]] = {
    **dict.fromkeys(FAMILIES, _build_hf),
    "efficientnet_lite0": _build_efficientnet,
}


def build_vision_encoder(
    config: TowerConfig, folder: Path | None = None, *, tile: Size | None = None, norm: Norm | None = None
) -> VisionEncoder:
    """Build the encoder that a config asks for, with its weights.

    Args:
        config: The vision part of a model's config.
        folder: The model's own folder, which "bundled" refers to.
        tile: The images' size in pixels; what the (first) tower was trained with when None.
        norm: The mean and deviation of each channel that pixels come with; needed where further towers name others.

    Returns:
        The encoder on the CPU, in eval mode, in the weights' own type.

    Raises:
        ConfigError: An unknown type, a tower of another type than configured, or an impossible selection.
        CheckpointError: The weights are missing, incomplete or unreadable.
    """

    def build(number: int, tower: TowerConfig, size: Size | None) -> VisionEncoder:
        return build_tower(tower, folder, size, number)

    return fuse(config, build, tile, norm) if isinstance(config, VisionConfig) else build(0, config, tile)


def build_tower(config: TowerConfig, folder: Path | None, tile: Size | None, number: int = 0) -> VisionEncoder:
    """Build one tower, the n-th of those in the model's folder where it is "bundled"."""
    if config.type == OWN:
        raise CheckpointError(
            "the vision tower is a module of the model's maker: compose the model again with it "
            "(`polymodal.compose(vision=MODULE, ...)`) and load the weights into that"
        )
    if config.type not in VISION_ENCODERS:
        raise unknown_name("vision encoder type", config.type, VISION_ENCODERS)
    return VISION_ENCODERS[config.type](config, None if folder is None else folder / tower_folder(number), tile)
