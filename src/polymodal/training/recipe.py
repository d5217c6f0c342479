"""A training stage as one YAML file: what it starts from, what is trained, on which data, for how long.

Unknown keys are errors that name the nearest key; `section.key=value` overrides come from the command line, with
`data.mix.0.path=...` for an entry of a list. Names follow the field where it has one (LLaVA's `learning_rate`,
`lora_r`, `lora_alpha`). LLaVA's `mm_projector_lr` and `mm_vision_tower_lr` are the `learning_rate` of a rule:
`{match: "projector.*", train: true, learning_rate: 2e-5}`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from polymodal.config import ImageConfig, ModelConfig, Strict, TemplateConfig, parse_config
from polymodal.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from polymodal.training.pairs.recipe import PairRecipe

AnyRecipe: TypeAlias = "Recipe | PairRecipe"
"""A stage of a language model, or one that learns from pairs."""

# YAML 1.1 reads a bare on or off as true or false.
Place = Annotated[str, BeforeValidator(lambda value: "off" if value is False else value)]
"""A folder, "memory" or "off"."""

Switch = Annotated[
    Literal["auto", "on", "off"],
    BeforeValidator(lambda value: {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value),
]


class InitConfig(Strict):
    """What the stage starts from; exactly one of the two.

    Attributes:
        from_folder: A model folder, usually an earlier stage's `final/`; also "default", or a published model's folder
            or hub id. Written `from` in the file.
        model: A new model, composed from this configuration.
        image: With `from`: the picture rules from this stage on, where they are not the folder's; the tile stays.
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
            raise ValueError("`image` goes with `from`; a new model's picture rules are `model.image`")
        if self.template is not None and self.model is not None:
            raise ValueError("`template` goes with `from`; a new model's is `model.template`")
        return self


class SourceConfig(Strict):
    """One source of the mixture.

    Attributes:
        path: A data file in any form that `data.records.load_records` reads; a folder or a pattern with `*` for shards.
        format: A name of `data.readers.table.FORMATS` (json, llava, messages, openai, coco, vqav2, gqa, textvqa,
            docvqa, parquet, webdataset, folder); "auto" tells by the content.
        annotations: The second file of formats that have two: VQAv2's answers, TextVQA's OCR tokens.
        image_root: The folder that picture paths start from; the file's own folder when None.
        kind: Of records that do not say: caption, vqa, reasoning, ocr, conversation, or a name of your own.
        source: What the log calls this source, for records that do not say; the file's name when empty.
        prompt: The question of captions, or what follows each question of a VQA set ("" for nothing); the format's own
            when None, LLaVA's "Answer the question using a single word or phrase." for VQA sets.
        repeat: How often each record is seen in an epoch; the fraction is a part drawn anew each epoch.
        weight: Share of the epoch, relative to the weights of the other sources, in place of `repeat`; every source
            has one or none has. The epoch then has as many samples as the sources have records.
        max_samples: Use only this many records, drawn once from `run.seed`.
    """

    path: str
    format: str = "auto"
    annotations: str | None = None
    image_root: str | None = None
    kind: str = ""
    source: str = ""
    prompt: str | None = None
    repeat: float = Field(default=1.0, gt=0)
    weight: float | None = Field(default=None, gt=0)
    max_samples: int | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _known_format(self) -> SourceConfig:
        from polymodal.data.readers.table import FORMATS

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


class DataConfig(Strict):
    """The data of the stage.

    Attributes:
        mix: The data files; together they are one epoch.
        template: A chat template for this stage only ("plain" for captions in stage 1); the model keeps its own.
        max_length: Records with more tokens are left out and counted, since cutting could cut a picture.
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


class LoraRecipe(Strict):
    """Low-rank adapters on the language model (Hu et al. 2021, arXiv:2106.09685), through peft.

    Attributes:
        match: A glob over full module names, such as `llm.model.layers.*.{q,k,v,o}_proj`.
        lora_r: Rank.
        lora_alpha: Scale; the update is multiplied by alpha / r.
        lora_dropout: Dropout before the adapter.
        learning_rate: Peak rate; `optim.learning_rate` when None.
        weight_decay: Of the adapter; `optim.weight_decay` when None.
        use_rslora: Scale by alpha / sqrt(r) (arXiv:2312.03732).
        use_dora: Train magnitude and direction apart (arXiv:2402.09353).
        load_in_4bit: Keep the frozen language model in 4-bit NormalFloat (QLoRA, arXiv:2305.14314); needs bitsandbytes.
        trainable_tokens: Tokens whose vocabulary rows are trained too, as text or ids. A token that the tokenizer
            lacks takes a spare row of the language model.
    """

    match: str = "llm.model.layers.*.{q,k,v,o,gate,up,down}_proj"
    lora_r: int = Field(default=64, gt=0)
    lora_alpha: float = Field(default=128, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    learning_rate: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    use_rslora: bool = False
    use_dora: bool = False
    load_in_4bit: bool = False
    trainable_tokens: tuple[str | int, ...] = ()


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
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, ge=0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(default=0.03, ge=0, lt=1)
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)


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
    """Meet the language model's word embeddings before stage 1; see `training.align`.

    Attributes:
        steps: Optimizer steps; none of them runs the language model.
        batch_size: Pictures a step.
        learning_rate: Peak rate.
        weight_decay: Decoupled decay.
        tokens: Tokens drawn from each picture.
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
    """Caption samples made of a tower's own classes; see `training.prototypes`.

    Attributes:
        count: Samples; every class equally often.
        questions: What is asked, one drawn for each sample (left out where the template is "plain").
    """

    count: int = Field(gt=0)
    questions: tuple[str, ...] = Field(default=("What is this?",), min_length=1)


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
        workers: Threads that read pictures ahead of the model, where features are not cached.
        feature_cache: Where the frozen encoder's output is kept: a folder, "memory", or "off". Needs an encoder that
            is not trained.
        feature_dtype: Of the cached features.
        eval_every: Steps between looks at the held-out files of `data.eval`; 0 looks once, at the end.
        eval_generations: Questions that are answered at each look, with their pictures, for the report; 0 for none.
        trackers: "tensorboard" and "wandb" get every log line too.
        engine: How several processes share the work: "ddp", "fsdp2", "deepspeed"; "auto" is DDP.
        deepspeed_config: DeepSpeed's own JSON file, for that engine.
        timeout_minutes: How long a process waits in a step for one that hangs.
        checkpointing: Keep only the input of each layer and compute the rest again in the backward pass: less memory,
            a third more time, same result. "auto" does so where activations would not fit.
        compile: Let torch compile the layers. "auto" does so on CUDA, in runs long enough for it to pay.
    """

    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    max_minutes: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    log_every: int = Field(default=10, gt=0)
    save_every: int = Field(default=200, ge=0)
    keep: int = Field(default=2, gt=0)
    resume: Literal["auto", "never"] = "auto"
    threads: int | None = Field(default=None, gt=0)
    workers: int = Field(default=2, gt=0)
    feature_cache: Place = "off"
    feature_dtype: Literal["float16", "float32"] = "float16"
    eval_every: int = Field(default=0, ge=0)
    eval_generations: int = Field(default=4, ge=0)
    trackers: tuple[str, ...] = ()
    engine: Literal["auto", "ddp", "fsdp2", "deepspeed"] = "auto"
    deepspeed_config: str | None = None
    timeout_minutes: float = Field(default=10, gt=0)
    checkpointing: Switch = "auto"
    compile: Switch = "auto"


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


def load_recipe(path: Path | str, overrides: list[str] | None = None) -> Recipe:
    """Read the recipe of a language model's stage.

    Args:
        path: The YAML file.
        overrides: `section.key=value` strings; the value is read as YAML.

    Returns:
        The recipe, checked.

    Raises:
        ConfigError: The file is missing or no YAML, a key is unknown, a value is wrong, or it is a pair recipe.
    """
    recipe = load_any_recipe(path, overrides)
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"{path}: is a pair recipe (it has an `objective`), which only `polymodal train` runs")
    return recipe


def load_any_recipe(path: Path | str, overrides: list[str] | None = None) -> AnyRecipe:
    """Read a recipe of either kind; see `load_recipe`.

    Args:
        path: The YAML file.
        overrides: `section.key=value` strings; the value is read as YAML.

    Returns:
        The recipe, checked: a `PairRecipe` where it has an `objective`.

    Raises:
        ConfigError: The file is missing or no YAML, a key is unknown, or a value is wrong.
    """
    data = read_yaml(Path(path))
    where = str(path)
    for override in overrides or []:
        apply_override(data, override, recipe_class(data))
        where = f"{path} with {' '.join(overrides or [])}"
    return parse_config(recipe_class(data), data, where)


def recipe_class(data: Any) -> type[Recipe] | type[PairRecipe]:
    """Which kind of recipe plain data are: an `objective` makes a pair recipe."""
    if isinstance(data, dict) and "objective" in data:
        from polymodal.training.pairs.recipe import PairRecipe

        return PairRecipe
    return Recipe


def read_yaml(path: Path) -> Any:
    """Read a YAML file as plain data.

    Args:
        path: The file.

    Returns:
        Its content; `1e-3` is a number.

    Raises:
        ConfigError: The file is missing or no YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"recipe {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"recipe {path}: not valid UTF-8 ({error.reason})") from error
    return _yaml(text, str(path))


