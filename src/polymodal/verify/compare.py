"""Proof that an exported folder is the same model: the same prompts through our code and through the stock class.

The stock side is everything that a user of the folder has: transformers' class, its own processor, its own generate
with the folder's settings. Compared are token ids, pixels, logits at all positions and greedy text; where vLLM is
installed, its text too. What was found is kept in `parity.json` of the folder, passed or not.

Logits and text are compared on the stock processor's pixels. Both sides normalise by another order of the same
operations; the last bit, which `same_pixels` bounds, can grow to a hundredth of a logit in a deep network and would
hide what is compared. On the same pixels nothing differs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers

from polymodal.backends.transformers.folder import open_model, open_processor
from polymodal.checkpoints.model_folder import ADAPTER_NAME, Loaded
from polymodal.errors import CheckpointError, first_line
from polymodal.interop.huggingface.export import QFORMER_PADDING
from polymodal.interop.huggingface.export_chat_template import LATER, differences, drops_text, stock_chat
from polymodal.interop.huggingface.export_class import BLIP
from polymodal.messages import Image, Text, assistant, user
from polymodal.processing.collate import Sample, collate
from polymodal.safety.config_json import read_json
from polymodal.verify.side_by_side import IN_ANOTHER_ENGINE, TOKENS, Check, Parity, Probe, SideBySide, chat_probes

PIXEL_TOLERANCE = 1e-5
"""Largest difference of two normalised pixels; the images of bytes must be equal."""
LOGIT_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference of two logits by the type of the weights on disk, as a part of the largest logit, which counts as
1 where it is smaller. Weights that were rounded to half precision cannot do better."""
AGREEMENT = {"float32": 1.0, "float16": 0.5, "bfloat16": 0.5}
"""Smallest share of greedy tokens before two answers part, by the type of the weights on disk."""
BATCHED = 1e-3
"""Largest difference of two logits alone and in a batch, in float32, as a part of the largest logit."""
ANSWER = "a cat"
"""What an encoder-decoder's logits are compared on."""


def verify_export(
    source: Loaded,
    folder: Path,
    *,
    tokens: int = TOKENS,
    more: Sequence[Probe] = (),
    published: Path | None = None,
    checks: Mapping[str, Callable[[Comparison], Check | None]] | None = None,
) -> Parity:
    """Compare an exported folder with the model that it was written from, and write `parity.json` into it.

    Args:
        source: The model, on the CPU.
        folder: The exported folder.
        tokens: Greedy tokens of each answer.
        more: What is asked besides the usual conversations; see `chat_probes`.
        published: The folder that the model was read from, where it is one of transformers too: what the stock class
            makes of it is compared as well, since a model that was read wrongly is written as it was read.
        checks: Names to comparisons, each None where its program is not installed; `CHECKS` where None.

    Returns:
        What was found; `passed` says whether the folder is the same model.

    Raises:
        PolymodalError: The folder holds no model, or the report cannot be written.
    """
    comparison = Comparison(source, folder, tokens, more)
    if checks is None:
        checks = CHECKS if published is None else {"source": partial(same_as_published, published=published), **CHECKS}
    return comparison.run(checks)


