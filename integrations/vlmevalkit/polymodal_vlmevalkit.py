"""Models that `polymodal.load` opens in VLMEvalKit, which has no plugins: this registers them and starts its run.py.

python polymodal_vlmevalkit.py NAME=MODEL [NAME=MODEL ...] VLMEvalKit/run.py --model NAME --data POPE --api-nproc 16
"""

from __future__ import annotations

import queue
import runpy
import sys
import threading
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import vlmeval.vlm
from vlmeval.config import supported_VLM
from vlmeval.vlm.base import BaseModel

import polymodal
from polymodal.backends.base import Answer
from polymodal.errors import PolymodalError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Image, Message, Text, Video

PARTS = {"text": Text, "image": Image, "video": Video}
FAILED = "Failed to obtain answer via API."  # by which VLMEvalKit knows what to ask again in the next run


class Polymodal(BaseModel):  # type: ignore[misc]
    """A model of polymodal. VLMEvalKit asks it from `--api-nproc` threads, whose questions become one batch."""

    INTERLEAVE = True
    is_api = True  # asked by several threads; the others are asked one question at a time

    def __init__(
        self,
        model: str = "default",
        batch_size: int = 16,
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        until: tuple[str, ...] = (),  # Texts that end an answer
        wait_s: float = 0.05,  # How long a batch waits for its next question
        **options: Any,  # Of `polymodal.load`
    ) -> None:
        super().__init__()
        self.backend = polymodal.load(model, **options)
        seed = 0 if temperature else None
        self.params = GenerationParams(max_new_tokens=max_new_tokens, temperature=temperature, stop=until, seed=seed)
        self.size, self.wait_s = batch_size, wait_s
        self.asked: queue.Queue[tuple[Message, Future[Answer]]] = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
        """Answer one question, in a batch with those that other threads ask meanwhile."""
        future: Future[Answer] = Future()
        self.asked.put((Message("user", tuple(PARTS[part["type"]](part["value"]) for part in message)), future))
        answer = future.result()
        return f"{FAILED} {answer}" if isinstance(answer, PolymodalError) else answer

    def _work(self) -> None:
        while True:
            batch = [self.asked.get()]
            try:
                while len(batch) < self.size:
                    batch.append(self.asked.get(timeout=self.wait_s))
            except queue.Empty:
                pass
            try:
                answers = self.backend.generate_batch([[message] for message, _ in batch], self.params)
            except Exception as error:  # it belongs to those who asked
                for _, future in batch:
                    future.set_exception(error)
                continue
            for (_, future), answer in zip(batch, answers, strict=True):
                future.set_result(answer)


def register(name: str, model: str, **options: Any) -> None:
    """Let `--model NAME` open a model: "default", a folder, a hub id, openai:MODEL."""
    vlmeval.vlm.Polymodal = Polymodal  # for the "class" of a --config file
    supported_VLM[name] = partial(Polymodal, model=model, **options)


if __name__ == "__main__":
    at = next((i for i, word in enumerate(sys.argv) if i and word.endswith(".py")), 0)
    if at < 2 or not all("=" in word for word in sys.argv[1:at]):
        sys.exit("usage: polymodal_vlmevalkit.py NAME=MODEL [NAME=MODEL ...] PATH/TO/run.py --model NAME ...")
    for word in sys.argv[1:at]:
        register(*word.split("=", 1))
    sys.argv = sys.argv[at:]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
