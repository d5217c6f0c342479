"""A pair stage as one YAML file; its key `objective` tells it from a stage of a language model.

What the two kinds of recipe share (sources, rules, optimizer, run) is the same class, with the same meaning. A step of
a pair stage is one contrast over `batch.global_size` pairs whatever `batch.micro_size` and the number of processes:
gradients are never accumulated over smaller contrasts, which would be another objective.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from polymodal.config import Strict
from polymodal.modeling.dual_encoders.config import AnyPairModelConfig, ObjectiveConfig
from polymodal.training.recipes.sections import MAX_BATCH, DataBase, InitBase, Place, RecipeBase
from polymodal.utils.paths import Parts


class PairInit(InitBase):
    """What the stage starts from; exactly one of `from` and `model`.

    Attributes:
        model: A new model, composed from this configuration; `from` is a CLIP, SigLIP or vision-text-dual-encoder
            model, or an earlier pair stage's `final/`.
    """

    model: Annotated[AnyPairModelConfig | None, Parts] = None


class PairDataConfig(DataBase):
    """The pairs of the stage: records with one image, whose answer is the caption.

    An image with several captions (a list `captions` in the record, or several records) is one sample, of which one
    caption is drawn each epoch.

    Attributes:
        tile_cache: Where decoded images are kept, so that each is decoded once: a folder, "memory", or "off".
    """

    tile_cache: Place = "off"


class TextConfig(Strict):
    """How a caption becomes tokens.

    Attributes:
        max_length: Most tokens, special ones included; what is longer is cut. The text encoder's own when None.
        templates: Sentences with `{}` for the caption, one drawn each epoch; the caption alone when empty.
    """

    max_length: int | None = Field(default=None, gt=1)
    templates: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _places(self) -> TextConfig:
        for template in self.templates:
            if template.count("{}") != 1:
                raise ValueError(f"templates: {template!r} must hold {{}} once, where the caption goes")
        return self


class AugmentConfig(Strict):
    """What is done to an image each time it is seen, drawn from (seed, epoch, sample).

    Attributes:
        type: "none", or "crop_flip": a random part of the image, resized to the tile, and a mirror image of it as
            often as `flip` says.
        scale: Least and largest part of the image's area; [1, 1] does not cut.
        ratio: Least and largest width to height of the part.
        flip: How often it is mirrored; 0 where captions name left and right or images show text.
    """

    type: Literal["none", "crop_flip"] = "none"
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = Field(default=0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _ranges(self) -> AugmentConfig:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale {list(self.scale)}: give the least and the largest part, above 0 and up to 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio {list(self.ratio)}: give the least and the largest width to height")
        return self


class PairBatchConfig(Strict):
    """How many pairs are contrasted.

    Attributes:
        global_size: Pairs of one optimizer step, over all processes; decides the objective, unlike elsewhere.
        micro_size: Pairs that go through the encoders at once; changes memory and speed, not the result. All of a
            process's pairs when None; with less, every image and text is encoded twice.
    """

    global_size: int = Field(default=256, gt=1, le=MAX_BATCH)
    micro_size: int | None = Field(default=None, gt=0, le=MAX_BATCH)


class PairRecipe(RecipeBase):
    """One pair stage. `run.feature_cache` keeps what a frozen vision encoder, or the teacher of `distill`, gives.

    Attributes:
        objective: What is learnt.
        init: What it starts from.
        data: What it is trained on.
        batch: Batch sizes.
        text: How captions become tokens.
        augment: What is done to images.
        task: See `RecipeBase`.
        marker: See `RecipeBase`.
    """

    task: ClassVar[str] = "polymodal.training.contrastive.task:ContrastiveTask"
    marker: ClassVar[str | None] = "objective"

    objective: Annotated[ObjectiveConfig, Parts]
    init: PairInit
    data: PairDataConfig
    batch: PairBatchConfig = Field(default_factory=PairBatchConfig)
    text: TextConfig = Field(default_factory=TextConfig)
    augment: AugmentConfig = Field(default_factory=AugmentConfig)

    @model_validator(mode="after")
    def _run_fits(self) -> PairRecipe:
        if self.run.engine not in ("auto", "ddp"):
            raise ValueError(
                f"run.engine {self.run.engine!r}: a pair stage adds up gradients by itself and does not shard; "
                "leave run.engine at auto"
            )
        if self.run.compile == "on":
            raise ValueError("run.compile: not for a pair stage; leave it at auto")
        # A teacher's features of an image can be mirrored with it.
        moves = self.augment.type != "none" and (self.objective.distill is None or self.augment.scale[0] < 1)
        if self.run.feature_cache != "off" and moves:
            raise ValueError(
                "run.feature_cache: images look different in every epoch under augment.type "
                f"{self.augment.type!r}; use data.tile_cache, or set augment.type to none"
            )
        return self
