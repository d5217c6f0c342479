"""How text and images are chosen from logits, and how long an answer may get."""

from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from polymodal.config import ImageOutputConfig, Strict

Modality: TypeAlias = Literal["text", "image", "audio"]


_NEWER = ("presence_penalty", "frequency_penalty", "min_p", "logit_bias", "logprobs", "response_schema", "grammar")
"""Settings that kept answers say nothing of where they are not used."""


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
        presence_penalty: Taken from the logits of tokens already in the answer, from -2 to 2.
        frequency_penalty: The same, once for each time that a token is there.
        min_p: Sample from the tokens that are at least this share as likely as the likeliest; 0 for all.
        logit_bias: Added to the logits of these ids of tokens, from -100 to 100 each.
        logprobs: Tell how likely each token was, and so many of the likeliest instead of it.
        response_schema: The JSON schema that the answer has to meet, which is JSON then; needs llguidance.
        grammar: The grammar that the answer has to follow, in llguidance's form of Lark.
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
    presence_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = Field(default=0.0, ge=-2.0, le=2.0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100.0, le=100.0)]] = Field(default={})
    logprobs: int | None = Field(default=None, ge=0, le=20)
    response_schema: dict[str, Any] | None = None
    grammar: str | None = None
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
        if self.alone and "image" in self.modalities:
            raise ValueError("logprobs, response_schema and grammar are of text; leave images out of modalities")
        if self.grammar is not None and self.response_schema is not None:
            raise ValueError("grammar: response_schema says what the answer is; give one of them")
        return self

    @property
    def plain(self) -> dict[str, Any]:
        """The settings as JSON, without those that change nothing: of images in an answer of text, and newer ones."""
        idle = {name for name in _NEWER if getattr(self, name) == type(self).model_fields[name].default}
        return self.model_dump(
            mode="json", exclude=idle | ({"modalities", "image"} if self.modalities == ("text",) else set())
        )

    @property
    def penalises(self) -> bool:
        """Whether it matters what the answer has said already."""
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)

    @property
    def follows(self) -> bool:
        """Whether the answer follows a schema or a grammar."""
        return self.response_schema is not None or self.grammar is not None

    @property
    def alone(self) -> bool:
        """Whether each answer needs a sampler of its own, also in a batch."""
        return self.logprobs is not None or self.follows

    def settled(self, own: ImageOutputConfig) -> "GenerationParams":
        """These settings with a model's own choice of how its codes are chosen, where they leave it to the model."""
        chosen = {name: getattr(own, name) for name in ("temperature", "guidance") if getattr(self.image, name) is None}
        return self.model_copy(update={"image": self.image.model_copy(update=chosen)})

    @property
    def of_codes(self) -> "GenerationParams":
        """The settings with which an image's codes are chosen."""
        return GenerationParams(**self.image.model_dump(include={"temperature", "top_p", "top_k"}))
