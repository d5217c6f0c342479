"""Our server beside `transformers serve` and llama.cpp, on the same weights and image, in one run.

    python -m benchmarks.serving [MODEL] [--runs 3] [--flags "--batch 8"]

Servers are processes that take turns over HTTP. transformers serves folders of its own classes only; the default
model's tower has no place in one, so a stand-in is made: the same language model behind a random CLIP tower of 22
million weights and 196 tokens an image, served by both. llama.cpp cannot encode our tower either: a small handler of
HTTP encodes and projects with our code, keeps what it has encoded, and lets llama.cpp read and decode (extra package
llama-cpp-python). A program that is missing has a row that says so.

An answer has 64 tokens whatever the model says (its stop ids are forbidden). Every run asks about an image that nobody
has seen, so that nothing is found in a cache; the second turn asks again about it. Streams ask about one image at once.
"""

from __future__ import annotations

import argparse
import base64
import copy
import ctypes
import gc
import io
import json
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import polymodal  # isort: skip  # before torch, whose threads wait as it says
import httpx2
import torch
from PIL import Image as PILImage

from benchmarks.serve_process import Server, ours, started
from polymodal import GenerationParams, Image, LocalBackend, Message, PolymodalError, assistant, user
from polymodal.generation.generate import embed_batch
from polymodal.processing.collate import collate

PICTURE = sorted((Path(__file__).resolve().parent.parent / "examples" / "pictures").glob("*.jpg"))[0]
WHOLE, STREAMED = 64, 32
STREAMS = (1, 2, 4, 8)
LLAMA = "Q8_0"
QUESTIONS = (
    "What is this?",
    "Which colours?",
    "Describe it.",
    "Is it day?",
    "Who is it?",
    "Is it old?",
    "Where?",
    "Why?",
)
AGAIN = "And what else is there to see?"


@dataclass
class Row:
    """A server, how it is asked, and what it took."""

    server: Server
    model: str
    extra: dict[str, Any]  # Of a request that is to have its full length
    took: dict[str, list[float]] = field(default_factory=dict)

    def note(self, what: str, value: float) -> None:
        self.took.setdefault(what, []).append(value)

    def mid(self, what: str) -> float | None:
        return statistics.median(self.took[what]) if what in self.took else None

    def request(self, messages: list[Any], tokens: int, **more: Any) -> dict[str, Any]:
        return {"model": self.model, "messages": messages, "max_tokens": tokens, "temperature": 0, **more}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--flags", default="", help="more flags of our server")
    parser.add_argument("--llama-cpp", type=int, metavar="PORT", help=argparse.SUPPRESS)  # the handler's own process
    args = parser.parse_args(arguments)
    if args.llama_cpp:
        serve_llama_cpp(args.model, args.llama_cpp)
        return
    plain = polymodal.load(args.model, "cpu", quantize="auto")
    if not isinstance(plain, LocalBackend):
        raise PolymodalError(f"{args.model}: not a model that is opened here")
    stops = plain.stop_ids
    plain.stop_ids = ()  # of the answers that are made without a server
    print(
        f"model {args.model}, {torch.get_num_threads()} threads, torch {torch.__version__}, medians of {args.runs} runs"
    )
    forbid = {"logit_bias": {str(token): -100 for token in stops}}
    whole = {"generation_config": json.dumps({"min_new_tokens": WHOLE, "max_new_tokens": WHOLE, "do_sample": False})}
    with ExitStack() as stack:
        stand_in = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="serving-")))
        make_stand_in(args.model, stand_in)
        rows: dict[str, Row] = {}
        missing: dict[str, str] = {}
        flags, placed, exported = args.flags.split(), str(stand_in / "model"), str(stand_in / "exported")
        handler = [sys.executable, "-m", "benchmarks.serving", args.model]
        stock = [str(Path(sys.executable).with_name("transformers")), "serve", "--device", "cpu", "--dtype", "float32"]
        ports = [free_port() for _ in range(2)]
        for name, command, port, model, extra in (
            ("polymodal serve", ours(args.model, *flags), None, "model", forbid),
            (f"llama.cpp {LLAMA}", [*handler, "--llama-cpp", str(ports[0])], ports[0], "model", forbid),
            ("stand-in: polymodal serve", ours(placed, *flags), None, "model", forbid),
            ("stand-in: same, float32", ours(placed, "--quantize", "float32", *flags), None, "model", forbid),
            ("stand-in: transformers", [*stock, "--host", "127.0.0.1", "--port", str(ports[1]), exported], ports[1],
             exported, whole),
        ):  # fmt: skip
            try:
                server = stack.enter_context(started(command, port and f"http://127.0.0.1:{port}"))
                rows[name] = Row(server, model, extra)
                ask(rows[name], conversation(0), WHOLE)  # warms up, and shows that it can
            except PolymodalError as error:
                rows.pop(name, None)
                missing[name] = str(error)
        if "polymodal serve" not in rows:
            raise PolymodalError(f"our own server: {missing['polymodal serve']}")
        measure(rows, plain, args.runs)
        report(rows, missing)


def measure(rows: dict[str, Row], plain: LocalBackend, runs: int) -> None:
    params = GenerationParams(max_new_tokens=WHOLE)
    first = next(iter(rows.values()))
    plain.generate(messages_of(conversation(0)), params)
    for run in range(1, runs + 1):
        begin = time.perf_counter()
        plain.generate(messages_of(conversation(1000 + run)), params)
        first.note("bare", time.perf_counter() - begin)
        for row in rows.values():
            row.note("whole", ask(row, conversation(run), WHOLE)[1])
            talk = conversation(2000 + run)
            said = ask(row, talk, WHOLE, full=False)[0]
            talk += [{"role": "assistant", "content": said}, {"role": "user", "content": AGAIN}]
            row.note("second", first_piece(row, talk))
    for row in rows.values():
        for count in STREAMS:
            row.note(f"{count}", at_once(row, count))
        row.note("peak", row.server.peak)


def report(rows: dict[str, Row], missing: dict[str, str]) -> None:
    titles = [f"{WHOLE} tokens, s", "2nd turn, ms", *(f"{count} at once" for count in STREAMS), "peak MB"]
    print(
        "at once: tokens a second of all streams; llama.cpp's handler, and transformers for images, take one at a time"
    )
    print(f"{'':<28}{''.join(f'{title:>14}' for title in titles)}")
    for name, row in rows.items():
        second = row.mid("second")
        cells = [
            row.mid("whole"),
            second and 1000 * second,
            *(row.mid(str(count)) for count in STREAMS),
            row.mid("peak"),
        ]
        shown = [
            f"{cell:14.2f}" if number == 0 else f"{cell:14.1f}" if cell else f"{'':14}"
            for number, cell in enumerate(cells)
        ]
        print(f"{name:<28}{''.join(shown)}")
    for name, why in missing.items():
        print(f"{name:<28}  cannot: {why}")
    found = {name: row.mid("whole") or 0.0 for name, row in rows.items()}
    mine = next(iter(rows.values()))
    bare = mine.mid("bare") or 0.0
    more = found["polymodal serve"] / bare - 1
    print(f"bare generate of the same model: {bare:.2f} s; the server adds {more:+.1%} (goal: under 5%)")
    one, four = mine.mid("1"), mine.mid("4")
    if one and four:
        print(f"4 streams: {four / one:.2f}x the throughput of one (goal: 2.5x)")
        first, alone, together = mine.mid("first") or 0.0, STREAMED / one, 4 * STREAMED / four
        if four < 2.5 * one:  # a prompt fills both cores already, whoever asks
            print(
                f"  prompts go one after the other, {first:.2f} s each (known image); the steps after them take "
                f"{alone - first:.2f} s for one stream and {together - 4 * first:.2f} s for four"
            )
    print(f"second turn: {1000 * (mine.mid('second') or 0):.0f} ms to the first piece (goal: under 300)")
    for one_name, other, goal in (
        ("polymodal serve", f"llama.cpp {LLAMA}", 1),
        ("stand-in: polymodal serve", "stand-in: transformers", 5),
    ):
        if other in found and one_name in found:
            print(f"{one_name}: {found[other] / found[one_name]:.2f}x as fast as {other} (goal: {goal}x)")
            if goal == 5 and (same := found.get("stand-in: same, float32")):
                print(f"  {found[other] / same:.2f}x of it with the same float32 weights, the rest by 8 bits")


# Asking


