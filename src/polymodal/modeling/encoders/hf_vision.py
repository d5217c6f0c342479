"""The vision towers of `transformers` as encoders: which hidden state, which positions, on which tile.

Families: CLIP (arXiv:2103.00020), SigLIP (arXiv:2303.15343), SigLIP 2 (arXiv:2502.14786), DINOv2 (arXiv:2304.07193)
with and without registers (arXiv:2309.16588), and EVA-CLIP ViT-g/14 as BLIP-2 uses it (arXiv:2211.07636,
arXiv:2301.12597).

Layers are counted as LLaVA counts them (arXiv:2304.08485): index into the hidden states of `transformers`, 0 the
embeddings, -1 the last layer before the final norm, -2 the layer before it. Differences from the reference: layers
above the deepest selected one are not run (the numbers are the same); register tokens are always dropped, also where
LLaVA's "full" would keep them; asking for a class token that the family lacks is an error instead of a lost patch.
The fixed-resolution SigLIP 2 checkpoints are `siglip` models to `transformers`; `siglip2` is the NaFlex kind.
EVA-02-CLIP has no class in `transformers` and is therefore not in the table.

A tower takes tiles of one size, or after `take_any_size` images of any whole number of patches, each at its own grid:
NaFlex as it was trained, the others with their positions interpolated by transformers' own code.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from polymodal.errors import ConfigError, unknown_name
from polymodal.media_plan import Size
from polymodal.modeling.encoders.packed_images import keep_images_apart


def _embed_clip(tower: Any, pixels: Tensor, grid: Size, interpolate: bool) -> Tensor:
    """CLIP's hidden state 0; its norm comes before the first layer."""
    return tower.pre_layrnorm(tower.embeddings(pixels, interpolate_pos_encoding=interpolate))


def _embed_plain(tower: Any, pixels: Tensor, grid: Size, interpolate: bool) -> Tensor:
    """Hidden state 0 of the families that are told when to interpolate their position embeddings."""
    return tower.embeddings(pixels, interpolate_pos_encoding=interpolate)


def _embed_dinov2(tower: Any, pixels: Tensor, grid: Size, interpolate: bool) -> Tensor:
    """DINOv2's hidden state 0; it sees from the image's size whether to interpolate."""
    return tower.embeddings(pixels)


def _embed_siglip2(tower: Any, pixels: Tensor, grid: Size, interpolate: bool) -> Tensor:
    """SigLIP 2's hidden state 0; it takes flat patches, channels last, and the grid they form."""
    count, patch = pixels.shape[0], _pair(tower.config.patch_size)
    pixels = pixels[..., : grid.height * patch.height, : grid.width * patch.width]
    patches = pixels.reshape(count, -1, grid.height, patch.height, grid.width, patch.width)
    patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(count, grid.area, -1)
    return tower.embeddings(patches, torch.tensor([[grid.height, grid.width]] * count))


@dataclass(frozen=True)
class Family:
    """What differs between the towers of `transformers`."""

    model_class: str  # The class in `transformers`
    model_types: tuple[str, ...]  # The `model_type` of its config, the vision model's own first, then the whole model's
    embed: Callable[[Any, Tensor, Size, bool], Tensor]  # Pixels to hidden state 0
    class_token: bool  # Whether position 0 is a class token
    layers: str = "layers"  # The name of the list of layers inside `encoder`
    # What a layer takes besides the hidden state: no attention mask, where it asks for one
    layer_args: tuple[None, ...] = (None,)
    # Renames from a whole model's weights, where `transformers` does not know them itself
    key_mapping: dict[str, str] | None = None


FAMILIES: dict[str, Family] = {
    "clip": Family("CLIPVisionModel", ("clip_vision_model", "clip"), _embed_clip, True),
    "siglip": Family("SiglipVisionModel", ("siglip_vision_model", "siglip"), _embed_plain, False),
    "siglip2": Family("Siglip2VisionModel", ("siglip2_vision_model", "siglip2"), _embed_siglip2, False),
    "dinov2": Family("Dinov2Model", ("dinov2",), _embed_dinov2, True, layers="layer"),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersModel", ("dinov2_with_registers",), _embed_dinov2, True, layers="layer"
    ),
    "eva_clip": Family(
        "Blip2VisionModel",
        ("blip_2_vision_model", "blip-2", "instructblip_vision_model", "instructblip"),
        _embed_plain,
        True,
        layer_args=(),
        key_mapping={r"^(model\.)?vision_model\.": ""},
    ),
}


def family_of(model_type: object) -> str | None:
    """The family whose towers have a `model_type`; None where none has."""
    return next((name for name, family in FAMILIES.items() if model_type in family.model_types), None)


