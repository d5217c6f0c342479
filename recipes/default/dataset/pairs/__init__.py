"""The generated pairs of picture and text, for contrastive training, and the held-out ones that judge it."""

from __future__ import annotations

from recipes.default.dataset.pairs.build import PairsReport, build_pairs

__all__ = ["PairsReport", "build_pairs"]
