"""Projected tokens into their order, and into the placeholders of a sequence."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from polymodal.errors import PolymodalError
from polymodal.media_plan import ImagePlan, VideoPlan
from polymodal.modeling.encoders.video_temporal import SpatioTemporalPool


def merge_media(
    text: Tensor,  # [B, T, D]
    is_media: Tensor,  # [B, T]
    media: Sequence[Tensor],
    sample_of_media: Sequence[int],
    modality: str,
    places: Tensor | None = None,  # [M]
) -> Tensor:  # [B, T, D]
    """Put media tokens where the placeholders are; the length does not change."""
    if places is not None and len(places) == sum(len(item) for item in media):
        return _put(text, places, media)
    given = [0] * len(text)
    for item, row in zip(media, sample_of_media, strict=True):
        given[row] += len(item)
    for row, (places, features) in enumerate(zip(is_media.sum(dim=1).tolist(), given, strict=True)):
        if places != features:
            raise PolymodalError(f"{modality}: sample {row} has {places} placeholders but {features} features")
    return _put(text, is_media.reshape(-1).nonzero().squeeze(1), media)


def _put(text: Tensor, places: Tensor, media: Sequence[Tensor]) -> Tensor:
    if not media:
        return text
    flat = text.reshape(-1, text.shape[-1])
    return flat.index_copy(0, places, torch.cat(list(media)).to(flat.dtype)).view_as(text)


def lay_out(tiles: Tensor, plan: ImagePlan | VideoPlan, newline: Tensor | None) -> Tensor:
    """Order the projected tokens of an image, or of a video's frames, as the plan says."""
    # tiles [n, Q, D], newline [D] -> [num_tokens, D]
    if isinstance(plan, VideoPlan):
        pool = SpatioTemporalPool(plan.tokens, max(1, plan.old), plan.stride)
        pooled = [pool(tiles[None, : plan.old])[0].flatten(0, 1)] if plan.old else []
        tokens = torch.cat((*pooled, tiles[plan.old :].flatten(0, 1)))
    elif plan.merge == "flat" or plan.kept is None or plan.unpadded is None:
        tokens = tiles.flatten(0, 1)
        if plan.newline and newline is not None:
            tokens = torch.cat((tokens, newline.to(tokens)[None]))
    else:
        width = tiles.shape[-1]
        overview = tiles[: 1 if plan.overview == "first" else 0].flatten(0, 1)
        rows, columns, kept = plan.grid.height, plan.grid.width, plan.kept
        canvas = tiles[len(tiles) - rows * columns :].view(rows, columns, plan.tokens.height, plan.tokens.width, width)
        canvas = canvas.permute(0, 2, 1, 3, 4).reshape(rows * plan.tokens.height, columns * plan.tokens.width, width)
        canvas = canvas[kept.top : kept.top + kept.height, kept.left : kept.left + kept.width]
        if (kept.height, kept.width) != (plan.unpadded.height, plan.unpadded.width):  # anyres_max_N shrinks
            size = [plan.unpadded.height, plan.unpadded.width]
            canvas = F.interpolate(canvas.permute(2, 0, 1)[None], size, mode="bilinear")[0].permute(1, 2, 0)
        if plan.newline and newline is not None:
            canvas = torch.cat((canvas, newline.to(canvas).expand(len(canvas), 1, width)), dim=1)
        tokens = torch.cat((overview, canvas.flatten(0, 1)))
    if len(tokens) != plan.num_tokens:
        raise PolymodalError(f"media: the plan says {plan.num_tokens} tokens, the layout gives {len(tokens)}")
    return tokens