class HFVisionEncoder(nn.Module):
    """A vision model of `transformers` as a `VisionEncoder`."""

    def __init__(
        self,
        model: nn.Module,
        select_layer: int | tuple[int, ...] = -2,
        select_feature: Literal["patch", "cls_patch", "cls"] = "patch",
        tile: Size | None = None,
    ) -> None:
        super().__init__()
        config: Any = model.config
        by_type = {kind: name for name, family in FAMILIES.items() for kind in family.model_types}
        if config.model_type not in by_type:
            raise unknown_name("vision model", config.model_type, by_type)
        self.family = by_type[config.model_type]
        family = FAMILIES[self.family]
        if select_feature != "patch" and not family.class_token:
            raise ConfigError(
                f"mm_vision_select_feature {select_feature!r}: {self.family} has no class token; use 'patch'"
            )
        self.model = model
        self.train(model.training)
        self.select_layers = _resolve_layers(select_layer, len(self._layers))
        self.select_feature = select_feature
        self.prefix = int(family.class_token) + getattr(config, "num_register_tokens", 0)
        native, patch = _native_tile(config, self.family), _pair(config.patch_size)
        self.tile = tile or native
        self.patch = patch
        self.any_size = False
        self.interpolate = self.tile != native
        self.patch_grid = Size(self.tile.height // patch.height, self.tile.width // patch.width)
        if not self.patch_grid.area:
            raise ConfigError(
                f"tile of {_text(self.tile)} pixels is smaller than a patch of {self.family} ({_text(patch)})"
            )
        self.grid = {"patch": self.patch_grid, "cls_patch": Size(1, self.patch_grid.area + 1), "cls": Size(1, 1)}[
            select_feature
        ]
        self.embed_dim = config.hidden_size * len(self.select_layers)

    def save(self, folder: Path) -> None:
        """Write the tower as a standard Hugging Face folder."""
        save: Any = self.model.save_pretrained
        save(folder)

    def take_any_size(self) -> None:
        """Take images of any whole number of patches from now on, one tensor or a list of several sizes."""
        self.any_size = True
        keep_images_apart(self.model, self._layers)

    @property
    def _layers(self) -> nn.ModuleList:
        model: Any = self.model
        layers: nn.ModuleList = getattr(model.encoder, FAMILIES[self.family].layers)
        return layers

    def forward(self, pixels: Any) -> Any:  # [N, 3, H, W] -> [N, P, E], or a sequence of such -> a list
        """Encode tiles, or images of several sizes at once; only the layers up to the deepest selected one are run."""
        if isinstance(pixels, Tensor):
            return self._join([self._select(state) for state in self._run(self._embed(pixels))])
        sizes = [image.shape[2:] for image in pixels]
        embedded: list[Tensor] = list(pixels)  # [n, P, E] each
        for size in set(sizes):
            alike = [place for place, own in enumerate(sizes) if own == size]
            together = self._embed(torch.cat([pixels[place] for place in alike]))
            for place, part in zip(alike, together.split([len(pixels[place]) for place in alike]), strict=True):
                embedded[place] = part
        lengths = [part.shape[1] for part in embedded for _ in part]
        states = self._run(torch.cat([part.flatten(0, 1) for part in embedded])[None], lengths=lengths)
        counts = [part.shape[:2].numel() for part in embedded]
        of_images = zip(*(state[0].split(counts) for state in states), strict=True)
        return [
            self._join([self._select(state.view(*part.shape[:2], -1)) for state in chosen])
            for part, chosen in zip(embedded, of_images, strict=True)
        ]

    def _embed(self, pixels: Tensor) -> Tensor:  # [N, 3, H, W] -> [N, prefix + patches, E]
        """Hidden state 0."""
        given = Size(pixels.shape[-2], pixels.shape[-1])
        grid = Size(given.height // self.patch.height, given.width // self.patch.width)
        if given != (grid * self.patch if self.any_size else self.tile):
            wanted = f"whole patches of {_text(self.patch)}" if self.any_size else f"tiles of {_text(self.tile)}"
            raise ConfigError(
                f"the vision encoder takes {wanted} pixels (height x width) and was given {_text(given)}: make "
                "image.tile_size agree with it"
            )
        model: Any = self.model
        # The embeddings' own type: quantised layers deeper down may store integers.
        dtype = next(p for p in model.embeddings.parameters() if p.is_floating_point()).dtype
        return FAMILIES[self.family].embed(model, pixels.to(dtype), grid, self.interpolate or self.any_size)

    def _run(self, hidden: Tensor, **told: Sequence[int]) -> list[Tensor]:
        """The selected hidden states."""
        states = [hidden]
        for layer in list(self._layers)[: max(self.select_layers)]:
            hidden = layer(hidden, *FAMILIES[self.family].layer_args, **told)
            states.append(hidden)
        return [states[index] for index in self.select_layers]

    @staticmethod
    def _join(chosen: list[Tensor]) -> Tensor:
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1)

    def _select(self, hidden: Tensor) -> Tensor:
        """Take the wanted positions out of a hidden state ``[N, prefix + patches, E]``."""
        if self.select_feature == "cls":
            return hidden[:, :1]
        patches = hidden[:, self.prefix :]
        return patches if self.select_feature == "patch" else torch.cat([hidden[:, :1], patches], dim=1)


def _resolve_layers(select: int | tuple[int, ...], layers: int) -> tuple[int, ...]:
    """Turn layer numbers as users write them into indices 0..layers of the hidden states."""
    wanted = (select,) if isinstance(select, int) else tuple(select)
    if not wanted:
        raise ConfigError("mm_vision_select_layer is empty; give a layer, such as -2")
    for index in wanted:
        if not -layers - 1 <= index <= layers:
            raise ConfigError(
                f"mm_vision_select_layer {index}: the encoder has {layers} layers, so {-layers - 1} to {layers}"
            )
    return tuple(index % (layers + 1) for index in wanted)


def _native_tile(config: Any, family: str) -> Size:
    """The image size that a tower's position embeddings were made for."""
    if family == "siglip2":
        side, patch = math.isqrt(config.num_patches), _pair(config.patch_size)
        return Size(side * patch.height, side * patch.width)
    tile = _pair(config.image_size)
    if tile.height != tile.width:
        # transformers folds the position embeddings into a square and would mix up rows without saying so.
        raise ConfigError(
            f"image_size {_text(tile)} of the {family} config: transformers needs it square; keep it square and "
            "choose another shape with image.tile_size"
        )
    return tile


def _pair(value: int | list[int] | tuple[int, ...]) -> Size:
    """A size that a config of `transformers` gives as one number or as (height, width)."""
    return Size(value, value) if isinstance(value, int) else Size(value[0], value[1])


def _text(size: Size) -> str:
    """A size for a message."""
    return f"{size.height}x{size.width}"
