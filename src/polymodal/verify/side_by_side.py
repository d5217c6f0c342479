"""Our model and an exported folder, side by side; what each makes of the same prompts is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.backends.local import LocalBackend
from polymodal.backends.transformers.folder import open_model, open_processor
from polymodal.checkpoints.model_folder import ADAPTER_NAME
from polymodal.errors import CheckpointError, PolymodalError, first_line
from polymodal.exchange.parity_probes import Probe, chat_probes, one_picture
from polymodal.generation.generate import generate_ids
from polymodal.generation.params import GenerationParams
from polymodal.interop.huggingface.export_chat_template import LATER, LATER_NOTE, differences
from polymodal.interop.huggingface.export_class import BLIP
from polymodal.messages import Text
from polymodal.processing.batch import collate
from polymodal.processing.chat_template.presets import PRESETS
from polymodal.safety.config_json import read_json

if TYPE_CHECKING:
    from polymodal.processing.collate import Sample

TOKENS = 16
"""Greedy tokens that are compared of each answer."""
AGREEMENT = {"float32": 1.0, "float16": 0.5, "bfloat16": 0.5}
"""Smallest share of greedy tokens before two answers part, by the type of the weights on disk."""
IN_ANOTHER_ENGINE = 0.95
"""The same for an engine that computes in another order: two tokens that are nearly as likely may change places."""


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: What was compared.
        passed: Whether it is within bounds.
        numbers: What was measured, and the bounds.
        reason: What is wrong, in one line; empty where nothing is.
    """

    name: str
    passed: bool
    numbers: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


def prompts(
    ours: LocalBackend, asked: Sequence[Probe], later_turns_differ: bool
) -> tuple[list[Probe], list[Sample], dict[str, str]]:
    """Make the prompts of a comparison.

    Args:
        ours: The model that was exported.
        asked: What is to be asked.
        later_turns_differ: The exported template writes earlier answers in other ids, which the export has said.

    Returns:
        The probes that can be asked, their prompts, and why each other one is left out.
    """
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
    """Our model and an exported folder, side by side; what each makes of the probes is computed once.

    Args:
        ours: The model that was exported.
        folder: The exported folder.
        tokens: Greedy tokens that are compared.
        more: What is asked besides the usual conversations.
    """

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
            asked = one_picture(asked, with_text=not self._without_text)
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
        """The folder's own processor, with Pillow for the pictures."""
        if not self.plain:
            return open_processor(self.folder)
        import transformers

        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
        try:
            processor = transformers.AutoProcessor.from_pretrained(str(self.folder), **options)
            pictures = transformers.AutoImageProcessor.from_pretrained(str(self.folder), backend="pil", **options)
        except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.folder}: its processor cannot be opened ({first_line(error)})") from error
        processor.image_processor = pictures
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
        pictures = iter(probe.pictures)
        chat = []
        for message in probe.messages:
            parts = [
                {"type": "text", "text": part.text}
                if isinstance(part, Text)
                else {"type": "image", "image": next(pictures)}
                for part in message.parts
            ]
            chat.append({"role": message.role, "content": parts})
        return self.processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    def _plain_inputs(self, probe: Probe) -> Any:
        return self.processor(images=probe.pictures[0], text=probe.messages[0].text, return_tensors="pt")


def greedy_ids(backend: LocalBackend, sample: Sample, tokens: int) -> list[int]:
    """Answer a prompt greedily with our code.

    Args:
        backend: The model.
        sample: The prompt.
        tokens: Most tokens.

    Returns:
        The ids, the one that ends the answer included.
    """
    batch = collate([sample], backend.processor.pad_id, side="left")
    params = GenerationParams(max_new_tokens=tokens)
    stops = backend.processor.template.stop_ids
    return generate_ids(backend.model, batch, params, stops, len(backend.tokenizer))[0]


def common_prefix(one: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    """Count the ids before two answers part.

    Args:
        one: An answer.
        other: Another.

    Returns:
        How many are the same, and the length of the longer answer.
    """
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return same, max(len(one), len(other))
