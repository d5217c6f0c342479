"""How text and images are chosen from logits, and how long an answer may get."""

from typing import Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from polymodal.config import ImageOutputConfig, Strict

Modality: TypeAlias = Literal["text", "image", "audio"]


class ImageParams(Strict):
    """Settings of the images in an answer; a code is never penalised for having been chosen before.

    Attributes:
        temperature: 0 takes the likeliest code; above 0 samples. The model's own choice where None, as of `guidance`.
        top_p: Sample from the smallest set of codes whose probability reaches this.
        top_k: Sample from this many likeliest codes; 0 for all.
        guidance: How far to go from what the model draws without a text to what it draws with it, and beyond: 1 is the
            model as it is, larger values follow the text more closely and cost twice the work.
        max_images: The most images of an answer.
    """

    temperature: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    guidance: float | None = Field(default=None, ge=0.0, le=100.0)
    max_images: int = Field(default=4, ge=1, le=1000)


class GenerationParams(Strict):
    """Settings of one generation.

    Attributes:
        max_new_tokens: The most tokens of text to make; the codes of images do not count.
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: Sample from the smallest set of tokens whose probability reaches this.
        top_k: Sample from this many likeliest tokens; 0 for all.
        repetition_penalty: Divides the logits of tokens already in the answer; 1 for none, from 0.01 to 100.
        seed: Makes sampling repeatable, in 64 bits; None draws a new seed.
        stop: Texts that end the answer; they are cut off.
        modalities: What the answer may hold. Where "image" comes first, it begins with one; alone, it is one. "audio"
            is the answer's text spoken, and comes behind "text".
        image: Settings of its images.
    """

    max_new_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100.0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: tuple[str, ...] = ()
    modalities: tuple[Modality, ...] = Field(default=("text",), min_length=1)
    image: ImageParams = Field(default_factory=ImageParams)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.modalities)) < len(self.modalities):
            raise ValueError("modalities: each is named once")
        if "audio" in self.modalities[: [*self.modalities, "text"].index("text")]:
            raise ValueError("modalities: audio is the answer's text spoken; name text before it")
        return self

    @property
    def plain(self) -> dict[str, Any]:
        """The settings as JSON, for an answer of text without those of images, which change nothing in it."""
        return self.model_dump(mode="json", exclude={"modalities", "image"} if self.modalities == ("text",) else None)

    def settled(self, own: ImageOutputConfig) -> "GenerationParams":
        """These settings with a model's own choice of how its codes are chosen, where they leave it to the model."""
        chosen = {name: getattr(own, name) for name in ("temperature", "guidance") if getattr(self.image, name) is None}
        return self.model_copy(update={"image": self.image.model_copy(update=chosen)})

    @property
    def of_codes(self) -> "GenerationParams":
        """The settings with which an image's codes are chosen."""
        return GenerationParams(**self.image.model_dump(include={"temperature", "top_p", "top_k"}))
