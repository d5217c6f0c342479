"""Our model and an exported folder, side by side; what each makes of the same prompts is computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.backends.local import LocalBackend
from polymodal.backends.transformers.folder import open_model, open_processor
from polymodal.checkpoints.model_folder import ADAPTER_NAME
from polymodal.errors import CheckpointError, PolymodalError, first_line
from polymodal.generation.generate import generate_ids
from polymodal.generation.params import GenerationParams
from polymodal.interop.huggingface.export_chat_template import LATER, LATER_NOTE, differences
from polymodal.interop.huggingface.export_class import BLIP
from polymodal.media.image import open_image
from polymodal.messages import Image, Message, Text, assistant, system, user
from polymodal.processing.chat_template.presets import PRESETS
from polymodal.processing.collate import collate
from polymodal.safety.config_json import read_json

if TYPE_CHECKING:
    from PIL import Image as PILImage

    from polymodal.processing.collate import Sample


# ---- The prompts and images on which an exported model is compared with ours; the same on every machine ----


SHAPES = ((480, 640), (90, 600), (700, 230), (64, 64))
"""Height and width of the images that are made here: usual, very wide, tall, and smaller than a tile."""


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


_MIX = ((7, 13, 3), (11, 5, 1), (3, 17, 5))


def chat_probes() -> list[Probe]:
    """Conversations for a model with a chat template; a model may refuse some, such as a system message."""
    made = [make_image(number) for number in range(len(SHAPES))]
    return [
        Probe("one image", (user(Image(made[0]), "What is shown here?"),)),
        Probe("a very wide image", (user(Image(made[1]), "Describe it in one sentence."),)),
        Probe("a tall image", (user(Image(made[2]), "How many colours are there? 1, 2, or more than 3?"),)),
        Probe("a small image after the text", (user("It's small; what might this be?\n", Image(made[3])),)),
        Probe("two images", (user(Image(made[0]), Image(made[2]), "What do they have in common?"),)),
        Probe("images between texts", (user("First:", Image(made[3]), "second:", Image(made[1]), "Which?"),)),
        Probe("text alone", (user("Write a word that begins with é, or 你好."),)),
        Probe("a system message", (system("Answer briefly."), user(Image(made[0]), "What is it?"))),
        Probe(
            "a second question",
            (user(Image(made[0]), "What is it?"), assistant("Blots of colour."), user("Which colours?")),
        ),
    ]


def image_probes(images: Sequence[Path]) -> list[Probe]:
    """Ask about images of one's own."""
    return [Probe(path.name, (user(Image(path), "What is in this picture?"),)) for path in images]


def one_image(probes: Sequence[Probe], *, with_text: bool) -> list[Probe]:
    """Keep what a model can be asked that takes one image and one text."""
    kept = [p for p in probes if len(p.messages) == 1 and [type(part) for part in p.messages[0].parts] == [Image, Text]]
    return kept if with_text else [Probe(p.name, (user(*p.messages[0].media),)) for p in kept]


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


TOKENS = 16
"""Greedy tokens that are compared of each answer."""
AGREEMENT = {"float32": 1.0, "float16": 0.5, "bfloat16": 0.5}
"""Smallest share of greedy tokens before two answers part, by the type of the weights on disk."""
IN_ANOTHER_ENGINE = 0.95
"""The same for an engine that computes in another order: two tokens that are nearly as likely may change places."""


@dataclass(frozen=True)
class Check:
    """One comparison."""

    name: str  # What was compared
    passed: bool  # Whether it is within bounds
    numbers: dict[str, Any] = field(default_factory=dict)  # What was measured, and the bounds
    reason: str = ""  # What is wrong, in one line; empty where nothing is


