"""Proof that an exported folder is the same model: the same prompts through our code and through the stock class.

The stock side is everything that a user of the folder has: transformers' class, its own processor, its own generate
with the folder's settings. Compared are token ids, pixels, logits at all positions and greedy text. What was found is
kept in `parity.json` of the folder, passed or not. Logits and text are compared on the stock processor's pixels, which
are compared with ours by themselves.

`CHECKS` is the list of comparisons; a format of another kind brings its own.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from polymodal.backends.local import LocalBackend
from polymodal.checkpoints.model_folder import ADAPTER_NAME, Loaded
from polymodal.errors import PolymodalError
from polymodal.messages import assistant
from polymodal.processing.collate import collate
from polymodal.utils.files import write_text
from polymodal.verify.side_by_side import (
    AGREEMENT,
    IN_ANOTHER_ENGINE,
    TOKENS,
    Check,
    Comparison,
    Probe,
    common_prefix,
    greedy_ids,
    hash_probes,
)

if TYPE_CHECKING:
    from polymodal.processing.collate import Sample


# ---- vLLM's greedy answers beside ours, where vLLM is installed ----


def same_text_in_vllm(comparison: Comparison) -> Check | None:
    """Compare greedy answers with vLLM's, which sees the same ids and images; None where it cannot be compared."""
    if not _installed() or comparison.plain or (comparison.folder / ADAPTER_NAME).is_dir():
        return None
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]

    backend, image_id = comparison.ours, int(comparison.config["image_token_index"])
    most = max((len(sample.plans) for sample in comparison.samples), default=0)
    length = max(len(sample.input_ids) for sample in comparison.samples) + comparison.tokens
    settings = json.loads((comparison.folder / "generation_config.json").read_text(encoding="utf-8"))
    # vLLM would turn float32 into a half type by itself, and knows no suppress_tokens.
    engine = LLM(
        model=str(comparison.folder),
        dtype=comparison.dtype,
        enforce_eager=True,
        max_model_len=min(length, backend.context_length),
        limit_mm_per_prompt={"image": max(most, 1)},
    )
    params = SamplingParams(
        temperature=0.0,
        max_tokens=comparison.tokens,
        stop_token_ids=list(backend.processor.template.stop_ids),
        logit_bias={int(token): -100.0 for token in settings.get("suppress_tokens") or ()},
    )
    prompts: list[dict[str, Any]] = []
    for probe, sample in zip(comparison.probes, comparison.samples, strict=True):
        ids = _one_placeholder_each(sample, backend.model.image_token_id, image_id)
        images = probe.images
        prompts.append({"prompt_token_ids": ids, **({"multi_modal_data": {"image": images}} if images else {})})
    given = [list(reply.outputs[0].token_ids) for reply in engine.generate(prompts, params)]
    equal = total = 0
    wrong = []
    for probe, sample, made in zip(comparison.probes, comparison.samples, given, strict=True):
        same, most = common_prefix(greedy_ids(backend, sample, comparison.tokens), made)
        equal, total = equal + same, total + most
        if same < most:
            wrong.append(f"{probe.name} ({same} of {most} tokens)")
    share, least = equal / total if total else 1.0, min(AGREEMENT[comparison.dtype], IN_ANOTHER_ENGINE)
    numbers = {"agreement": share, "tokens": total, "least": least, "version": _release()}
    return Check("vllm", share >= least, numbers, "" if share >= least else f"answers part for {', '.join(wrong)}")


def _one_placeholder_each(sample: Sample, old: int, new: int) -> list[int]:
    """The prompt before its placeholders were repeated, as engines take it that repeat them by themselves."""
    inside = {place for slot in sample.slots for place in range(slot.start + 1, slot.start + slot.length)}
    ids = sample.input_ids.tolist()
    return [new if token == old else token for place, token in enumerate(ids) if place not in inside]


def _installed() -> bool:
    try:
        return find_spec("vllm") is not None
    except ValueError:  # a module without a specification, which is there
        return True


def _release() -> str:
    try:
        return version("vllm")
    except PackageNotFoundError:
        return "(unknown)"


REPORT_NAME = "parity.json"
PIXEL_TOLERANCE = 1e-5
"""Largest difference of two normalised pixels; the images of bytes must be equal."""
LOGIT_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest difference of two logits by the type of the weights on disk, as a part of the largest logit, which counts as
1 where it is smaller. Weights that were rounded to half precision cannot do better."""
ANSWER = "a cat"
"""What an encoder-decoder's logits are compared on."""


class Compared(Protocol):
    """What a report says of two models side by side.

    Attributes:
        folder: The exported folder.
        tokens: Greedy tokens that are compared.
        probes: What is asked of both.
        left_out: Probes that the model refuses, and why.
    """

    folder: Path
    tokens: int
    probes: list[Probe]
    left_out: dict[str, str]


