"""What a notebook shows of a reply, a sample, a plan: every text escaped, images as they are."""

import html
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from polymodal.media.video import MOST_SHOWN
from polymodal.media_plan import ImagePlan, VideoPlan
from polymodal.messages import Audio
from polymodal.utils.html import data_url
from polymodal.viewer.draw import draw_plan, draw_video
from polymodal.viewer.view import plan_facts, view_sample

MOST_PIXELS = 40_000_000
"""Of a plan that is drawn, on paper as large as its image."""
GREY = (150, 155, 160)


def shown(value: Any) -> str:
    """The view of a value, by what it is."""
    return VIEWS[next(kind.__name__ for kind in type(value).__mro__ if kind.__name__ in VIEWS)](value)


def _sample(sample: Any) -> str:
    """Its tokens, each in the colour of its kind, under what an encoder is given."""
    if sample.tokenizer is None:
        return "".join(map(_media_plan, sample.plans)) + f"<p>{len(sample.input_ids)} tokens</p>"
    pixels = iter(sample.pixels or ())
    drawings = [
        None if heard or (tiles := next(pixels, None)) is None else _drawn(plan, _images(tiles))
        for plan, heard in zip(sample.plans, sample.heard, strict=True)
    ]
    return view_sample(sample, sample.tokenizer, drawings)._repr_html_()


def _images(tiles: Tensor) -> list[Image.Image]:  # tiles [n, 3, H, W]
    """Tiles for the eye: normalised ones between their least and largest values."""
    array = tiles.float().numpy().transpose(0, 2, 3, 1)
    if tiles.is_floating_point():
        low, high = float(array.min(initial=0)), float(array.max(initial=0))
        array = (array - low) * (255 / max(high - low, 1e-6))
    return [Image.fromarray(tile) for tile in array.round().astype(np.uint8)]


def _drawn(plan: Any, tiles: list[Image.Image]) -> Image.Image | None:
    if isinstance(plan, VideoPlan):
        places = np.linspace(0, len(tiles) - 1, min(len(tiles), MOST_SHOWN), dtype=int).tolist()
        return draw_video(plan, {place: tiles[place] for place in places})
    if not isinstance(plan, ImagePlan) or plan.source.area > MOST_PIXELS:
        return None
    paper = Image.new("RGB", (plan.source.width, plan.source.height), GREY)
    if plan.num_tiles == 1 and plan.frame is None:  # the tile is the whole image
        paper = tiles[0].resize(paper.size)
    return draw_plan(paper, plan, tiles)


def _media_plan(plan: Any) -> str:
    """A drawing of its tiles on paper, and its integers."""
    tile = getattr(plan, "tile", None) or getattr(getattr(plan, "frame", None), "tile", None)
    drawing = None
    if tile is not None:
        drawing = _drawn(plan, [Image.new("RGB", (tile.width, tile.height), GREY)] * plan.num_tiles)
    image = f'<img style="max-width:100%" src="{data_url(drawing, "png")}">' if drawing is not None else ""
    return f"<div>{image}{_table(plan_facts(plan))}</div>"


def _paper_plan(plan: Any) -> str:
    return f"<div>{_table({key: value for key, value in plan.plain().items() if value not in ((), {}, None)})}</div>"


def _reply(reply: Any) -> str:
    """The answer with its images and sounds, and what it cost."""
    parts = []
    for part in reply.message.parts:
        if isinstance(part, Audio) and isinstance(part.source, bytes):
            url = data_url(part.source, "wav").replace("image", "audio", 1)
            parts.append(f'<audio controls src="{url}"></audio>')
        elif (text := getattr(part, "text", None)) is not None:
            parts.append(f'<div style="white-space:pre-wrap">{html.escape(text)}</div>')
        elif isinstance(part.source, Image.Image):
            parts.append(f'<img style="max-width:100%" src="{data_url(part.source, "png")}">')
    usage, seconds = reply.usage, reply.timing.total_s
    counts = {"in": usage.prompt_tokens, "of media": usage.image_tokens, "out": usage.completion_tokens}
    told = ", ".join(f"{count} {name}" for name, count in counts.items() if count is not None)
    line = f"{reply.model}: {told or 'tokens not told'}; {seconds:.2f} s, ended by {reply.finish_reason}"
    return f'<div>{"".join(parts)}<small style="opacity:.6">{html.escape(line)}</small></div>'


def _table(facts: dict[str, Any]) -> str:
    rows = "".join(f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<table>{rows}</table>"


VIEWS = {
    "Reply": _reply,
    "Sample": _sample,
    "Plan": _paper_plan,
    **dict.fromkeys(("ImagePlan", "VideoPlan", "AudioPlan"), _media_plan),
}
"""Each class that is shown, and how."""
