"""Configuration of projectors: what leads from an encoder's features to the language model's width."""

import math
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from polymodal.utils.strict import Strict


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


class SummaryConfig(Strict):
    """Tokens that sum a tile up, before those of its patches; `modeling.projectors.summary`.

    Attributes:
        num_query_tokens: S, the tokens that sum up.
        hidden_size: Width of the transformer layers.
        num_layers: Its layers.
        num_attention_heads: Heads of each attention.
        mlp_hidden_size: Width between the two layers of the MLP; the language model's where None.
    """

    num_query_tokens: PositiveInt = 8
    hidden_size: PositiveInt = 384
    num_layers: PositiveInt = 3
    num_attention_heads: PositiveInt = 6
    mlp_hidden_size: PositiveInt | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not divisible by {self.num_attention_heads} heads")
        return self


PER_TOKEN = r"linear|mlp[1-9]\d*x_gelu"
"""The projectors that take each feature by itself, in whatever grid."""
SETTINGS_OF_TYPE = (
    "qformer",
    "resampler",
    "abstractor",
    "summary",
)  # the projectors that have settings, under their own name


class ProjectorConfig(Strict):
    """Which projector takes encoder features to the language model's width.

    Attributes:
        mm_projector_type: "linear", "mlp2x_gelu" (any number), "pixel_shuffle<r>[_mlp2x_gelu]", "avg_pool<r>[_...]",
            "qformer", "resampler", "abstractor", "summary"; see `projectors.build_projector`.
        bias: Whether linear layers have a bias; of the last four only the one to the language model's width is asked.
        norm: Before the first layer: "layer" a LayerNorm, "standardize" a mean and deviation measured on first data.
        hidden_size: Width between the layers of an MLP; the language model's where None.
        qformer: Settings of "qformer".
        resampler: Settings of "resampler".
        abstractor: Settings of "abstractor".
        summary: Settings of "summary".
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
    summary: SummaryConfig | None = None
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