def dump_recipe(recipe: AnyRecipe) -> str:
    """Write a recipe as YAML, with every default spelled out; `load_any_recipe` reads it back unchanged."""
    import yaml

    plain = json.loads(recipe.model_dump_json(by_alias=True, exclude_none=True))
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))


def _yaml(text: str, where: str) -> Any:
    """Parse YAML, with one-line errors; `1e-3` is a number here, as every recipe writes it."""
    import yaml

    try:
        return _numbers(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error


def _numbers(value: Any) -> Any:
    # YAML 1.1 reads 1e-3 as text (it wants 1.0e-3); nobody who writes it means text.
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and "e" in value.lower() and value[:1] in "+-.0123456789":
        try:
            return float(value)
        except ValueError:
            return value
    return value


def apply_override(data: Any, override: str, schema: type[BaseModel] | None = None) -> None:
    """Set one dotted key in plain data, in place.

    Args:
        data: As read from YAML.
        override: `section.key=value`; the value is read as YAML.
        schema: What the data are; a `Recipe` when None.

    Raises:
        ConfigError: It is not written so, or the key is unknown; names the nearest.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    value = _yaml(text, f"override {override!r}")
    steps = key.split(".")
    schema = schema or Recipe
    here = data
    for position, step in enumerate(steps):
        last = position == len(steps) - 1
        if isinstance(here, list):
            if not step.isdigit() or int(step) >= len(here):
                raise ConfigError(f"override {override!r}: {step!r} is no index into {len(here)} entries")
            if last:
                here[int(step)] = value
            else:
                here = here[int(step)]
            continue
        if not isinstance(here, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(steps[:position])} has no keys")
        if schema is not None:
            names = [field.alias or name for name, field in schema.model_fields.items()]
            if step not in names and step not in schema.model_fields:
                raise ConfigError(f"override {override!r}: {unknown_name('key', step, names)}")
        schema = None if schema is None else _nested(schema, step)
        if last:
            here[step] = value
        else:
            if here.get(step) is None:
                here[step] = {}
            here = here[step]


def _nested(schema: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The config class behind a key, where there is one."""
    field = schema.model_fields.get(key)
    if field is None:
        return None
    for candidate in (field.annotation, *getattr(field.annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None
