"""The key under which features are cached stands for the image and for all that turns it into tiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from polymodal.backends import load_processor
from polymodal.config import ImageConfig, VideoConfig
from polymodal.media_plan import Size
from polymodal.messages import Document, Image, Video, user
from polymodal.planning.sample import PaperVideo, plan_media
from polymodal.processing import document_pages
from polymodal.processing.media_parts import image_key
from polymodal.viewer.draw import draw_media
from tests.media.makers import clip

RULES: dict[str, Any] = {"tile_size": (32, 32), "image_mean": (0.5, 0.4, 0.3), "image_std": (0.2, 0.3, 0.4)}
CHANGES: dict[str, Any] = {
    "image_aspect_ratio": "squash",
    "tile_size": (28, 28),
    "resize_short_side": 40,
    "image_grid_pinpoints": ((64, 64),),
    "anyres_max": 4,
    "mm_patch_merge_type": "spatial_unpad",
    "max_tiles": 4,
    "thumbnail": False,
    "overview_aspect_ratio": "pad",
    "image_mean": (0.5, 0.4, 0.31),
    "image_std": (0.2, 0.3, 0.41),
    "resample": "bilinear",
    "background": (0, 0, 0),
    "pad_color": (1, 2, 3),
    "max_pixels": 10_000,
}


NATIVE = {"native_min_pixels": 100, "native_max_pixels": 10_000}


def noise(seed: int = 1, height: int = 20, width: int = 30) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", CHANGES)
def test_other_image_rules_have_another_key(name: str) -> None:
    usual, changed = ImageConfig(**RULES), ImageConfig(**{**RULES, name: CHANGES[name]})
    assert getattr(usual, name) != getattr(changed, name)
    assert image_key(noise(), changed) != image_key(noise(), usual)
    assert image_key(noise(), ImageConfig(**RULES)) == image_key(noise(), usual)


def test_every_rule_is_tried() -> None:
    assert {*CHANGES, *NATIVE, "several_images"} == set(ImageConfig.model_fields)


@pytest.mark.parametrize("name, value", NATIVE.items())
def test_bounds_of_native_are_in_the_key_of_native_images_alone(name: str, value: int) -> None:
    native = {**RULES, "image_aspect_ratio": "native"}
    assert image_key(noise(), ImageConfig(**native, **{name: value})) != image_key(noise(), ImageConfig(**native))
    # Younger than caches that people have.
    assert image_key(noise(), ImageConfig(**RULES, **{name: value})) == image_key(noise(), ImageConfig(**RULES))


def test_another_image_has_another_key() -> None:
    rules = ImageConfig(**RULES)
    other = PILImage.frombytes("RGB", (20, 30), noise().tobytes())  # the same bytes in another shape
    assert len({image_key(image, rules) for image in (noise(), noise(2), other)}) == 3
    padded = ImageConfig(**RULES, several_images="pad")
    assert (
        image_key(noise(), padded, alone=False) != image_key(noise(), padded, alone=True) == image_key(noise(), rules)
    )
    assert image_key(noise(), rules, alone=False) == image_key(noise(), rules)


def test_the_processor_gives_keys_of_its_own_rules(tiny_model_folder: Path) -> None:
    processor = load_processor(tiny_model_folder)
    assert processor.config.image is not None
    keys = set()
    for rules in (processor.config.image, processor.config.image.model_copy(update={"image_mean": (0.1, 0.2, 0.3)})):
        changed = processor.with_config(processor.config.model_copy(update={"image": rules}))
        keys |= set(changed([user(Image(noise()), "What?")]).media_keys)
    assert len(keys) == 2


def test_a_video_beside_an_image_makes_it_no_second_image(tiny_model_folder: Path, tmp_path: Path) -> None:
    processor = load_processor(tiny_model_folder)
    assert processor.config.image is not None
    height, width = processor.config.image.tile_size
    anyres = {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": ((2 * height, 2 * width),),
        "several_images": "pad",
    }
    given = {"image": processor.config.image.model_copy(update=anyres), "video": VideoConfig(num_frames=2)}
    processor = processor.with_config(processor.config.model_copy(update=given))
    image, video = Image(noise()), Video(clip(tmp_path / "a.mp4"))
    alone = processor([user(image, "What?")], pixels=False)
    messages = [user(image, video, "What?")]
    beside = processor(messages, pixels=False)
    assert alone.plans[0].num_tiles == 5
    assert (beside.plans[0], beside.media_keys[0]) == (alone.plans[0], alone.media_keys[0])
    assert processor.medium(messages, 0).plan == alone.plans[0]
    paper = plan_media([Size(20, 30)], [PaperVideo()], [], [], processor.config, processor.tokens, None)
    assert paper.images[0][1] == alone.plans[0]
    assert len(draw_media(processor, messages)) == 2
    assert processor([user(image, image, "What?")], pixels=False).plans[0].num_tiles == 1


def test_a_page_is_opened_again_without_reading_it(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise AssertionError("OCR is loaded for pixels")

    monkeypatch.setattr(document_pages, "load_engine", refuse)
    opened = load_processor(tiny_model_folder).medium([user(Document(noise(), text="ocr"), "What?")], 0)
    assert opened.plan.source == Size(20, 30)  # type: ignore[union-attr]
