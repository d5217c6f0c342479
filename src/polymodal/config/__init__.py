"""Strict, frozen configuration of a model. A value is typed once; what can be derived is a property.

Unknown keys are errors that name the nearest key. Names follow the field's habits (LLaVA's `vision_tower`,
`mm_projector_type`, `mm_vision_select_layer`, `image_aspect_ratio`, ...).
"""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from polymodal.config.media import MAX_PIXELS as MAX_PIXELS
from polymodal.config.media import RESAMPLE_FILTERS as RESAMPLE_FILTERS
from polymodal.config.media import VISION_ORIGINS as VISION_ORIGINS
from polymodal.config.media import AspectRatio as AspectRatio
from polymodal.config.media import AudioConfig as AudioConfig
from polymodal.config.media import FusedTowerConfig as FusedTowerConfig
from polymodal.config.media import ImageConfig as ImageConfig
from polymodal.config.media import OldFramesConfig as OldFramesConfig
from polymodal.config.media import PatchMerge as PatchMerge
from polymodal.config.media import Resample as Resample
from polymodal.config.media import TemporalAttentionConfig as TemporalAttentionConfig
from polymodal.config.media import TemporalConfig as TemporalConfig
from polymodal.config.media import TowerConfig as TowerConfig
from polymodal.config.media import VideoConfig as VideoConfig
from polymodal.config.media import VisionConfig as VisionConfig
from polymodal.config.media import tower_folder as tower_folder
from polymodal.config.output import ImageOutputConfig as ImageOutputConfig
from polymodal.config.output import OutputConfig as OutputConfig
from polymodal.config.output import VocabularyLayout as VocabularyLayout
from polymodal.config.projector import AbstractorConfig as AbstractorConfig
from polymodal.config.projector import ProjectorConfig as ProjectorConfig
from polymodal.config.projector import QFormerConfig as QFormerConfig
from polymodal.config.projector import ResamplerConfig as ResamplerConfig
from polymodal.config.projector import SummaryConfig as SummaryConfig
from polymodal.errors import ConfigError
from polymodal.utils.strict import Strict as Strict
from polymodal.utils.strict import parse_config as parse_config


class RopeScalingConfig(Strict):
    """How rotary positions are stretched past the length that a language model was made for; keys as transformers has.

    What depends on the length of each text ("dynamic", "longrope") is not offered: keys in a cache keep their rotation.

    Attributes:
        rope_type: "linear" (arXiv:2306.15595), "yarn" (arXiv:2309.00071) or "llama3" (Llama 3.1).
        factor: How many times as many positions.
        original_max_position_embeddings: The positions before; what the model's own configuration says where None.
        attention_factor: Of "yarn": what attention is scaled by; follows from the factor where None.
        beta_fast: Of "yarn": turns over the original length from which a dimension is left alone; 32 where None.
        beta_slow: Of "yarn": turns below which it is stretched fully; 1 where None.
        low_freq_factor: Of "llama3".
        high_freq_factor: Of "llama3".
    """

    RENAMED = {"type": "rope_type"}  # noqa: RUF012  # a class variable, as `Strict` says

    rope_type: Literal["linear", "yarn", "llama3"]
    factor: float = Field(gt=1, le=10_000)
    original_max_position_embeddings: PositiveInt | None = None
    attention_factor: PositiveFloat | None = None
    beta_fast: PositiveFloat | None = None
    beta_slow: PositiveFloat | None = None
    low_freq_factor: PositiveFloat | None = None
    high_freq_factor: PositiveFloat | None = None

    @model_validator(mode="after")
    def _no_settings_of_another_type(self) -> Self:
        own = {
            "yarn": ("attention_factor", "beta_fast", "beta_slow"),
            "llama3": ("low_freq_factor", "high_freq_factor"),
        }
        for owner, names in own.items():
            given = [name for name in names if getattr(self, name) is not None]
            if given and self.rope_type != owner:
                raise ValueError(f"{given[0]!r} is for rope_type {owner!r}, but rope_type is {self.rope_type!r}")
        low, high = self.low_freq_factor, self.high_freq_factor
        if self.rope_type == "llama3" and (low is None or high is None or low >= high):
            raise ValueError("rope_type 'llama3' needs a low_freq_factor and, above it, a high_freq_factor")
        return self


class LLMConfig(Strict):
    """Which language model.

    Attributes:
        model_name_or_path: A folder, a hub id, a .gguf file, or "smollm2" for the default that `polymodal` finds.
        revision: The pinned revision of a hub id.
        dtype: Of the weights in memory.
        device_map: Passed to transformers; None keeps the model on one device.
        attn_implementation: Passed to transformers.
        encoder_decoder: Whether it is an encoder-decoder such as T5; None asks the language model's configuration. A
            saved model says so, since a processor is opened without the language model.
        rope_scaling: Stretches its rotary positions, for contexts longer than it was made for; None leaves them.
    """

    model_name_or_path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device_map: str | None = None
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    encoder_decoder: bool | None = None
    rope_scaling: RopeScalingConfig | None = None


