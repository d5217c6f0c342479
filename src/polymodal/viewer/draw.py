"""One drawing of what the encoder is given: an image's tiles, a video's frames with their times, a sound's spectrogram.

Of an image the outlines of its tiles, and each tile as it is encoded. Thin lines inside a tile or frame part its
tokens; a number is the place in the batch that the encoder sees.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from polymodal.config import ModelConfig
from polymodal.media.audio import Sound
from polymodal.media.video import MOST_SHOWN, Frames
from polymodal.media_plan import AudioPlan, Box, ImagePlan, Size, VideoPlan
from polymodal.messages import Message
from polymodal.processing.image_transform import tile_images
from polymodal.processing.media_parts import Opened, frame_rules
from polymodal.processing.processor import Processor

MARGIN = 16
SHOWN_SOURCE = 480  # the longer side of the drawn source, pixels
SHOWN_TILE = 224  # the longer side of a drawn tile, pixels
SHOWN_FRAME = 144  # the longer side of a drawn frame, pixels
SHOWN_WINDOW = 1120  # a window's width, of a sound that has one or more, pixels
MOST_WINDOWS = 20  # that are drawn
PALETTE = ((214, 39, 40), (31, 119, 180), (44, 160, 44), (255, 127, 14), (148, 103, 189), (23, 190, 207))
PAPER, INK, EMPTY = (255, 255, 255), (40, 40, 40), (225, 225, 225)


def draw_media(processor: Processor, messages: Sequence[Message]) -> list[Image.Image]:
    """Open what a conversation shows and plays again, for the eye this time, and draw each medium's plan."""
    return [draw_medium(medium, processor.config) for medium in processor.media(messages)]


def draw_medium(medium: Opened, config: ModelConfig) -> Image.Image:
    """Draw one medium's way into the sequence."""
    plan, decoded = medium.plan, medium.decoded
    if isinstance(plan, AudioPlan):
        assert isinstance(decoded, Sound) and medium.windows is not None
        return draw_sound(decoded, plan, medium.windows)
    assert config.image is not None
    if isinstance(plan, VideoPlan):
        assert isinstance(decoded, Frames) and config.video is not None
        rules, shown = frame_rules(config.image, config.video), _evenly(len(decoded), MOST_SHOWN)
        return draw_video(plan, {place: tile_images(decoded[place], plan.frame, rules)[0] for place in shown})
    assert isinstance(decoded, Image.Image)
    return draw_plan(decoded, plan, tile_images(decoded, plan, config.image))


def draw_plan(image: Image.Image, plan: ImagePlan, tiles: Sequence[Image.Image]) -> Image.Image:
    """Draw one image's way into the sequence."""
    source = _draw_source(image, plan)
    panel = _draw_tiles(plan, tiles)
    caption = (
        f"{plan.source.width} x {plan.source.height} pixels -> {plan.num_tiles} tile"
        f"{'s' if plan.num_tiles != 1 else ''} of {plan.tile.width} x {plan.tile.height} -> {plan.num_tokens} tokens"
    )
    both = Image.new("RGB", (source.width + MARGIN + panel.width, max(source.height, panel.height)), PAPER)
    both.paste(source, (0, 0))
    both.paste(panel, (source.width + MARGIN, 0))
    return _captioned(both, caption)


