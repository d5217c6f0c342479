"""How long commands take to begin: wall and processor seconds, and where an answer's go.

    python -m benchmarks.start [RUNS]

Every command is a process of its own and all take turns; medians over the runs. What was made once before (the
language model's conversion, its graph) is made before the clock starts, and files are in the system's cache.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMAGE = Path(__file__).resolve().parent.parent / "examples" / "pictures" / "apple.png"
TURNS = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "An apple."}]
ASK = ("generate", "--prompt", "What is this?", "--image", str(IMAGE))
GOALS = {"--help": 0.3, "describe": 2.0, "plan": 2.0, "data check": 2.0, "generate, a graph": 2.5}
"""Wall seconds on two idle cores."""

STEPS = """
import json, sys, time
begin, steps = time.perf_counter(), {}
def step(name):
    global begin
    steps[name], begin = time.perf_counter() - begin, time.perf_counter()
import torch
step("import torch")
import transformers
step("import transformers")
import polymodal
from polymodal.backends import local
from polymodal.checkpoints import model_folder
from polymodal.modeling import onnx_llm
step("import polymodal")
model = polymodal.load("default", "cpu", quantize=sys.argv[2] if sys.argv[2] != "none" else None)
step("open the model")
question = [polymodal.user(polymodal.Image(sys.argv[1]), "What is this?")]
events = model.stream(question)
next(events)
step("image and first token")
list(events)
step("the rest of the answer")
print(json.dumps(steps))
"""


def main(runs: str = "5") -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        rows.write_text(json.dumps([{"image": IMAGE.name, "conversations": TURNS}]), encoding="utf-8")
        output = ("--image-root", str(IMAGE.parent), "--output", str(Path(folder) / "report"))
        commands = {
            "--help": ("--help",),
            "describe": ("describe", "default"),
            "plan": ("plan", "default", "--image", "480x640"),
            "data check": ("data", "check", str(rows), *output),
            "generate, a graph": ASK,
            "generate, float32": (*ASK, "--quantize", "none"),
        }
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        parts: dict[str, list[dict[str, float]]] = {"auto": [], "none": []}
        for number in range(int(runs) + 1):
            for name, command in commands.items():
                seconds = timed([sys.executable, "-m", "polymodal", *command])
                if number:  # the first makes what is made once
                    took[name].append(seconds)
            for how, measured in parts.items():
                done = subprocess.run([sys.executable, "-c", STEPS, str(IMAGE), how], capture_output=True, check=True)
                if number:
                    measured.append(json.loads(done.stdout.splitlines()[-1]))
    print(f"medians of {runs}, {os.cpu_count()} cores, seconds\n{'':<24}   wall   processor   goal")
    for name, pairs in took.items():
        wall, processor = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{name:<24}{wall:7.2f}{processor:12.2f}{GOALS.get(name, ''):>7}")
    print(f"\n{'inside generate':<24}  graph   float32")
    for name in parts["auto"][0]:
        graph, plain = (statistics.median(run[name] for run in measured) for measured in parts.values())
        print(f"{name:<24}{graph:7.2f}{plain:10.2f}")


def timed(command: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of a process."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main(*sys.argv[1:])