def picture(number: int) -> str:
    """The image, of which no two numbers have the same pixels, as a data: URL."""
    with PILImage.open(PICTURE) as image:
        pixels = image.convert("RGB")
    pixels.putpixel((0, 0), (number % 256, number // 256, 7))
    buffer = io.BytesIO()
    pixels.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def conversation(number: int, question: str = QUESTIONS[0]) -> list[dict[str, Any]]:
    image = {"type": "image_url", "image_url": {"url": picture(number)}}
    return [{"role": "user", "content": [image, {"type": "text", "text": question}]}]


def ask(row: Row, messages: list[Any], tokens: int, full: bool = True) -> tuple[str, float]:
    """The text of an answer, which is to have its `full` length or ends by itself, and its seconds."""
    body = row.request(messages, tokens, **(row.extra if full else {}))
    begin = time.perf_counter()
    got = httpx2.post(f"{row.server.url}/v1/chat/completions", json=body, timeout=600, trust_env=False)
    seconds = time.perf_counter() - begin
    if got.status_code != 200:
        raise PolymodalError(f"refuses the request: {got.text[:200]}")
    answer = got.json()
    if (made := answer["usage"]["completion_tokens"]) != tokens and full:
        raise PolymodalError(f"ended after {made} tokens")
    return answer["choices"][0]["message"]["content"], seconds


def first_piece(row: Row, messages: list[Any]) -> float:
    """Seconds to the first text of a stream."""
    begin, body = time.perf_counter(), row.request(messages, 8, stream=True)
    with httpx2.stream("POST", f"{row.server.url}/v1/chat/completions", json=body, timeout=600, trust_env=False) as got:
        for line in got.iter_lines():
            if line.startswith("data: {") and any(
                c["delta"].get("content") for c in json.loads(line[6:]).get("choices", [])
            ):
                return time.perf_counter() - begin
    raise PolymodalError("a stream without text")


def at_once(row: Row, count: int) -> float:
    """Tokens a second of so many requests at the same time, about an image that is known already."""
    if "generation_config" in row.extra:
        settings = json.dumps({"min_new_tokens": STREAMED, "max_new_tokens": STREAMED, "do_sample": False})
        row = Row(row.server, row.model, {"generation_config": settings})
    ask(row, conversation(0), STREAMED)
    row.note("first", first_piece(row, conversation(0, f"{AGAIN} {count}")))
    begin = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda number: ask(row, conversation(0, QUESTIONS[number]), STREAMED), range(count)))
    return count * STREAMED / (time.perf_counter() - begin)


def messages_of(given: list[Any]) -> list[Message]:
    """A conversation as our own messages."""
    found: list[Message] = []
    for message in given:
        if message["role"] == "assistant":
            found.append(assistant(message["content"]))
            continue
        parts = (
            message["content"]
            if isinstance(message["content"], list)
            else [{"type": "text", "text": message["content"]}]
        )
        found.append(user(*(Image(p["image_url"]["url"]) if p["type"] == "image_url" else p["text"] for p in parts)))
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


# What is served


