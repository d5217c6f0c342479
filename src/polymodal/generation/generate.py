"""Decoding: read the prompt once, then make token after token from the key-value cache.

Rows of a batch are padded on the left, so that unequal prompts give the same tokens as one by one. Placeholder ids
and rows of the head that belong to no token are never chosen.
"""

import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, cast

import torch
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

from polymodal.generation.lookup import Lookup
from polymodal.generation.params import GenerationParams
from polymodal.generation.sampling import Sampler, forbid, new_generator, sample_next, unspoken
from polymodal.generation.streaming import Step
from polymodal.modeling.language_model import context_length, decoder_start_id
from polymodal.modeling.onnx_llm import OnnxCache, OnnxLLM
from polymodal.modeling.seq2seq import move_left, take
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Batch

NextLogits = Callable[..., torch.Tensor]
"""Takes the ids [B] chosen in the step before, None in the first, and which rows go on [B], all where it is left out;
gives logits [B, V]. One row of a causal model takes several ids [T] too, and gives the logits behind each, [T, V]."""


def start_decoding(
    model: MultimodalLM, embeds: torch.Tensor, attention_mask: torch.Tensor, cache: DynamicCache | None = None
) -> NextLogits:
    """Begin a generation: the caller gives the ids that were chosen and gets the next logits, step after step."""
    # embeds [B, T, D], attention_mask [B, T], or with what the cache holds before it
    if model.encoder_decoder:
        return _encoder_decoder(model, embeds, attention_mask)
    if isinstance(model.llm, OnnxLLM):
        return _Graph(model.llm, embeds, attention_mask, cast(OnnxCache | None, cache))
    return _Causal(model, embeds, attention_mask, new_cache(model) if cache is None else cache)


def _decoder(model: MultimodalLM) -> Any:
    return model.llm.config.get_text_config()


def can_share(model: MultimodalLM) -> bool:
    """Whether several rows can go on from one beginning: where every layer keeps all keys and values of it."""
    if model.encoder_decoder or getattr(model.llm, "_is_stateful", False):
        return False
    if isinstance(model.llm, OnnxLLM):
        return True
    rope = getattr(_decoder(model), "rope_parameters", None) or {}
    kinds = {each.get("rope_type") for each in (rope, *rope.values()) if isinstance(each, dict)}
    if kinds & {"dynamic", "longrope"}:  # the same position is rotated otherwise in a longer text
        return False
    return all(type(layer) is DynamicLayer for layer in new_cache(model).layers)


def new_cache(model: MultimodalLM) -> Any:
    """An empty key-value cache of a causal language model."""
    return OnnxCache(model.llm) if isinstance(model.llm, OnnxLLM) else DynamicCache(config=_decoder(model))


@torch.inference_mode()
def read_beginnings(model: MultimodalLM, batch: Batch, rows: Sequence[int]) -> tuple[DynamicCache, torch.Tensor]:
    """Read prompts' beginnings once; gives the cache of the rows that go on from them, and its mask [rows, P]."""
    batch = batch.to(model.device)
    begun = start_decoding(model, embed_batch(model, batch), batch.attention_mask)
    begun(None)
    cache = begun.cache  # type: ignore[attr-defined]  # of a causal language model
    index = torch.tensor(rows, device=model.device)
    cache.batch_select_indices(index)
    return cache, batch.attention_mask[index]


def embed_batch(model: MultimodalLM, batch: Batch) -> torch.Tensor:
    """A prompt's embeddings, media in their places."""
    media = (batch.plans, batch.sample_of_image, batch.pixel_values, batch.features, None, batch.context_ids)
    return model.embed(batch.input_ids, *media, batch.audio_values, batch.audio_features)


class _Causal:
    """The prompt goes into the key-value cache, and the decoding on from there."""

    def __init__(
        self, model: MultimodalLM, embeds: torch.Tensor, attention_mask: torch.Tensor, cache: DynamicCache
    ) -> None:
        self.model, self.embeds, self.cache = model, embeds, cache
        self.mask = attention_mask
        self.padded = not bool(attention_mask.all())

    def __call__(self, ids: torch.Tensor | None, running: torch.Tensor | None = None) -> torch.Tensor:
        # A row that has ended takes no further position, of which there may be none.
        inputs = {"inputs_embeds": self.embeds} if ids is None else {"input_ids": ids.view(len(self.embeds), -1)}
        last = 1 if ids is None else inputs["input_ids"].shape[1]
        if ids is not None and self.padded:
            running = self.mask.new_ones(len(self.mask)) if running is None else running
            self.mask = torch.cat((self.mask, running[:, None]), dim=1)
        kwargs = self.model.decoder_inputs(self.mask, self.cache) if self.padded else {}
        logits: torch.Tensor = self.model.llm(
            **inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=last, **kwargs
        ).logits
        return logits[:, -last:].flatten(0, 1)

    def forget(self, row: int, start: int) -> None:
        """Let a row see nothing any more of what stands behind a position, counted in its cache."""
        assert self.padded  # only then the mask goes on beside the cache
        self.mask[row, start:] = False