def draw_video(plan: VideoPlan, tiles: dict[int, Image.Image]) -> Image.Image:
    """Draw a contact sheet of a video's frames, as the encoder gets them, each with its second."""
    scale = SHOWN_FRAME / max(plan.frame.tile.height, plan.frame.tile.width)
    width, height = round(plan.frame.tile.width * scale), round(plan.frame.tile.height * scale)
    columns, gap, line = min(8, len(tiles)), 8, 20
    panel = Image.new("RGB", (columns * (width + gap) - gap, -(-len(tiles) // columns) * (height + line)), PAPER)
    pen = ImageDraw.Draw(panel)
    for number, (place, tile) in enumerate(tiles.items()):
        x, y = (number % columns) * (width + gap), (number // columns) * (height + line)
        panel.paste(_tokens_on(tile.resize((width, height)), plan.frame.tokens), (x, y))
        _label(pen, (x + 5, y + 4), str(place + 1), PALETTE[place % len(PALETTE)], 13)
        pen.text((x, y + height), f"{plan.times[place]:.2f} s", fill=INK, font=_font(14))
    some = "" if len(tiles) == plan.num_tiles else f"{len(tiles)} of "
    size = f"{plan.frame.source.width} x {plan.frame.source.height}"
    return _captioned(panel, f"{some}{plan.num_tiles} frames of {size} pixels -> {plan.num_tokens} tokens")


def draw_sound(sound: Sound, plan: AudioPlan, windows: Tensor) -> Image.Image:
    """Draw the waveform and the log-mel features of each of a sound's windows, with its seconds and tokens."""
    # windows [W, F, L]
    line, wave_height, mel_height = 22, 56, 96
    row = line + wave_height + mel_height + 10
    shown, longest = min(len(plan.frames), MOST_WINDOWS), max(plan.frames)
    panel = Image.new("RGB", (SHOWN_WINDOW, shown * row), PAPER)
    pen = ImageDraw.Draw(panel)
    loudest = max(float(np.abs(sound.samples).max(initial=0)), 1e-6)
    per_frame = sound.sample_rate // 100
    for number in range(shown):
        frames, tokens, begin, top = plan.frames[number], plan.tokens[number], sum(plan.frames[:number]), number * row
        said = f"window {number + 1}: {begin / 100:.2f} to {(begin + frames) / 100:.2f} s, {tokens} tokens"
        pen.text((0, top), said, fill=INK, font=_font(14))
        width = max(1, SHOWN_WINDOW * frames // longest)
        pieces = np.array_split(sound.samples[begin * per_frame : (begin + frames) * per_frame], width)
        middle = top + line + wave_height // 2
        pen.rectangle((0, top + line, width - 1, top + line + wave_height - 1), fill=EMPTY)
        for x, piece in enumerate(pieces):
            low, high = piece.min(initial=0) / loudest, piece.max(initial=0) / loudest
            half = wave_height // 2 - 2
            pen.line((x, middle - round(high * half), x, middle - round(low * half)), fill=PALETTE[1])
        mel = windows[number, :, :frames].float().numpy()
        grey = np.clip(255 * (1 - (mel.max() - mel) / 2), 0, 255).astype(np.uint8)[::-1]  # features span 2 at most
        strip = Image.fromarray(np.ascontiguousarray(grey)).resize((width, mel_height))
        y = top + line + wave_height
        panel.paste(ImageOps.colorize(strip, "#0b0b2b", "#fff3b0", mid="#c2356b"), (0, y))
        for token in range(1, tokens if width >= 4 * tokens else 0):
            x = token * width // tokens
            pen.line((x, y + mel_height - 6, x, y + mel_height), fill=PAPER)
    some = "" if shown == len(plan.frames) else f", the first {shown} drawn"
    count = f"{len(plan.frames)} window{'s' if len(plan.frames) != 1 else ''}{some}"
    return _captioned(panel, f"{sound.seconds:.2f} seconds of sound -> {count} -> {plan.num_tokens} tokens")


def _evenly(count: int, most: int) -> list[int]:
    return np.linspace(0, count - 1, min(count, most), dtype=int).tolist()


def _captioned(panel: Image.Image, caption: str) -> Image.Image:
    font = _font(16)
    width = max(panel.width, int(font.getlength(caption))) + 2 * MARGIN
    sheet = Image.new("RGB", (width, panel.height + 3 * MARGIN + 18), PAPER)
    sheet.paste(panel, (MARGIN, MARGIN))
    ImageDraw.Draw(sheet).text((MARGIN, sheet.height - MARGIN - 18), caption, fill=INK, font=font)
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
        shown = _tokens_on(tile.resize((width, height)), plan.tokens)
        pen = ImageDraw.Draw(shown)
        colour = INK if number == whole else PALETTE[number % len(PALETTE)]
        pen.rectangle((0, 0, width - 1, height - 1), outline=colour, width=3)
        _label(pen, (6, 6), f"{number + 1}{' (whole)' if number == whole else ''}", colour, 16)
        panel.paste(shown, ((number % columns) * (width + gap), (number // columns) * (height + gap)))
    return panel


def _tokens_on(tile: Image.Image, tokens: Size) -> Image.Image:
    """A tile with thin lines between its tokens."""
    pen = ImageDraw.Draw(tile, "RGBA")
    for row in range(1, tokens.height):
        y = row * tile.height // tokens.height
        pen.line((0, y, tile.width, y), fill=(255, 255, 255, 110))
    for column in range(1, tokens.width if tokens.height > 1 else 1):
        x = column * tile.width // tokens.width
        pen.line((x, 0, x, tile.height), fill=(255, 255, 255, 110))
    return tile


def _label(pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: tuple[int, int, int], size: int) -> None:
    font = _font(size)
    left, top, right, bottom = pen.textbbox(at, text, font=font)
    pen.rectangle((left - 3, top - 2, right + 3, bottom + 2), fill=colour)
    pen.text(at, text, fill=PAPER, font=font)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
