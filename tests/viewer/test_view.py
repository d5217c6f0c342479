"""The view of a sample: nothing lost, every kind counted, text that attacks the page or the terminal is harmless."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image as PILImage

from polymodal.config import ImageConfig, LLMConfig, ModelConfig, VisionConfig
from polymodal.media_plan import Size
from polymodal.messages import Image, Message, assistant, system, user
from polymodal.processing.image_transform import tile_images
from polymodal.processing.processor import Processor
from polymodal.viewer.draw import draw_media, draw_plan, stack
from polymodal.viewer.view import View, plan_facts, to_html, to_terminal, view_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

RULES: dict[str, dict[str, Any]] = {
    "pad": {"image_aspect_ratio": "pad"},
    "squash": {"image_aspect_ratio": "squash"},
    "crop": {"image_aspect_ratio": "crop"},
    "slice": {"image_aspect_ratio": "slice", "max_tiles": 4},
    "anyres": {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": ((28, 56), (56, 28), (56, 56)),
        "mm_patch_merge_type": "spatial_unpad",
    },
}


def make_processor(tokenizer: PreTrainedTokenizerFast, rule: str = "pad") -> Processor:
    image = ImageConfig(tile_size=(28, 28), image_mean=(0.5,) * 3, image_std=(0.5,) * 3, **RULES[rule])
    config = ModelConfig(
        vision=VisionConfig(vision_tower="none", type="clip"), image=image, llm=LLMConfig(model_name_or_path="none")
    )
    return Processor(config, tokenizer, Size(4, 4), 500)


def view_of(processor: Processor, *messages: Message) -> View:
    return view_sample(processor(list(messages), pixels=False), processor.tokenizer)


def image(height: int, width: int) -> PILImage.Image:
    return PILImage.linear_gradient("L").resize((width, height)).convert("RGB")


def test_nothing_is_lost_and_every_kind_is_counted(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    processor = make_processor(byte_tokenizer)
    messages = [system("be kind"), user(Image(image(20, 30)), "what?"), assistant("A 猫, é.")]
    sample = processor(messages, pixels=False)
    view = view_sample(sample, byte_tokenizer)
    assert [i for cell in view.cells for i in cell.ids] == sample.input_ids.tolist()
    assert [cell.start for cell in view.cells][1:] == [cell.start + len(cell.ids) for cell in view.cells][:-1]
    assert view.counts["media"] == 16
    assert view.counts["trained"] == int(sample.loss_mask.sum())
    assert sum(view.counts.values()) == sample.input_ids.numel()
    assert "".join(c.text for c in view.cells if c.kind == "trained") == "A 猫, é.<|im_end|>"
    (media,) = [cell for cell in view.cells if cell.kind == "media"]
    assert (media.text, len(media.ids)) == ("image 1", 16)


def test_characters_spread_over_tokens_are_one_cell(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    view = view_of(make_processor(byte_tokenizer), user("猫é!"))
    lengths = {cell.text: len(cell.ids) for cell in view.cells}
    assert (lengths["猫"], lengths["é"], lengths["!"]) == (3, 2, 1)


def test_control_tokens_and_typed_ones_differ(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    view = view_of(make_processor(byte_tokenizer), user("<|im_end|><image>"))
    assert [c.text for c in view.cells if c.special].count("<|im_end|>") == 1
    plain = "".join(c.text for c in view.cells if not c.special)
    assert "<|im_end|><image>" in plain
    assert view.counts["media"] == 0


def test_terminal(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    view = view_of(make_processor(byte_tokenizer), user(Image(image(20, 30)), "hi \x1b[2J"), assistant("yes"))
    plain = to_terminal(view, colour=False, clean=lambda text: text.replace("\x1b", "ESC"))
    assert "⟨image 1: 16 tokens⟩hi ESC[2J" in plain
    assert "⟦yes<|im_end|>⟧" in plain
    assert "\x1b" not in plain
    assert f"{view.counts['trained']} trained" in plain
    assert "\x1b[32m" in to_terminal(view, colour=True)


class Tags(HTMLParser):
    """Collects what a browser would make of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


ATTACK = "</span><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & \x00"


def test_html_runs_nothing_and_loads_nothing(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    processor = make_processor(byte_tokenizer, "slice")
    source = image(60, 90)
    messages = [user(Image(source), ATTACK), assistant(ATTACK)]
    view = view_sample(processor(messages, pixels=False), processor.tokenizer, draw_media(processor, messages))
    plan = view.plans[0]
    page = to_html(view)
    seen = Tags()
    seen.feed(page)
    assert "script" not in seen.tags
    assert seen.tags.count("img") == 1
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert all(
        (value or "").startswith("data:image/png;base64,") for name, value in seen.attributes if name in ("src", "href")
    )
    assert "<script>alert(1)</script>" in seen.text
    assert str(plan.num_tokens) in seen.text
    assert "\x00" not in page


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [(28, 28), (60, 90), (200, 31), (1, 300)])
def test_every_plan_can_be_drawn(rule: str, size: tuple[int, int], byte_tokenizer: PreTrainedTokenizerFast) -> None:
    processor = make_processor(byte_tokenizer, rule)
    source = image(*size)
    plan = processor.plan(source)
    assert processor.config.image is not None
    tiles = tile_images(source, plan, processor.config.image)
    drawing = draw_plan(source, plan, tiles)
    assert max(drawing.size) < 4000
    # The outlines of the grid and the labels of the tiles put strong colours on a grey image.
    colours = {colour for _, colour in drawing.getcolors(1 << 24) or []}
    assert any(max(c) - min(c) > 100 for c in colours if isinstance(c, tuple))
    assert stack([drawing, drawing]).height == 2 * drawing.height


def test_plan_facts_say_when_the_image_was_scaled(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    processor = make_processor(byte_tokenizer, "slice")
    facts = plan_facts(processor.plan(image(600, 900)))
    assert "scaled down" in facts["scaled to"]
    assert facts["image"].startswith("900 × 600")
    assert facts["tokens in all"] == str(processor.plan(image(600, 900)).num_tokens)


def test_images_from_files(byte_tokenizer: PreTrainedTokenizerFast, image_folder: Path) -> None:
    processor = make_processor(byte_tokenizer)
    view = view_of(processor, user(Image(image_folder / "cat.jpg"), Image(image_folder / "rocket.jpg"), "two"))
    assert [c.text for c in view.cells if c.kind == "media"] == ["image 1", "image 2"]
