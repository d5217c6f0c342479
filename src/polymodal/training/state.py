"""Where a run is: what a checkpoint keeps of it, and what is only measured between two log lines."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class State:
    """Where a run is; plain numbers, stored in each checkpoint.

    Attributes:
        step: Optimizer steps done.
        samples: Samples seen.
        trained_tokens: Tokens with a label seen.
        real_tokens: Tokens seen, padding not counted.
        elapsed_s: Time in the loop, by the first process's clock.
        skipped: Steps left out because of a gradient that was not finite.
        skipped_in_row: The same, since the last good step.
        pending_loss: Sum of losses since the last log line.
        pending_tokens: Trained tokens since the last log line.
        finished: The run is over.
    """

    step: int = 0
    samples: int = 0
    trained_tokens: int = 0
    real_tokens: int = 0
    elapsed_s: float = 0.0
    skipped: int = 0
    skipped_in_row: int = 0
    pending_loss: float = 0.0
    pending_tokens: int = 0
    finished: bool = False


@dataclass
class Window:
    """Measurements since the last log line; not part of a checkpoint."""

    began: float = field(default_factory=time.monotonic)
    samples: int = 0
    real_tokens: int = 0
    padded_tokens: int = 0
    data_wait_s: float = 0.0
