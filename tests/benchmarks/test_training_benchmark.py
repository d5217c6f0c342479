"""The side-by-side benchmark compares like with like, and notices when it does not."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture(params=[1, 2], ids=["stage1", "stage2"])
def stage(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def rows_of(folder: Path, stage: int, kind: str = "even", count: int = 4) -> list[dict[str, Any]]:
    from benchmarks.training.rows import read_rows, write_rows

    write_rows(folder, stage, count, seed=0, kind=kind, image_tokens=16, scale=0.2)
    return read_rows(folder)


def our_samples(folder: Path, stage: int) -> tuple[Any, list[Any]]:
    from benchmarks.training.models import build_inputs
    from benchmarks.training.setting import SHAPES
    from polymodal.data.load import load_records
    from polymodal.processing.processor import Processor

    inputs = build_inputs(SHAPES["tiny"], stage, seed=0)
    model = inputs.model
    processor = Processor(inputs.config, inputs.tokenizer, model.tokens_per_tile, model.image_token_id)
    return inputs, [processor(record.messages) for record in load_records(folder / "rows.json")]


@pytest.mark.parametrize(("kind", "count"), [("even", 4), ("llava", 16)])
def test_all_count_and_train_the_same_tokens(tmp_path: Path, stage: int, kind: str, count: int) -> None:
    from benchmarks.training.models import build_processor
    from benchmarks.training.rows import row_tokens
    from benchmarks.training.setting import SHAPES
    from benchmarks.training.systems import tokenise

    rows = rows_of(tmp_path, stage, kind, count)
    processor = build_processor(SHAPES["tiny"], stage)
    _, samples = our_samples(tmp_path, stage)
    for row, sample in zip(rows, samples, strict=True):
        theirs = tokenise(processor, row)
        assert sample.input_ids.tolist() == theirs["input_ids"]
        assert torch.where(sample.loss_mask, sample.input_ids, -100).tolist() == theirs["labels"]
        assert row_tokens(row, stage, 16) == (len(sample.input_ids), int(sample.loss_mask[1:].sum()))
    assert (kind, stage) == ("llava", 1) or len({len(sample.input_ids) for sample in samples}) > 1
    assert any(row["image"] is None for row in rows) == ((kind, stage) == ("llava", 2))


def test_the_rows_have_the_mix_of_llava(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    from benchmarks.training import rows as module

    monkeypatch.setattr(module, "draw_image", lambda rng, scale: Image.new("RGB", (4, 4)))
    module.write_rows(tmp_path, 2, 664, seed=0, kind="llava", image_tokens=196)
    rows = module.read_rows(tmp_path)
    total, trained = zip(*(module.row_tokens(row, 2, 196) for row in rows), strict=True)
    assert sum(row["image"] is None for row in rows) == 40
    assert max(total) <= 2048 * 196 / 576 < 1.01 * max(total)  # ShareGPT fills the context
    assert 0.1 < sum(trained) / sum(total) < 0.2  # most tokens are images'
    turns = [len(row["messages"]) // 2 for row in rows]
    # Sources of one turn, and the shortest rows of VQAv2, whose turns become one.
    assert 66 + 9 + 22 + 23 + 77 <= turns.count(1) < 220 and max(turns) > 5
    module.write_rows(tmp_path / "again", 2, 664, seed=0, kind="llava", image_tokens=196)
    assert (tmp_path / "again/rows.json").read_text() == (tmp_path / "rows.json").read_text()


def test_a_mode_says_who_trains_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.training import stage
    from benchmarks.training.__main__ import parse_options

    def used(*argv: str) -> list[str]:
        options = parse_options(["--tiny", *argv])
        return [stage.precision_of(options, m, s) for m in options.mode for s in ("hf", "trl", "polymodal")]

    monkeypatch.setattr(stage, "has_fast_bf16", lambda: True)
    assert used() == ["fp32"] * 3 + ["fp32", "bf16", "bf16"] + ["bf16"] * 6
    monkeypatch.setattr(stage, "has_fast_bf16", lambda: False)
    assert used() == ["fp32"] * 3 + ["fp32", "bf16", "fp32"] + ["fp32"] * 6
    assert set(used("--precision", "bf16")) == {"bf16"}


def test_the_models_are_one_and_see_the_image(tmp_path: Path) -> None:
    from benchmarks.training.models import build_llava
    from benchmarks.training.setting import SHAPES
    from polymodal.processing.collate import collate

    rows_of(tmp_path, 2)
    inputs, samples = our_samples(tmp_path, 2)
    theirs = build_llava(SHAPES["tiny"], inputs.model.image_token_id, seed=0)
    batch = collate(samples, 0)

    def their_loss(pixels: torch.Tensor) -> float:
        with torch.no_grad():
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
            return float(theirs(**inputs, pixel_values=pixels, labels=batch.labels).loss)

    with torch.no_grad():
        out = inputs.model(**batch.inputs())
    assert batch.pixel_values is not None
    assert inputs.model.pixel_norm is not None
    pixels = inputs.model.pixel_norm(batch.pixel_values)
    assert float(out.loss_sum) / out.num_targets == pytest.approx(their_loss(pixels), abs=1e-4)
    # More than the tolerance: a system that loses or mixes up its images is found out.
    for wrong in (torch.zeros_like(pixels), pixels.roll(1, 0), pixels.flip(3)):
        assert abs(their_loss(wrong) - their_loss(pixels)) > 1e-3


def test_a_difference_ends_the_benchmark_before_timing() -> None:
    from benchmarks.training.__main__ import parse_options
    from benchmarks.training.stage import Difference, compare

    options = parse_options(["--tiny"])
    warmup = {"first_loss": 6.0, "real_tokens": 90, "trained_tokens": 30}
    good = {"system": "hf", "mode": "matched", "precision": "fp32", "warmup": warmup}

    def other(precision: str = "fp32", **changes: Any) -> dict[str, Any]:
        return {"system": "polymodal", "mode": "best", "precision": precision, "warmup": {**warmup, **changes}}

    compare(other(first_loss=6.0009), good, 90, 30, options)
    compare(other("bf16", first_loss=6.01), good, 90, 30, options)
    for loss in (6.0011, 5.9, float("nan")):
        with pytest.raises(Difference, match=r"first step's loss of polymodal \(best\)"):
            compare(other(first_loss=loss), good, 90, 30, options)
    with pytest.raises(Difference, match="31 trained tokens in its first turn, not 30"):
        compare(other(trained_tokens=31), good, 90, 30, options)
    with pytest.raises(Difference, match="89 real tokens"):
        compare(other(real_tokens=89), good, 90, 30, options)


def test_the_formula_counts_what_torch_counts(tmp_path: Path, stage: int) -> None:
    """Matrix products of one sample, against torch's own counter; attention apart, which kernels do in full squares."""
    from dataclasses import replace

    from benchmarks.training.models import build_inputs
    from benchmarks.training.setting import SHAPES
    from benchmarks.training.speed import model_flops
    from polymodal.config import LoraRecipe
    from polymodal.processing.collate import collate
    from polymodal.training.optimizer import apply_policy
    from polymodal.training.recipes.sections import OptimConfig, RuleConfig

    shape = SHAPES["tiny"]
    rows_of(tmp_path, stage)
    _, samples = our_samples(tmp_path, stage)
    model = build_inputs(shape, stage, seed=0).model
    lora = LoraRecipe(lora_r=shape.lora_r, lora_alpha=8) if stage == 2 else None
    apply_policy(model, [RuleConfig(match="projector.*", train=True)], lora, OptimConfig())
    batch = collate(samples[:1], 0)
    with FlopCounterMode(display=False) as counter:
        model(**batch.inputs()).loss_sum.backward()
    counted = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for op, count in counted.items() if "attention" not in op and "bmm" not in op)
    length, targets = batch.input_ids.numel(), int((batch.labels[:, 1:] != -100).sum())
    whole = model_flops(shape, stage, [length], [targets], cached=False)
    attention = 6 * length**2 * shape.width * shape.layers
    attention += (shape.tower_layers - 1) * 4 * (shape.image_tokens + 1) ** 2 * shape.tower_width
    assert products == pytest.approx(whole - attention, rel=0.02)
    saved = whole - model_flops(shape, stage, [length], [targets], cached=True)
    assert 0 < saved < whole
    wider = replace(shape, vocab=2 * shape.vocab)
    assert model_flops(wider, stage, [length], [targets], False) - whole == 4 * shape.width * shape.vocab * targets


