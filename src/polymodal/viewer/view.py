"""What the model sees, for a person to look at: every token with its kind, and the integers of every image's plan.

This is a view of a `Sample`, so it shows what the model is really given; nothing is worked out a second time. It
needs the tokenizer and the plan, and no weights of the language model.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from polymodal.media_plan import AudioPlan, MediaPlan, Size, VideoPlan
from polymodal.processing.collate import Sample
from polymodal.utils.html import data_url, html_page

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase


Kind = Literal["text", "media", "trained"]
"""text: read by the model; media: filled with an image's features; trained: text that carries a loss."""

_LONGEST_CHARACTER = 8
"""Tokens that one character may be spread over; byte-level tokenizers need up to four, composed emoji more."""

_STYLE: dict[Kind, str] = {"text": "", "media": "\x1b[35m", "trained": "\x1b[32m"}
_RESET = "\x1b[0m"


@dataclass(frozen=True)
class Cell:
    """A piece of the sequence: usually one token; several where they spell one character, or are one image."""

    kind: Kind  # What the piece is
    text: str  # The text it stands for; "image 1" for the first image
    start: int  # Its first position
    ids: tuple[int, ...]  # Its ids
    special: bool = False  # It is a control token of the tokenizer, such as the end of a turn


@dataclass(frozen=True)
class View:
    """A sequence, cut into cells."""

    cells: tuple[Cell, ...]  # In order; together they are the whole sequence
    plans: tuple[MediaPlan, ...]  # One plan a medium, in order
    drawings: tuple[Image.Image | None, ...] = ()  # One a medium, as of `viewer.draw.draw_media`; or none at all

    @property
    def counts(self) -> dict[Kind, int]:
        """Tokens of each kind."""
        counts: dict[Kind, int] = {"text": 0, "media": 0, "trained": 0}
        for cell in self.cells:
            counts[cell.kind] += len(cell.ids)
        return counts

    def _repr_html_(self) -> str:
        """The page, as a notebook shows it: in a frame, so that its styles stay in there."""
        return f'<iframe srcdoc="{html.escape(to_html(self))}" style="width:100%;height:32rem;border:0"></iframe>'


def view_sample(
    sample: Sample, tokenizer: PreTrainedTokenizerBase, drawings: Sequence[Image.Image | None] = ()
) -> View:
    """Cut a sample into cells."""
    ids = [int(i) for i in sample.input_ids]
    trained = [bool(m) for m in sample.loss_mask]
    specials = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    starts = {slot.start: (number, slot) for number, slot in enumerate(sample.slots, start=1)}
    cells: list[Cell] = []
    position = 0
    while position < len(ids):
        if position in starts:
            number, slot = starts[position]
            end = position + slot.length
            cells.append(Cell("media", f"{slot.modality} {number}", position, tuple(ids[position:end])))
        else:
            kind: Kind = "trained" if trained[position] else "text"
            codes = 0
            while position + codes < len(ids) and ids[position + codes] >= len(tokenizer):
                codes += 1
            if codes:
                end = position + codes
                cells.append(Cell(kind, f"⟨{codes} codes⟩", position, tuple(ids[position:end]), special=True))
                position = end
                continue
            limit = min(len(ids), position + _LONGEST_CHARACTER)
            stops = [p for p in range(position + 1, limit) if p in starts or trained[p] != trained[position]]
            end, text = _piece(ids, position, stops[0] if stops else limit, tokenizer)
            cells.append(Cell(kind, text, position, tuple(ids[position:end]), ids[position] in specials))
        position = end
    return View(tuple(cells), sample.plans, tuple(drawings))