def prompts(
    ours: LocalBackend, asked: Sequence[Probe], later_turns_differ: bool
) -> tuple[list[Probe], list[Sample], dict[str, str]]:
    """Make the prompts of a comparison."""
    probes: list[Probe] = []
    samples: list[Sample] = []
    left_out: dict[str, str] = {}
    for probe in asked:
        if later_turns_differ and any(message.role == "assistant" for message in probe.messages):
            left_out[probe.name] = LATER_NOTE
            continue
        try:
            sample = ours.processor(probe.messages, add_generation_prompt=True)
        except PolymodalError as error:
            left_out[probe.name] = str(error)
            continue
        probes.append(probe)
        samples.append(sample)
    return probes, samples, left_out


class Comparison:
    """Our model and an exported folder, side by side; what each makes of the probes is computed once."""

    def __init__(self, ours: LocalBackend, folder: Path, tokens: int = TOKENS, more: Sequence[Probe] = ()) -> None:
        self.ours = ours
        self.folder = folder
        self.tokens = tokens
        self.config = read_json(folder / "config.json")
        self.plain = self.config.get("model_type") in BLIP
        self.dtype = str(self.config.get("dtype") or "float32")
        template = ours.config.template.chat_template
        self._without_text = template in PRESETS and PRESETS[template].media_only
        asked = [*chat_probes(), *more]
        if self.plain:
            asked = one_image(asked, with_text=not self._without_text)
        later = any(message.role == "assistant" for probe in asked for message in probe.messages)
        self.probes, self.samples, self.left_out = prompts(ours, asked, later and self._later_turns_differ())

    def _later_turns_differ(self) -> bool:
        """Whether nothing but the ids around earlier answers differs, which an export says beforehand."""
        try:
            processor = self.processor
        except CheckpointError:
            return False  # the checks will say so
        image_id = int(self.config.get("image_token_index") or 0)
        template = str(processor.chat_template)
        return differences(self.ours.processor.template, processor.tokenizer, template, image_id) == [LATER]

    @cached_property
    def processor(self) -> Any:
        """The folder's own processor, with Pillow for the images."""
        if not self.plain:
            return open_processor(self.folder)
        import transformers

        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        try:
            processor = transformers.AutoProcessor.from_pretrained(str(self.folder), **options)
            images = transformers.AutoImageProcessor.from_pretrained(str(self.folder), backend="pil", **options)
        except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.folder}: its processor cannot be opened ({first_line(error)})") from error
        processor.image_processor = images
        return processor

    @cached_property
    def model(self) -> Any:
        """The stock class with the folder's weights, in float32 on the CPU; with the adapter where one was kept."""
        model: Any = open_model(self.folder, "cpu")
        adapter = self.folder / ADAPTER_NAME
        if not adapter.is_dir():
            return model
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(adapter)).eval()

    @cached_property
    def inputs(self) -> list[dict[str, Any]]:
        """What the folder's processor makes of each probe."""
        made = []
        for probe in self.probes:
            try:
                made.append(dict(self._plain_inputs(probe) if self.plain else self._chat_inputs(probe)))
            except Exception as error:  # whatever a stock processor raises means that it cannot take the probe
                raise CheckpointError(
                    f"the exported processor refuses {probe.name!r} ({' '.join(str(error).split())[:200]})"
                ) from error
        return made

    def _chat_inputs(self, probe: Probe) -> Any:
        images = iter(probe.images)
        chat = []
        for message in probe.messages:
            parts = [
                {"type": "text", "text": part.text}
                if isinstance(part, Text)
                else {"type": "image", "image": next(images)}
                for part in message.parts
            ]
            chat.append({"role": message.role, "content": parts})
        return self.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    def _plain_inputs(self, probe: Probe) -> Any:
        return self.processor(images=probe.images[0], text=probe.messages[0].text, return_tensors="pt")


def greedy_ids(backend: LocalBackend, sample: Sample, tokens: int) -> list[int]:
    """Answer a prompt greedily with our code."""
    batch = collate([sample], backend.processor.pad_id, side="left")
    params = GenerationParams(max_new_tokens=tokens)
    stops = backend.processor.template.stop_ids
    return generate_ids(backend.model, batch, params, stops, len(backend.tokenizer))[0]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    """Count the ids before two answers part."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return same, max(len(one), len(other))
