"""The systems under test. Each trains until the clock ends it; flags come from its documentation, none is patched.

All three: AdamW, constant rate, clipping at norm 1, loss per trained token over the whole step, no checkpoints, a log
line every step. HF Trainer and polymodal tokenise before training; TRL tokenises images' conversations in its
collator and cannot do otherwise. Images are decoded from their files in every step, except in mode "cached".
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.training.models import build_inputs, build_llava, build_processor, freeze_for_stage
from benchmarks.training.rows import read_rows
from benchmarks.training.setting import SHAPES, Job
from benchmarks.training.turns import Clock

if TYPE_CHECKING:
    from transformers import LlavaProcessor

LEARNING_RATE = 1e-4


def run_hf(job: Job, clock: Clock) -> None:
    """The Trainer of transformers over LlavaForConditionalGeneration: padded batches, logits at every position."""
    from PIL import Image
    from transformers import Trainer, TrainingArguments

    shape = SHAPES[job.shape]
    processor = build_processor(shape, job.stage)
    model = freeze_for_stage(build_llava(shape, processor.image_token_id, job.seed), job.stage, shape)
    clock.watch(model, processor.tokenizer.pad_token_id)
    samples = [tokenise(processor, row) for row in read_rows(Path(job.data))]

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        def pad(name: str, value: int) -> torch.Tensor:
            rows = [torch.tensor(sample[name]) for sample in batch]
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        images = []
        for path in (sample["image"] for sample in batch if sample["image"]):
            with Image.open(path) as image:
                images.append(image.convert("RGB"))
        lengths = torch.tensor([len(sample["input_ids"]) for sample in batch])
        pixels = processor.image_processor(images, return_tensors="pt") if images else {}
        return {
            "input_ids": pad("input_ids", processor.tokenizer.pad_token_id),
            "labels": pad("labels", -100),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            **pixels,
        }

    arguments = TrainingArguments(**trainer_arguments(job))
    chosen = [samples[i] for i in row_order(job)]
    trainer = Trainer(model=model, args=arguments, train_dataset=chosen, data_collator=collate)
    clock.first_loss = lambda: float(trainer.state.log_history[0]["loss"])
    trainer.train()


def tokenise(processor: LlavaProcessor, row: dict[str, Any]) -> dict[str, Any]:
    """One row for the Trainer.

    Args:
        processor: Its template marks what is trained.
        row: As `read_rows` gives it.

    Returns:
        `input_ids`, `labels` (-100 where nothing is trained) and the path of the `image`.
    """
    from PIL import Image

    messages = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in row["messages"]]
    if row["image"]:
        with Image.open(row["image"]) as image:
            messages[0]["content"].insert(0, {"type": "image", "image": image.convert("RGB")})
    made = processor.apply_chat_template(
        messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        processor_kwargs={"add_special_tokens": False},
    )
    ids, mask = made["input_ids"][0], made["assistant_masks"][0]
    labels = [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
    return {"input_ids": ids, "labels": labels, "image": row["image"]}


def run_trl(job: Job, clock: Clock) -> None:
    """TRL's SFTTrainer with its own collator for images; it refuses packing there, and so pads."""
    from datasets import Dataset, Image, List
    from trl import SFTConfig, SFTTrainer

    shape = SHAPES[job.shape]
    processor = build_processor(shape, job.stage)
    model = freeze_for_stage(build_llava(shape, processor.image_token_id, job.seed), job.stage, shape)
    clock.watch(model, processor.tokenizer.pad_token_id)
    rows = [
        # Bytes of the answers and questions: enough to group by length.
        {
            "messages": row["messages"],
            "images": [row["image"]] if row["image"] else [],
            "length": sum(len(m["content"]) for m in row["messages"]),
        }
        for row in read_rows(Path(job.data))
    ]
    dataset = Dataset.from_list(rows).cast_column("images", List(Image())).select(row_order(job))
    arguments = SFTConfig(**trainer_arguments(job), assistant_only_loss=True, max_length=None)
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=dataset, processing_class=processor)
    clock.first_loss = lambda: float(trainer.state.log_history[0]["loss"])
    trainer.train()


def trainer_arguments(job: Job) -> dict[str, Any]:
    """Flags that the Trainer of transformers and TRL's, which is built on it, share."""
    # What the Trainer and TRL choose themselves differs: TRL trains in bf16 and checkpoints activations.
    chosen: dict[str, Any] = {}
    if job.mode != "default":
        chosen = {"gradient_checkpointing": False, "bf16": job.precision == "bf16"}
    if job.mode == "matched":
        chosen["optim"] = "adamw_torch"
    return {
        "output_dir": job.folder,
        "max_steps": job.total_steps,
        "per_device_train_batch_size": job.micro,
        "gradient_accumulation_steps": job.rows // job.micro,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        # The rows are shuffled already.
        "train_sampling_strategy": "group_by_length" if job.mode == "best" else "sequential",
        **chosen,
        "use_cpu": job.device == "cpu",
        "dataloader_pin_memory": job.device != "cpu",
        "remove_unused_columns": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": job.seed,
    }


def row_order(job: Job) -> list[int]:
    """Rows in the order in which polymodal sees them, for all steps; in mode "best" the sampler has its own."""
    from polymodal.training.steps import epoch_order

    count = job.rows * job.steps
    if job.mode == "best":
        return list(range(count))
    sources = ((range(count), 1.0),)
    epochs = -(-job.total_steps // job.steps)
    return [int(i) for epoch in range(epochs) for i in epoch_order(sources, job.seed, epoch)]


def run_polymodal(job: Job, clock: Clock) -> None:
    """The real `train`, with a recipe as a user would write it."""
    from polymodal.config import parse_config
    from polymodal.training import train
    from polymodal.training.recipes.sft import Recipe
    from polymodal.training.reporting.log import read_log

    shape = SHAPES[job.shape]
    inputs = build_inputs(shape, job.stage, job.seed)
    clock.watch(inputs.model, inputs.tokenizer.pad_token_id)
    batch: dict[str, Any] = {"global_size": job.rows, "micro_size": job.micro}
    if job.mode == "matched":
        batch |= {"packing": "none", "group_by_length": False}
    elif job.mode != "default":
        batch |= {"packing": "pack", "micro_tokens": job.micro_tokens}
    plain = {
        "name": f"{job.mode}-{job.stage}",
        # Not read, since the model is handed over in memory.
        "init": {"model": inputs.config.model_dump(exclude_none=True)},
        "data": {"mix": [{"path": str(Path(job.data) / "rows.json")}]},
        "train": [{"match": "projector.*", "train": True}],
        "lora": {"lora_r": shape.lora_r, "lora_alpha": 2 * shape.lora_r} if job.stage == 2 else None,
        "optim": {"learning_rate": LEARNING_RATE, "schedule": "constant", "warmup": 0.0},
        "batch": batch,
        "run": {
            "max_steps": job.total_steps,
            "epochs": job.total_steps,
            "seed": job.seed,
            "precision": job.precision,
            "log_every": 1,
            "save_every": 0,
            "threads": job.threads,
            "feature_cache": "memory" if job.mode == "cached" else "off",
        },
        "output_dir": job.folder,
    }
    clock.first_loss = lambda: float(read_log(Path(job.folder) / "log.jsonl")[0]["loss"])
    train(parse_config(Recipe, plain, "benchmark"), inputs)


RUN: dict[str, Callable[[Job, Clock], None]] = {"hf": run_hf, "trl": run_trl, "polymodal": run_polymodal}