def _piece(ids: Sequence[int], start: int, limit: int, tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
    """The shortest run of ids from `start` that spells whole characters: its end and its text."""
    # Decoded behind the token before it, since some tokenizers drop the space in front of a first word.
    before = [ids[start - 1]] if start and ids[start - 1] < len(tokenizer) else []
    head = tokenizer.decode(before)
    first = ""
    for end in range(start + 1, limit + 1):
        text = str(tokenizer.decode([*before, *ids[start:end]]))
        text = text[len(head) :] if text.startswith(head) else str(tokenizer.decode(list(ids[start:end])))
        first = first or text
        if "\ufffd" not in text:
            return end, text
    return start + 1, first


def plan_facts(plan: MediaPlan) -> dict[str, str]:
    """The integers of one plan, as a person would write them."""
    if isinstance(plan, VideoPlan):
        return _video_facts(plan)
    if isinstance(plan, AudioPlan):
        seconds, windows = sum(plan.frames) / 100, ", ".join(map(str, plan.tokens))
        return {"sound": f"{seconds:.2f} seconds", "tokens of windows": windows, "tokens in all": str(plan.num_tokens)}
    box = plan.content_box
    facts = {
        "image": f"{_size(plan.source)} pixels"
        + (f", padded to {plan.frame.width} × {plan.frame.height}" if plan.frame else ""),
        "scaled to": f"{box.width} × {box.height}" + (" (scaled down to the tile limit)" if plan.scaled_to_fit else ""),
        "canvas": f"{_size(plan.canvas)}, filled from top {box.top}, left {box.left}",
        "tiles": f"{plan.num_tiles} of {_size(plan.tile)} pixels: grid {_size(plan.grid)}"
        + ("" if plan.overview == "none" else f" and the whole image, {plan.overview}"),
        "tokens of a tile": f"{plan.tokens.area} ({_size(plan.tokens)})",
    }
    if plan.unpadded is not None:
        facts["tokens of the canvas"] = f"{_size(plan.unpadded)} ({plan.merge})"
    facts["tokens in all"] = str(plan.num_tokens)
    return facts


def _video_facts(plan: VideoPlan) -> dict[str, str]:
    return {
        "video": f"{plan.num_tiles} frames of {_size(plan.frame.source)} pixels, tiles of {_size(plan.frame.tile)}",
        "at seconds": ", ".join(f"{time:.2f}" for time in plan.times),
        "tokens of its frames": f"{plan.frames} × {plan.tokens.area} tokens ({_size(plan.tokens)})",
        **({"old frames": f"the first {plan.old}, pooled by {plan.stride}"} if plan.old else {}),
        "tokens in all": str(plan.num_tokens),
    }


def to_terminal(view: View, *, colour: bool, clean: Callable[[str], str] = str) -> str:
    """Lay a view out as text."""
    pieces: list[str] = []
    before: Kind = "text"
    for cell in view.cells:
        if not colour and (cell.kind == "trained") != (before == "trained"):
            pieces.append("⟦" if cell.kind == "trained" else "⟧")
        before = cell.kind
        text = f"⟨{cell.text}: {len(cell.ids)} tokens⟩" if cell.kind == "media" else clean(cell.text)
        pieces.append(f"{_STYLE[cell.kind]}{text}{_RESET}" if colour and _STYLE[cell.kind] else text)
    if not colour and before == "trained":
        pieces.append("⟧")
    counts = view.counts
    legend = ", ".join(
        f"{_STYLE[kind]}{count} {kind}{_RESET}" if colour and _STYLE[kind] else f"{count} {kind}"
        for kind, count in counts.items()
    )
    lines = ["".join(pieces), "", f"{sum(counts.values())} tokens: {legend}"]
    for number, plan in enumerate(view.plans, start=1):
        lines += [
            "",
            f"{_kind(plan)} {number}",
            *(f"  {label:<21}{value}" for label, value in plan_facts(plan).items()),
        ]
    return "\n".join(lines)


def _size(size: Size) -> str:
    return f"{size.width} × {size.height}"


def to_html(view: View) -> str:
    """Write a view as a page."""
    drawn = ["" if image is None else data_url(image, "png") for image in view.drawings] or [""] * len(view.plans)
    media = [(_kind(plan), plan_facts(plan), url) for plan, url in zip(view.plans, drawn, strict=True)]
    return html_page("viewer/view.html.jinja", view=view, media=media, place=_place, text=_text)


def _kind(plan: MediaPlan) -> str:
    return type(plan).__name__.removesuffix("Plan").lower()


def _place(cell: Cell) -> str:
    last = cell.start + len(cell.ids) - 1
    where = f"position {cell.start}" if last == cell.start else f"positions {cell.start} to {last}"
    same = cell.ids[:1] if len(set(cell.ids)) == 1 else cell.ids
    return f"{where}, id {' '.join(str(i) for i in same)}"


def _text(cell: Cell) -> str:
    """What stands in a cell; a line break is shown and kept."""
    return f"{cell.text}: {len(cell.ids)} tokens" if cell.kind == "media" else cell.text.replace("\n", "⏎\n")
