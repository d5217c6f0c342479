"""The sections that every recipe has: a training stage is one YAML file, whatever its task.

Unknown keys are errors that name the nearest key; `section.key=value` overrides come from the command line, with
`data.mix.0.path=...` for an entry of a list. Names follow the field where it has one (LLaVA's `learning_rate`,
`lora_r`, `lora_alpha`). LLaVA's `mm_projector_lr` and `mm_vision_tower_lr` are the `learning_rate` of a rule:
`{match: "projector.*", train: true, learning_rate: 2e-5}`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from polymodal.config import ImageConfig, Strict
from polymodal.errors import ConfigError, unknown_name
from polymodal.utils.paths import FilePath, OutputFolder

# YAML 1.1 reads a bare on or off as true or false.
Place = Annotated[FilePath, BeforeValidator(lambda value: "off" if value is False else value)]
"""A folder, "memory" or "off"."""

# What no run needs more of; beyond it a number is a slip that would fill the memory or never end.
MAX_STEPS, MAX_BATCH, MAX_TOKENS, MAX_WORKERS = 10**9, 10**6, 10**9, 256
Count = Annotated[int, Field(gt=0, le=MAX_STEPS)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _plain_name(value: str) -> str:
    """Refuse what cannot stand in a line of a log, or as the name of a file."""
    if not value.strip() or len(value) > 200 or not value.isprintable() or set(value) & set("/\\"):
        raise ValueError("a name has up to 200 characters, without slashes and line breaks")
    return value


Name = Annotated[str, AfterValidator(_plain_name)]
"""What a run is called in logs, charts and the model's history."""

Switch = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda value: {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value),
]


class SourceConfig(Strict):
    """One source of the mixture.

    Attributes:
        path: A data file in any form that `data.load.load_records` reads; a folder or a pattern with `*` for shards.
        format: A name of `data.readers.registry.FORMATS` (json, llava, messages, openai, coco, vqav2, gqa, textvqa,
            docvqa, parquet, webdataset, folder); "auto" tells by the content.
        annotations: The second file of formats that have two: VQAv2's answers, TextVQA's OCR tokens.
        image_root: The folder that image paths start from; the file's own folder when None.
        kind: Of records that do not say: caption, vqa, reasoning, ocr, conversation, or a name of your own.
        source: What the log calls this source, for records that do not say; the file's name when empty.
        prompt: The question of captions, or what follows each question of a VQA set ("" for nothing); the format's own
            when None, LLaVA's "Answer the question using a single word or phrase." for VQA sets.
        repeat: How often each record is seen in an epoch; the fraction is a part drawn anew each epoch.
        weight: Share of the epoch, relative to the weights of the other sources, in place of `repeat`; every source
            has one or none has. The epoch then has as many samples as the sources have records.
        max_samples: Use only this many records, drawn once from `run.seed`.
    """

    path: FilePath
    format: str = "auto"
    annotations: FilePath | None = None
    image_root: FilePath | None = None
    kind: str = ""
    source: str = ""
    prompt: str | None = None
    repeat: float = Field(default=1.0, gt=0, le=10_000)
    weight: float | None = Field(default=None, gt=0, le=1e9)
    max_samples: Count | None = None

    @model_validator(mode="after")
    def _check_format(self) -> SourceConfig:
        from polymodal.data.readers.registry import FORMATS

        if self.format != "auto" and self.format not in FORMATS:
            raise ValueError(str(unknown_name("data format", self.format, ["auto", *FORMATS])))
        if self.annotations is None and self.format in FORMATS and FORMATS[self.format].annotations == "needed":
            raise ValueError(f"format {self.format} needs its second file; set `annotations`")
        return self

    @model_validator(mode="after")
    def _repeat_or_weight(self) -> SourceConfig:
        if self.weight is not None and self.repeat != 1:
            raise ValueError("give `repeat` or `weight`, not both")
        return self


