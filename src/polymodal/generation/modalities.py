"""Answers of text and images: a state machine over modalities, each with its own ids and its own way of choosing them.

A row is in its text or inside a block. In the text it may say the tokenizer's words and, where the whole block still
fits into the context, what begins an image. A block then has its length and its allowed ids position by position, its
end is forced, and the text goes on. Nothing else can be said: ids that are not allowed are never looked at, so no code
stands outside of a block and no word inside (Chameleon's authors, too, found such masks indispensable).

Guidance (arXiv:2207.12598) reads a second row for each, which knows the image so far and no condition, in the same
batch and cache: `unconditional + g (conditional - unconditional)`, inside blocks only. Between blocks that row sees its
first token alone, and takes no position. Every row has a random state of its own and left padding is masked, so a batch
of unequal prompts draws what each draws alone.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from polymodal.config import VocabularyLayout
from polymodal.errors import PolymodalError
from polymodal.generation.generate import embed_batch, start_decoding
from polymodal.generation.params import GenerationParams
from polymodal.generation.sampling import sample_next, seeded_generator, unspoken
from polymodal.generation.streaming import Step
from polymodal.modeling.language_model import context_length
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Batch, Sample, collate

Ids = tuple[int, int]
"""Neighbouring ids: the first, and the one behind the last."""


@dataclass(frozen=True)
class Block:
    """A medium as ids: what begins it, and what may stand at each position after, its end among them."""

    begin: int
    steps: tuple[Ids, ...]

    @property
    def length(self) -> int:
        """Positions that it takes."""
        return 1 + len(self.steps)


def image_block(vocabulary: VocabularyLayout, codes: int) -> Block:
    """The block of an image of so many codes."""
    image, names = vocabulary.image, vocabulary.specials
    return Block(names["<boi>"], (*[(image.offset, image.end)] * codes, _only(names["<eoi>"])))


def video_block(vocabulary: VocabularyLayout, frames: int, codes: int) -> Block:
    """The block of a video: its frames as images, one id between each two."""
    image, names = vocabulary.image, vocabulary.specials
    frame = [_only(names["<frame>"]), *[(image.offset, image.end)] * codes]
    return Block(names["<bov>"], (*(frame * frames)[1:], _only(names["<eov>"])))


def audio_block(vocabulary: VocabularyLayout, frames: int) -> Block:
    """The block of a sound: of each frame one code of each codebook, in their order."""
    ranges, names = vocabulary.audio, vocabulary.specials
    return Block(names["<boa>"], (*[(each.offset, each.end) for each in ranges] * frames, _only(names["<eoa>"])))


def _only(token: int) -> Ids:
    return token, token + 1


@dataclass
class _Row:
    """Where an answer is."""

    block: Block
    params: GenerationParams
    stop_ids: tuple[int, ...]
    generator: torch.Generator
    room: int  # Positions that are left in the context
    said: list[int] = field(default_factory=list)  # The ids of its text
    media: int = 0  # Blocks that were begun
    place: int | None = None  # The next position of the block that it is in
    running: bool = True

    def allowed(self, text: torch.Tensor) -> torch.Tensor | Ids:
        """What may come next, out of its text [V] of bools or a run of ids."""
        first = not self.said and not self.media
        if self.place is not None:
            return self.block.steps[self.place]
        if first and self.params.modalities[0] == "image":
            return _only(self.block.begin)
        if "text" not in self.params.modalities:  # the image is all of the answer
            return _only(self.stop_ids[0])
        text = text.clone()
        may = "image" in self.params.modalities and self.media < self.params.image.max_images
        text[self.block.begin] = may and self.block.length <= self.room
        return text

    def take(self, token: int) -> None:
        """Go on by an id."""
        self.room -= 1
        if self.place is not None:
            self.place = self.place + 1 if self.place + 1 < len(self.block.steps) else None
        elif token == self.block.begin:
            self.place, self.media = 0, self.media + 1
        else:
            self.said.append(token)
            self.running = token not in self.stop_ids and len(self.said) < self.params.max_new_tokens
        if self.place is None and self.room < 1:
            self.running = False


@torch.inference_mode()
def stream_modalities(
    model: MultimodalLM,
    batch: Batch,
    params: GenerationParams,
    stop_ids: Sequence[int],
    block: Block,
    text_ids: int,  # The ids below are the tokenizer's
    conditions: Sequence[Sequence[int]],  # What stands in each second row in place of the prompt
    look: Callable[[torch.Tensor], None] = lambda logits: None,  # Sees the logits that each image's id is chosen from
) -> Generator[Step]:
    """Generate answers that may hold images, one step at a time; as `stream_ids`, with ids of blocks among them."""
    batch = batch.to(model.device)
    begin = time.perf_counter()
    rows = len(batch.input_ids)
    assert params.image.guidance is not None  # settled by the model
    guided = params.image.guidance != 1.0
    embeds, mask = embed_batch(model, batch), batch.attention_mask
    if guided:
        embeds, mask = _with_second_rows(model, embeds, mask, conditions)
    encode_s = time.perf_counter() - begin
    next_logits = start_decoding(model, embeds, mask)
    prompt = mask.shape[1]
    room = context_length(model.llm.config) - batch.attention_mask.sum(dim=1)
    require_room(int(room.min()), params, block)
    states = [_Row(block, params, tuple(stop_ids), seeded_generator(params, model.device), int(left)) for left in room]
    text = _text_mask(model, text_ids)
    next_ids: torch.Tensor | None = None
    running: torch.Tensor | None = None
    step = 0
    while any(state.running for state in states):
        logits = next_logits(next_ids, running).float()
        ids: list[int | None] = []
        for row, state in enumerate(states):
            second = logits[rows + row] if guided else None
            ids.append(_choose(state, logits[row], second, text, look) if state.running else None)
        yield ids, encode_s if step == 0 else 0.0
        step += 1
        for row, (state, token) in enumerate(zip(states, ids, strict=True)):
            if token is not None:
                state.take(token)
            if guided and token is not None and state.place == 0:  # the image before, and text, are no condition
                next_logits.forget(rows + row, prompt)  # type: ignore[attr-defined]  # a causal language model
        on = [state.running for state in states]
        inside = [state.running and state.place is not None for state in states] if guided else []
        chosen = [0 if token is None else token for token in ids]
        running = torch.tensor([*on, *inside], device=model.device)
        next_ids = torch.tensor([*chosen, *chosen] if guided else chosen, device=model.device)


def require_room(room: int, params: GenerationParams, block: Block) -> None:
    """Refuse to begin with an image for which the context has no room."""
    if params.modalities[0] == "image" and room < block.length:
        raise PolymodalError(
            f"an image takes {block.length} positions, and behind this conversation the model's context has "
            f"{max(0, room)} left; shorten the conversation"
        )


def _with_second_rows(
    model: MultimodalLM, embeds: torch.Tensor, mask: torch.Tensor, conditions: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put rows that know no prompt below those that do."""
    samples = [Sample(torch.tensor(ids), torch.zeros(len(ids), dtype=torch.bool)) for ids in conditions]
    second = collate(samples, 0, side="left").to(embeds.device)
    parts = [(embeds, mask), (embed_batch(model, second), second.attention_mask)]
    # One position of padding at least, so that there is a mask, in which a second row can be made to forget.
    pads = [1 + max(embeds.shape[1], second.input_ids.shape[1]) - part.shape[1] for part, _ in parts]
    return (
        torch.cat([F.pad(part, (0, 0, pad, 0)) for pad, (part, _) in zip(pads, parts, strict=True)]),
        torch.cat([F.pad(seen, (pad, 0)) for pad, (_, seen) in zip(pads, parts, strict=True)]),
    )


def _choose(
    state: _Row,
    logits: torch.Tensor,  # [V]
    second: torch.Tensor | None,  # [V]
    text: torch.Tensor,  # [V]
    look: Callable[[torch.Tensor], None],
) -> int:
    """Choose a row's next id among those that are allowed."""
    allowed = state.allowed(text)
    if isinstance(allowed, torch.Tensor):
        made = torch.tensor([state.said], dtype=torch.int64, device=logits.device)
        masked = logits[: len(allowed)].masked_fill(~allowed, -torch.inf)
        return int(sample_next(masked[None], state.params, made, state.generator))
    first, end = allowed
    if end - first == 1:
        return first
    guided = logits[first:end]
    if second is not None:
        without = second[first:end]
        guided = without + (state.params.image.guidance or 0.0) * (guided - without)
    look(guided)
    none = torch.empty((1, 0), dtype=torch.int64, device=logits.device)
    return first + int(sample_next(guided[None], state.params.of_codes, none, state.generator))


def _text_mask(model: MultimodalLM, text_ids: int) -> torch.Tensor:  # [V]
    mask = torch.ones(text_ids, dtype=torch.bool, device=model.device)
    mask[[token for token in unspoken(model) if token < text_ids]] = False
    return mask
