"""Strict, frozen configuration of a model. A value is typed once; what can be derived is a property.

Unknown keys are errors that name the nearest key. Names follow the field's habits (LLaVA's `vision_tower`,
`mm_projector_type`, `mm_vision_select_layer`, `image_aspect_ratio`, ...).
"""

import math
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, PositiveInt, field_validator, model_validator

from polymodal.errors import ConfigError
from polymodal.utils.strict import Strict as Strict
from polymodal.utils.strict import parse_config as parse_config

AspectRatio: TypeAlias = Literal["squash", "pad", "crop"]
PatchMerge: TypeAlias = Literal["flat", "spatial", "spatial_unpad"]
Resample: TypeAlias = Literal["bilinear", "bicubic", "lanczos"]
RESAMPLE_FILTERS: dict[Resample, int] = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
"""The resize filters that image rules may name, and their numbers in Pillow and in stock preprocessor files."""


# What a stranger's file may ask for; the largest published towers take 1,536 pixels a side and cut 36 tiles.
MAX_TILE, MAX_CANVAS, MAX_PIXELS = 4096, 2**27, 400_000_000
Side: TypeAlias = Annotated[int, Field(ge=1, le=MAX_TILE)]
Channel: TypeAlias = Annotated[int, Field(ge=0, le=255)]
Deviation: TypeAlias = Annotated[float, Field(gt=0)]


class VisionConfig(Strict):
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


