"""Our model beside an exported one: what both are asked, how their answers are compared, and `parity.json`.

The prompts and images are the same on every machine. A comparison (`verify.compare`, `verify.llamacpp`) is a
`SideBySide` with the other side in it, and a table of checks.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

from PIL import Image as PILImage

from polymodal.backends.local import LocalBackend
from polymodal.checkpoints.model_folder import Loaded
from polymodal.errors import PolymodalError
from polymodal.generation.generate import generate_ids
from polymodal.generation.params import GenerationParams
from polymodal.interop.huggingface.export_chat_template import LATER_NOTE
from polymodal.media.image import open_image
from polymodal.messages import Image, Message, Text, assistant, system, user
from polymodal.processing.collate import Sample, collate
from polymodal.utils.files import write_text

REPORT_NAME = "parity.json"
TOKENS = 16
"""Greedy tokens that are compared of each answer."""
IN_ANOTHER_ENGINE = 0.95
"""Smallest share of greedy tokens before two answers part, in an engine that computes in another order: two tokens that
are nearly as likely may change places."""
SHAPES = ((480, 640), (90, 600), (700, 230), (64, 64))
"""Height and width of the images that are made here: usual, very wide, tall, and smaller than a tile."""
_MIX = ((7, 13, 3), (11, 5, 1), (3, 17, 5))


@dataclass(frozen=True)
class Probe:
    """One conversation."""

    name: str  # What reports call it
    messages: tuple[Message, ...]  # The conversation; its images are open

    @property
    def images(self) -> list[PILImage.Image]:
        """The images, in order."""
        return [open_image(part.source) for m in self.messages for part in m.media if isinstance(part, Image)]


def make_image(number: int) -> PILImage.Image:
    """Make an image of soft coloured blots; the same number gives the same pixels."""
    import numpy as np
    from PIL import Image as PILImage

    height, width = SHAPES[number]
    # Integers alone, so that no random generator of some version decides.
    rows, columns = np.indices((height // 16 + 2, width // 16 + 2))
    colours = [(rows * a + columns * b + rows * columns * c + number * 37) * 2654435761 for a, b, c in _MIX]
    blots = (np.stack(colours, axis=-1) >> 13) & 0xFF
    image = PILImage.fromarray(blots.astype(np.uint8))
    return image.resize((width, height), PILImage.Resampling.BICUBIC)


def chat_probes() -> list[Probe]:
    """Conversations for a model with a chat template; a model may refuse some, such as a system message."""
    usual, wide, tall, small = (Image(make_image(number)) for number in range(len(SHAPES)))
    asked = {
        "one image": [user(usual, "What is shown here?")],
        "a very wide image": [user(wide, "Describe it in one sentence.")],
        "a tall image": [user(tall, "How many colours are there? 1, 2, or more than 3?")],
        "a small image after the text": [user("It's small; what might this be?\n", small)],
        "two images": [user(usual, tall, "What do they have in common?")],
        "images between texts": [user("First:", small, "second:", wide, "Which?")],
        "text alone": [user("Write a word that begins with é, or 你好.")],
        "a system message": [system("Answer briefly."), user(usual, "What is it?")],
        "a second question": [user(usual, "What is it?"), assistant("Blots of colour."), user("Which colours?")],
    }
    return [Probe(name, tuple(messages)) for name, messages in asked.items()]


def image_probes(images: Sequence[Path]) -> list[Probe]:
    """Ask about images of one's own."""
    return [Probe(path.name, (user(Image(path), "What is in this picture?"),)) for path in images]


