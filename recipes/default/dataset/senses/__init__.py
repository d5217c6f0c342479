"""Clips, speech and sounds that the default model's ears and moving eyes are trained on."""

from __future__ import annotations

from recipes.default.dataset.senses.build import build_senses

__all__ = ["build_senses"]
