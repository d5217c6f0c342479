"""vLLM's greedy answers beside ours, where vLLM is installed."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from polymodal.checkpoints.model_folder import ADAPTER_NAME
from polymodal.verify.side_by_side import AGREEMENT, IN_ANOTHER_ENGINE, Check, Comparison, common_prefix, greedy_ids

if TYPE_CHECKING:
    from polymodal.processing.collate import Sample


def same_text_in_vllm(comparison: Comparison) -> Check | None:
    """Compare greedy answers with vLLM's, which sees the same ids and pictures; None where it cannot be compared."""
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
        pictures = probe.pictures
        prompts.append({"prompt_token_ids": ids, **({"multi_modal_data": {"image": pictures}} if pictures else {})})
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