class _Graph:
    """The same by a graph, which reads the rows of a prompt one by one, without their padding."""

    def __init__(self, llm: OnnxLLM, embeds: torch.Tensor, mask: torch.Tensor, cache: OnnxCache | None) -> None:
        self.llm, self.embeds = llm, embeds
        self.cache = OnnxCache(llm, len(embeds)) if cache is None else cache
        self.mask = mask[:, mask.shape[1] - embeds.shape[1] :]

    def __call__(self, ids: torch.Tensor | None, running: torch.Tensor | None = None) -> torch.Tensor:
        if ids is None:
            rows = zip(self.embeds, self.mask.bool(), strict=True)
            return torch.cat([self.llm.read(row[real][None], self.cache, n) for n, (row, real) in enumerate(rows)])
        before = list(self.cache.lengths)
        embeds = self.llm.embed_tokens(ids.view(len(self.embeds), -1))
        logits = self.llm.read(embeds, self.cache, last=embeds.shape[1])
        if running is not None:  # a row that has ended takes no further position
            now = self.cache.lengths
            self.cache.lengths = [a if on else b for a, b, on in zip(now, before, running.tolist(), strict=True)]
        return logits

    def forget(self, row: int, start: int) -> None:
        """Let a row see nothing any more of what stands behind the prompt."""
        self.cache.lengths[row] = int(self.mask[row].sum())


def _encoder_decoder(model: MultimodalLM, embeds: torch.Tensor, attention_mask: torch.Tensor) -> NextLogits:
    """The encoder reads the prompt once; the decoder begins with its start token."""
    llm: Any = model.llm
    index, real = move_left(attention_mask)
    mask = None if bool(real.all()) else real
    encoded = llm.get_encoder()(inputs_embeds=take(embeds, index), attention_mask=mask, return_dict=True)
    cache: EncoderDecoderCache | None = None  # the model makes its own, one part for each of the decoder's attentions
    first = torch.full((len(embeds),), decoder_start_id(llm), device=embeds.device)

    def next_logits(ids: torch.Tensor | None, _running: torch.Tensor | None = None) -> torch.Tensor:
        nonlocal cache
        ids = first if ids is None else ids
        out = llm(
            encoder_outputs=encoded, attention_mask=mask, decoder_input_ids=ids[:, None], past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        cache = out.past_key_values
        last: torch.Tensor = out.logits[:, -1]
        return last

    return next_logits


@torch.inference_mode()
def stream_ids(
    model: MultimodalLM,
    batch: Batch,
    params: GenerationParams,
    stop_ids: Sequence[int],
    vocab_size: int | None = None,
    past: tuple[DynamicCache, torch.Tensor] | None = None,  # What was read before `batch`, and its mask [B, P]
    prompt: torch.Tensor | None = None,  # All ids of a single row [T], where drafts are to be looked up in them
    samplers: Sequence[Sampler] | None = None,  # Of each row, where a row has one of its own
) -> Generator[Step]:
    """Generate, one step at a time; a row's last id is its stop id where it met one, or stands at its last position."""
    batch = batch.to(model.device)
    begin = time.perf_counter()
    embeds, mask, cache = embed_batch(model, batch), batch.attention_mask, None
    encode_s = time.perf_counter() - begin
    if past is not None:
        cache, before = past
        mask = torch.cat((before, mask), dim=1)
    next_logits = start_decoding(model, embeds, mask, cache)
    generator = new_generator(params, model.device)
    stops = torch.tensor(sorted(set(stop_ids)), device=model.device)
    running = torch.ones(len(embeds), dtype=torch.bool, device=model.device)
    made = torch.empty((len(embeds), 0), dtype=torch.int64, device=model.device)
    next_ids: torch.Tensor | None = None
    room = context_length(model.llm.config) - (0 if model.encoder_decoder else mask.sum(dim=1))
    if prompt is not None and can_share(model):  # a cache that forgets goes back to no position
        never = torch.isin(prompt, torch.tensor([*stop_ids, *unspoken(model)])) | (prompt >= (vocab_size or 1 << 62))
        begun = cast(_Causal | _Graph, next_logits)
        most = min(params.max_new_tokens, int(room))
        next_logits = Lookup(begun, begun.cache, prompt.masked_fill(never, -1).tolist(), most)
    for step in range(params.max_new_tokens):
        logits = forbid(next_logits(next_ids, running), unspoken(model), vocab_size)
        if samplers is None:
            next_ids = sample_next(logits, params, made, generator)
            made = torch.cat((made, next_ids[:, None]), dim=1)
        else:
            on = zip(samplers, logits, running.tolist(), strict=True)
            next_ids = torch.tensor([choose(row) if goes_on else 0 for choose, row, goes_on in on], device=model.device)
        ids = [i if on else None for i, on in zip(next_ids.tolist(), running.tolist(), strict=True)]
        yield ids, encode_s if step == 0 else 0.0
        running &= ~torch.isin(next_ids, stops) & (step + 1 < room)
        if not running.any():
            return


def generate_ids(
    model: MultimodalLM, batch: Batch, params: GenerationParams, stop_ids: Sequence[int], vocab_size: int | None = None
) -> list[list[int]]:
    """Generate whole answers."""
    rows: list[list[int]] = [[] for _ in range(len(batch.input_ids))]
    for ids, _ in stream_ids(model, batch, params, stop_ids, vocab_size):
        for row, token in zip(rows, ids, strict=True):
            if token is not None:
                row.append(token)
    return rows
