"""What a recipe says of a model that learns from pairs, and of its loss."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from polymodal.config import ImageConfig, QFormerConfig, Strict, TowerConfig


class PairModelConfig(Strict):
    """A new pair of encoders, as one stock model of `transformers`.

    Attributes:
        family: "clip", "siglip", or "pair" for any two encoders (`VisionTextDualEncoderModel`).
        vision: The vision encoder: keys of the family's own config (`hidden_size`, `num_hidden_layers`, ...) for fresh
            weights; for "pair" with `model_type` among them, or a folder or hub id of an encoder with its weights.
        text: The text encoder, in the same way. Vocabulary and special tokens follow the tokenizer.
        projection_dim: Width of what is contrasted; "siglip" has none: its encoders are equally wide.
        tokenizer: A folder or hub id.
        pad_token: A token of the tokenizer to pad with, where it names none itself.
        image: How images become tiles: "squash" or "crop", which stock image processors can do too.
    """

    family: Literal["clip", "siglip", "pair"]
    vision: dict[str, Any] | str = Field(default_factory=dict)
    text: dict[str, Any] | str = Field(default_factory=dict)
    projection_dim: int = Field(default=512, gt=0)
    tokenizer: str
    pad_token: str | None = None
    image: ImageConfig

    @model_validator(mode="after")
    def _stock(self) -> PairModelConfig:
        if self.image.image_aspect_ratio not in ("squash", "crop"):
            raise ValueError(
                f"image.image_aspect_ratio {self.image.image_aspect_ratio!r}: a stock image processor cannot do that; "
                "use squash or crop"
            )
        if self.family != "pair" and (isinstance(self.vision, str) or isinstance(self.text, str)):
            raise ValueError(f"family {self.family!r} takes keys of its config; encoders with weights go with 'pair'")
        return self


class Blip2ModelConfig(Strict):
    """A new Q-Former beside a vision tower, for stage 1 of BLIP-2 (Li et al. 2023, arXiv:2301.12597).

    Attributes:
        family: "blip2".
        vision: The vision tower. BLIP-2 reads the last layer with its class token, before the last norm.
        image: How an image becomes the one tile that the tower takes.
        qformer: The Q-Former; its `vocab_size` and `pad_token_id` follow the tokenizer.
        norm: What comes before the Q-Former: "standardize" for towers whose channels differ widely in size.
        bert: A folder of a BERT to start from, as wide as the Q-Former and at least as deep; fresh weights when None.
        tokenizer: A folder or hub id of a BERT tokenizer; the one in `bert` when None.
        words: Without `bert`: a language model (folder, hub id, or "smollm2") whose word embeddings, reduced to the
            Q-Former's width, its own start from; fresh ones when None.
        projection_dim: Width of what is contrasted.
    """

    family: Literal["blip2"]
    vision: TowerConfig
    image: ImageConfig
    qformer: QFormerConfig = Field(default_factory=QFormerConfig)
    norm: Literal["none", "standardize"] = "none"
    bert: str | None = None
    tokenizer: str | None = None
    words: str | None = None
    projection_dim: int = Field(default=256, gt=0)

    @model_validator(mode="after")
    def _has_tokenizer(self) -> Blip2ModelConfig:
        if self.bert is None and self.tokenizer is None:
            raise ValueError("give `tokenizer` (a folder), or `bert`, which has one")
        if self.bert is not None and self.words is not None:
            raise ValueError("`bert` has word embeddings of its own: leave `words` out")
        return self


class TowerTextConfig(Strict):
    """A new text tower beside a frozen image tower of ours, to compare towers by retrieval.

    Attributes:
        family: "tower".
        vision: The image tower.
        image: How an image becomes the one tile that the tower takes.
        text: Keys of `SiglipTextConfig`; vocabulary and special tokens follow the tokenizer.
        projection_dim: Width of what is contrasted, and of the head that pools the tower's patches.
        tokenizer: A folder or hub id.
    """

    family: Literal["tower"]
    vision: TowerConfig
    image: ImageConfig
    text: dict[str, Any] = Field(default_factory=dict)
    projection_dim: int = Field(default=256, gt=0)
    tokenizer: str


class DistillConfig(Strict):
    """A frozen tower whose features the vision encoder learns to give too.

    Attributes:
        tower: The teacher.
        image: The teacher's image rules; those of the model that is trained when None.
        weight: Of the distance, beside the contrast.
        loss: "cosine" compares directions, "smooth_l1" values; either on channels of zero mean and unit variance.
    """

    tower: TowerConfig
    image: ImageConfig | None = None
    weight: float = Field(default=1.0, gt=0)
    loss: Literal["cosine", "smooth_l1"] = "cosine"


class ObjectiveConfig(Strict):
    """What is learnt from the pairs; its presence tells a pair recipe from others.

    Attributes:
        type: "clip" (Radford et al. 2021, arXiv:2103.00020), "siglip" (Zhai et al. 2023, arXiv:2303.15343) or "blip2"
            (stage 1 of Li et al. 2023, arXiv:2301.12597).
        label_smoothing: Of CLIP's cross-entropy, and BLIP-2's; BLIP-2's own 0.1 there when None, else 0.
        gather_with_grad: Let gradients flow through features gathered from other processes. Without, as in LAVIS, the
            gradient depends on the number of processes.
        chunk: SigLIP: texts compared at a time, to bound memory; all at once when None.
        distill: A teacher for the vision encoder, or None.
    """

    type: Literal["clip", "siglip", "blip2"]
    label_smoothing: float | None = Field(default=None, ge=0, lt=1)
    gather_with_grad: bool = True
    chunk: int | None = Field(default=None, gt=0)
    distill: DistillConfig | None = None


AnyPairModelConfig = Annotated[PairModelConfig | Blip2ModelConfig | TowerTextConfig, Field(discriminator="family")]
"""What `init.model` of a pair recipe may be, told apart by `family`."""