C = TypeVar("C", bound=Compared)


@dataclass(frozen=True)
class Parity:
    """What `parity.json` holds."""

    passed: bool  # Every check that could be run passed, and there was one
    checks: tuple[Check, ...]  # The comparisons
    not_run: tuple[str, ...]  # Names of those whose program is not installed
    document: dict[str, Any]  # All of it, as written

    @property
    def line(self) -> str:
        """The outcome in one line."""
        if self.passed:
            return "parity: " + ", ".join(f"{check.name} ok" for check in self.checks)
        wrong = [f"{check.name}: {check.reason}" for check in self.checks if not check.passed]
        return "parity FAILED: " + ("; ".join(wrong) or "nothing could be compared")


def verify_export(
    source: Loaded | LocalBackend,
    folder: Path,
    *,
    tokens: int = TOKENS,
    more: Sequence[Probe] = (),
    checks: Mapping[str, Callable[[Comparison], Check | None]] | None = None,
) -> Parity:
    """Compare an exported folder with the model that it was written from, and write `parity.json` into it.

    Args:
        source: The model, on the CPU.
        folder: The exported folder.
        tokens: Greedy tokens of each answer.
        more: What is asked besides the usual conversations; see `parity_probes`.
        checks: Names to comparisons, each None where its program is not installed; `CHECKS` where None.

    Returns:
        What was found; `passed` says whether the folder is the same model.

    Raises:
        PolymodalError: The folder holds no model, or the report cannot be written.
    """
    comparison = Comparison(local(source), folder, tokens, more)
    return run_checks(comparison, CHECKS if checks is None else checks)


def local(source: Loaded | LocalBackend) -> LocalBackend:
    """A model as something that answers, which it may be already."""
    return source if isinstance(source, LocalBackend) else LocalBackend(source.model, source.tokenizer, source.config)


