"""Several answers at once: rows join and leave between two steps, and each is what it would be alone.

A step is a position of every answer that is being made, in one run of the model, and behind it a piece of the one
prompt that is being read: a medium that is encoded, or some hundred positions. So no answer waits for a long prompt.
"""

import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import torch

from polymodal.generation.generate import embed_batch, new_cache
from polymodal.generation.kept import (
    Kept,
    MediaCache,
    PrefixCache,
    Weights,
    common_beginning,
    medium_of,
    one_medium,
    weights_of,
    without_beginning,
)
from polymodal.generation.sampling import Sampler, forbid, unspoken
from polymodal.modeling.language_model import context_length
from polymodal.modeling.merge import merge_media
from polymodal.modeling.onnx_llm import OnnxCache, OnnxLLM
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Sample, collate

CHUNK = 128
"""Positions of a prompt between two steps of the answers; how many makes no difference to a graph's logits."""


class Row:
    """One answer on its way."""

    def __init__(
        self,
        sample: Sample,
        sampler: Sampler,
        most: int,  # Ids that it may have
        salt: str = "",
    ) -> None:
        self.sample, self.sampler, self.most, self.salt = sample, sampler, most, salt
        self.ids: list[int] = []
        self.cached = 0  # Positions of the prompt that were read before
        self.encode_s = 0.0  # Seconds of its media
        self.weights: Weights = ()
        self.prompt: Generator[torch.Tensor | None] | None = None  # Reads it piece by piece

    @property
    def full(self) -> bool:
        """Whether there is no room for another id."""
        return len(self.ids) >= self.most

    @property
    def read(self) -> Sample:
        """All that the model has read of it; the last id was not."""
        ids = torch.cat((self.sample.input_ids, torch.tensor(self.ids[:-1], dtype=torch.int64)))
        return replace(self.sample, input_ids=ids, pixels=None, sounds=None)


class Batcher:
    """The answers that are being made with a model; used by one thread."""

    def __init__(
        self, model: MultimodalLM, vocab_size: int, most: int, prefixes: PrefixCache | None, media: MediaCache
    ) -> None:
        self.model, self.vocab_size, self.most = model, vocab_size, most
        self.prefixes, self.media = prefixes, media  # None where no beginning is read from what was read before
        self.running: list[Row] = []
        self.reading: Row | None = None
        graph: Any = model.llm if isinstance(model.llm, OnnxLLM) else None
        self._caches = _OneEach(model, most) if graph is None else _OneBlock(graph, most)

    @property
    def free(self) -> bool:
        """Whether another row may begin."""
        return self.reading is None and len(self.running) < self.most

    def add(self, row: Row) -> None:
        """Begin a row, where there is room."""
        assert self.free
        row.most = min(row.most, context_length(self.model.llm.config) - len(row.sample.input_ids))
        row.prompt = self._read(row)
        self.reading = row

    @torch.inference_mode()
    def step(self) -> list[tuple[Row, int | BaseException]]:
        """Go on by a step; gives the id that each row chose, or why it failed, and it is gone."""
        rows = list(self.running)
        events: list[tuple[Row, int | BaseException]] = []
        ids, logits = [row.ids[-1] for row in rows], None
        try:
            logits = self._caches.step(ids) if rows else None
        except Exception:
            logits = None  # one of them is at fault, which is found below
        for place, row in enumerate(rows):
            try:
                each = self._caches.step([ids[place]], place) if logits is None else logits[place : place + 1]
                assert each is not None  # of one row
                events.append((row, self._choose(row, each)))
            except BaseException as error:  # what chooses may panic with what is no Exception
                events.append((row, error))
        if (row := self.reading) is not None:  # type: ignore[assignment]
            assert row.prompt is not None
            try:
                if (found := next(row.prompt)) is not None:
                    events.append((row, self._choose(row, found)))
                    self.running.append(row)
                    self.reading = row.prompt = None
            except BaseException as error:
                events.append((row, error))
        for row, event in events:
            if isinstance(event, BaseException):
                self.drop(row, keep=False)
        return events

    def _choose(self, row: Row, logits: torch.Tensor) -> int:  # [1, V]
        token = row.sampler(forbid(logits, unspoken(self.model), self.vocab_size)[0])
        row.ids.append(token)
        return token

    @torch.inference_mode()
    def drop(self, row: Row, keep: bool = True) -> None:
        """End a row; the last one takes its place."""
        last = len(self.running) - 1
        if row is self.reading:
            self.reading = row.prompt = None
        else:
            place = self.running.index(row)
            if keep and self.prefixes is not None:
                try:
                    self.prefixes.put(Kept(row.read, self._caches.take(place), row.weights, row.salt))
                except Exception:  # no memory
                    self.prefixes.clear()
            if place != last:
                self._caches.copy(place, self._caches.held(last), last)
            self.running[place] = self.running[last]
            del self.running[last]
            if self.reading is not None:
                self._caches.copy(last, self._caches.held(last + 1), last + 1)
        if not self.running and self.reading is None:
            self._caches.clear()

    def _read(self, row: Row) -> Generator[torch.Tensor | None]:
        """Read a prompt; the last piece gives the logits behind it."""
        # The row stands behind the running ones, which may get fewer meanwhile.
        row.weights = weights_of(self.model)
        self._begin(row)
        rest = without_beginning(row.sample, row.cached)
        media = []
        for number in range(len(rest.plans)):
            begin, key = time.perf_counter(), (row.salt, *medium_of(rest, number))
            tokens = self.media.get(key, row.weights)
            if tokens is None:
                tokens = self._encode(one_medium(rest, number, self.model.image_token_id))
                self.media.put(key, tokens)
                row.encode_s += time.perf_counter() - begin
                yield None
            media.append(tokens)
        row.sample, rest = (replace(sample, pixels=None, sounds=None) for sample in (row.sample, rest))
        ids = rest.input_ids[None].to(self.model.device)
        is_media = ids == self.model.image_token_id
        text = self.model.llm.get_input_embeddings()(ids.masked_fill(is_media, 0))
        embeds = merge_media(text, is_media, media, [0] * len(media), "media")
        for start in range(0, embeds.shape[1], CHUNK):
            logits = self._caches.read(embeds[:, start : start + CHUNK], len(self.running))
            yield logits if start + CHUNK >= embeds.shape[1] else None

    def _encode(self, sample: Sample) -> torch.Tensor:
        return embed_batch(self.model, collate([sample], 0).to(self.model.device))[0]

    def _begin(self, row: Row) -> None:
        """Take over what another row, or a kept one, has in common with a new one."""
        place, source, at = len(self.running), None, 0
        if self.prefixes is not None:
            kept, row.cached = self.prefixes.find(row.sample, row.weights, row.salt)
            source = None if kept is None else kept.cache
            for number, other in enumerate(self.running):
                if (other.salt, other.weights) == (row.salt, row.weights):
                    length = common_beginning(other.read, row.sample)
                    if length > row.cached:
                        row.cached, source, at = length, self._caches.held(number), number
            self.prefixes.asked += len(row.sample.input_ids)
            self.prefixes.hits += row.cached
        self._caches.copy(place, source, at, row.cached)


