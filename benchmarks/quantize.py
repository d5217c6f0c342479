"""Ways to make an answer on the CPU: speed, memory, logits, answers.

    python benchmarks/quantize.py [MODEL] [RUNS]

The same prompts by transformers' own `generate`, by the model in float32, with 8-bit layers of ours, as a graph of
ONNX Runtime with weights of 32, 8 and 4 bits (extra `fast`), and in llama.cpp where llama-cpp-python is installed (pip
builds it for this machine, in 10 to 40 minutes; nothing else needs it): the merged weights as GGUF, fed with our
embeddings of words and image. transformers and llama.cpp have a process of their own, in which threads wait as they do
without polymodal. All take turns, so that other work on the machine slows them alike.

Medians over the runs: tokens a second after the first, the first token of a long prompt, a whole answer of 64 tokens
about an image, and the first token of a second question behind about 640 tokens. Logits are those of the first token,
and tokens are compared where all answers so far agree. At last what that answer costs with one core kept busy by
another program, beside what it costs alone.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import cache, partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, cast

import polymodal  # isort: skip  # before torch, whose threads wait as it says
import numpy as np
import torch

from polymodal import GenerationParams, Image, LocalBackend, Message, PolymodalError, assistant, user
from polymodal.generation.generate import embed_batch, start_decoding
from polymodal.interop.gguf.export import describe_tokens
from polymodal.interop.gguf.weights import reasons_against_llm, write_llm
from polymodal.modeling.lora import fold_in, merge_adapter
from polymodal.modeling.onnx_llm import BITS, OnnxLLM, available
from polymodal.modeling.quantization import fast_dtype, quantize_int8
from polymodal.processing.collate import collate

IMAGES = Path(__file__).resolve().parent.parent / "examples" / "pictures"
QUESTIONS = ("What is this?", "Describe this picture in detail.", "Which colours do you see?", "Is there a cat?")
TOKENS = 16
WHOLE = 64
STOCK, PLAIN = "transformers generate", "float32"
CPP = ("F32", "Q8_0", "Q4_0")
"""Types of weights in llama.cpp, which makes the later ones of the first."""
SPINS = "300000"
"""How long threads of OpenMP wait for each other before they sleep where nobody says so."""


class Made(NamedTuple):
    """An answer, and what it cost."""

    logits: np.ndarray  # The first token's, [V]
    ids: list[int]  # Up to the end
    seconds: list[float]  # Each token's; the first one's holds everything up to it
    cpu: float  # Seconds of all processors


Way = Callable[[list[Message], int], Made]


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

    os.environ["GOMP_SPINCOUNT"] = SPINS  # of the process that is started now
    with another_process() as pool:
        ways: dict[str, Way] = {STOCK: partial(ask_peer, pool, name, STOCK)}
        ways |= {kind: partial(answer, backend) for kind, backend in backends.items()}
        sizes = {kind: megabytes(backend) for kind, backend in backends.items()}
        try:
            sizes |= (cpp := pool.submit(llama_cpp_sizes, name).result())
            ways |= {kind: partial(ask_peer, pool, name, kind) for kind in cpp}
        except PolymodalError as error:
            print(f"llama.cpp: {error}")
        compare(ways, backends, sizes, prompts, long, talk, int(runs))


def compare(
    ways: dict[str, Way],
    backends: dict[str, LocalBackend],
    sizes: dict[str, float],
    prompts: list[list[Message]],
    long: list[Message],
    talk: list[Message],
    runs: int,
) -> None:
    plain = backends[PLAIN]
    took: dict[str, dict[str, list[float]]] = {kind: {} for kind in ways}
    for way in ways.values():
        way(prompts[0], 2)  # warms up
    for _ in range(runs):
        for kind, way in ways.items():
            seconds = way(prompts[1], WHOLE).seconds
            took[kind].setdefault("token", []).append(sum(seconds[1:]) / (len(seconds) - 1))
            took[kind].setdefault("whole", []).append(sum(seconds))
            took[kind].setdefault("first", []).append(way(long, 1).seconds[0])
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
        size = f"{sizes[kind]:10.0f}" if kind in sizes else ""
        print(
            f"{kind:<24}{1 / mid['token']:6.1f} {ratio['token']:<9}{1000 * mid['first']:8.0f} {ratio['first']:<9}"
            f"{mid['whole']:8.2f} {ratio['whole']:<9}{second}{size}"
        )

    wanted = [ways[PLAIN](prompt, TOKENS) for prompt in prompts]
    print(f"\n{len(prompts)} prompts   largest logit difference   same token   same answer")
    for kind in [kind for kind in ways if kind not in (STOCK, PLAIN)]:
        got = [ways[kind](prompt, TOKENS) for prompt in prompts]
        off = max(abs(a.logits - b.logits).max() for a, b in zip(wanted, got, strict=True))
        same = [prefix(a.ids, b.ids) for a, b in zip(wanted, got, strict=True)]
        share = sum(same) / sum(min(len(a.ids), n + 1) for a, n in zip(wanted, same, strict=True))
        equal = sum(a.ids == b.ids for a, b in zip(wanted, got, strict=True))
        print(f"{kind:<24}{off:12.3f}{share:25.1%}{equal:10} of {len(prompts)}")
    low, high = min(made.logits.min() for made in wanted), max(made.logits.max() for made in wanted)
    print(f"(logits lie between {low:.1f} and {high:.1f})")
    beside_another({kind: partial(way, prompts[1], WHOLE) for kind, way in ways.items()}, runs)


def another_process() -> Executor:
    """One process for all that other programs answer."""
    return ProcessPoolExecutor(1, get_context("spawn"))


def ask_peer(pool: Executor, name: str, kind: str, messages: list[Message], tokens: int) -> Made:
    """An answer of another program."""
    return pool.submit(peer_answer, name, kind, messages, tokens).result()


def beside_another(ways: dict[str, Callable[[], Made]], runs: int) -> None:
    """Print what an answer costs alone, and with one core kept busy by another program."""
    took: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for _, busy in itertools.product(range(runs), (False, True)):
        other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        time.sleep(0.5)
        for kind, way in ways.items():
            made = way()
            took.setdefault((kind, busy), []).append((made.cpu, sum(made.seconds)))
        if other is not None:
            other.kill()
            other.wait()
    print(f"\n{WHOLE} tokens, medians  CPU s alone  beside another  ratio    wall s alone  beside another  ratio")
    for kind in ways:
        alone, beside = ([statistics.median(each) for each in zip(*took[kind, busy], strict=True)] for busy in (0, 1))
        cells = [f"{a:12.2f}{b:16.2f}{b / a:7.2f}" for a, b in zip(alone, beside, strict=True)]
        print(f"{kind:<22}{'    '.join(cells)}")


class LlamaCpp:
    """A language model in llama.cpp, which takes embeddings and gives next logits."""

    def __init__(self, path: Path, context: int) -> None:
        import llama_cpp

        threads = torch.get_num_threads()
        sizes = {"n_ctx": context, "n_batch": context, "n_threads": threads, "n_threads_batch": threads}
        self.lib, self.megabytes = llama_cpp, path.stat().st_size / 1e6
        self.llama: Any = llama_cpp.Llama(str(path), **sizes, n_gpu_layers=0, flash_attn=True, verbose=False)

    def start(self, _model: Any, embeds: torch.Tensor, _mask: torch.Tensor) -> Callable[..., torch.Tensor]:
        """As `start_decoding`, of one row."""
        lib, context, (rows, width) = self.lib, self.llama.ctx, embeds.shape[1:]
        lib.llama_memory_clear(lib.llama_get_memory(context), True)

        def following(ids: torch.Tensor | None) -> torch.Tensor:
            if ids is not None:
                batch = lib.llama_batch_get_one((lib.llama_token * 1)(int(ids)), 1)
            else:
                batch = lib.llama_batch_init(rows, width, 1)
                batch.n_tokens, values = rows, embeds.float().contiguous()
                ctypes.memmove(batch.embd, values.data_ptr(), values.nbytes)
                for row in range(rows):
                    batch.pos[row], batch.n_seq_id[row], batch.seq_id[row][0] = row, 1, 0
                    batch.logits[row] = row == rows - 1
            if lib.llama_decode(context, batch):
                raise PolymodalError("llama.cpp cannot go on with the answer")
            if ids is None:
                lib.llama_batch_free(batch)
            values = lib.llama_get_logits_ith(context, -1)
            found = (ctypes.c_float * self.llama.n_vocab()).from_address(ctypes.addressof(values.contents))
            return torch.frombuffer(found, dtype=torch.float32).clone()[None]

        return following


@cache
def open_plain(name: str) -> LocalBackend:
    """The model whose embeddings other programs are given."""
    return cast(LocalBackend, polymodal.load(name, "cpu"))


@cache
def open_llama_cpp(name: str) -> dict[str, LlamaCpp]:
    """The same language model in llama.cpp."""
    backend, found = open_plain(name), {}
    llm = copy.deepcopy(backend.model.llm)
    fold_in(llm)
    reasons = [] if find_spec("llama_cpp") else ["not installed (pip install llama-cpp-python)"]
    if reasons := [*reasons, *reasons_against_llm(llm)]:
        raise PolymodalError("; ".join(reasons))
    stops, rows = backend.processor.template.stop_ids, len(llm.get_input_embeddings().weight)
    tokens = partial(describe_tokens, tokenizer=backend.tokenizer, rows=rows, stop_ids=stops, jinja="")
    with tempfile.TemporaryDirectory() as work:
        plain = Path(work, "model.gguf")
        write_llm(plain, llm, "float32", name, tokens)
        for kind in CPP:
            path = plain if kind == CPP[0] else rounded_gguf(plain, kind)
            found[f"llama.cpp {kind}"] = LlamaCpp(path, min(2048, backend.context_length))
    return found


def llama_cpp_sizes(name: str) -> dict[str, float]:
    """What llama.cpp can be asked for, and the megabytes of it."""
    return {kind: llama.megabytes for kind, llama in open_llama_cpp(name).items()}


def peer_answer(name: str, kind: str, messages: list[Message], tokens: int) -> Made:
    """An answer by transformers or llama.cpp."""
    if kind == STOCK:
        return stock(open_plain(name), messages, tokens)
    return answer(open_plain(name), messages, tokens, open_llama_cpp(name)[kind].start)


def rounded_gguf(path: Path, kind: str) -> Path:
    """A GGUF file's weights rounded by llama.cpp as it does for this type."""
    import llama_cpp

    made = path.with_name(f"{kind}.gguf")
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}"), torch.get_num_threads()
    if llama_cpp.llama_model_quantize(str(path).encode(), str(made).encode(), params):
        raise PolymodalError(f"llama.cpp cannot round the weights to {kind}")
    return made


def second_turn(backend: LocalBackend, talk: list[Message]) -> float:
    """Seconds to the first token of a second question, the first one's cache at hand."""
    params = GenerationParams(max_new_tokens=1)
    backend.forget()
    backend.generate(talk[:1], params)
    return backend.generate([*talk, user(QUESTIONS[0])], params).timing.first_token_s


@torch.inference_mode()
def stock(backend: LocalBackend, messages: list[Message], tokens: int) -> Made:
    """Answer by the language model's own `generate`."""
    from transformers import LogitsProcessor

    times, cpu = [time.perf_counter()], time.process_time()

    class Clock(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            times.append(time.perf_counter())
            return scores

    batch = collate([backend.prepare(messages, tokens)], backend.processor.pad_id, side="left")
    ids = backend.model.llm.generate(
        inputs_embeds=embed_batch(backend.model, batch),
        attention_mask=batch.attention_mask,
        min_new_tokens=tokens,
        max_new_tokens=tokens,
        do_sample=False,
        logits_processor=[Clock()],
    )
    seconds = [b - a for a, b in itertools.pairwise(times)]
    return Made(np.empty(0), ids[0].tolist(), seconds, time.process_time() - cpu)


def quantized(backend: LocalBackend) -> LocalBackend:
    """A copy with 8-bit layers."""
    model = copy.deepcopy(backend.model)
    merge_adapter(model)
    quantize_int8(model)
    return LocalBackend(model, backend.tokenizer, backend.config)


@torch.inference_mode()
def answer(
    backend: LocalBackend, messages: list[Message], tokens: int, start: Callable[..., Any] = start_decoding
) -> Made:
    """Answer greedily."""
    cpu, begin = time.process_time(), time.perf_counter()
    batch = collate([backend.prepare(messages, tokens)], backend.processor.pad_id, side="left")
    model = backend.model
    following = start(model, embed_batch(model, batch), batch.attention_mask)
    first = logits = following(None)
    ids, seconds = [int(logits.argmax())], [time.perf_counter() - begin]
    while len(ids) < tokens and (tokens != TOKENS or ids[-1] not in backend.processor.template.stop_ids):
        begin = time.perf_counter()
        logits = following(logits.argmax(dim=-1))
        ids.append(int(logits.argmax()))
        seconds.append(time.perf_counter() - begin)
    return Made(first[0].numpy(), ids, seconds, time.process_time() - cpu)


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
