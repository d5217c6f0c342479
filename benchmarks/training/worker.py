"""One system in a process of its own: `python -m benchmarks.training.worker JOB`, started by `turns.Worker`."""

from __future__ import annotations

import ctypes
import signal
import sys
import warnings


def main(text: str) -> None:
    if sys.platform == "linux":
        # A stopped process would outlive a parent that is killed; PR_SET_PDEATHSIG is 1.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    warnings.filterwarnings("ignore")
    import torch

    from benchmarks.training.setting import Job
    from benchmarks.training.systems import RUN
    from benchmarks.training.turns import Clock, Done
    from polymodal.modeling.language_model import quieten_transformers

    job = Job.parse(text)
    torch.set_num_threads(job.threads)
    quieten_transformers()
    try:
        RUN[job.system](job, Clock(job))
    except Done:
        return
    raise SystemExit("training ended before the last turn")


if __name__ == "__main__":
    main(sys.argv[1])
