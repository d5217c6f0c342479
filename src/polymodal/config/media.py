"""Configuration of what is seen and heard: the encoders, and how images, videos and sounds are made ready for them."""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from polymodal.config.projector import PER_TOKEN, ProjectorConfig
from polymodal.utils.strict import Strict

AspectRatio: TypeAlias = Literal["squash", "pad", "crop"]
PatchMerge: TypeAlias = Literal["flat", "spatial", "spatial_unpad"]
Resample: TypeAlias = Literal["bilinear", "bicubic", "lanczos"]
RESAMPLE_FILTERS: dict[Resample, int] = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
"""The resize filters that image rules may name, and their numbers in Pillow and in stock preprocessor files."""


# What a stranger's file may ask for; the largest published towers take 1,536 pixels a side and cut 36 tiles.
MAX_TILE, MAX_CANVAS, MAX_PIXELS = 4096, 2**27, 400_000_000
Side: TypeAlias = Annotated[int, Field(ge=1, le=MAX_TILE)]
Area: TypeAlias = Annotated[int, Field(ge=1, le=MAX_CANVAS)]
Channel: TypeAlias = Annotated[int, Field(ge=0, le=255)]
Deviation: TypeAlias = Annotated[float, Field(gt=0)]


Mean: TypeAlias = tuple[float, float, float]
Deviations: TypeAlias = tuple[Deviation, Deviation, Deviation]


class TowerConfig(Strict):
    """Which vision encoder, and what of it is used.

    Attributes:
        vision_tower: A folder, a hub id, or "bundled" for weights that lie in the model's own folder.
        type: The encoder family; a key of `modeling.encoders.vision.VISION_ENCODERS`.
        revision: The pinned revision of a hub id.
        mm_vision_select_layer: The hidden state that is used (-1 the last, as LLaVA counts); several are concatenated.
        mm_vision_select_feature: "patch" drops the class token, "cls_patch" keeps it, "cls" keeps only it.
        pool: Average-pool the patch grid to this many rows and columns inside the encoder (convolutional towers).
        stages: Which stages of a convolutional tower are concatenated.
        detail: Cells a side that shallow stages keep inside each token (convolutional towers); 1 where None.
    """

    vision_tower: str
    type: str
    revision: str | None = None
    mm_vision_select_layer: int | tuple[int, ...] = -2
    mm_vision_select_feature: Literal["patch", "cls_patch", "cls"] = "patch"
    pool: Side | None = None
    stages: tuple[str, ...] | None = None
    detail: Side | None = None


class FusedTowerConfig(TowerConfig):
    """A further tower, whose features stand beside those of the first.

    Attributes:
        image_mean: What it was trained with, where that is not the `image.image_mean` of the first; with `image_std`.
        image_std: The same of `image.image_std`.
    """

    image_mean: Mean | None = None
    image_std: Deviations | None = None

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("image_mean and image_std come together: give both or neither")
        return self


