"""What is measured: the shape of the model, and one job (a system, a mode, a stage) as a worker process gets it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

SYSTEMS = ("hf", "trl", "polymodal")
MODES = ("matched", "default", "best", "cached")
"""Matched: float32 and the same padded micro-batches everywhere. Default: what each system does when only told what
must be equal (rows and their order, samples of a step and at once, learning rate, clipping). Best: each system's
fastest documented flags that compute every image in every step. Cached: polymodal with the frozen tower's features
kept, which the others cannot do."""


@dataclass(frozen=True)
class Shape:
    """A LLaVA model: CLIP tower, two-layer MLP, Llama.

    Attributes:
        layers: Of the language model.
        width: Of the language model.
        inner: Width inside its MLPs.
        heads: Query heads.
        kv_heads: Key and value heads.
        vocab: Rows of the vocabulary; input and output share them.
        tower_layers: Of the tower; the last one is not used, as in LLaVA.
        tower_width: Of the tower; its MLPs are four times as wide.
        tower_heads: Of the tower.
        image: Side of the tower's input in pixels.
        patch: Side of a patch in pixels.
        lora_r: Rank of the adapter in stage 2.
    """

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    tower_layers: int
    tower_width: int
    tower_heads: int
    image: int
    patch: int
    lora_r: int

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        return (self.image // self.patch) ** 2


SHAPES = {
    # The language model is SmolLM2-135M's shape: a small body under a large vocabulary.
    "smollm2-135m": Shape(30, 576, 1536, 9, 3, 49152, 6, 512, 8, 224, 16, 64),
    "tiny": Shape(2, 32, 64, 4, 2, 512, 3, 24, 4, 28, 7, 4),
}


@dataclass(frozen=True)
class Job:
    """One system under one set of flags.

    Attributes:
        system: One of `SYSTEMS`.
        mode: One of `MODES`.
        stage: 1 trains the projector on captions; 2 the projector and LoRA on conversations.
        shape: A name of `SHAPES`.
        rows: Samples of an optimizer step.
        micro: Samples that go through the model at once.
        micro_tokens: The same in tokens, where samples are packed.
        steps: Optimizer steps of a turn.
        runs: Turns that are measured; one more warms up.
        threads: Of torch.
        device: "cpu" or "cuda".
        precision: "fp32" or "bf16".
        seed: Of weights, rows and order.
        data: Folder of the rows.
        folder: The worker's own folder.
    """

    system: str
    mode: str
    stage: int
    shape: str
    rows: int
    micro: int
    micro_tokens: int
    steps: int
    runs: int
    threads: int
    device: str
    precision: str
    seed: int
    data: str
    folder: str

    @property
    def total_steps(self) -> int:
        """Steps that training is asked for; the clock ends it long before.

        Far more than are measured: who reads ahead must have as much left to read in the last turn as in the first.
        """
        return (self.runs + 1) * self.steps + 100

    @property
    def events(self) -> Path:
        """Where the worker writes what it measured."""
        return Path(self.folder) / "events.jsonl"

    def dump(self) -> str:
        """As text, for a command line."""
        return json.dumps(asdict(self))

    @staticmethod
    def parse(text: str) -> Job:
        """The reverse of `dump`."""
        return Job(**json.loads(text))
