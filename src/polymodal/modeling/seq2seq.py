"""An encoder-decoder language model (T5, arXiv:1910.10683) behind one sequence of ids with a loss mask.

Up to the model there is one representation, whatever the language model: ids with placeholders, and labels on what the
assistant says. Here the row is cut in two. Everything before the *last* trained run, the last answer, is the encoder's
input, images and earlier answers included; that run is what the decoder is taught, from its start token on. What
comes after it, such as a template's newline, belongs to neither. So of a conversation of several turns only the last
answer is trained: a decoder cannot be taught an answer whose question's encoding has already seen that answer.
`Processor(last_answer_only=True)` masks the earlier ones where the loss mask is made, so that trained tokens are
counted as the model scores them; labels on several runs are refused here.

This is the split of BLIP-2's FlanT5 models (arXiv:2301.12597): image and prompt into the encoder, the answer out of
the decoder. Differences from the reference: the encoder's input ends where the template ends it (the preset "t5" ends
every message with `</s>`, as T5's tokenizer does); rows are moved to the left before they are encoded, so that models
with absolute positions see the same whichever side was padded. Pure functions of tensors; shapes as in
`docs/shapes.md`, with S positions of the encoder and U of the decoder.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from polymodal.errors import PolymodalError

IGNORE = -100
"""The label of a position that is not trained."""


@dataclass(frozen=True)
class Split:
    """Rows of a batch, cut into what is read and what is said."""

    source_index: Tensor  # [B, S] positions of the row that the encoder reads, moved to the left; any on padding
    source_mask: Tensor | None  # [B, S] bool, False on padding; None where nothing is padded
    # [B, U] the answer behind the start token, moved one to the right; the start token on padding
    decoder_input_ids: Tensor
    places: Tensor  # [R] positions of the flattened [B * U] that predict a target, row by row
    targets: Tensor  # [R] what they predict


def split_rows(labels: Tensor, attention_mask: Tensor | None, start_id: int) -> Split:
    """Cut rows before their answers."""
    # labels [B, T], attention_mask [B, T]
    rows, length = labels.shape
    positions = torch.arange(length, device=labels.device)
    trained = labels != IGNORE
    trained[:, 0] = False
    end = torch.where(trained, positions, -1).amax(dim=1)
    begin = torch.where(~trained & (positions <= end[:, None]), positions, -1).amax(dim=1) + 1
    begin = torch.where(end < 0, length, begin)
    read = positions < begin[:, None]
    if attention_mask is not None:
        read &= attention_mask
    said = (end - begin + 1).clamp(min=0)
    # The only wait for the device.
    counts: list[list[int]] = torch.stack((said, trained.sum(dim=1), read.sum(dim=1))).tolist()
    for row, (run, labelled, source) in enumerate(zip(*counts, strict=True)):
        if run != labelled:
            raise PolymodalError(
                f"sample {row}: {labelled} tokens carry a label, but its last answer has {run}; an encoder-decoder is "
                "trained on the last answer only (Processor(last_answer_only=True) masks the others)"
            )
        if not source:
            raise PolymodalError(f"sample {row}: nothing stands before its answer, so the encoder has nothing to read")
    source_index, source_mask = move_left(read, max(counts[2]))

    steps = max(1, *counts[0])
    offsets = torch.arange(steps, device=labels.device)
    answers = labels.gather(1, (begin[:, None] + offsets).clamp(max=length - 1))
    fed = torch.where(offsets[1:] < said[:, None], answers[:, :-1], start_id)
    places = [row * steps + place for row, run in enumerate(counts[0]) for place in range(run)]
    at = torch.tensor(places, dtype=torch.int64, device=labels.device)
    return Split(
        source_index=source_index,
        source_mask=source_mask if min(counts[2]) < max(counts[2]) else None,
        decoder_input_ids=torch.cat((fed.new_full((rows, 1), start_id), fed), dim=1),
        places=at,
        targets=answers.reshape(-1).index_select(0, at),
    )


def move_left(mask: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Find what is real in each row, and put it to the left."""
    # mask [B, T] -> [B, S]
    if length is None:
        length = int(mask.sum(dim=1).max())
    index = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :length]
    return index, mask.gather(1, index)


def take(embeds: Tensor, index: Tensor) -> Tensor:  # embeds [B, T, D], index [B, S] -> [B, S, D]
    """Pick positions of each row."""
    return embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1]))