class InitBase(Strict):
    """What a stage starts from: exactly one of `from` and `model`.

    Attributes:
        from_folder: A folder or hub id, often an earlier stage's `final/`; written `from` in the file.
        model: A new model, composed from this configuration.
        image: With `from`: the image rules from this stage on, where they are not the folder's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True)

    from_folder: FilePath | None = Field(default=None, alias="from")
    model: Any = None
    image: ImageConfig | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.from_folder is None) == (self.model is None):
            raise ValueError("give exactly one of `from` (a folder or hub id) and `model` (a configuration)")
        for key in ("image", "template", "video", "audio", "output"):
            if getattr(self, key, None) is not None and self.model is not None:
                raise ValueError(f"`{key}` goes with `from`; a new model's is `model.{key}`")
        return self


class DataBase(Strict):
    """The data of a stage.

    Attributes:
        mix: The data files; together they are one epoch.
        on_error: What to do with a record that cannot be used: "stop", or "skip" it, count it and list it in
            `skipped.jsonl`.
        eval: Held-out files, for `run.eval_every`; never trained on.
        index: The folder where what was made of the data is kept, to be shared by runs; `index/` in `output_dir` when
            None.
    """

    mix: tuple[SourceConfig, ...] = Field(min_length=1)
    on_error: Literal["stop", "skip"] = "stop"
    eval: tuple[SourceConfig, ...] = ()
    index: FilePath | None = None

    @model_validator(mode="after")
    def _all_or_no_weights(self) -> Self:
        without = [source.path for source in self.mix if source.weight is None]
        if 0 < len(without) < len(self.mix):
            raise ValueError(f"give every source of the mix a `weight` or none; {without[0]} has none")
        return self


class RuleConfig(Strict):
    """Whether the parameters whose full name matches are trained. Rules are read in order; the last match wins.

    Attributes:
        match: A glob over full parameter names; `*` crosses dots, `{a,b}` means either. A rule that matches nothing
            is an error.
        train: Whether these are trained.
        learning_rate: Peak rate; `optim.learning_rate` when None.
        weight_decay: `optim.weight_decay` when None. Biases and one-dimensional parameters never decay.
    """

    match: str
    train: bool
    learning_rate: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)


class OptimConfig(Strict):
    """AdamW and its schedule.

    Attributes:
        learning_rate: Peak rate of every group without its own.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: Decoupled decay of matrices.
        clip: Largest norm of the whole gradient; 0 for no clipping.
        schedule: Shape after warm-up.
        warmup: Part of the run spent rising linearly.
        min_lr_ratio: Where the schedule ends, as a part of the peak.
    """

    learning_rate: float = Field(default=1e-3, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.03, ge=0, lt=1)
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)


class RunConfig(Strict):
    """How long, how exactly, and what is kept.

    Attributes:
        epochs: Passes over the mixture; may be a fraction.
        max_steps: Stop after this many optimizer steps; the schedule ends there.
        max_minutes: Stop after this much time in the loop. The schedule follows steps or time, whichever is further,
            so a run with a time budget is not exactly reproducible.
        seed: Of everything random.
        precision: "bf16" is autocast; what is trained stays float32, the frozen language model's linear layers are
            kept in bf16. "auto" is bf16 on CUDA and on CPUs that have instructions for it, else fp32.
        log_every: Steps between log lines.
        save_every: Steps between checkpoints; 0 for none but the last.
        keep: Checkpoints kept.
        resume: "auto" goes on from the newest complete checkpoint in `output_dir`; "never" starts anew.
        threads: CPU threads for torch; its own choice when None.
        workers: Threads that read images ahead of the model, where features are not cached.
        feature_cache: Where the frozen encoder's output is kept: a folder, "memory", or "off". Needs an encoder that
            is not trained.
        feature_dtype: Of the cached features.
        eval_every: Steps between evaluations on the held-out files of `data.eval`; 0 for one, at the end.
        eval_generations: Questions that are answered at each, with their images, for the report; 0 for none.
        trackers: "tensorboard" and "wandb" get every log line too.
        engine: How several processes share the work: "ddp" or "fsdp2"; "auto" is DDP.
        timeout_minutes: How long a process waits in a step for one that hangs.
        checkpointing: Keep only the input of each layer and compute the rest again in the backward pass: less memory,
            a third more time, same result. "auto" does so where activations would not fit.
        compile: Let torch compile the layers. "auto" does so on CUDA, in runs long enough for it to pay.
    """

    epochs: float = Field(default=1.0, gt=0, le=MAX_STEPS)
    max_steps: Count | None = None
    max_minutes: float | None = Field(default=None, gt=0, le=MAX_STEPS)
    seed: int = Field(default=0, ge=0, lt=2**63)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    log_every: Count = 10
    save_every: int = Field(default=200, ge=0, le=MAX_STEPS)
    keep: Count = 2
    resume: Literal["auto", "never"] = "auto"
    threads: int | None = Field(default=None, gt=0, le=MAX_WORKERS)
    workers: int = Field(default=2, gt=0, le=MAX_WORKERS)
    feature_cache: Place = "off"
    feature_dtype: Literal["float16", "float32"] = "float16"
    eval_every: int = Field(default=0, ge=0, le=MAX_STEPS)
    eval_generations: int = Field(default=4, ge=0, le=1000)
    trackers: tuple[str, ...] = ()
    engine: Literal["auto", "ddp", "fsdp2"] = "auto"
    timeout_minutes: float = Field(default=10, gt=0, le=100_000)
    checkpointing: Switch = "auto"
    compile: Switch = "auto"

    @model_validator(mode="before")
    @classmethod
    def _deepspeed_was_removed(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if data.get("engine") == "deepspeed" or data.get("deepspeed_config") is not None:
            raise ConfigError("run.engine deepspeed was removed; FSDP2 does the same: set run.engine=fsdp2")
        return {key: value for key, value in data.items() if key != "deepspeed_config"}


class RecipeBase(Strict):
    """One training stage, whatever its task.

    Attributes:
        task: The class that trains it, as `module:name`; a `training.task.Task`.
        marker: The key that tells this kind of recipe from the others; None for the kind without one.
        name: For logs and the model's history.
        init: What it starts from.
        data: What it is trained on.
        train: Which parameters are trained; everything is frozen where no rule matches.
        optim: Optimizer and schedule.
        batch: Batch sizes.
        run: Length, seed, checkpoints.
        output_dir: The run's folder; the trained model is in its `final/`.
    """

    task: ClassVar[str]
    marker: ClassVar[str | None] = None

    name: Name
    init: Any
    data: Any
    train: tuple[RuleConfig, ...] = ()
    optim: OptimConfig = Field(default_factory=OptimConfig)
    batch: Any
    run: RunConfig = Field(default_factory=RunConfig)
    output_dir: OutputFolder