class TemplateConfig(Strict):
    """How a conversation becomes one string of tokens.

    Attributes:
        chat_template: A preset of `processing.chat_template.presets.PRESETS` ("chatml", "llama2", "llama3", "mistral",
            "vicuna", "t5", "plain"), "tokenizer" for the tokenizer's own, or jinja text.
        default_system: The system message where a conversation has none; None means no system turn.
        image_newline_text: Text after an image, as LLaVA's `<image>\\n`; empty for none.
        stop_token_ids: Further tokens that end an answer, such as those that a generation_config.json names.
        own_generation_prompt: A question ends with what the template writes for `add_generation_prompt` even where
            that is not how an answer begins in training; LLaVA-OneVision's differ.
        enable_thinking: Handed to templates that ask for it, such as Qwen3's; None leaves it to the template.
        text_restarts: The first text, and each after an image, is tokenised as a string of its own, as LLaVA's training
            does; SentencePiece tokenizers with `legacy: false` then put a space there.
    """

    chat_template: str = "tokenizer"
    default_system: str | None = None
    image_newline_text: str = ""
    stop_token_ids: tuple[int, ...] = ()
    own_generation_prompt: bool = False
    enable_thinking: bool | None = None
    text_restarts: bool = False


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
        trainable_tokens: Text or ids whose vocabulary rows are trained too; what the tokenizer lacks takes a spare row.
            Of a model that makes images, "image" stands for the rows of all codes and specials.
        only_tokens: Train only those rows in this stage; the adapters are there, but nothing, until the next one.
    """

    match: str = "llm.model.layers.*.{q,k,v,o,gate,up,down}_proj"
    lora_r: PositiveInt = 64
    lora_alpha: float = Field(default=128, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    learning_rate: float | None = Field(default=None, gt=0)
    weight_decay: float | None = Field(default=None, ge=0)
    use_rslora: bool = False
    use_dora: bool = False
    load_in_4bit: bool = False
    trainable_tokens: tuple[str | int, ...] = ()
    only_tokens: bool = False

    @model_validator(mode="after")
    def _some_tokens(self) -> Self:
        if self.only_tokens and not self.trainable_tokens:
            raise ValueError("only_tokens: nothing would be trained; name rows in trainable_tokens")
        return self


class ModelConfig(Strict):
    """A whole multimodal LLM. Written to `polymodal.json`, read back, and compared on load.

    Attributes:
        vision: The vision encoder; None for a text-only model.
        image: The image preprocessing; needed where `vision` is.
        video: How videos are seen, with the vision encoder; None for a model that takes none.
        audio: The audio encoder and its projector; None for a model that takes no sound.
        output: What it makes besides text; None for a model that only writes.
        projector: The vision projector.
        llm: The language model.
        template: The chat template.
        image_token_id: The placeholder's id, of images and every other medium. None: the tokenizer's own `<image>`
            where it has one, else the first id past the language model's vocabulary, which the head cannot produce.
    """

    vision: VisionConfig | None = None
    image: ImageConfig | None = None
    video: VideoConfig | None = None
    audio: AudioConfig | None = None
    output: OutputConfig | None = None
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)
    llm: LLMConfig
    template: TemplateConfig = Field(default_factory=TemplateConfig)
    image_token_id: int | None = None

    @model_validator(mode="after")
    def _image_needs_vision(self) -> Self:
        if (self.image is None) != (self.vision is None):
            missing = "image" if self.image is None else "vision"
            raise ValueError(f"`vision` and `image` come together, and {missing!r} is missing: give both or neither")
        if self.video is not None and self.vision is None:
            raise ValueError("`video` needs `vision`: frames are seen by the vision encoder")
        return self


def new_output(config: ModelConfig, output: OutputConfig | None) -> ModelConfig:
    """Let a model learn to make images; one that does already keeps its tokenizer and its ids."""
    if output is None or config.output is None:
        return config if output is None else config.model_copy(update={"output": output})
    had = config.output.image
    if output.image.image_tokenizer not in ("bundled", had.image_tokenizer):
        raise ConfigError(
            "init.output.image: the model has its image tokenizer already, and its codes mean nothing to another; "
            "write image_tokenizer: bundled, or leave init.output out"
        )
    kept = output.image.model_copy(update={"image_tokenizer": had.image_tokenizer})
    return config.model_copy(update={"output": config.output.model_copy(update={"image": kept})})


def new_senses(config: ModelConfig, video: VideoConfig | None, audio: AudioConfig | None) -> ModelConfig:
    """Let a model go on with eyes for videos or with ears; what it has learnt there already must fit."""
    given = {"video": video, "audio": audio}
    fixed = ("video.temporal", "audio.audio_tower", "audio.type", "audio.stack", "audio.projector")
    for name, key in (place.split(".") for place in fixed):
        had, wanted = getattr(config, name), given[name]
        if had is not None and wanted is not None and getattr(had, key) != getattr(wanted, key):
            raise ConfigError(
                f"init.{name}: the model has {key} {getattr(had, key)}, the recipe asks for {getattr(wanted, key)}"
            )
    return config.model_copy(update={name: wanted for name, wanted in given.items() if wanted is not None})


def new_image_rules(config: ModelConfig, image: ImageConfig | None) -> ModelConfig:
    """Let a model go on with other image rules, as LLaVA-NeXT does between its stages."""
    if image is None:
        return config
    for key in ("tile_size", "image_mean", "image_std"):  # what tower and projector learnt from
        if (had := getattr(config.image, key, "no images")) != (now := getattr(image, key)):
            raise ConfigError(f"init.image: the model takes {key} {had}, the recipe asks for {now}")
    return config.model_copy(update={"image": image})