class VisionConfig(TowerConfig):
    """Which vision encoder, and what of it is used; or several side by side.

    Attributes:
        fused: Further towers: each sees the same tiles, normalised as it wants them, and its features are put beside
            the first's along the channels, on the first's grid (arXiv:2402.07865).
    """

    fused: tuple[FusedTowerConfig, ...] = ()

    @property
    def towers(self) -> tuple[TowerConfig, ...]:
        """Every tower, the first of them first."""
        return (self, *self.fused)

    def at(self, places: Sequence[str]) -> Self:
        """The same towers at other places, one for each."""
        moved = (t.model_copy(update={"vision_tower": p}) for t, p in zip(self.fused, places[1:], strict=True))
        return self.model_copy(update={"vision_tower": places[0], "fused": tuple(moved)})

    @model_serializer(mode="wrap")
    def _as_before_there_were_several(self, plain: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What is hashed, such as the names of kept features, stays what it was for a single tower.
        return {key: value for key, value in plain(self).items() if key != "fused" or value}


VISION_ORIGINS: Any = {"vision_tower": True, "revision": True, "fused": {"__all__": {"vision_tower", "revision"}}}
"""Where towers come from, to be left out of what their features depend on besides their weights."""


def tower_folder(number: int) -> str:
    """The folder of a model's n-th tower inside the model's own: "vision", "vision_2", ..."""
    return "vision" if number == 0 else f"vision_{number + 1}"


class ImageConfig(Strict):
    """How an image becomes tiles; travels with the weights, since it is part of what was trained.

    Attributes:
        image_aspect_ratio: "squash" resizes to the tile regardless of shape; "pad" pads to a square first; "crop"
            resizes the short side and crops the centre; "slice" cuts tiles and adds a thumbnail; "anyres" fits the
            image to the best of `image_grid_pinpoints` and adds a global view; "native" keeps the image's shape and
            rounds its size to whole tokens.
        tile_size: The encoder's input, (height, width) in pixels. For "native": that of a video's frames, and what
            the bounds on pixels are counted by where none are given.
        resize_short_side: For "crop": the short side before cropping; the tile's short side when None.
        image_grid_pinpoints: For "anyres": the canvases allowed, (height, width) in pixels.
        anyres_max: For "anyres": LLaVA-OneVision's anyres_max_N; grids with more tokens than N tiles are shrunk.
        mm_patch_merge_type: For "anyres": see `media_plan.ImagePlan.merge`. For "native": "spatial_unpad" ends each row
            of tokens with a newline token, which tells the model how wide the image is.
        several_images: For "anyres", with more than one image in a conversation: "alike" cuts each as if it were alone;
            "pad" makes each one padded tile with a newline token behind it, as LLaVA-OneVision does.
        native_min_pixels: For "native": smaller images are scaled up to this; a quarter of a tile where None.
        native_max_pixels: For "native": larger images are scaled down to this; four tiles where None.
        max_tiles: For "slice": the most tiles besides the thumbnail.
        thumbnail: For "slice": add the whole image as a last tile when it was cut.
        overview_aspect_ratio: How the overview or thumbnail tile is made: squashed, or padded to a square.
        image_mean: Per channel, after rescaling to 0..1.
        image_std: Per channel, after rescaling to 0..1.
        resample: Pillow's filter.
        background: What shows through transparent pixels and fills padding of "slice", RGB 0..255.
        pad_color: What "pad" puts beside the image; None takes the mean colour, as LLaVA does.
        max_pixels: Images with more pixels are refused before they are decoded; `--max-pixels` goes before it.
    """

    RENAMED = {"several_pictures": "several_images"}  # noqa: RUF012  # a class variable, as `Strict` says

    image_aspect_ratio: Literal["squash", "pad", "crop", "slice", "anyres", "native"] = "pad"
    tile_size: tuple[Side, Side]
    resize_short_side: Annotated[int, Field(ge=1, le=2**16)] | None = None
    image_grid_pinpoints: Annotated[tuple[tuple[PositiveInt, PositiveInt], ...], Field(max_length=1024)] = ()
    anyres_max: PositiveInt | None = None
    mm_patch_merge_type: PatchMerge = "flat"
    several_images: Literal["alike", "pad"] = "alike"
    native_min_pixels: Area | None = None
    native_max_pixels: Area | None = None
    max_tiles: int = Field(default=6, ge=1, le=1024)
    thumbnail: bool = True
    overview_aspect_ratio: AspectRatio = "squash"
    image_mean: Mean
    image_std: Deviations
    resample: Resample = "bicubic"
    background: tuple[Channel, Channel, Channel] = (255, 255, 255)
    pad_color: tuple[Channel, Channel, Channel] | None = None
    max_pixels: int = Field(default=64_000_000, ge=1, le=MAX_PIXELS)

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        height, width = self.tile_size
        canvases = {"max_tiles": self.max_tiles * height * width if self.image_aspect_ratio == "slice" else 0}
        canvases |= {"image_grid_pinpoints": max((h * w for h, w in self.image_grid_pinpoints), default=0)}
        for name, area in canvases.items():
            if area > MAX_CANVAS:
                raise ValueError(f"{name} asks for {area:,} pixels an image, at most {MAX_CANVAS:,} are allowed")
        least, most = self.native_min_pixels, self.native_max_pixels
        if least is not None and most is not None and least > most:
            raise ValueError(f"native_min_pixels {least:,} is more than native_max_pixels {most:,}")
        return self


class TemporalAttentionConfig(Strict):
    """Attention along time; `modeling.encoders.video_temporal.TemporalAttention`.

    Attributes:
        hidden_size: Its width; the encoder's where None.
        num_layers: Its layers.
        num_attention_heads: Heads of each attention.
        motion: Tell each frame how far each of its patches is from its mean over the video: a map of what moves.
        time_embedding: "sinusoidal" adds waves of the time in seconds, "learned" puts a small network behind them.
        min_period: The shortest wave, in seconds: about what can be told apart.
        max_period: The longest wave, in seconds: about what can be told apart from its repetition.
        pool: "mean" ends with the mean over frames, "none" keeps them all.
    """

    hidden_size: int | None = Field(default=None, ge=2)
    num_layers: PositiveInt = 1
    num_attention_heads: PositiveInt = 8
    motion: bool = False
    time_embedding: Literal["sinusoidal", "learned"] = "sinusoidal"
    min_period: float = Field(default=0.25, gt=0)
    max_period: float = Field(default=4096.0, gt=0)
    pool: Literal["mean", "none"] = "none"

    @model_validator(mode="after")
    def _shorter_first(self) -> Self:
        if self.min_period >= self.max_period:
            raise ValueError(f"min_period {self.min_period} is not below max_period {self.max_period}")
        return self


class TemporalConfig(Strict):
    """How a video's frames are looked at together, before the projector; see `modeling.encoders.video_temporal`.

    Attributes:
        type: "mean" over frames, "attention" along time, or "spatio_temporal_pool" over blocks.
        attention: Settings of "attention"; its defaults where None.
        stride: Of "spatio_temporal_pool": frames, rows and columns of a block; (2, 2, 2) where None.
    """

    type: str = "mean"
    attention: TemporalAttentionConfig | None = None
    stride: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None

    @model_validator(mode="after")
    def _no_settings_of_another_type(self) -> Self:
        for name, owner in (("attention", "attention"), ("stride", "spatio_temporal_pool")):
            if getattr(self, name) is not None and self.type != owner:
                raise ValueError(f"{name!r} is for type {owner!r}, but type is {self.type!r}")
        return self


class OldFramesConfig(Strict):
    """How the older frames of a long video are thinned out, behind the projector.

    Attributes:
        keep: The newest frames, of those that come out of the temporal encoder, which stay as they are.
        stride: Of the older ones each block of so many frames, rows and columns of tokens becomes its mean.
    """

    keep: PositiveInt
    stride: tuple[PositiveInt, PositiveInt, PositiveInt] = (2, 2, 2)


class VideoConfig(Strict):
    """How a video becomes frames, and how these are looked at together.

    A frame is one tile. Which frames are taken is said by the question (`messages.Video`) or, where it is silent, here.

    Attributes:
        num_frames: As many, evenly spread, the first and the last among them; where `fps` is None.
        fps: So many a second, thinned out evenly to `max_frames`.
        max_frames: The most frames of a video.
        max_tokens: The most tokens that a video may take; fewer frames are taken where they would be more.
        frame_aspect_ratio: How a frame is fitted to the tile.
        temporal: The encoder that looks along time, before the projector; None leaves each frame as it is.
        tokens_per_frame: Of a "summary" projector: the first so many tokens of each frame; None for all of them.
        old_frames: Keeps the newest frames whole and pools the older ones; None keeps all whole.
        time_instruction: A text before each video that tells the model about it, with the {duration} of all of it in
            seconds, {num_frames} and {times} (LLaVA-Video's way); empty for none.
        audio: Whether a video's sound is given too, behind its frames, where the question does not say.
    """

    num_frames: PositiveInt = 8
    fps: float | None = Field(default=None, gt=0)
    max_frames: int = Field(default=64, ge=1, le=4096)
    max_tokens: PositiveInt | None = None
    frame_aspect_ratio: AspectRatio = "pad"
    temporal: TemporalConfig | None = None
    tokens_per_frame: PositiveInt | None = None
    old_frames: OldFramesConfig | None = None
    time_instruction: str = ""
    audio: bool = False

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.fps is None and self.num_frames > self.max_frames:
            raise ValueError(f"num_frames {self.num_frames} is more than max_frames {self.max_frames}")
        try:
            self.time_instruction.format(duration=1.0, num_frames=1, times="0.00s")
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise ValueError(f"time_instruction knows {{duration}}, {{num_frames}} and {{times}}: {error!r}") from None
        return self


class AudioConfig(Strict):
    """Which audio encoder, and how a sound becomes tokens of the language model.

    Attributes:
        audio_tower: A folder, a hub id, a name such as "whisper_base", or "bundled" for weights in the model's folder.
        type: The encoder family; a key of `modeling.encoders.audio.AUDIO_ENCODERS`.
        revision: The pinned revision of a hub id.
        stack: How many of the encoder's frames in a row become one token (20 ms each of Whisper's).
        projector: The audio projector: "linear" or an MLP.
        max_seconds: Longer sounds are refused; what is longer than the encoder's window becomes several windows.
    """

    audio_tower: str
    type: str = "whisper"
    revision: str | None = None
    stack: int = Field(default=8, ge=1, le=1500)
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)
    max_seconds: float = Field(default=600.0, gt=0, le=86_400)

    @model_validator(mode="after")
    def _projects_each_token(self) -> Self:
        if not re.fullmatch(PER_TOKEN, name := self.projector.mm_projector_type):
            raise ValueError(f"a sound has no grid for mm_projector_type {name!r}; take linear or an MLP, and `stack`")
        return self