class _OneBlock:
    """All rows of a graph in one block, so that the first ones go on in one run."""

    def __init__(self, llm: OnnxLLM, most: int) -> None:
        self.llm, self.most = llm, most
        self.cache = OnnxCache(llm, most)

    def held(self, place: int) -> OnnxCache:
        """What holds a row, as `copy` takes it."""
        return self.cache

    def copy(self, place: int, source: OnnxCache | None, at: int, length: int | None = None) -> None:
        """Make a row the first positions of another one, or of a kept one; an empty one where there is no source."""
        if source is None:
            self.cache.lengths[place] = 0
        else:
            self.cache.copy_row(place, source, at, source.lengths[at] if length is None else length)

    def take(self, place: int) -> OnnxCache:
        """The cache of a row that ends."""
        return self.cache.row(place)

    def read(self, embeds: torch.Tensor, place: int) -> torch.Tensor:
        """Read on in one row, [1, T, D] -> [1, V]."""
        return self.llm.read(embeds, self.cache, place)

    def step(self, ids: Sequence[int], place: int | None = None) -> torch.Tensor | None:
        """Read an id of each of the first rows, or of one, -> [B, V]; None where they go on one by one."""
        return self.llm.read(self.llm.embed_tokens(torch.tensor(ids)[:, None]), self.cache, place)

    def clear(self) -> None:
        """Free what no row needs any more."""
        self.cache = OnnxCache(self.llm, self.most)


class _OneEach:
    """The same with a cache of transformers for each row, which go on one after the other: their lengths differ."""

    def __init__(self, model: MultimodalLM, most: int) -> None:
        self.model, self.most = model, most
        self.clear()

    def held(self, place: int) -> Any:
        return self.caches[place]

    def copy(self, place: int, source: Any, at: int, length: int | None = None) -> None:
        if length is None:  # a row that moves
            self.caches[place] = source
            return
        self.caches[place] = made = new_cache(self.model)
        for number, layer in enumerate(source.layers if source is not None else ()):
            made.update(layer.keys[:, :, :length].clone(), layer.values[:, :, :length].clone(), number)

    def take(self, place: int) -> Any:
        return self.caches[place]

    def read(self, embeds: torch.Tensor, place: int) -> torch.Tensor:
        return self._run(place, inputs_embeds=embeds)

    def step(self, ids: Sequence[int], place: int | None = None) -> torch.Tensor | None:
        if place is None:
            return None
        return self._run(place, input_ids=torch.tensor([ids], device=self.model.device))

    def _run(self, place: int, **inputs: torch.Tensor) -> torch.Tensor:
        cache = self.caches[place]
        logits: torch.Tensor = self.model.llm(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[:, -1]

    def clear(self) -> None:
        self.caches: list[Any] = [None] * (self.most + 1)
