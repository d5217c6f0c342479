"""A tiny random language model, tower and image data set, on disk, as a recipe would name them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from polymodal.config import parse_config
from polymodal.training import train
from polymodal.training.recipes.sections import RecipeBase
from polymodal.training.recipes.sft import Recipe
from polymodal.training.trainer import Trainer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COLOURS = {"red": (220, 30, 30), "green": (20, 180, 40), "blue": (30, 60, 220), "white": (250, 250, 250)}


def make_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `llm/`, `tower/`, `data.json` and images."""
    from PIL import Image
    from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    llm = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.3,  # a random model of the usual 0.02 can hardly be steered
        )
    )
    llm.save_pretrained(root / "llm")
    tokenizer.save_pretrained(root / "llm")
    tower = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    )
    tower.save_pretrained(root / "tower")
    records = []
    for number in range(24):
        name = list(COLOURS)[number % 4]
        Image.new("RGB", (30 + number, 40), COLOURS[name]).save(root / f"{number}.png")
        answer = name if number % 3 else f"a {name} image"
        turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": answer}]
        if number % 5 == 0:
            turns += [{"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "yes"}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    records.append({"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "hello"}]})
    (root / "data.json").write_text(json.dumps(records))
    return root


@pytest.fixture
def plain(tiny: Path, tmp_path: Path) -> dict[str, Any]:
    """A projector-only recipe as plain data, ready to be changed by a test."""
    return {
        "name": "tiny",
        "init": {
            "model": {
                "vision": {"vision_tower": str(tiny / "tower"), "type": "clip"},
                "image": {
                    "image_aspect_ratio": "squash",
                    "tile_size": [28, 28],
                    "image_mean": [0.5, 0.5, 0.5],
                    "image_std": [0.5, 0.5, 0.5],
                },
                "projector": {"mm_projector_type": "mlp2x_gelu"},
                "llm": {"model_name_or_path": str(tiny / "llm")},
            }
        },
        "data": {"mix": [{"path": str(tiny / "data.json")}]},
        "train": [{"match": "projector.*", "train": True}],
        "optim": {"learning_rate": 1e-2},
        "batch": {"global_size": 8, "micro_size": 4},
        "run": {"max_steps": 6, "epochs": 10, "log_every": 1, "save_every": 2, "threads": 1, "precision": "fp32"},
        "output_dir": str(tmp_path / "run"),
    }


@pytest.fixture(scope="session")
def recipe_of() -> Callable[..., Recipe]:
    """Make a recipe of plain data with changes such as `run__max_steps=3` or `lora={...}`."""

    def make(plain: dict[str, Any], **changes: Any) -> Recipe:
        merged = json.loads(json.dumps(plain))
        for key, value in changes.items():
            section, _, inner = key.partition("__")
            if inner:
                merged[section][inner] = value
            else:
                merged[section] = value
        return parse_config(Recipe, merged, "recipe")

    return make


@pytest.fixture
def train_until(monkeypatch: pytest.MonkeyPatch) -> Callable[[RecipeBase, int], None]:
    """Train a recipe, and kill it after so many steps."""

    def start(recipe: RecipeBase, step: int) -> None:
        inner = Trainer.step

        def stopping(run: Trainer, *rest: Any) -> float:
            if run.state.step == step:
                raise KeyboardInterrupt
            return inner(run, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", stopping)
            with pytest.raises(KeyboardInterrupt):
                train(recipe)

    return start


@pytest.fixture(scope="session")
def run_jobs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[dict[str, Any]]], list[Any]]:
    """Train recipes in processes of their own, and kill some; see run_driver.py."""

    def run(jobs: list[dict[str, Any]]) -> list[Any]:
        plan = tmp_path_factory.mktemp("jobs") / "jobs.json"
        plan.write_text(json.dumps(jobs))
        driver = Path(__file__).with_name("run_driver.py")
        # One thread a process, whatever the machine: two processes share its cores.
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(
            [sys.executable, str(driver), str(plan)], capture_output=True, text=True, timeout=600, env=environment
        )
        assert done.returncode == 0, done.stderr
        results: list[Any] = json.loads(done.stdout.splitlines()[-1])
        return results

    return run


@pytest.fixture(scope="session")
def order_of() -> Callable[[Path], dict[int, list[list[str]]]]:
    """Read what run_driver.py noted: the micro-batches of each step, as they were when it was taken the last time."""

    def read(path: Path) -> dict[int, list[list[str]]]:
        steps: dict[int, list[list[str]]] = {}
        before = -1
        for line in path.read_text().splitlines():
            step, ids = json.loads(line)
            # A step that was killed half-way and is taken again begins anew, with the same first micro-batch.
            if step != before or ids == steps[step][0]:
                steps[step] = []
            steps[step].append(ids)
            before = step
        return steps

    return read