@pytest.mark.slow
def test_the_whole_benchmark_on_a_tiny_model(tmp_path: Path) -> None:
    argv = ["--tiny", "--stage", "2", "--rows", "even", "--samples", "8", "--runs", "2", "--threads", "1"]
    argv += ["--json", str(tmp_path / "out.json")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training", *argv], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    has_trl = importlib.util.find_spec("trl") is not None
    assert ("TRL is not installed" in done.stdout) != has_trl
    assert ("TRL SFTTrainer" in done.stdout) == has_trl
    (found,) = json.loads((tmp_path / "out.json").read_text())["stages"]
    entries = {(entry["system"], entry["mode"]): entry for entry in found["entries"]}
    others = {(name, mode) for name in ["hf"] + ["trl"] * has_trl for mode in ("matched", "default", "best")}
    assert set(entries) == others | {("polymodal", mode) for mode in ("matched", "default", "best", "cached")}
    for entry in entries.values():
        assert len(entry["turns"]) == 2
        assert all(turn["trained_tokens"] == sum(found["targets"]) for turn in entry["turns"])
        assert all(turn["wall_s"] > 0 and turn["samples"] == 8 for turn in entry["turns"])
    padded, packed = entries["polymodal", "matched"]["turns"][0], entries["polymodal", "best"]["turns"][0]
    assert padded["slots"] == entries["hf", "matched"]["turns"][0]["slots"] > packed["slots"] == packed["real_tokens"]
