"""One drawing of what the encoder is given: the tiles' outlines on the source, and each tile as it is encoded.

Thin lines inside a tile part its tokens; a tile's number is its place in the batch that the encoder sees.
"""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from polymodal.media_plan import Box, ImagePlan

MARGIN = 16
SHOWN_SOURCE = 480  # the longer side of the drawn source, pixels
SHOWN_TILE = 224  # the longer side of a drawn tile, pixels
PALETTE = ((214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 127, 14), (148, 103, 189), (23, 190, 207))
PAPER, INK, EMPTY = (255, 255, 255), (40, 40, 40), (225, 225, 225)


def draw_plan(image: Image.Image, plan: ImagePlan, tiles: Sequence[Image.Image]) -> Image.Image:
    """Draw one image's way into the sequence."""
    source = _draw_source(image, plan)
    panel = _draw_tiles(plan, tiles)
    caption = (
        f"{plan.source.height} x {plan.source.width} pixels -> {plan.num_tiles} tile"
        f"{'s' if plan.num_tiles != 1 else ''} of {plan.tile.height} x {plan.tile.width} -> {plan.num_tokens} tokens"
    )
    font = _font(16)
    width = max(source.width + panel.width + 3 * MARGIN, int(font.getlength(caption)) + 2 * MARGIN)
    height = max(source.height, panel.height) + 3 * MARGIN + 18
    sheet = Image.new("RGB", (width, height), PAPER)
    sheet.paste(source, (MARGIN, MARGIN))
    sheet.paste(panel, (source.width + 2 * MARGIN, MARGIN))
    ImageDraw.Draw(sheet).text((MARGIN, height - MARGIN - 18), caption, fill=INK, font=font)
    return sheet


def stack(sheets: Sequence[Image.Image]) -> Image.Image:
    """Put the drawings of several images under one another."""
    whole = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), PAPER)
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole


def _draw_source(image: Image.Image, plan: ImagePlan) -> Image.Image:
    """The source with the tiles of the canvas outlined on it; tiles may reach past it into padding."""
    box = plan.content_box
    # What was resized to the content box: the frame that the image was laid on, or the image itself.
    frame = plan.frame or Box(0, 0, plan.source.height, plan.source.width)
    per_row, per_column = frame.height / box.height, frame.width / box.width  # source pixels per canvas pixel
    # A tile and the canvas, in source pixels.
    down, across = plan.tile.height * per_row, plan.tile.width * per_column
    canvas_top, canvas_left = -box.top * per_row - frame.top, -box.left * per_column - frame.left
    top, left = min(0.0, canvas_top), min(0.0, canvas_left)
    bottom = max(float(plan.source.height), canvas_top + plan.grid.height * down)
    right = max(float(plan.source.width), canvas_left + plan.grid.width * across)
    scale = SHOWN_SOURCE / max(right - left, bottom - top)

    def at(row: float, column: float) -> tuple[int, int]:
        return round((column - left) * scale), round((row - top) * scale)

    width, height = at(bottom, right)
    drawing = Image.new("RGB", (width + 3, height + 3), EMPTY)
    shown = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    drawing.paste(shown, at(0, 0))
    pen = ImageDraw.Draw(drawing)
    first = 1 if plan.overview == "first" else 0
    for row in range(plan.grid.height):
        for column in range(plan.grid.width):
            number = first + row * plan.grid.width + column
            x, y = at(canvas_top + row * down, canvas_left + column * across)
            far = at(canvas_top + (row + 1) * down, canvas_left + (column + 1) * across)
            colour = PALETTE[number % len(PALETTE)]
            pen.rectangle((x, y, *far), outline=colour, width=3)
            _label(pen, (x + 6, y + 6), str(number + 1), colour, 18)
    return drawing


def _draw_tiles(plan: ImagePlan, tiles: Sequence[Image.Image]) -> Image.Image:
    """The tiles as the encoder gets them, in its order, each with the grid of its tokens."""
    columns = max(1, min(3, plan.grid.width if plan.grid.area > 1 else len(tiles)))
    rows = -(-len(tiles) // columns)
    scale = SHOWN_TILE / max(plan.tile.height, plan.tile.width)
    width, height = round(plan.tile.width * scale), round(plan.tile.height * scale)
    gap = 8
    panel = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), PAPER)
    whole = {"none": -1, "first": 0, "last": len(tiles) - 1}[plan.overview]
    for number, tile in enumerate(tiles):
        shown = tile.resize((width, height))
        pen = ImageDraw.Draw(shown, "RGBA")
        for row in range(1, plan.tokens.height):
            y = row * height // plan.tokens.height
            pen.line((0, y, width, y), fill=(255, 255, 255, 110))
        for column in range(1, plan.tokens.width if plan.tokens.height > 1 else 1):
            x = column * width // plan.tokens.width
            pen.line((x, 0, x, height), fill=(255, 255, 255, 110))
        colour = INK if number == whole else PALETTE[number % len(PALETTE)]
        pen.rectangle((0, 0, width - 1, height - 1), outline=colour, width=3)
        _label(pen, (6, 6), f"{number + 1}{' (whole)' if number == whole else ''}", colour, 16)
        panel.paste(shown, ((number % columns) * (width + gap), (number // columns) * (height + gap)))
    return panel


def _label(pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: tuple[int, int, int], size: int) -> None:
    font = _font(size)
    left, top, right, bottom = pen.textbbox(at, text, font=font)
    pen.rectangle((left - 3, top - 2, right + 3, bottom + 2), fill=colour)
    pen.text(at, text, fill=PAPER, font=font)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
