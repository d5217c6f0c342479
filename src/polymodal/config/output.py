"""Configuration of what is made besides text: media as codes, in one vocabulary with the words.

Ids are contiguous: text [0, T), then the specials, then each codebook. A code's id is the code plus the range's offset,
so no code has a name in the tokenizer, and nothing that anybody types can become one. A video uses the image's range,
frame by frame; a sound has a range for each of its codebooks.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from polymodal.config.media import AspectRatio, Channel
from polymodal.utils.strict import Strict

SPECIALS = {"image": ("<boi>", "<eoi>"), "audio": ("<boa>", "<eoa>"), "video": ("<bov>", "<eov>", "<frame>")}
"""What begins a medium of a kind, what ends it, and what stands between a video's frames."""


class CodeRange(Strict):
    """The codes of one codebook among the ids.

    Attributes:
        offset: The id of code 0.
        size: How many codes there are.
    """

    offset: int = Field(ge=0)
    size: PositiveInt

    @property
    def end(self) -> int:
        """The first id behind the range."""
        return self.offset + self.size

    def encode(self, codes: Sequence[int]) -> list[int]:
        """Codes as ids."""
        assert all(0 <= code < self.size for code in codes), f"a code is not in [0, {self.size})"
        return [code + self.offset for code in codes]

    def decode(self, ids: Sequence[int]) -> list[int]:
        """Ids as codes."""
        assert all(self.offset <= i < self.end for i in ids), f"an id is not in [{self.offset}, {self.end})"
        return [i - self.offset for i in ids]


class VocabularyLayout(Strict):
    """Where words, specials and codes lie among the ids of a language model.

    Attributes:
        text: The ids below are the tokenizer's own.
        specials: Name to id of what begins and ends media; only what is used.
        image: The codes of images, and of videos frame by frame.
        audio: The codes of sounds, a range for each codebook.
    """

    text: PositiveInt
    specials: Mapping[str, int]
    image: CodeRange
    audio: tuple[CodeRange, ...] = ()

    @model_validator(mode="after")
    def _contiguous(self) -> Self:
        ranges, names = (self.image, *self.audio), {name for kind in SPECIALS.values() for name in kind}
        if unknown := sorted(self.specials.keys() - names):
            raise ValueError(f"specials: {unknown[0]!r} is none of {', '.join(sorted(names))}")
        if max(self.text - 1, *self.specials.values()) >= self.image.offset:
            raise ValueError("image: its codes begin among the tokenizer's ids; they come behind them")
        if any(one.end != other.offset for one, other in itertools.pairwise(ranges)):
            raise ValueError("the ranges of codes must follow each other without a gap")
        return self

    @property
    def size(self) -> int:
        """The first id behind all."""
        return (self.image, *self.audio)[-1].end

    @property
    def new_ids(self) -> list[int]:
        """All that the language model did not know before: specials and codes."""
        return sorted({*self.specials.values(), *range(self.image.offset, self.size)})


def new_layout(text: int, ids: Mapping[str, int], image: int, audio: Sequence[int] = ()) -> VocabularyLayout:
    """Lay codebooks of these sizes out behind the tokenizer's ids and the specials."""
    offset = max(text, *(i + 1 for i in ids.values()))
    ranges: list[CodeRange] = []
    for size in (image, *audio):
        ranges.append(CodeRange(offset=offset, size=size))
        offset += size
    return VocabularyLayout(text=text, specials=dict(ids), image=ranges[0], audio=tuple(ranges[1:]))


class ImageOutputConfig(Strict):
    """How images are made, and which are read as codes.

    Attributes:
        image_tokenizer: The folder of an image tokenizer, or "bundled" for the one in the model's own folder.
        image_aspect_ratio: How an image that is made into codes is fitted to the tokenizer's square.
        background: What shows through transparent pixels and beside an image that is padded, RGB 0..255.
        questions: What images of questions are read as: "features" of the vision encoder, where there is one, or
            "codes" (as in Chameleon and Emu3). Without a vision encoder they are always codes.
        temperature: How codes are chosen where a request does not say: 0 takes the likeliest, above 0 samples.
        guidance: How far beyond what it draws with its text the model goes, where a request does not say; 1 for none.
    """

    image_tokenizer: str
    image_aspect_ratio: AspectRatio = "pad"
    background: tuple[Channel, Channel, Channel] = (255, 255, 255)
    questions: Literal["features", "codes"] = "features"
    temperature: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    guidance: float = Field(default=2.0, ge=0.0, le=100.0)


class OutputConfig(Strict):
    """What a model makes besides text.

    Attributes:
        image: How images are made.
        vocabulary: Where specials and codes lie; found when the model is first composed, and kept.
    """

    image: ImageOutputConfig
    vocabulary: VocabularyLayout | None = None
