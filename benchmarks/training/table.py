"""The figures of a stage as a table in plain text."""

from __future__ import annotations

from statistics import median
from typing import Any

TITLES = {
    1: "stage 1: projector only, captions",
    2: "stage 2: projector + LoRA on all linear layers of the language model, conversations",
}
NAMES = {"hf": "HF Trainer", "trl": "TRL SFTTrainer", "polymodal": "polymodal"}
NOTES = {
    "matched": "matched flags: float32, padded, same micro-batches, same order, no feature cache",
    "default": "default flags: HF float32, padded; TRL bf16, padded, activations computed twice; polymodal bf16 where "
    "the machine has it, rows of like length together",
    "best": "best flags: HF and TRL {best}, fused AdamW; polymodal packs to {tokens} tokens; no feature cache",
    "cached": "its own line, since the others have no such flag: the frozen tower runs once per image, in set-up",
}
COLUMNS = (
    "", "type", "samples/s", "range", "ratio", "range", "x HF default", "real tok/s", "CPU s/sample", "peak GB",
    "padding", "roofline", "loss", "set-up s",
)  # fmt: skip


def draw_table(stage: dict[str, Any]) -> str:
    """Lay out one stage.

    Args:
        stage: As `run_stage` returns it.

    Returns:
        Lines of text.
    """
    roofs = {precision: median(speeds) for precision, speeds in stage["matmul_flops"].items() if speeds}
    matmul = ", ".join(f"{roof / 1e9:.0f} GFLOP/s in {precision}" for precision, roof in roofs.items())
    rows: list[tuple[str, ...] | str] = [COLUMNS]
    shown = ""
    for entry in stage["entries"]:
        if entry["mode"] != shown:
            shown = entry["mode"]
            rows.append(NOTES[shown].format(**stage["flags"]))
        rows.append(line(entry, stage["entries"], stage["model_flops"][shown], roofs[entry["precision"]]))
    widths = [max(len(row[i]) for row in rows if not isinstance(row, str)) for i in range(len(COLUMNS))]
    lengths = sorted(stage["lengths"])
    out = [
        "",
        f"{TITLES[stage['stage']]}; {len(lengths)} rows of {lengths[0]} to {lengths[-1]} tokens, "
        f"{sum(stage['targets'])} of {sum(lengths)} trained",
        f"matmul: {matmul}; a pass over the rows needs {stage['model_flops']['best'] / 1e9:.0f} GFLOP, "
        f"{stage['model_flops']['cached'] / 1e9:.0f} with kept features",
        "ratio: beside the HF Trainer's line above; under best flags and with kept features beside the fastest line of",
        "another system; loss: the first step's",
    ]
    for row in rows:
        if isinstance(row, str):
            out.append(f"-- {row}")
        else:
            cells = [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
            out.append("  ".join(cells).rstrip())
    return "\n".join(out)


def reference(entry: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What a line is held against: the HF Trainer in the same mode, or, of all others' lines, the fastest."""
    same = [other for other in entries if other["system"] == "hf" and other["mode"] == entry["mode"]]
    others = [other for other in entries if other["system"] != "polymodal"]
    return min(same if entry["mode"] in ("matched", "default") else others, key=seconds, default=None)


def seconds(entry: dict[str, Any]) -> float:
    """A system's usual time of a turn."""
    return median(turn["wall_s"] for turn in entry["turns"])


def line(entry: dict[str, Any], entries: list[dict[str, Any]], flops: float, roof: float) -> tuple[str, ...]:
    """One system's cells."""
    turns = entry["turns"]
    rates = sorted(turn["samples"] / turn["wall_s"] for turn in turns)
    wall = seconds(entry)
    same = reference(entry, entries)
    # Matched flags are the HF Trainer's own, but for the optimizer's kernel.
    plain = [e for mode in ("default", "matched") for e in entries if (e["system"], e["mode"]) == ("hf", mode)]
    ratio = spread = "-"
    if same is not None:
        # Turn by turn: what slows the machine for a while slows both.
        pairs = zip(turns, same["turns"], strict=True)
        ratios = sorted(other["wall_s"] / turn["wall_s"] for turn, other in pairs)
        ratio, spread = f"{median(ratios):.2f}", f"{ratios[0]:.2f}..{ratios[-1]:.2f}"
    return (
        NAMES[entry["system"]],
        entry["precision"],
        f"{median(rates):.3f}",
        f"{rates[0]:.3f}..{rates[-1]:.3f}",
        ratio,
        spread,
        f"{seconds(plain[0]) / wall:.2f}" if plain else "-",
        f"{turns[0]['real_tokens'] / wall:.0f}",
        f"{median(turn['cpu_s'] / turn['samples'] for turn in turns):.2f}",
        f"{turns[-1]['peak_bytes'] / 1e9:.2f}",
        f"{1 - turns[0]['real_tokens'] / turns[0]['slots']:.0%}",
        f"{flops / wall / roof:.0%}",
        f"{entry['warmup']['first_loss']:.4f}",
        f"{entry['warmup']['setup_s']:.1f}",
    )