def hash_probes(probes: Sequence[Probe]) -> str:
    """Hash texts and pixels."""
    digest = hashlib.sha256()
    for probe in probes:
        for message in probe.messages:
            digest.update(f"\x00{message.role}".encode())
            for part in message.parts:
                digest.update(b"\x01" + part.text.encode() if isinstance(part, Text) else b"\x02")
        for image in probe.images:
            digest.update(f"{image.size}".encode() + image.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Check:
    """One comparison."""

    name: str  # What was compared
    passed: bool  # Whether it is within bounds
    numbers: dict[str, Any] = field(default_factory=dict)  # What was measured, and the bounds
    reason: str = ""  # What is wrong, in one line; empty where nothing is

    @classmethod
    def unless(cls, wrong: Sequence[str], name: str, numbers: dict[str, Any], what: str) -> Check:
        """A check that passes where nothing is wrong."""
        return cls(name, not wrong, numbers, f"{what} {', '.join(wrong)}" if wrong else "")


@dataclass(frozen=True)
class Parity:
    """What was found; `parity.json` holds it."""

    passed: bool  # Every check that could be run passed, and there was one
    checks: tuple[Check, ...]  # The comparisons
    not_run: tuple[str, ...]  # Names of those whose program is not installed

    @property
    def line(self) -> str:
        """The outcome in one line."""
        if self.passed:
            return "parity: " + ", ".join(f"{check.name} ok" for check in self.checks)
        wrong = [f"{check.name}: {check.reason}" for check in self.checks if not check.passed]
        return "parity FAILED: " + ("; ".join(wrong) or "nothing could be compared")


class SideBySide:
    """Our model and an exported folder; a subclass adds the other side, which answers each probe once."""

    def __init__(self, source: Loaded, folder: Path, tokens: int) -> None:
        self.ours = LocalBackend(source.model, source.tokenizer, source.config)
        self.folder, self.tokens = folder, tokens
        self.probes: list[Probe] = []
        self.samples: list[Sample] = []
        self.left_out: dict[str, str] = {}  # probes that the model refuses, and why

    def ask(self, probes: Iterable[Probe], *, later_turns_differ: bool) -> None:
        """Make our prompts of all probes that can be compared."""
        for probe in probes:
            if later_turns_differ and any(message.role == "assistant" for message in probe.messages):
                self.left_out[probe.name] = LATER_NOTE
                continue
            try:
                self.samples.append(self.ours.processor(probe.messages, add_generation_prompt=True))
                self.probes.append(probe)
            except PolymodalError as error:
                self.left_out[probe.name] = str(error)

    def greedy(self, sample: Sample) -> list[int]:
        """Our model's answer to a prompt."""
        batch = collate([sample], self.ours.processor.pad_id, side="left")
        params, stops = GenerationParams(max_new_tokens=self.tokens), self.ours.processor.template.stop_ids
        return generate_ids(self.ours.model, batch, params, stops, len(self.ours.tokenizer))[0]

    def compare_ids(self, found: Iterable[Sequence[int | None]], image_id: int | None, who: str) -> Check:
        """Compare token ids with ours, the placeholder's given."""
        old, wrong, total = self.ours.model.image_token_id, [], 0
        for probe, sample, ids in zip(self.probes, self.samples, found, strict=True):
            wanted = [image_id if token == old else token for token in sample.input_ids.tolist()]
            total += len(wanted)
            if ids != wanted:
                wrong.append(probe.name)
        numbers = {"probes": len(self.probes), "tokens": total, "differ": wrong}
        return Check.unless(wrong, "token_ids", numbers, f"{who} gives other ids for")

    def compare_answers(
        self, name: str, pairs: Iterable[tuple[list[int], list[int]]], least: float, package: str = "", **numbers: Any
    ) -> Check:
        """Compare greedy answers, ours and theirs, each side stopping where it stops."""
        wrong, equal, total = [], 0, 0
        for probe, (ours, theirs) in zip(self.probes, pairs, strict=True):
            most = max(len(ours), len(theirs))
            same = next((i for i in range(most) if ours[i : i + 1] != theirs[i : i + 1]), most)
            equal, total = equal + same, total + most
            if same < most:
                wrong.append(f"{probe.name} ({same} of {most} tokens)")
        share = equal / total if total else 1.0
        numbers = {"agreement": share, "tokens": total, "least": least, "part": wrong, **numbers}
        if package:
            numbers["version"] = _version(package)
        return Check.unless(wrong if share < least else [], name, numbers, "answers part for")

    def run(self, checks: Mapping[str, Callable[[Self], Check | None]]) -> Parity:
        """Make all checks and write `parity.json`; one whose program is not installed gives None."""
        done: list[Check] = []
        not_run: list[str] = []
        for name, check in checks.items():
            try:
                found = check(self)
            except PolymodalError as error:
                found = Check(name, False, reason=str(error))
            except (ValueError, RuntimeError, IndexError, KeyError, TypeError) as error:  # of theirs, on a probe
                found = Check(name, False, reason=f"the exported model fails: {' '.join(str(error).split())[:300]}")
            if found is None:
                not_run.append(name)
            else:
                done.append(found)
        parity = Parity(bool(done) and all(check.passed for check in done), tuple(done), tuple(not_run))
        packages = ("polymodal", "torch", "transformers", "tokenizers", "pillow")
        document = {
            "passed": parity.passed,
            "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
            "probes": {
                "names": [probe.name for probe in self.probes],
                "sha256": hash_probes(self.probes),
                "left_out": self.left_out,
                "greedy_tokens": self.tokens,
            },
            "checks": [asdict(check) for check in done],
            "not_run": not_run,
        }
        write_text(self.folder / REPORT_NAME, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        return parity


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