class ImageConfig(Strict):
    """How an image becomes tiles; travels with the weights, since it is part of what was trained.

    Attributes:
        image_aspect_ratio: "squash" resizes to the tile regardless of shape; "pad" pads to a square first; "crop"
            resizes the short side and crops the centre; "slice" cuts tiles and adds a thumbnail; "anyres" fits the
            image to the best of `image_grid_pinpoints` and adds a global view.
        tile_size: The encoder's input, (height, width) in pixels.
        resize_short_side: For "crop": the short side before cropping; the tile's short side when None.
        image_grid_pinpoints: For "anyres": the canvases allowed, (height, width) in pixels.
        anyres_max: For "anyres": LLaVA-OneVision's anyres_max_N; grids with more tokens than N tiles are shrunk.
        mm_patch_merge_type: For "anyres": see `media_plan.ImagePlan.merge`.
        several_images: For "anyres", with more than one image in a conversation: "alike" cuts each as if it were alone;
            "pad" makes each one padded tile with a newline token behind it, as LLaVA-OneVision does.
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

    image_aspect_ratio: Literal["squash", "pad", "crop", "slice", "anyres"] = "pad"
    tile_size: tuple[Side, Side]
    resize_short_side: Annotated[int, Field(ge=1, le=2**16)] | None = None
    image_grid_pinpoints: Annotated[tuple[tuple[PositiveInt, PositiveInt], ...], Field(max_length=1024)] = ()
    anyres_max: PositiveInt | None = None
    mm_patch_merge_type: PatchMerge = "flat"
    several_images: Literal["alike", "pad"] = "alike"
    max_tiles: int = Field(default=6, ge=1, le=1024)
    thumbnail: bool = True
    overview_aspect_ratio: AspectRatio = "squash"
    image_mean: tuple[float, float, float]
    image_std: tuple[Deviation, Deviation, Deviation]
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
        return self


class TemporalAttentionConfig(Strict):
    """Attention along time; `modeling.encoders.video_temporal.TemporalAttention`.

    Attributes:
        hidden_size: Its width; the encoder's where None.
        num_layers: Its layers.
        num_attention_heads: Heads of each attention.
        time_embedding: "sinusoidal" adds waves of the time in seconds, "learned" puts a small network behind them.
        min_period: The shortest wave, in seconds: about what can be told apart.
        max_period: The longest wave, in seconds: about what can be told apart from its repetition.
        pool: "mean" ends with the mean over frames, "none" keeps them all.
    """

    hidden_size: int | None = Field(default=None, ge=2)
    num_layers: PositiveInt = 1
    num_attention_heads: PositiveInt = 8
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


class QFormerConfig(Strict):
    """BLIP-2's Q-Former: a BERT whose learned queries look at the image; defaults as published.

    Attributes:
        num_query_tokens: Q, the tokens of one tile.
        hidden_size: Its width.
        num_hidden_layers: Its layers.
        num_attention_heads: Heads of each attention.
        intermediate_size: Width inside the feed-forward parts.
        cross_attention_frequency: n: layers 0, n, 2n, ... look at the image.
        hidden_dropout_prob: Dropout on hidden states.
        attention_probs_dropout_prob: Dropout on attention weights.
        initializer_range: Deviation of fresh weights and queries.
        layer_norm_eps: Of its own norms.
        vision_norm_eps: Of the norm on the tower's output.
        vocab_size: Rows of its word embeddings: BERT's and one for [DEC], which begins a caption.
        max_position_embeddings: Positions of its text.
        pad_token_id: The row of padding, which is not trained; None for none.
        max_text_length: Where its text is cut, in tokens.
        text_context: It reads the question beside the image, as InstructBLIP's does.
        tokenizer: For `text_context`: the folder or hub id of its tokenizer; None where `projector.pretrained` has it.
            A model folder carries its own.
    """

    num_query_tokens: PositiveInt = 32
    hidden_size: PositiveInt = 768
    num_hidden_layers: PositiveInt = 12
    num_attention_heads: PositiveInt = 12
    intermediate_size: PositiveInt = 3072
    cross_attention_frequency: PositiveInt = 2
    hidden_dropout_prob: float = Field(default=0.1, ge=0, lt=1)
    attention_probs_dropout_prob: float = Field(default=0.1, ge=0, lt=1)
    initializer_range: float = Field(default=0.02, gt=0)
    layer_norm_eps: float = Field(default=1e-12, gt=0)
    vision_norm_eps: float = Field(default=1e-6, gt=0)
    vocab_size: PositiveInt = 30523
    max_position_embeddings: PositiveInt = 512
    pad_token_id: int | None = 0
    max_text_length: int = Field(default=32, ge=3)
    text_context: bool = False
    tokenizer: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        width, heads = self.hidden_size, self.num_attention_heads
        if width % heads:
            raise ValueError(f"hidden_size {width} is not divisible by num_attention_heads {heads}")
        text, most = self.max_text_length, self.max_position_embeddings
        if text > most:
            raise ValueError(f"max_text_length {text} is more than max_position_embeddings {most}")
        if self.tokenizer is not None and not self.text_context:
            raise ValueError("tokenizer is read only with text_context: true")
        return self


class ResamplerConfig(Strict):
    """Flamingo's Perceiver resampler; `modeling.projectors.resampler`.

    Attributes:
        num_query_tokens: Q, the tokens of one tile.
        hidden_size: Its width; the encoder's where None.
        num_layers: Its layers.
        num_attention_heads: Heads of each attention.
        head_dim: Width of a head.
        intermediate_ratio: How much wider the inside of a feed-forward part is.
    """

    num_query_tokens: PositiveInt = 64
    hidden_size: PositiveInt | None = None
    num_layers: PositiveInt = 6
    num_attention_heads: PositiveInt = 8
    head_dim: PositiveInt = 64
    intermediate_ratio: PositiveInt = 4


class AbstractorConfig(Strict):
    """Honeybee's C-Abstractor; `modeling.projectors.abstractor`.

    Attributes:
        num_query_tokens: Q, the tokens of one tile; a square number.
        hidden_size: Channels of the convolutions.
        depth: Convolution blocks before the pooling, and again after it.
        mlp_depth: Linear layers at the end.
    """

    num_query_tokens: PositiveInt = 144
    hidden_size: int = Field(default=1024, ge=4)
    depth: PositiveInt = 3
    mlp_depth: PositiveInt = 2

    @field_validator("num_query_tokens")
    @classmethod
    def _square(cls, value: int) -> int:
        if math.isqrt(value) ** 2 != value:
            raise ValueError("must be a square number, such as 49, 64 or 144")
        return value


SETTINGS_OF_TYPE = ("qformer", "resampler", "abstractor")  # the projectors that have settings, under their own name


class ProjectorConfig(Strict):
    """Which projector takes encoder features to the language model's width.

    Attributes:
        mm_projector_type: "linear", "mlp2x_gelu" (any number), "pixel_shuffle<r>[_mlp2x_gelu]", "avg_pool<r>[_...]",
            "qformer", "resampler", "abstractor"; see `projectors.build_projector`.
        bias: Whether linear layers have a bias; of the last three only the one to the language model's width is asked.
        norm: Before the first layer: "layer" a LayerNorm, "standardize" a mean and deviation measured on first data.
        hidden_size: Width between the layers of an MLP; the language model's where None.
        qformer: Settings of "qformer".
        resampler: Settings of "resampler".
        abstractor: Settings of "abstractor".
        pretrained: Of "qformer": a folder to start from, what stage 1 of BLIP-2 left or a BERT. Read only when a model
            is composed; a model folder has its weights and does not name it.
    """

    mm_projector_type: str = "mlp2x_gelu"
    bias: bool = True
    norm: Literal["none", "layer", "standardize"] = "none"
    hidden_size: int | None = None
    qformer: QFormerConfig | None = None
    resampler: ResamplerConfig | None = None
    abstractor: AbstractorConfig | None = None
    pretrained: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _settings_of_the_type(cls, data: Any) -> Any:
        # A type's settings are written down, defaults too, so that they are stored with the weights.
        kind = data.get("mm_projector_type") if isinstance(data, dict) else None
        return {**data, kind: {}} if kind in SETTINGS_OF_TYPE and data.get(kind) is None else data

    @model_validator(mode="after")
    def _fits_the_type(self) -> Self:
        for kind in SETTINGS_OF_TYPE:
            if kind != self.mm_projector_type and getattr(self, kind) is not None:
                raise ValueError(f"{kind!r} settings are given, but mm_projector_type is {self.mm_projector_type!r}")
        if self.pretrained is not None and self.qformer is None:
            raise ValueError(f"pretrained is for qformer, but mm_projector_type is {self.mm_projector_type!r}")
        if self.hidden_size is not None and self.mm_projector_type in SETTINGS_OF_TYPE:
            raise ValueError(f"hidden_size is for MLPs; set {self.mm_projector_type}.hidden_size")
        if self.norm == "layer" and self.qformer is not None:
            raise ValueError("norm 'layer': the Q-Former has a LayerNorm of its own there; leave it out")
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
    """

    model_name_or_path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device_map: str | None = None
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    encoder_decoder: bool | None = None


