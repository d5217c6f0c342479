"""A supervised stage as one YAML file: what it starts from, what is trained, on which data, for how long."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from polymodal.config import ImageConfig, LoraRecipe, ModelConfig, Strict, TemplateConfig
from polymodal.training.recipes.sections import OptimConfig, RuleConfig, RunConfig, SourceConfig


class InitConfig(Strict):
    """What the stage starts from; exactly one of the two.

    Attributes:
        from_folder: A model folder, usually an earlier stage's `final/`; also "default", or a published model's folder
            or hub id. Written `from` in the file.
        model: A new model, composed from this configuration.
        image: With `from`: the image rules from this stage on, where they are not the folder's; the tile stays.
        template: With `from`: the chat template from this stage on, where it is not the folder's, such as when a
            captioner (BLIP-2's second stage) is tuned to converse.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True)

    from_folder: str | None = Field(default=None, alias="from")
    model: ModelConfig | None = None
    image: ImageConfig | None = None
    template: TemplateConfig | None = None

    @model_validator(mode="after")
    def _one_source(self) -> InitConfig:
        if (self.from_folder is None) == (self.model is None):
            raise ValueError("give exactly one of `from` (a model folder) and `model` (a configuration)")
        if self.image is not None and self.model is not None:
            raise ValueError("`image` goes with `from`; a new model's image rules are `model.image`")
        if self.template is not None and self.model is not None:
            raise ValueError("`template` goes with `from`; a new model's is `model.template`")
        return self


class DataConfig(Strict):
    """The data of the stage.

    Attributes:
        mix: The data files; together they are one epoch.
        template: A chat template for this stage only ("plain" for captions in stage 1); the model keeps its own.
        max_length: Records with more tokens are left out and counted, since cutting could cut an image.
        on_error: What to do with a record that cannot be read: "stop", or "skip" it, count it and list it in
            `skipped.jsonl`.
        eval: Held-out files, for `run.eval_every`; never trained on.
        index: The folder that tokenised data are kept in, to be shared by runs; `index/` in `output_dir` when None.
    """

    mix: tuple[SourceConfig, ...] = Field(min_length=1)
    template: str | None = None
    max_length: int = Field(default=2048, gt=1)
    on_error: Literal["stop", "skip"] = "stop"
    eval: tuple[SourceConfig, ...] = ()
    index: str | None = None

    @model_validator(mode="after")
    def _weights(self) -> DataConfig:
        without = [source.path for source in self.mix if source.weight is None]
        if 0 < len(without) < len(self.mix):
            raise ValueError(f"give every source of the mix a `weight` or none; {without[0]} has none")
        return self


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
    """

    global_size: int = Field(default=32, gt=0)
    global_tokens: int | None = Field(default=None, gt=0)
    packing: Literal["none", "pack"] = "none"
    micro_size: int = Field(default=8, gt=0)
    micro_tokens: int = Field(default=2048, gt=0)
    group_by_length: bool = True


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

    steps: int = Field(default=1500, ge=3)
    batch_size: int = Field(default=96, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.02, ge=0)
    tokens: int = Field(default=4, gt=0)
    classes: bool = True
    write_classes: bool = True
    prototype_share: float = Field(default=0.33, ge=0, lt=1)


class PrototypeConfig(Strict):
    """Caption samples made of a tower's own classes; see `training.sft.class_prototypes`.

    Attributes:
        count: Samples; every class equally often.
        questions: What is asked, one drawn for each sample (left out where the template is "plain").
    """

    count: int = Field(gt=0)
    questions: tuple[str, ...] = Field(default=("What is this?",), min_length=1)


class Recipe(Strict):
    """One training stage.

    Attributes:
        name: For logs and the model's history.
        init: What it starts from.
        data: What it is trained on.
        train: Which parameters are trained; everything is frozen where no rule matches.
        lora: Adapters on the language model, or None.
        warm_start: Train the projector towards word embeddings first, or None.
        prototypes: Samples made of the tower's own classes, or None.
        optim: Optimizer and schedule.
        batch: Batch sizes.
        run: Length, seed, checkpoints.
        output_dir: The run's folder; the trained model is in its `final/`.
    """

    name: str
    init: InitConfig
    data: DataConfig
    train: tuple[RuleConfig, ...] = ()
    lora: LoraRecipe | None = None
    warm_start: WarmStartConfig | None = None
    prototypes: PrototypeConfig | None = None
    optim: OptimConfig = Field(default_factory=OptimConfig)
    batch: BatchConfig = Field(default_factory=BatchConfig)
    run: RunConfig = Field(default_factory=RunConfig)
    output_dir: str
