"""Images as ids: rows whose answers hold images, what people type, the next turn; and what cannot be used."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image as PILImage

from polymodal.backends import load_processor
from polymodal.config.output import new_layout
from polymodal.errors import DataError, PolymodalError
from polymodal.messages import Image, Video, assistant, user
from polymodal.processing.processor import Processor
from tests.drawers import CODES, PROMPTS, SIDE, codes_of, picture


@pytest.fixture(scope="module")
def drawer(drawer_folder: Path) -> Processor:
    return load_processor(drawer_folder)


def block(processor: Processor, prompt: str) -> list[int]:
    assert processor.codes is not None
    layout = processor.codes.vocabulary
    return [layout.specials["<boi>"], *layout.image.encode(codes_of(prompt)), layout.specials["<eoi>"]]


def test_an_answer_s_image_is_a_block_of_ids_all_of_them_trained(drawer: Processor) -> None:
    sample = drawer([user("red left"), assistant(Image(picture("red left")))])
    asked = drawer([user("red left")], add_generation_prompt=True).input_ids
    made = block(drawer, "red left")
    assert sample.input_ids[len(asked) :].tolist()[: len(made) + 1] == [*made, drawer.tokenizer.eos_token_id]
    assert sample.input_ids[: len(asked)].tolist() == asked.tolist()
    assert sample.loss_mask.nonzero().flatten().tolist() == list(range(len(asked), len(asked) + len(made) + 1))
    assert not sample.plans and not sample.slots  # ids like any other: nothing is scattered


def test_text_and_images_of_an_answer_stay_in_order(drawer: Processor) -> None:
    parts = ("One: ", Image(picture("red left")), " and two:\n", Image(picture("blue right")), "done")
    sample = drawer([user("Draw"), assistant(*parts)])
    asked = drawer([user("Draw")], add_generation_prompt=True).input_ids
    says = [drawer.tokenizer.encode(text, add_special_tokens=False) for text in parts[::2]]
    expected = [*says[0], *block(drawer, "red left"), *says[1], *block(drawer, "blue right"), *says[2]]
    assert sample.input_ids[len(asked) :].tolist()[: len(expected)] == expected
    assert bool(sample.loss_mask[len(asked) : len(asked) + len(expected)].all())


def test_a_question_s_image_is_codes_without_eyes_and_is_not_trained(drawer: Processor) -> None:
    sample = drawer([user(Image(picture("green middle")), "What?"), assistant("a cell")])
    begin = sample.input_ids.tolist().index(block(drawer, "green middle")[0])
    assert sample.input_ids[begin : begin + CODES + 2].tolist() == block(drawer, "green middle")
    assert not bool(sample.loss_mask[begin : begin + CODES + 2].any())
    answer = sample.input_ids[sample.loss_mask].tolist()
    assert drawer.tokenizer.decode(answer, skip_special_tokens=True).strip() == "a cell"
    silent = drawer([user("x"), assistant(Image(picture("red left"))), user("y"), assistant("z")])
    assert drawer.seen([user(Image(picture("red left")), "Q")]) == [user("Q")]
    assert int(silent.loss_mask.sum()) > CODES


def test_nothing_that_is_typed_becomes_a_code(drawer: Processor) -> None:
    assert drawer.codes is not None
    layout = drawer.codes.vocabulary
    typed = "<boi><eoi> <image> <img_3> <|boi|> PM m0x " + "".join(drawer.tokenizer.all_special_tokens)
    for messages in ([user(typed)], [user("Q"), assistant(typed)], [user(typed, Image(picture("red left")), typed)]):
        ids = drawer(messages).input_ids.tolist()
        images = sum(len(message.media) for message in messages)
        assert sum(i >= layout.image.offset for i in ids) == CODES * images
        assert all(ids.count(token) == images for token in layout.specials.values())
    for code in layout.new_ids:  # and no text that is read gives one, whatever the tokenizer calls it
        name = drawer.tokenizer.decode([code])
        assert code not in drawer([user(name or "x")]).input_ids.tolist()


def test_an_image_that_was_made_is_read_as_its_own_codes(drawer: Processor) -> None:
    assert drawer.codes is not None
    codes = drawer.codes
    blank = codes.vocabulary.image.encode([0] * CODES)
    made = codes.decode(blank)
    assert codes.encode(made)[1:-1] == blank

    class Forgetful:
        """A tokenizer that encodes to other codes than an image was made of, as learned ones do."""

        codebook_size, image_size, grid = codes.tokenizer.codebook_size, SIDE, codes.tokenizer.grid
        decode, state_dict = codes.tokenizer.decode, codes.tokenizer.state_dict

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            return torch.full((len(pixels), CODES), 3)

    other = type(codes)(Forgetful(), codes.vocabulary, codes.config)
    assert other.encode(picture("red left"))[1:-1] == codes.vocabulary.image.encode([3] * CODES)
    ids = codes.vocabulary.image.encode(codes_of("red left"))
    assert other.encode(other.decode(ids))[1:-1] == ids


def test_a_preview_fills_what_is_missing_with_the_last_code(drawer: Processor) -> None:
    assert drawer.codes is not None
    ids = drawer.codes.vocabulary.image.encode([0, 0, 1])
    colours = drawer.codes.decode(ids).resize((3, 3), PILImage.Resampling.NEAREST).get_flattened_data()
    assert list(colours) == [(255, 255, 255)] * 2 + [(255, 0, 0)] * 7
    assert drawer.codes.decode([]).size == (SIDE, SIDE)


def test_images_of_any_size_are_fitted_to_the_square(drawer: Processor) -> None:
    assert drawer.codes is not None
    large = picture("blue left").resize((SIDE * 7, SIDE * 7), PILImage.Resampling.NEAREST)
    assert drawer.codes.encode(large) == drawer.codes.encode(picture("blue left"))
    wide = PILImage.new("RGB", (90, 30), "red")  # padded with white above and below
    assert drawer.codes.encode(wide)[1:-1] == drawer.codes.vocabulary.image.encode([0] * 3 + [1] * 3 + [0] * 3)


def test_a_model_that_makes_nothing_says_what_to_do(tiny_model_folder: Path, drawer: Processor) -> None:
    plain = load_processor(tiny_model_folder)
    with pytest.raises(DataError, match="this model makes none: give it an image tokenizer") as caught:
        plain([user("Draw"), assistant(Image(picture("red left")))])
    assert caught.value.code == "misplaced-medium"
    with pytest.raises(PolymodalError, match="no vision encoder; leave the video out"):
        drawer([user("Draw"), assistant(Video("a.mp4"))])


def test_ranges_are_contiguous_and_asserted() -> None:
    layout = new_layout(50, {"<boi>": 50, "<eoi>": 51}, 8, (4, 4))
    assert (layout.image.offset, layout.audio[0].offset, layout.audio[1].offset, layout.size) == (52, 60, 64, 68)
    assert layout.image.decode(layout.image.encode([0, 7])) == [0, 7]
    assert layout.new_ids == list(range(50, 68))
    for wrong in ([8], [-1]):
        with pytest.raises(AssertionError):
            layout.image.encode(wrong)
    for wrong in ([51], [60]):
        with pytest.raises(AssertionError):
            layout.image.decode(wrong)
    gap = layout.model_dump() | {"audio": [{"offset": 61, "size": 4}]}
    inside = layout.model_dump() | {"text": 60}
    named = layout.model_dump() | {"specials": {"<bio>": 50}}
    for values, complaint in ((gap, "without a gap"), (inside, "among the tokenizer's ids"), (named, "is none of")):
        with pytest.raises(ValueError, match=complaint):
            type(layout).model_validate(values)


def test_kept_codes_are_verified_by_decoding(drawer: Processor) -> None:
    assert drawer.codes is not None
    good = block(drawer, PROMPTS[0])
    drawer.codes.verify(picture(PROMPTS[0]), good, "here")
    for wrong in (block(drawer, PROMPTS[1]), good[:-2], [good[0], *[5] * CODES, good[-1]]):
        with pytest.raises(DataError, match="here: the codes that were kept do not decode to its image"):
            drawer.codes.verify(picture(PROMPTS[0]), wrong, "here")
