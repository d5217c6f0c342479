"""A tokenizer of images as one YAML file; its key `tokenizer` tells it from other recipes."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from polymodal.config import Strict
from polymodal.modeling.tokenizers.config import ImageVQConfig
from polymodal.training.recipes.sections import MAX_BATCH, DataBase, InitBase, Place, RecipeBase
from polymodal.utils.paths import Parts

Weight = Annotated[float, Field(ge=0, le=1000)]


class TokenizerConfig(Strict):
    """What is learnt, and what the result must reach.

    Attributes:
        l1: Weight of the mean absolute difference of pixels.
        mse: Weight of their mean squared difference, which PSNR measures.
        min_usage: The run fails where fewer of all codes than this part are used on the held-out images.
        baseline: Compare with k-means over patches at the same number of codes, at the end; it is kept in
            `output_dir/baseline/`.
        shown: Held-out images in the grid of originals and reconstructions that each evaluation draws, in
            `output_dir/reconstructions/`.
        save_dtype: Of the weights that are saved in `final/`.
    """

    l1: Weight = 1.0
    mse: Weight = 4.0
    min_usage: float = Field(default=0.5, ge=0, le=1)
    baseline: bool = False
    shown: int = Field(default=8, ge=0, le=64)
    save_dtype: Literal["float32", "float16"] = "float32"


class TokenizerInit(InitBase):
    """What the stage starts from; exactly one of `from` and `model`.

    Attributes:
        model: A new tokenizer; `from` is a tokenizer's folder, or a folder of a `VQModel` of diffusers.
        image: Not used.
    """

    model: Annotated[ImageVQConfig | None, Parts] = None
    image: None = None


class ImageDataConfig(DataBase):
    """The images of the stage: all of the records, whoever shows them, or a folder of image files.

    Attributes:
        tile_cache: Where decoded images are kept, so that each is decoded once: a folder, "memory", or "off".
        image_aspect_ratio: How an image becomes a square: "squash", "pad" with white, or "crop" the centre.
    """

    tile_cache: Place = "off"
    image_aspect_ratio: Literal["squash", "pad", "crop"] = "pad"


class ImageBatchConfig(Strict):
    """How many images make a step.

    Attributes:
        global_size: Images of one optimizer step, over all processes.
        micro_size: Images that go through the model at once; changes memory and speed, not the result.
    """

    global_size: int = Field(default=32, gt=0, le=MAX_BATCH)
    micro_size: int = Field(default=32, gt=0, le=MAX_BATCH)


class TokenizerRecipe(RecipeBase):
    """One stage that learns an image tokenizer.

    Attributes:
        tokenizer: What is learnt.
        init: What it starts from.
        data: What it is trained on.
        batch: Batch sizes.
        task: See `RecipeBase`.
        marker: See `RecipeBase`.
    """

    task: ClassVar[str] = "polymodal.training.tokenizer.task:TokenizerTask"
    marker: ClassVar[str | None] = "tokenizer"

    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    init: TokenizerInit
    data: ImageDataConfig
    batch: ImageBatchConfig = Field(default_factory=ImageBatchConfig)

    @model_validator(mode="after")
    def _run_fits(self) -> TokenizerRecipe:
        if self.run.engine == "fsdp2":
            raise ValueError("run.engine fsdp2: a tokenizer is small and is not sharded; leave it at auto")
        if self.run.compile == "on" or self.run.checkpointing == "on" or self.run.feature_cache != "off":
            raise ValueError("run: compile, checkpointing and feature_cache are not for a tokenizer; leave them out")
        if not self.data.eval and (self.tokenizer.min_usage or self.tokenizer.baseline or self.run.eval_every):
            raise ValueError(
                "data.eval: name held-out images, or set tokenizer.min_usage, tokenizer.baseline and run.eval_every "
                "to 0"
            )
        return self
