"""A supervised stage as one YAML file: what it starts from, what is trained, on which data, for how long."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from polymodal.config import AudioConfig, LoraRecipe, ModelConfig, OutputConfig, Strict, TemplateConfig, VideoConfig
from polymodal.training.recipes.sections import MAX_BATCH, MAX_STEPS, MAX_TOKENS, DataBase, InitBase, RecipeBase
from polymodal.utils.paths import Parts


class InitConfig(InitBase):
    """What the stage starts from; exactly one of `from` and `model`.

    Attributes:
        model: A new model, composed from this configuration; `from` may also be "default".
        template: With `from`: the chat template from this stage on, where it is not the folder's, such as when a
            captioner (BLIP-2's second stage) is tuned to converse.
        video: With `from`: how the model sees videos from this stage on, with a new temporal encoder where it had none.
        audio: With `from`: gives a model that hears nothing an audio encoder and its projector.
        output: With `from`: gives a model that only writes an image tokenizer, and rows for its codes.
        other_image_rules: The mean and deviation of images are meant to differ from those that the tower was trained
            with, which `polymodal check` takes for a mistake.
    """

    model: Annotated[ModelConfig | None, Parts] = None
    template: TemplateConfig | None = None
    video: VideoConfig | None = None
    audio: AudioConfig | None = None
    output: OutputConfig | None = None
    other_image_rules: bool = False


class DataConfig(DataBase):
    """The data of the stage: conversations.

    Attributes:
        template: A chat template for this stage only ("plain" for captions in stage 1); the model keeps its own.
        max_length: Records with more tokens are left out and counted, since cutting could cut an image.
        condition_dropout: Part of the rows that ask for an image in words alone which is trained without the words, so
            that drawing can be guided (arXiv:2207.12598); drawn anew in each step.
    """

    template: str | None = None
    condition_dropout: float = Field(default=0.1, ge=0, lt=1)
    max_length: int = Field(default=2048, gt=1, le=MAX_TOKENS)


class BatchConfig(Strict):
    """How many samples make a step.

    Attributes:
        global_size: Samples of one optimizer step, over all processes.
        global_tokens: Tokens of one optimizer step, about; takes the place of `global_size`.
        packing: "pack" puts samples end to end in rows without padding, planned within each step, so that a published
            learning rate stays valid; attention never crosses samples. "none" pads.
        micro_size: Samples that go through the model at once, without packing; changes memory and speed, not the
            result.
        micro_tokens: Tokens that go through the model at once, with packing; a longer sample goes alone.
        group_by_length: Without packing, sort a step's samples by length before cutting it into micro-batches: less
            padding, same gradient.
        last_step: With `global_size`, where the records do not come out even: "whole" steps, as many as come nearest to
            `run.epochs`, or a "short" last one of what is left, by which each record is seen exactly that often.
    """

    global_size: int = Field(default=32, gt=0, le=MAX_BATCH)
    global_tokens: int | None = Field(default=None, gt=0, le=MAX_TOKENS)
    packing: Literal["none", "pack"] = "none"
    micro_size: int = Field(default=8, gt=0, le=MAX_BATCH)
    micro_tokens: int = Field(default=2048, gt=0, le=MAX_TOKENS)
    group_by_length: bool = True
    last_step: Literal["whole", "short"] = "whole"

    @model_validator(mode="after")
    def _short_needs_samples(self) -> BatchConfig:
        if self.last_step == "short" and self.global_tokens is not None:
            raise ValueError("last_step: with global_tokens every epoch is cut into steps without a rest; leave it out")
        return self


class WarmStartConfig(Strict):
    """Meet the language model's word embeddings before stage 1; see `training.sft.warm_start`.

    Attributes:
        steps: Optimizer steps; none of them runs the language model.
        batch_size: Images a step.
        learning_rate: Peak rate.
        weight_decay: Decoupled decay.
        tokens: Tokens drawn from each image.
        classes: Learn the names of the tower's own classifier too, from class prototypes, where it has one.
        write_classes: Before that, write the class scores into the hidden units of an MLP projector.
        prototype_share: Part of a batch that is moved to a class of the classifier.
    """

    steps: int = Field(default=1500, ge=3, le=MAX_STEPS)
    batch_size: int = Field(default=96, gt=0, le=MAX_BATCH)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.02, ge=0)
    tokens: int = Field(default=4, gt=0, le=MAX_BATCH)
    classes: bool = True
    write_classes: bool = True
    prototype_share: float = Field(default=0.33, ge=0, lt=1)


class SceneWarmStartConfig(Strict):
    """Say what is where in word embeddings before stage 1; see `training.sft.scene_warm_start`.

    Attributes:
        steps: Optimizer steps; none of them runs the language model.
        batch_size: Images a step.
        learning_rate: Peak rate.
        weight_decay: Decoupled decay.
        patches: Patches of each image that are taught in a step, beside the summary.
        scale: What cosines are multiplied by before the softmax.
        write_classes: Before that, write the scores of the tower's own classifier into the hidden units of the MLP.
        prototype_share: Part of a batch that is moved to a class of that classifier.
    """

    steps: int = Field(default=4000, ge=3, le=MAX_STEPS)
    batch_size: int = Field(default=96, gt=0, le=MAX_BATCH)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.02, ge=0)
    patches: int = Field(default=12, gt=0, le=MAX_BATCH)
    scale: float = Field(default=20.0, gt=0)
    write_classes: bool = True
    prototype_share: float = Field(default=0.25, ge=0, lt=1)


class AudioWarmStartConfig(Strict):
    """Spell transcripts in word embeddings before the stage; see `training.sft.audio_warm_start`.

    Attributes:
        steps: Optimizer steps; none of them runs the language model.
        batch_size: Recordings a step.
        learning_rate: Peak rate.
        weight_decay: Decoupled decay.
    """

    steps: int = Field(default=2000, ge=3, le=MAX_STEPS)
    batch_size: int = Field(default=32, gt=0, le=MAX_BATCH)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.02, ge=0)


class VideoWarmStartConfig(Strict):
    """Say the words that videos differ in before the stage; see `training.sft.video_warm_start`.

    Attributes:
        steps: Optimizer steps; none of them runs the language model.
        batch_size: Videos a step.
        learning_rate: Peak rate.
        weight_decay: Decoupled decay.
        tokens: Tokens drawn from each video.
    """

    steps: int = Field(default=1000, ge=3, le=MAX_STEPS)
    batch_size: int = Field(default=32, gt=0, le=MAX_BATCH)
    learning_rate: float = Field(default=2e-3, gt=0)
    weight_decay: float = Field(default=0.02, ge=0)
    tokens: int = Field(default=24, gt=0, le=MAX_BATCH)


class PrototypeConfig(Strict):
    """Caption samples made of a tower's own classes; see `training.sft.class_prototypes`.

    Attributes:
        count: Samples; every class equally often.
        questions: What is asked, one drawn for each sample (left out where the template is "plain").
    """

    count: int = Field(gt=0, le=10 * MAX_BATCH)
    questions: tuple[str, ...] = Field(default=("What is this?",), min_length=1)


class Recipe(RecipeBase):
    """One supervised stage of a language model.

    Attributes:
        init: What it starts from.
        data: What it is trained on.
        batch: Batch sizes.
        lora: Adapters on the language model, or None.
        warm_start: Train the projector towards word embeddings first, or None.
        scene_warm_start: Train a "summary" projector to say what is where first, or None.
        audio_warm_start: Teach the audio projector to spell what is said first, or None.
        video_warm_start: Teach the temporal encoder to say what happens first, or None.
        prototypes: Samples made of the tower's own classes, or None.
        task: See `RecipeBase`.
    """

    task: ClassVar[str] = "polymodal.training.sft.task:SFTTask"

    init: InitConfig
    data: DataConfig
    batch: BatchConfig = Field(default_factory=BatchConfig)
    lora: LoraRecipe | None = None
    warm_start: WarmStartConfig | None = None
    scene_warm_start: SceneWarmStartConfig | None = None
    audio_warm_start: AudioWarmStartConfig | None = None
    video_warm_start: VideoWarmStartConfig | None = None
    prototypes: PrototypeConfig | None = None