class TemplateConfig(Strict):
    """How a conversation becomes one string of tokens.

    Attributes:
        chat_template: A preset of `processing.chat_template.presets.PRESETS` ("chatml", "llama2", "llama3", "mistral",
            "vicuna", "t5", "plain"), "tokenizer" for the tokenizer's own, or jinja text.
        default_system: The system message where a conversation has none; None means no system turn.
        image_newline_text: Text after an image, as LLaVA's "<image>\\n"; empty for none.
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


class ModelConfig(Strict):
    """A whole multimodal LLM. Written to `polymodal.json`, read back, and compared on load.

    Attributes:
        vision: The vision encoder; None for a text-only model.
        image: The image preprocessing; needed where `vision` is.
        projector: The vision projector.
        llm: The language model.
        template: The chat template.
        image_token_id: The placeholder's id. None: the tokenizer's own "<image>" where it has one, else the first id
            past the language model's vocabulary, which the head cannot produce.
    """

    vision: VisionConfig | None = None
    image: ImageConfig | None = None
    projector: ProjectorConfig = Field(default_factory=ProjectorConfig)
    llm: LLMConfig
    template: TemplateConfig = Field(default_factory=TemplateConfig)
    image_token_id: int | None = None

    @model_validator(mode="after")
    def _image_needs_vision(self) -> Self:
        if (self.image is None) != (self.vision is None):
            missing = "image" if self.image is None else "vision"
            raise ValueError(f"`vision` and `image` come together, and {missing!r} is missing: give both or neither")
        return self


def new_image_rules(config: ModelConfig, image: ImageConfig | None) -> ModelConfig:
    """Let a model go on with other image rules, as LLaVA-NeXT does between its stages."""
    if image is None:
        return config
    for key in ("tile_size", "image_mean", "image_std"):  # what tower and projector learnt from
        if (had := getattr(config.image, key, "no images")) != (now := getattr(image, key)):
            raise ConfigError(f"init.image: the model takes {key} {had}, the recipe asks for {now}")
    return config.model_copy(update={"image": image})
