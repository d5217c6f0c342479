"""What 8-bit weights change in a model on the CPU: speed, memory, logits, answers.

    python benchmarks/quantize.py [MODEL] [RUNS]

The same prompts to the same model in float32, with 8-bit weights, and with 8-bit weights but for the output head; the
three take turns, so that other work on the machine slows all of them alike. Medians over the runs, 16 tokens each;
logits are those of the first token, and tokens are compared where all answers so far agree.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from pathlib import Path

import torch

import polymodal
from polymodal import Image, LocalBackend, Message, PolymodalError, user
from polymodal.generation.generate import start_decoding
from polymodal.modeling.lora import merge_adapter
from polymodal.modeling.quantization import fast_dtype, quantize_int8
from polymodal.processing.collate import collate

IMAGES = Path(__file__).resolve().parent.parent / "examples" / "pictures"
QUESTIONS = ("What is this?", "Describe this picture in detail.", "Which colours do you see?", "Is there a cat?")
TOKENS = 16


def main(name: str = "default", runs: str = "3") -> None:
    plain = polymodal.load(name, "cpu")
    if not isinstance(plain, LocalBackend):
        raise PolymodalError(f"{name}: not a model that is opened here")
    backends = {"float32": plain, "int8": quantized(plain), "int8 but for the head": quantized(plain, ["lm_head"])}
    prompts = [[user(Image(path), question)] for path in sorted(IMAGES.glob("*.jpg")) for question in QUESTIONS]
    repeats = 40 if plain.context_length > 1024 else 2
    long = [user(Image(sorted(IMAGES.glob("*.jpg"))[0]), "Look closely at this picture. " * repeats + QUESTIONS[1])]
    print(f"model {name}, {torch.get_num_threads()} threads, prompts in {fast_dtype()}, torch {torch.__version__}")

    decode: dict[str, list[float]] = {kind: [] for kind in backends}
    first: dict[str, list[float]] = {kind: [] for kind in backends}
    for backend in backends.values():
        answer(backend, prompts[0], 2)  # warms up
    for _ in range(int(runs)):
        for kind, backend in backends.items():
            decode[kind].extend(answer(backend, prompts[0], TOKENS)[2][1:])
        for kind, backend in backends.items():
            first[kind].append(answer(backend, long, 1)[2][0])
    length = backends["float32"].prepare(long, 0).input_ids.numel()
    print(f"{'':<24}tokens/s   first token of {length}, ms   MB of weights")
    for kind, backend in backends.items():
        speed, start = 1 / statistics.median(decode[kind]), 1000 * statistics.median(first[kind])
        times = statistics.median(decode["float32"]) * speed, 1000 * statistics.median(first["float32"]) / start
        print(f"{kind:<24}{speed:8.1f} ({times[0]:.2f}x){start:10.0f} ({times[1]:.2f}x){megabytes(backend):14.0f}")

    wanted = [answer(plain, prompt, TOKENS) for prompt in prompts]
    print(f"\n{len(prompts)} prompts   largest logit difference   same token   same answer")
    for kind, backend in list(backends.items())[1:]:
        got = [answer(backend, prompt, TOKENS) for prompt in prompts]
        off = max(float((a[0] - b[0]).abs().max()) for a, b in zip(wanted, got, strict=True))
        same = [prefix(a[1], b[1]) for a, b in zip(wanted, got, strict=True)]
        share = sum(same) / sum(min(len(a[1]), n + 1) for a, n in zip(wanted, same, strict=True))
        equal = sum(a[1] == b[1] for a, b in zip(wanted, got, strict=True))
        print(f"{kind:<24}{off:12.3f}{share:25.1%}{equal:10} of {len(prompts)}")
    low, high = (float(f([pick(row[0]) for row in wanted])) for f, pick in ((min, torch.min), (max, torch.max)))
    print(f"(logits lie between {low:.1f} and {high:.1f})")


def quantized(backend: LocalBackend, skip: list[str] | None = None) -> LocalBackend:
    """A copy with 8-bit weights."""
    model = copy.deepcopy(backend.model)
    merge_adapter(model)
    quantize_int8(model, skip or [])
    return LocalBackend(model, backend.tokenizer, backend.config)


@torch.inference_mode()
def answer(backend: LocalBackend, messages: list[Message], tokens: int) -> tuple[torch.Tensor, list[int], list[float]]:
    """Answer greedily.

    Returns:
        The first token's logits [V], the ids up to the end, and each token's seconds; the first one's holds everything
        up to it.
    """
    begin = time.perf_counter()
    batch = collate([backend.prepare(messages, tokens)], backend.processor.pad_id, side="left")
    model = backend.model
    embeds = model.embed(batch.input_ids, batch.plans, batch.sample_of_image, batch.pixel_values, batch.features)
    following = start_decoding(model, embeds, batch.attention_mask)
    start = logits = following(None)
    ids, seconds = [int(logits.argmax())], [time.perf_counter() - begin]
    while len(ids) < tokens and (tokens != TOKENS or ids[-1] not in backend.processor.template.stop_ids):
        begin = time.perf_counter()
        logits = following(logits.argmax(dim=-1))
        ids.append(int(logits.argmax()))
        seconds.append(time.perf_counter() - begin)
    return start[0], ids, seconds


def prefix(first: list[int], second: list[int]) -> int:
    """How many ids agree from the beginning."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def megabytes(backend: LocalBackend) -> float:
    """Of everything that the language model holds."""
    llm = backend.model.llm
    tensors = {t.data_ptr(): t for t in (*llm.parameters(), *llm.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except PolymodalError as error:
        sys.exit(f"quantize: {error}")
