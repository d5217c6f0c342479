"""Ways to make an answer on the CPU: speed, memory, logits, answers.

    python benchmarks/quantize.py [MODEL] [RUNS]

The same prompts by transformers' own `generate`, by the model in float32, with 8-bit layers of ours, and as a graph of
ONNX Runtime with weights of 32, 8 and 4 bits (extra `fast`); all take turns, so that other work on the machine slows
them alike. Medians over the runs: tokens a second after the first, the first token of a long prompt, a whole answer of
64 tokens about an image, and the first token of a second question behind about 640 tokens. Logits are those of the
first token, and tokens are compared where all answers so far agree.
"""

from __future__ import annotations

import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import polymodal
from polymodal import GenerationParams, Image, LocalBackend, Message, PolymodalError, assistant, user
from polymodal.generation.generate import embed_batch, start_decoding
from polymodal.modeling.lora import merge_adapter
from polymodal.modeling.onnx_llm import BITS, OnnxLLM, available
from polymodal.modeling.quantization import fast_dtype, quantize_int8
from polymodal.processing.collate import collate

IMAGES = Path(__file__).resolve().parent.parent / "examples" / "pictures"
QUESTIONS = ("What is this?", "Describe this picture in detail.", "Which colours do you see?", "Is there a cat?")
TOKENS = 16
WHOLE = 64
STOCK, PLAIN = "transformers generate", "float32"


def main(name: str = "default", runs: str = "3") -> None:
    plain = polymodal.load(name, "cpu")
    if not isinstance(plain, LocalBackend):
        raise PolymodalError(f"{name}: not a model that is opened here")
    backends = {PLAIN: plain, "int8 layers": quantized(plain)}
    for how in BITS if available() else ():
        try:
            opened = polymodal.load(name, "cpu", quantize=how)
        except PolymodalError as error:
            print(f"graph {how}: {error}")
            continue
        if isinstance(opened, LocalBackend) and isinstance(opened.model.llm, OnnxLLM):
            backends[f"graph {how}"] = opened
    pictures = sorted(IMAGES.glob("*.jpg"))
    prompts = [[user(Image(path), question)] for path in pictures for question in QUESTIONS]
    repeats = 40 if plain.context_length > 1024 else 2
    long = [user(Image(pictures[0]), "Look closely at this picture. " * repeats + QUESTIONS[1])]
    talk = [user(Image(pictures[0]), "Look closely at this picture. " * (100 if repeats > 2 else 2)), assistant("Yes.")]
    print(f"model {name}, {torch.get_num_threads()} threads, prompts in {fast_dtype()}, torch {torch.__version__}")

    ways: dict[str, Callable[[list[Message], int], list[float]]] = {STOCK: lambda asked, n: stock(plain, asked, n)}
    ways |= {kind: (lambda asked, n, b=backend: answer(b, asked, n)[2]) for kind, backend in backends.items()}
    took: dict[str, dict[str, list[float]]] = {kind: {} for kind in ways}
    for way in ways.values():
        way(prompts[0], 2)  # warms up
    for _ in range(int(runs)):
        for kind, way in ways.items():
            seconds = way(prompts[1], WHOLE)
            took[kind].setdefault("token", []).append(sum(seconds[1:]) / (len(seconds) - 1))
            took[kind].setdefault("whole", []).append(sum(seconds))
            took[kind].setdefault("first", []).append(way(long, 1)[0])
            if kind in backends:
                took[kind].setdefault("second", []).append(second_turn(backends[kind], talk))
    lengths = [plain.prepare(asked, 0).input_ids.numel() for asked in (long, [*talk, user(QUESTIONS[0])])]
    print(f"medians of {runs}; ratios to {STOCK}, in brackets, are of each measure's own column")
    print(
        f"{'':<24}tokens/s        first of {lengths[0]}, ms   {WHOLE} tokens, s    2nd turn of {lengths[1]}, ms     MB"
    )
    base = {what: statistics.median(values) for what, values in took[STOCK].items()}
    for kind in ways:
        mid = {what: statistics.median(values) for what, values in took[kind].items()}
        ratio = {what: f"({base[what] / mid[what]:.2f}x)" for what in base}
        second = f"{1000 * mid['second']:12.0f}" if "second" in mid else f"{'':12}"
        size = f"{megabytes(backends[kind]):10.0f}" if kind in backends else ""
        print(
            f"{kind:<24}{1 / mid['token']:6.1f} {ratio['token']:<9}{1000 * mid['first']:8.0f} {ratio['first']:<9}"
            f"{mid['whole']:8.2f} {ratio['whole']:<9}{second}{size}"
        )

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


def second_turn(backend: LocalBackend, talk: list[Message]) -> float:
    """Seconds to the first token of a second question, the first one's cache at hand."""
    params = GenerationParams(max_new_tokens=1)
    backend.forget()
    backend.generate(talk[:1], params)
    return backend.generate([*talk, user(QUESTIONS[0])], params).timing.first_token_s


@torch.inference_mode()
def stock(backend: LocalBackend, messages: list[Message], tokens: int) -> list[float]:
    """Answer by the language model's own `generate`; each token's seconds, the first one's with all before it."""
    from transformers import LogitsProcessor

    times = [time.perf_counter()]

    class Clock(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            times.append(time.perf_counter())
            return scores

    batch = collate([backend.prepare(messages, tokens)], backend.processor.pad_id, side="left")
    backend.model.llm.generate(
        inputs_embeds=embed_batch(backend.model, batch),
        attention_mask=batch.attention_mask,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        logits_processor=[Clock()],
    )
    return [b - a for a, b in itertools.pairwise(times)]


def quantized(backend: LocalBackend) -> LocalBackend:
    """A copy with 8-bit layers."""
    model = copy.deepcopy(backend.model)
    merge_adapter(model)
    quantize_int8(model)
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
    following = start_decoding(model, embed_batch(model, batch), batch.attention_mask)
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
    """Of everything that the language model holds; of a graph, its file and the table of embeddings."""
    llm = backend.model.llm
    if isinstance(llm, OnnxLLM):
        return sum(path.stat().st_size for path in llm.folder.glob("*")) / 1e6
    tensors = {t.data_ptr(): t for t in (*llm.parameters(), *llm.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values()) / 1e6


if __name__ == "__main__":
    try:
        main(*sys.argv[1:3])
    except PolymodalError as error:
        sys.exit(f"quantize: {error}")
