"""What a notebook shows: images, tiles and coloured tokens, with every text escaped."""

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image as PILImage

import polymodal
from polymodal import Image, assistant, user
from polymodal.backends import load_processor
from polymodal.backends.base import Reply, Timing, Usage
from polymodal.messages import Audio
from polymodal.planning.plan import Question, plan_model


def reply(*parts: object) -> Reply:
    return Reply(assistant(*parts), Usage(9, 4, 3), Timing(0, 0, 0, 1.5, 2), "stop", "<b>m</b>")  # type: ignore[arg-type]


def test_a_reply_is_its_text_escaped_with_its_images_and_sounds() -> None:
    html = reply("<script>1</script>\n&", Image(PILImage.new("RGB", (4, 3), "red")), Audio(b"RIFF"))._repr_html_()
    assert "<script>" not in html and "&lt;script&gt;1&lt;/script&gt;\n&amp;" in html
    assert "&lt;b&gt;m&lt;/b&gt;: 9 in, 4 of media, 3 out; 1.50 s" in html
    image = re.search(r"data:image/png;base64,([^\"]+)", html)
    assert image is not None and PILImage.open(io.BytesIO(base64.b64decode(image[1]))).size == (4, 3)
    assert 'src="data:audio/wav;base64,UklGRg=="' in html


def test_a_sample_is_its_tokens_in_colour_and_its_tiles(tiny_model_folder: Path) -> None:
    processor = load_processor(tiny_model_folder)
    messages = [user(Image(PILImage.new("RGB", (60, 40), "blue")), "<i>What?</i>"), assistant("It is blue.")]
    html = processor(messages)._repr_html_()
    assert html.startswith("<iframe srcdoc=") and "<i>" not in html
    assert "class=&quot;trained&quot;" in html and "class=&quot;media&quot;" in html
    assert "data:image/png" in html and "60 × 40 pixels" in html
    without = processor(messages, pixels=False)
    assert "data:image/png" not in without._repr_html_() and "60 × 40 pixels" in without._repr_html_()
    assert without == without  # the tokenizer has no say in it


def test_plans(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (plan,) = load_processor(tiny_model_folder)([user(Image(PILImage.new("RGB", (60, 40))), "a")]).plans
    html = plan._repr_html_()
    assert "data:image/png" in html and "<td>tokens in all</td><td>16</td>" in html
    table = plan_model(str(tiny_model_folder), Question())._repr_html_()
    assert "<td>weight_bytes</td>" in table


def test_polymodal_itself_draws_nothing(tiny_model_folder: Path) -> None:
    model = polymodal.load(tiny_model_folder, "cpu", quantize=None)
    answer = model.generate([user("x")], polymodal.GenerationParams(max_new_tokens=1))
    assert answer._repr_html_().startswith("<div>")
