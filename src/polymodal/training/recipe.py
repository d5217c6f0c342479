"""A training stage as one YAML file: what it starts from, what is trained, on which data, for how long.

Unknown keys are errors that name the nearest key; `section.key=value` overrides come from the command line, with
`data.mix.0.path=...` for an entry of a list. Names follow the field where it has one (LLaVA's `learning_rate`,
`lora_r`, `lora_alpha`). LLaVA's `mm_projector_lr` and `mm_vision_tower_lr` are the `learning_rate` of a rule:
`{match: "projector.*", train: true, learning_rate: 2e-5}`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from polymodal.config import ModelConfig, Strict, parse_config
from polymodal.errors import ConfigError, unknown_name


class InitConfig(Strict):
    """What the stage starts from; exactly one of the two.

    Attributes:
        from_folder: A model folder, usually an earlier stage's `final/`; written `from` in the file.
        model: A new model, composed from this configuration.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True)

    from_folder: str | None = Field(default=None, alias="from")
    model: ModelConfig | None = None

    @model_validator(mode="after")
    def _one_source(self) -> InitConfig:
        if (self.from_folder is None) == (self.model is None):
            raise ValueError("give exactly one of `from` (a model folder) and `model` (a configuration)")
        return self


class SourceConfig(Strict):
    """One data file of the mixture.

    Attributes:
        path: A JSON list or JSONL file of records in any format that `data.load_records` reads.
        image_root: The folder that picture paths start from; the file's own folder when None.
        repeat: How often each record is seen in an epoch; the fraction is a part drawn anew each epoch.
        max_samples: Use only this many records, drawn once from `run.seed`.
    """

    path: str
    image_root: str | None = None
    repeat: float = Field(default=1.0, gt=0)
    max_samples: int | None = Field(default=None, gt=0)


class DataConfig(Strict):
    """The data of the stage.

    Attributes:
        mix: The data files; together they are one epoch.
        template: A chat template for this stage only ("plain" for captions in stage 1); the model keeps its own.
        max_length: Records with more tokens are left out and counted, since cutting could cut a picture.
        on_error: What to do with a record that cannot be read: "stop", or "skip" it, count it and list it in
            `skipped.jsonl`.
    """

    mix: tuple[SourceConfig, ...] = Field(min_length=1)
    template: str | None = None
    max_length: int = Field(default=2048, gt=1)
    on_error: Literal["stop", "skip"] = "stop"


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
    """

    match: str = "llm.model.layers.*.{q,k,v,o,gate,up,down}_proj"
    lora_r: int = Field(default=64, gt=0)
    lora_alpha: float = Field(default=128, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    learning_rate: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    use_rslora: bool = False


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
        micro_size: Samples that go through the model at once; changes memory and speed, not the result.
        group_by_length: Sort a step's samples by length before cutting it into micro-batches: less padding, same
            gradient.
    """

    global_size: int = Field(default=32, gt=0)
    micro_size: int = Field(default=8, gt=0)
    group_by_length: bool = True


class WarmStartConfig(Strict):
    """Meet the language model's word embeddings before stage 1; see `training.align`.

    Attributes:
        steps: Optimizer steps; none of them runs the language model.
        batch_size: Pictures a step.
        learning_rate: Peak rate.
        weight_decay: Decoupled decay.
        tokens: Tokens drawn from each picture.
        classes: Start from the tower's own classifier, where it has one.
        prototype_share: Part of a batch that is moved to a class of the classifier.
    """

    steps: int = Field(default=1500, gt=0)
    batch_size: int = Field(default=96, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=0.02, ge=0)
    tokens: int = Field(default=4, gt=0)
    classes: bool = True
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
    feature_cache: str = "off"
    feature_dtype: Literal["float16", "float32"] = "float16"


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
    """Read a recipe.

    Args:
        path: The YAML file.
        overrides: `section.key=value` strings; the value is read as YAML.

    Returns:
        The recipe, checked.

    Raises:
        ConfigError: The file is missing or no YAML, a key is unknown, or a value is wrong.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"recipe {path}: {error.strerror or error}") from error
    data = _yaml(text, str(path))
    where = str(path)
    for override in overrides or []:
        _apply_override(data, override)
        where = f"{path} with {' '.join(overrides or [])}"
    return parse_config(Recipe, data, where)


def dump_recipe(recipe: Recipe) -> str:
    """Write a recipe as YAML, with every default spelled out; `load_recipe` reads it back unchanged."""
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


def _apply_override(data: Any, override: str) -> None:
    """Set one dotted key in plain data, in place."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write it as section.key=value")
    value = _yaml(text, f"override {override!r}")
    steps = key.split(".")
    schema: type[BaseModel] | None = Recipe
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