def run_checks(comparison: C, checks: Mapping[str, Callable[[C], Check | None]]) -> Parity:
    """Run comparisons and write `parity.json`."""
    done: list[Check] = []
    not_run: list[str] = []
    for name, run in checks.items():
        try:
            check = run(comparison)
        except PolymodalError as error:
            check = Check(name, False, reason=str(error))
        except (ValueError, RuntimeError, IndexError, KeyError, TypeError) as error:  # of the stock class, on a probe
            check = Check(name, False, reason=f"the exported model fails: {' '.join(str(error).split())[:300]}")
        if check is None:
            not_run.append(name)
        else:
            done.append(check)
    passed = bool(done) and all(check.passed for check in done)
    document = {
        "passed": passed,
        "versions": _versions(),
        "probes": {
            "names": [probe.name for probe in comparison.probes],
            "sha256": hash_probes(comparison.probes),
            "left_out": comparison.left_out,
            "greedy_tokens": comparison.tokens,
        },
        "checks": [asdict(check) for check in done],
        "not_run": not_run,
    }
    write_text(comparison.folder / REPORT_NAME, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return Parity(passed, tuple(done), tuple(not_run), document)


def same_ids(comparison: Comparison) -> Check:
    """Compare token ids, placeholders expanded."""
    ours, theirs = comparison.ours.model.image_token_id, comparison.config.get("image_token_index")
    wrong = []
    for probe, sample, given in zip(comparison.probes, comparison.samples, comparison.inputs, strict=True):
        wanted = [theirs if token == ours else token for token in sample.input_ids.tolist()]
        if given["input_ids"][0].tolist() != wanted:
            wrong.append(probe.name)
    total = sum(len(sample.input_ids) for sample in comparison.samples)
    return Check(
        "token_ids",
        not wrong,
        {"probes": len(comparison.probes), "tokens": total, "differ": wrong},
        f"the exported processor gives other ids for {', '.join(wrong)}" if wrong else "",
    )


def same_pixels(comparison: Comparison) -> Check:
    """Compare tiles: the floats that a tower takes, and the bytes they were, which are hashed."""
    largest, wrong = 0.0, []
    hashes = hashlib.sha256(), hashlib.sha256()
    for probe, sample, given in zip(comparison.probes, comparison.samples, comparison.inputs, strict=True):
        if not sample.plans:
            continue
        assert sample.pixels is not None
        ours = torch.cat(list(sample.pixels))
        theirs = _real_tiles(given["pixel_values"], sample)
        if ours.shape != theirs.shape:
            wrong.append(f"{probe.name} ({len(theirs)} tiles instead of {len(ours)})")
            continue
        difference = float((ours - theirs).abs().max())
        largest = max(largest, difference)
        as_bytes = [_to_bytes(tiles, comparison) for tiles in (ours, theirs)]
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
    reason = f"the exported processor makes other pixels of {', '.join(wrong)}" if wrong else ""
    return Check("pixels", not wrong, numbers, reason)


@torch.inference_mode()
def same_logits(comparison: Comparison) -> Check:
    """Compare logits: at all positions of a prompt, or on a given answer for an encoder-decoder."""
    allowed = LOGIT_TOLERANCE[comparison.dtype]
    largest, size, wrong = 0.0, 0.0, []
    for probe, sample, given in zip(comparison.probes, comparison.samples, comparison.inputs, strict=True):
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
    numbers = {
        "max_difference": largest,
        "largest_logit": size,
        "tolerance": allowed,
        "dtype": comparison.dtype,
    }
    return Check("logits", not wrong, numbers, f"logits differ for {', '.join(wrong)}" if wrong else "")


@torch.inference_mode()
def same_text(comparison: Comparison) -> Check:
    """Compare greedy answers, each side stopping where it stops."""
    allowed = AGREEMENT[comparison.dtype]
    wrong, equal, total = [], 0, 0
    for probe, sample, given in zip(comparison.probes, comparison.samples, comparison.inputs, strict=True):
        ours = greedy_ids(comparison.ours, _on_same_pixels(sample, given), comparison.tokens)
        made = comparison.model.generate(**given, max_new_tokens=comparison.tokens, do_sample=False)[0].tolist()
        prompt = given["input_ids"][0].tolist()
        if comparison.ours.model.encoder_decoder:
            made = made[1:]  # where a decoder starts
        elif made[: len(prompt)] == prompt:
            made = made[len(prompt) :]
        same, most = common_prefix(ours, made)
        equal, total = equal + same, total + most
        if same < allowed * most:
            wrong.append(f"{probe.name} ({same} of {most} tokens)")
    share = equal / total if total else 1.0
    numbers = {"agreement": share, "tokens": total, "least": allowed, "dtype": comparison.dtype}
    passed = share >= allowed
    return Check("greedy", passed, numbers, "" if passed else f"greedy answers part for {', '.join(wrong)}")


CHECKS: dict[str, Callable[[Comparison], Check | None]] = {
    "token_ids": same_ids,
    "pixels": same_pixels,
    "logits": same_logits,
    "greedy": same_text,
    "vllm": same_text_in_vllm,
}
"""The comparisons with a stock folder of transformers; the last where vLLM is installed."""


def _logits(
    comparison: Comparison, probe: Probe, sample: Sample, given: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and theirs, [positions, V]."""
    backend = comparison.ours
    extra: dict[str, Any] = {}
    if backend.model.encoder_decoder:
        sample = backend.processor([*probe.messages, assistant(ANSWER)])
        extra = {"labels": sample.input_ids[sample.loss_mask][None]}
    batch = collate([_on_same_pixels(sample, given)], backend.processor.pad_id)
    inputs = batch.to(backend.model.device).inputs()
    if not extra:
        inputs["labels"] = None
    found = backend.model(**inputs).logits
    assert found is not None
    return found.reshape(-1, found.shape[-1]).float().cpu(), comparison.model(**given, **extra).logits[0].float()


def _on_same_pixels(sample: Sample, given: dict[str, Any]) -> Sample:
    """Our prompt with the pixels of the stock processor, where they are as many."""
    # Both normalise by another order of the same operations. The last bit, which `same_pixels` bounds, can grow to a
    # hundredth of a logit in a deep network and would hide what is compared here; on the same pixels nothing differs.
    if not sample.plans or sample.pixels is None:
        return sample
    tiles = _real_tiles(given["pixel_values"], sample)
    if tiles.shape != torch.cat(list(sample.pixels)).shape:
        return sample
    return replace(sample, pixels=tiles.split([plan.num_tiles for plan in sample.plans]))


def _real_tiles(pixels: Any, sample: Sample) -> torch.Tensor:
    """A stock processor's tiles without the rows of zeros that fill its batch."""
    if isinstance(pixels, list | tuple):
        return torch.cat([torch.as_tensor(one) for one in pixels]).float()
    if pixels.ndim == 4:
        return torch.as_tensor(pixels).float()
    counts = [plan.num_tiles for plan in sample.plans]
    return torch.cat([one[:count] for one, count in zip(pixels, counts, strict=True)]).float()


def _to_bytes(tiles: torch.Tensor, comparison: Comparison) -> torch.Tensor:
    image = comparison.ours.config.image
    assert image is not None  # there are tiles
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (image.image_mean, image.image_std))
    return ((tiles * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("polymodal", "torch", "transformers", "tokenizers", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "(not installed)"
    return found
