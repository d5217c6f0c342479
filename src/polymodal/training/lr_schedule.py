"""Learning-rate factor by step: linear warm-up, then cosine, linear or constant.

Unlike `transformers.get_cosine_schedule_with_warmup`, the first step of the warm-up already has a rate above zero
(the field's version wastes it), and the position may be a fraction, for runs bounded by time.
"""

from __future__ import annotations

import math

from polymodal.training.recipes.sections import OptimConfig


def lr_factor(position: float, total: int, optim: OptimConfig) -> float:
    """Factor on the peak learning rate."""
    warm = math.ceil(optim.warmup * total)
    if position < warm:
        return min(1.0, (position + 1) / warm)
    if optim.schedule == "constant":
        return 1.0
    done = min(1.0, (position - warm) / max(1, total - warm))
    shape = 1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape
