"""llama.cpp's answers beside ours, on the GGUF files that were exported; with llama-cpp-python installed.

Everything of llama.cpp's own is used: its tokenizer, its image rules (mtmd), its towers and its language models.
Compared are token ids, an image's tokens behind the projector, logits at the end of a prompt, and greedy answers.
llama.cpp takes the tanh form of GELU from a table of half precision, and other orders of summation, so numbers agree to
a part in a hundred and answers to 95%, besides those that part where two tokens are as likely as one can tell.

Images that are not square are padded after they are resized there, before it here. That difference is measured by
itself; for the answers such images are padded beforehand, so that models are compared and not edges.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from polymodal.checkpoints.model_folder import Loaded
from polymodal.errors import CheckpointError, PolymodalError
from polymodal.interop.gguf.export import CLASS_TOKEN_NOTE, PAD_COLOUR
from polymodal.interop.huggingface.export_chat_template import LATER, differences, stock_text, with_placeholder
from polymodal.processing.collate import Sample, collate
from polymodal.verify.side_by_side import IN_ANOTHER_ENGINE, TOKENS, Check, Parity, Probe, SideBySide, chat_probes

NEAR = {"f32": 0.02, "f16": 0.05, "bf16": 0.1, "q8_0": 0.15}
"""Largest relative difference (of norms) of a square image's tokens, by the type of the weights."""
PARTED = {"f32": IN_ANOTHER_ENGINE, "f16": 0.8, "bf16": 0.5, "q8_0": 0.5}
"""Smallest share of greedy tokens before two answers part, by the type of the weights."""


def verify_gguf(source: Loaded, folder: Path, *, tokens: int = TOKENS, more: Sequence[Probe] = ()) -> Parity:
    """Compare exported GGUF files with the model that they were written from, and write `parity.json` beside them."""
    comparison = GgufComparison(source, folder, tokens, more)
    parity = comparison.run(CHECKS if find_spec("llama_cpp") else dict.fromkeys(CHECKS, lambda _: None))
    if "theirs" in vars(comparison):
        comparison.theirs.close()
    return parity


class LlamaCpp:
    """A model opened by llama.cpp."""

    silence: ClassVar[Any] = None

    def __init__(self, model: Path, mmproj: Path, context: int, threads: int) -> None:
        import llama_cpp  # type: ignore[import-not-found,unused-ignore]
        from llama_cpp import mtmd_cpp

        self.lib: Any = llama_cpp
        self.mtmd: Any = mtmd_cpp
        try:
            self.llama: Any = llama_cpp.Llama(
                str(model), n_ctx=context, n_batch=context, n_threads=threads, n_gpu_layers=0, verbose=False
            )
        except (ValueError, OSError, AssertionError) as error:
            raise CheckpointError(f"{model}: llama.cpp does not open it ({error})") from error
        # Pages of log otherwise; the class keeps the callback, to which the library holds no reference.
        LlamaCpp.silence = LlamaCpp.silence or self.lib.llama_log_callback(lambda *_line: None)
        for name in ("mtmd_log_set", "mtmd_helper_log_set"):  # not in older versions
            if hasattr(mtmd_cpp, name):
                getattr(mtmd_cpp, name)(LlamaCpp.silence, None)
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu, params.n_threads, params.print_timings = False, threads, False
        self.context: Any = mtmd_cpp.mtmd_init_from_file(str(mmproj).encode(), self.llama.model, params)
        if not self.context:
            raise CheckpointError(f"{mmproj}: llama.cpp does not open it")

    def close(self) -> None:
        """Free the memory."""
        self.mtmd.mtmd_free(self.context)
        self.llama.close()

    @contextmanager
    def chunks(self, pieces: Sequence[str], images: Sequence[Any]) -> Iterator[Any]:
        """Cut a prompt into llama.cpp's chunks of text and images."""
        api = self.mtmd
        marker: bytes = api.mtmd_default_marker()
        text = marker.join(piece.encode() for piece in pieces)
        bitmaps: list[Any] = []
        chunks = api.mtmd_input_chunks_init()
        try:
            for image in images:
                raw = image.tobytes()
                data = (ctypes.c_uint8 * len(raw)).from_buffer_copy(raw)
                bitmaps.append(api.mtmd_bitmap_init(image.width, image.height, data))
            given = api.mtmd_input_text(text=text, add_special=False, parse_special=True)
            given.text_len = len(text)  # older versions have no such field and look for the end themselves
            listed = (api.mtmd_bitmap_p_ctypes * max(len(bitmaps), 1))(*bitmaps)
            if api.mtmd_tokenize(self.context, chunks, ctypes.byref(given), listed, len(bitmaps)):
                raise PolymodalError("llama.cpp refuses the prompt")
            yield chunks
        finally:
            api.mtmd_input_chunks_free(chunks)
            for bitmap in bitmaps:
                api.mtmd_bitmap_free(bitmap)

    def ids(self, chunks: Any) -> list[int | None]:
        """The prompt's ids, None for each position of an image."""
        found: list[int | None] = []
        for chunk, is_text in self._each(chunks):
            if is_text:
                count = ctypes.c_size_t()
                ids = self.mtmd.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                found += list(ids[: count.value])
            else:
                found += [None] * self.mtmd.mtmd_input_chunk_get_n_tokens(chunk)
        return found

    def image_tokens(self, chunks: Any, width: int) -> list[Tensor]:
        """Each image behind the projector, [tokens, width]."""
        found = []
        for chunk in (chunk for chunk, is_text in self._each(chunks) if not is_text):
            if self.mtmd.mtmd_encode_chunk(self.context, chunk):
                raise PolymodalError("llama.cpp cannot encode the image")
            count = self.mtmd.mtmd_input_chunk_get_n_tokens(chunk) * width
            found.append(torch.tensor(self.mtmd.mtmd_get_output_embd(self.context)[:count]).view(-1, width))
        return found

    def answer(self, chunks: Any, tokens: int, stops: Sequence[int]) -> tuple[Tensor, list[int]]:
        """Answer greedily; returns the logits behind the prompt, [V], and the ids, the one that ends it included."""
        lib, llama = self.lib, self.llama
        lib.llama_memory_clear(lib.llama_get_memory(llama.ctx), True)
        past = ctypes.byref(ctypes.c_int32())
        if self.mtmd.mtmd_helper_eval_chunks(self.context, llama.ctx, chunks, 0, 0, llama.n_batch, True, past):
            raise PolymodalError("llama.cpp cannot read the prompt")
        first = logits = self._logits()
        made: list[int] = []
        while True:
            made.append(int(logits.argmax()))
            if made[-1] in stops or len(made) == tokens:
                return first, made
            batch = lib.llama_batch_get_one((lib.llama_token * 1)(made[-1]), 1)
            if lib.llama_decode(llama.ctx, batch):
                raise PolymodalError("llama.cpp cannot go on with the answer")
            logits = self._logits()

    def _logits(self) -> Tensor:
        values = self.lib.llama_get_logits_ith(self.llama.ctx, -1)
        return torch.tensor(values[: self.llama.n_vocab()])

    def _each(self, chunks: Any) -> Iterator[tuple[Any, bool]]:
        """Every chunk, and whether it is text."""
        for i in range(self.mtmd.mtmd_input_chunks_size(chunks)):
            chunk = self.mtmd.mtmd_input_chunks_get(chunks, i)
            yield chunk, self.mtmd.mtmd_input_chunk_get_type(chunk) == self.mtmd.MTMD_INPUT_CHUNK_TYPE_TEXT


class GgufComparison(SideBySide):
    """Our model and its GGUF files, side by side."""

    def __init__(self, source: Loaded, folder: Path, tokens: int, more: Sequence[Probe]) -> None:
        from gguf import GGUFReader

        super().__init__(source, folder, tokens)
        found = sorted(folder.glob("model-*.gguf"))
        if len(found) != 1:
            raise CheckpointError(f"{folder}: one model-*.gguf expected, found {len(found)}")
        self.kind = found[0].stem.removeprefix("model-")
        self.files = found[0], folder / f"mmproj-{self.kind}.gguf"
        template = GGUFReader(self.files[0]).fields.get("tokenizer.chat_template")
        if template is None:
            raise CheckpointError(f"{self.files[0]}: no tokenizer.chat_template in it")
        self.jinja = str(template.contents())
        self.words, image_id, _ = with_placeholder(self.ours.tokenizer, self.ours.model.image_token_id)
        self.placeholder = str(self.words.convert_ids_to_tokens(image_id))
        wrong = differences(self.ours.processor.template, self.words, self.jinja, image_id)
        self.ask([*chat_probes(), *more], later_turns_differ=wrong == [LATER])

    @cached_property
    def theirs(self) -> LlamaCpp:
        """llama.cpp with both files."""
        length = max(len(sample.input_ids) for sample in self.samples) + self.tokens
        return LlamaCpp(*self.files, min(length + 8, self.ours.context_length), torch.get_num_threads())

    def next_logits(self, sample: Sample, said: Sequence[int] = ()) -> Tensor:
        """Our logits behind a prompt and the beginning of an answer, [V]."""
        ids = torch.cat((sample.input_ids, torch.tensor(said, dtype=sample.input_ids.dtype)))
        mask = torch.cat((sample.loss_mask, torch.zeros(len(said), dtype=sample.loss_mask.dtype)))
        batch = collate([replace(sample, input_ids=ids, loss_mask=mask)], self.ours.processor.pad_id)
        logits = self.ours.model(**{**batch.to(self.ours.model.device).inputs(), "labels": None}).logits
        assert logits is not None
        return logits.reshape(-1, logits.shape[-1])[-1].float().cpu()

    def prompt(self, probe: Probe, *, square: bool = False) -> AbstractContextManager[Any]:
        """The probe as llama.cpp's chunks, images padded to squares beforehand where that is wanted."""
        # The text is what the file's own chat template makes of the probe.
        pieces = stock_text(self.words, self.jinja, probe.messages).split(self.placeholder)
        images = [image.convert("RGB") for image in probe.images]
        return self.theirs.chunks(pieces, [_padded(image) for image in images] if square else images)


def same_ids(comparison: GgufComparison) -> Check:
    """Compare token ids."""
    found = []
    for probe in comparison.probes:
        with comparison.prompt(probe) as chunks:
            found.append(comparison.theirs.ids(chunks))
    return comparison.compare_ids(found, None, "llama.cpp")


@torch.inference_mode()
def same_images(comparison: GgufComparison) -> Check:
    """Compare an image's tokens behind the projector; of images that are not square the edges may differ."""
    model, config, allowed = comparison.ours.model, comparison.ours.config, NEAR[comparison.kind]
    worst, wrong = {"square": 0.0, "other": 0.0}, []
    for probe, sample in zip(comparison.probes, comparison.samples, strict=True):
        if sample.pixels is None or not sample.plans:
            continue
        ours = [model.project(model.encode_images(tiles.to(model.device)))[0].float().cpu() for tiles in sample.pixels]
        with comparison.prompt(probe) as chunks:
            theirs = comparison.theirs.image_tokens(chunks, ours[0].shape[-1])
        for image, one, other in zip(probe.images, ours, theirs, strict=True):
            shape = "square" if image.width == image.height else "other"
            difference = float("inf")
            if one.shape == other.shape:
                difference = float((one - other).norm() / one.norm().clamp(min=1e-9))
            worst[shape] = max(worst[shape], difference)
            if shape == "square" and not difference <= allowed:
                wrong.append(f"{probe.name} ({difference:.2g})")
    if wrong and config.vision is not None and config.vision.type == "clip":
        wrong[-1] += f" ({CLASS_TOKEN_NOTE})"
    numbers = {"max_relative_difference": worst, "tolerance_of_square": allowed}
    return Check.unless(wrong, "images", numbers, "tokens of images differ for")


@torch.inference_mode()
def same_answers(comparison: GgufComparison) -> Check:
    """Compare the logits behind each prompt, and greedy answers."""
    backend, answers, furthest, largest = comparison.ours, [], 0.0, 0.0
    for probe, sample in zip(comparison.probes, comparison.samples, strict=True):
        with comparison.prompt(probe, square=True) as chunks:
            logits, made = comparison.theirs.answer(chunks, comparison.tokens, backend.processor.template.stop_ids)
        last = comparison.next_logits(sample)
        furthest = max(furthest, float((last - logits[: len(last)]).abs().max()))
        largest = max(largest, float(last.abs().max()))
        answers.append((comparison.greedy(sample), made))
    # Of tokens that are as likely as one can tell the two programs may choose either, and go on from there.
    tie, ties = min(2 * furthest, NEAR[comparison.kind] / 10 * largest), 0
    for place, (sample, (ours, theirs)) in enumerate(zip(comparison.samples, answers, strict=True)):
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        if same is not None:
            logits = comparison.next_logits(sample, ours[:same])
            if theirs[same] < len(logits) and float(logits[ours[same]] - logits[theirs[same]]) <= tie:
                answers[place], ties = (ours[:same], theirs[:same]), ties + 1
    numbers = {"probes": len(answers), "max_logit_difference": furthest, "largest_logit": largest, "ties": ties}
    least, package = PARTED[comparison.kind], "llama-cpp-python"
    return comparison.compare_answers("llama.cpp", answers, least, package=package, **numbers)


CHECKS: dict[str, Callable[[GgufComparison], Check | None]] = {
    "token_ids": same_ids,
    "images": same_images,
    "llama.cpp": same_answers,
}
"""The comparisons with llama.cpp."""


def _padded(image: Any) -> Any:
    """An image in the middle of a square, as LLaVA pads it."""
    from PIL import Image

    side = max(image.size)
    canvas = Image.new("RGB", (side, side), PAD_COLOUR)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas
