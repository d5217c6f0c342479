"""More sources for training: icons, flags, photographs, cards and the drawings whose names the first table lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recipes.default.dataset import icons
from recipes.default.dataset.sources import Source

if TYPE_CHECKING:
    from PIL import Image as Pictures


def load(source: Source) -> Pictures.Image:
    """The image of an entry inside a package's file, RGBA."""
    return icons.render(source.path)
