"""How text is chosen from logits, and how long it may get."""

from pydantic import Field

from polymodal.config import Strict


class GenerationParams(Strict):
    """Settings of one generation.

    Attributes:
        max_new_tokens: The most tokens to make.
        temperature: 0 takes the likeliest token; above 0 samples.
        top_p: Sample from the smallest set of tokens whose probability reaches this.
        top_k: Sample from this many likeliest tokens; 0 for all.
        repetition_penalty: Divides the logits of tokens already in the answer; 1 for none, from 0.01 to 100.
        seed: Makes sampling repeatable, in 64 bits; None draws a new seed.
        stop: Texts that end the answer; they are cut off.
    """

    max_new_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    repetition_penalty: float = Field(default=1.0, ge=0.01, le=100.0)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stop: tuple[str, ...] = ()