class Comparison(SideBySide):
    """Our model and a stock folder, side by side."""

    def __init__(self, source: Loaded, folder: Path, tokens: int, more: Sequence[Probe]) -> None:
        super().__init__(source, folder, tokens)
        self.config = read_json(folder / "config.json")
        self.plain = self.config.get("model_type") in BLIP
        self.dtype = str(self.config.get("dtype") or "float32")
        asked = [*chat_probes(), *more]
        if self.plain:  # one image and one text, or none
            alone = [p for p in asked if [[type(part) for part in m.parts] for m in p.messages] == [[Image, Text]]]
            cut = drops_text(self.ours.config.template)
            asked = [Probe(p.name, (user(*p.messages[0].media),)) for p in alone] if cut else alone
        self.ask(asked, later_turns_differ=not self.plain and self._later_turns_differ())

    def _later_turns_differ(self) -> bool:
        """Whether nothing but the ids around earlier answers differs, which an export says beforehand."""
        try:
            processor = self.processor
        except CheckpointError:
            return False  # the checks will say so
        image_id, jinja = int(self.config.get("image_token_index") or 0), str(processor.chat_template)
        return differences(self.ours.processor.template, processor.tokenizer, jinja, image_id) == [LATER]

    @cached_property
    def processor(self) -> Any:
        """The folder's own processor, with Pillow for the images."""
        if not self.plain:
            return open_processor(self.folder)

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
        # The folder's own settings, as its users get them: they say what is never made.
        model.generation_config = transformers.GenerationConfig.from_pretrained(str(self.folder))
        adapter = self.folder / ADAPTER_NAME
        if not adapter.is_dir():
            return model
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(adapter)).eval()

    @cached_property
    def inputs(self) -> list[dict[str, Any]]:
        """What the folder's processor makes of each probe."""
        return [self._inputs(probe) for probe in self.probes]

    def _inputs(self, probe: Probe) -> dict[str, Any]:
        try:
            return self.batch([probe])
        except Exception as error:  # whatever a stock processor raises means that it cannot take the probe
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"the exported processor refuses {probe.name!r} ({reason})") from error

    def first_logits(self, probes: Sequence[Probe]) -> torch.Tensor:
        """The stock model's logits of the first token of each answer, padded in one batch, [B, V]."""
        made = self.model.generate(
            **self.batch(probes), max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return torch.as_tensor(made.logits[0]).float()

    def batch(self, probes: Sequence[Probe]) -> dict[str, Any]:
        """What the folder's processor makes of several probes at once, padded as its tokenizer does."""
        if self.plain:
            images, texts = [probe.images[0] for probe in probes], [probe.messages[0].text for probe in probes]
            return dict(self.processor(images=images, text=texts, padding=True, return_tensors="pt"))
        chats = [stock_chat(probe.messages, probe.images) for probe in probes]
        options: dict[str, Any] = {"return_dict": True, "return_tensors": "pt", "padding": True}
        return dict(self.processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, **options))

    def each(self) -> Iterable[tuple[Probe, Sample, dict[str, Any]]]:
        """Every probe with our prompt and theirs."""
        return zip(self.probes, self.samples, self.inputs, strict=True)


def same_ids(comparison: Comparison) -> Check:
    """Compare token ids, placeholders expanded; a placeholder that somebody typed must be no image."""
    found = (given["input_ids"][0].tolist() for given in comparison.inputs)
    check = comparison.compare_ids(found, comparison.config.get("image_token_index"), "the exported processor")
    if not check.passed or comparison.plain:  # BLIP-2's processor has no template to see to it
        return check
    token = comparison.processor.tokenizer.convert_ids_to_tokens(int(comparison.config["image_token_index"]))
    typed = [
        Probe(probe.name, (user(*probe.messages[-1].media, f"Is {token} a word?"),)) for probe in comparison.probes
    ]
    counts = [comparison.processor.apply_chat_template(stock_chat(p.messages, p.images)).count(token) for p in typed]
    wrong = [probe.name for probe, count in zip(typed, counts, strict=True) if count != len(probe.images)]
    return Check.unless(wrong, "token_ids", check.numbers, f"a typed {token!r} counts as an image beside")


def same_pixels(comparison: Comparison) -> Check:
    """Compare tiles: the floats that a tower takes, and the bytes they were, which are hashed."""
    image = comparison.ours.config.image
    assert image is not None  # of an exported model
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (image.image_mean, image.image_std))
    largest, wrong = 0.0, []
    hashes = hashlib.sha256(), hashlib.sha256()
    for probe, sample, given in comparison.each():
        if sample.pixels is None or not sample.plans:
            continue
        ours, theirs = torch.cat(list(sample.pixels)), _real_tiles(given["pixel_values"], sample)
        if ours.shape != theirs.shape:
            wrong.append(f"{probe.name} ({len(theirs)} tiles instead of {len(ours)})")
            continue
        difference = float((ours - theirs).abs().max())
        largest = max(largest, difference)
        as_bytes = [((t * std + mean) * 255).round().clamp(0, 255).to(torch.uint8) for t in (ours, theirs)]
        for digest, tiles in zip(hashes, as_bytes, strict=True):
            digest.update(tiles.numpy().tobytes())
        if difference > PIXEL_TOLERANCE or not torch.equal(*as_bytes):
            wrong.append(f"{probe.name} ({difference:.2g})")
    numbers = {
        "max_difference": largest,
        "tolerance": PIXEL_TOLERANCE,
        "sha256_ours": hashes[0].hexdigest(),
        "sha256_exported": hashes[1].hexdigest(),
    }
    return Check.unless(wrong, "pixels", numbers, "the exported processor makes other pixels of")


@torch.inference_mode()
def same_logits(comparison: Comparison) -> Check:
    """Compare logits: at all positions of a prompt, or on a given answer for an encoder-decoder."""
    allowed = LOGIT_TOLERANCE[comparison.dtype]
    largest, size, wrong = 0.0, 0.0, []
    for probe, sample, given in comparison.each():
        ours, theirs = _logits(comparison, probe, sample, given)
        if len(ours) != len(theirs):
            wrong.append(f"{probe.name} ({len(theirs)} positions instead of {len(ours)})")
            continue
        # Rows that were added for the placeholder are behind all of ours.
        difference = float((ours - theirs[:, : ours.shape[1]]).abs().max())
        scale = max(1.0, float(ours.abs().max()))
        largest, size = max(largest, difference), max(size, scale)
        if not difference <= allowed * scale:  # NaN is wrong too
            wrong.append(f"{probe.name} (largest difference {difference:.2g} of logits up to {scale:.3g})")
    numbers = {"max_difference": largest, "largest_logit": size, "tolerance": allowed, "dtype": comparison.dtype}
    return Check.unless(wrong, "logits", numbers, "logits differ for")


@torch.inference_mode()
def same_text(comparison: Comparison) -> Check:
    """Compare greedy answers."""
    answers = []
    for _, sample, given in comparison.each():
        made = comparison.model.generate(**given, max_new_tokens=comparison.tokens, do_sample=False)[0].tolist()
        prompt = given["input_ids"][0].tolist()
        if comparison.ours.model.encoder_decoder:
            made = made[1:]  # where a decoder starts
        elif made[: len(prompt)] == prompt:
            made = made[len(prompt) :]
        answers.append((comparison.greedy(_on_same_pixels(sample, given)), made))
    return comparison.compare_answers("greedy", answers, AGREEMENT[comparison.dtype], dtype=comparison.dtype)


@torch.inference_mode()
def same_in_a_batch(comparison: Comparison) -> Check:
    """Compare the first token's logits of two unequal prompts in one batch with those of each prompt alone."""
    if comparison.config["model_type"] == "instructblip" and not comparison.ours.model.encoder_decoder:
        return Check("batch", True, {"not_compared": QFORMER_PADDING})
    lengths = {len(sample.input_ids): probe for probe, sample, _ in comparison.each() if len(probe.images) == 1}
    pair = [lengths[length] for length in sorted({min(lengths, default=0), max(lengths, default=0)} & lengths.keys())]
    alone = [comparison.first_logits([probe])[0] for probe in pair]
    together = comparison.first_logits(pair)
    largest, wrong = 0.0, []
    for probe, one, other in zip(pair, alone, together, strict=True):
        largest = max(largest, difference := float((one - other).abs().max()))
        if not difference <= BATCHED * max(1.0, float(one.abs().max())):
            wrong.append(f"{probe.name} (largest difference {difference:.2g})")
    numbers = {"prompts": [probe.name for probe in pair], "max_difference": largest, "tolerance": BATCHED}
    return Check.unless(wrong, "batch", numbers, "padded in a batch, logits differ for")


@torch.inference_mode()
def same_as_published(comparison: Comparison, published: Path) -> Check:
    """Compare logits with those of the stock class on the folder that the model was read from."""
    allowed, model = LOGIT_TOLERANCE[comparison.dtype], open_model(published, "cpu")
    old, new = (int(one.config.image_token_id) for one in (model, comparison.model))
    largest, size, wrong = 0.0, 0.0, []
    for probe, _, given in comparison.each():
        ids = given["input_ids"]
        if comparison.ours.model.encoder_decoder:
            given = {**given, "labels": ids[:, -2:]}
        theirs = model(**{**given, "input_ids": torch.where(ids == new, old, ids)}).logits[0].float()
        written = comparison.model(**given).logits[0].float()
        width = min(theirs.shape[1], written.shape[1], len(comparison.ours.tokenizer))
        difference = float((theirs[:, :width] - written[:, :width]).abs().max())
        scale = max(1.0, float(theirs.abs().max()))
        largest, size = max(largest, difference), max(size, scale)
        if not difference <= allowed * scale:
            wrong.append(f"{probe.name} (largest difference {difference:.2g} of logits up to {scale:.3g})")
    numbers = {"max_difference": largest, "largest_logit": size, "tolerance": allowed}
    return Check.unless(wrong, "source", numbers, f"the stock class on {published.name} gives other logits for")


def same_text_in_vllm(comparison: Comparison) -> Check | None:
    """Compare greedy answers with vLLM's, which sees the same ids and images; None where it cannot be compared."""
    if comparison.plain or (comparison.folder / ADAPTER_NAME).is_dir():
        return None
    try:
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise CheckpointError(f"vLLM is installed and cannot be imported ({first_line(error)})") from error
        return None
    backend, image_id = comparison.ours, int(comparison.config["image_token_index"])
    length = max(len(sample.input_ids) for sample in comparison.samples) + comparison.tokens
    settings = read_json(comparison.folder / "generation_config.json")
    # vLLM would turn float32 into a half type by itself, and knows no suppress_tokens.
    engine = LLM(
        model=str(comparison.folder),
        dtype=comparison.dtype,
        enforce_eager=True,
        max_model_len=min(length, backend.context_length),
        limit_mm_per_prompt={"image": max([1, *(len(sample.plans) for sample in comparison.samples)])},
    )
    params = SamplingParams(
        temperature=0.0,
        max_tokens=comparison.tokens,
        stop_token_ids=list(backend.processor.template.stop_ids),
        logit_bias={int(token): -100.0 for token in settings.get("suppress_tokens") or ()},
    )
    prompts: list[dict[str, Any]] = []
    for probe, sample in zip(comparison.probes, comparison.samples, strict=True):
        # Engines repeat the placeholders by themselves: the prompt before ours were.
        inside = {place for slot in sample.slots for place in range(slot.start + 1, slot.start + slot.length)}
        ids = [token for place, token in enumerate(sample.input_ids.tolist()) if place not in inside]
        ids = [image_id if token == backend.model.image_token_id else token for token in ids]
        images = probe.images
        prompts.append({"prompt_token_ids": ids, **({"multi_modal_data": {"image": images}} if images else {})})
    given = [list(reply.outputs[0].token_ids) for reply in engine.generate(prompts, params)]
    answers = [(comparison.greedy(sample), made) for sample, made in zip(comparison.samples, given, strict=True)]
    least = min(AGREEMENT[comparison.dtype], IN_ANOTHER_ENGINE)
    return comparison.compare_answers("vllm", answers, least, package="vllm")


CHECKS: dict[str, Callable[[Comparison], Check | None]] = {
    "token_ids": same_ids,
    "pixels": same_pixels,
    "logits": same_logits,
    "greedy": same_text,
    "batch": same_in_a_batch,
    "vllm": same_text_in_vllm,
}
"""The comparisons with a stock folder of transformers; the last where vLLM is installed."""


def _logits(
    comparison: Comparison, probe: Probe, sample: Sample, given: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and theirs, [positions, V]."""
    backend = comparison.ours
    taught = backend.model.encoder_decoder
    if taught:
        sample = backend.processor([*probe.messages, assistant(ANSWER)])
        given = {**given, "labels": sample.input_ids[sample.loss_mask][None]}
    batch = collate([_on_same_pixels(sample, given)], backend.processor.pad_id).to(backend.model.device).inputs()
    found = backend.model(**(batch if taught else {**batch, "labels": None})).logits
    assert found is not None
    return found.reshape(-1, found.shape[-1]).float().cpu(), comparison.model(**given).logits[0].float()


def _on_same_pixels(sample: Sample, given: dict[str, Any]) -> Sample:
    """Our prompt with the pixels of the stock processor, where they are as many."""
    if not sample.plans or sample.pixels is None:
        return sample
    tiles = _real_tiles(given["pixel_values"], sample)
    alike = tiles.shape == torch.cat(list(sample.pixels)).shape
    return replace(sample, pixels=tiles.split([plan.num_tiles for plan in sample.plans])) if alike else sample


def _real_tiles(pixels: Any, sample: Sample) -> torch.Tensor:
    """A stock processor's tiles without the rows of zeros that fill its batch."""
    if not isinstance(pixels, list | tuple) and pixels.ndim == 4:
        return torch.as_tensor(pixels).float()
    counts = [plan.num_tiles for plan in sample.plans]
    return torch.cat([torch.as_tensor(one)[:count] for one, count in zip(pixels, counts, strict=True)]).float()