def make_stand_in(name: str, folder: Path) -> None:
    """Write the stand-in's folder, and the same exported for transformers."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    from polymodal.checkpoints.model_folder import load_model, save_model
    from polymodal.config import ImageConfig, LLMConfig, ModelConfig, ProjectorConfig, VisionConfig
    from polymodal.interop.huggingface.export import export_hf
    from polymodal.modeling.build import build_model
    from polymodal.modeling.lora import fold_in

    plain = cast(LocalBackend, polymodal.load(name, "cpu"))
    llm, tower = copy.deepcopy(plain.model.llm), {"num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 16}
    fold_in(llm)
    llm.save_pretrained(folder / "llm")
    plain.tokenizer.save_pretrained(folder / "llm")
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(hidden_size=384, intermediate_size=1536, image_size=224, **tower)).save_pretrained(
        folder / "tower"
    )
    rules: dict[str, Any] = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3, "tile_size": (224, 224)}
    config = ModelConfig(
        vision=VisionConfig(vision_tower=str(folder / "tower"), type="clip"),
        image=ImageConfig(image_aspect_ratio="pad", **rules),
        projector=ProjectorConfig(mm_projector_type="mlp2x_gelu"),
        llm=LLMConfig(model_name_or_path=str(folder / "llm")),
        template=plain.config.template,
    )
    model, tokenizer = build_model(config)
    save_model(folder / "model", model, config, tokenizer, llm_trained=True, vision_trained=True)
    export_hf(load_model(folder / "model"), folder / "exported")
    for part in ("llm", "tower"):
        shutil.rmtree(folder / part)


def serve_llama_cpp(name: str, port: int) -> None:
    """Answer over HTTP with our tower and llama.cpp's language model, one request at a time."""
    from benchmarks import quantize

    quantize.CPP = (quantize.CPP[0], LLAMA)
    found = quantize.open_llama_cpp(name)
    backend, llama = quantize.open_plain(name), found.pop(f"llama.cpp {LLAMA}")
    for other in found.values():
        other.llama.close()
    # What is measured holds no language model but llama.cpp's, and forgets what making it took.
    backend.model.llm.get_decoder().layers = torch.nn.ModuleList()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    lock, talk = threading.Lock(), LlamaTalk(backend, llama)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            self.send(b"{}")

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                ids: list[int] = []
                for token in talk.answer(messages_of(asked["messages"]), asked["max_tokens"], "logit_bias" in asked):
                    ids.append(token)
                    if asked.get("stream"):  # the first piece is all that is measured
                        break
            text = backend.tokenizer.decode(ids)
            if asked.get("stream"):
                chunk = {"choices": [{"index": 0, "delta": {"content": text or "."}}]}
                self.send(f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n".encode())
            else:
                usage = {"completion_tokens": len(ids)}
                self.send(json.dumps({"choices": [{"message": {"content": text}}], "usage": usage}).encode())

        def send(self, data: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


class LlamaTalk:
    """Our tower before llama.cpp; what the last prompt and this one begin with is read once, an image encoded once."""

    def __init__(self, backend: LocalBackend, llama: Any) -> None:
        self.backend, self.lib, self.llama = backend, llama.lib, llama.llama
        self.media: Any = None
        self.images: list[torch.Tensor] = []
        self.read = torch.empty(0, dtype=torch.int64)

    @torch.inference_mode()
    def embed(self, sample: Any) -> torch.Tensor:
        """What the language model is given, [T, D]."""
        if sample.media_keys != self.media:
            self.read = self.read[:0]
            batch = collate([sample], self.backend.processor.pad_id, side="left")
            embeds = embed_batch(self.backend.model, batch)[0]
            self.images = [embeds[slot.start : slot.start + slot.length].clone() for slot in sample.slots]
            self.media = sample.media_keys
            return embeds
        table = self.backend.model.llm.get_input_embeddings()
        embeds = table(sample.input_ids.clamp(max=table.weight.shape[0] - 1))
        for slot, image in zip(sample.slots, self.images, strict=True):
            embeds[slot.start : slot.start + slot.length] = image
        return embeds

    def answer(self, messages: list[Message], tokens: int, full: bool) -> Iterator[int]:
        """The ids of an answer, greedily; a `full` one has no end of its own."""
        sample = self.backend.prepare(messages, tokens)
        embeds, ids = self.embed(sample), sample.input_ids
        length = min(len(self.read), len(ids) - 1)
        differ = (self.read[:length] != ids[:length]).nonzero()
        common = int(differ[0]) if len(differ) else length
        self.decode(embeds[common:].float().contiguous(), common)
        self.read = ids
        for number in range(tokens):
            logits = self.logits()
            if full:
                logits[list(self.backend.stop_ids)] = -torch.inf
            token = int(logits.argmax())
            if token in self.backend.stop_ids:
                return
            yield token
            if number + 1 < tokens:
                one = self.lib.llama_batch_get_one((self.lib.llama_token * 1)(token), 1)
                if self.lib.llama_decode(self.llama.ctx, one):
                    raise PolymodalError("llama.cpp cannot go on with the answer")
                self.read = torch.cat((self.read, torch.tensor([token])))

    def decode(self, embeds: torch.Tensor, begin: int) -> None:
        """Read a prompt from a position on."""
        lib, (rows, width) = self.lib, embeds.shape
        lib.llama_memory_seq_rm(lib.llama_get_memory(self.llama.ctx), 0, begin, -1)
        batch = lib.llama_batch_init(rows, width, 1)
        batch.n_tokens = rows
        ctypes.memmove(batch.embd, embeds.data_ptr(), embeds.nbytes)
        for row in range(rows):
            batch.pos[row], batch.n_seq_id[row], batch.seq_id[row][0] = begin + row, 1, 0
            batch.logits[row] = row == rows - 1
        failed = lib.llama_decode(self.llama.ctx, batch)
        lib.llama_batch_free(batch)
        if failed:
            raise PolymodalError("llama.cpp cannot read the prompt")

    def logits(self) -> torch.Tensor:
        values = self.lib.llama_get_logits_ith(self.llama.ctx, -1)
        found = (ctypes.c_float * self.llama.n_vocab()).from_address(ctypes.addressof(values.contents))
        return torch.frombuffer(found, dtype=torch.float32).clone()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except PolymodalError as error:
        sys.exit(f"serving: {error}")
