"""Run the media parts that a batch does not need, so that every process takes part in every collective.

What comes out is zero with a gradient path: a part that had nothing to do gets gradients of zero, not none.
"""

from typing import Any

import torch
from torch import Tensor

from polymodal.media_plan import AudioPlan
from polymodal.utils.modules import evaluating


def touch_images(model: Any, has_images: bool, has_videos: bool) -> Tensor:
    """Zero, by way of every trained part for images and videos that has not run; these see an empty tile."""
    zero = torch.zeros((), device=model.device)
    if model.image_newline is not None:
        zero = zero + model.image_newline.float().sum() * 0
    encoder, temporal = model.vision_encoder, model.temporal_encoder
    if encoder is None or model.projector is None:
        return zero
    if not has_images:
        features = torch.zeros((1, encoder.grid.area, encoder.embed_dim), device=model.device)
        if _takes_part(encoder):
            tile = (1, 3, encoder.tile.height, encoder.tile.width)
            with evaluating(encoder):
                features = model.encode_images(torch.zeros(tile, device=model.device, dtype=_dtype(encoder)))
        context = torch.zeros((1, 1), dtype=torch.int64, device=model.device) if model.reads_context else None
        zero = zero + model.project(features, context).float().sum() * 0
    if not has_videos and temporal is not None and _takes_part(temporal):
        frames = torch.zeros((1, 1, encoder.grid.area, encoder.embed_dim), device=model.device, dtype=_dtype(temporal))
        zero = zero + temporal(frames, torch.zeros((1, 1), device=model.device)).float().sum() * 0
    return zero


def touch_audio(model: Any) -> Tensor:
    """Zero, by way of every trained part for sounds; these hear an empty frame."""
    zero, encoder = torch.zeros((), device=model.device), model.audio_encoder
    if encoder is None or model.audio_projector is None:
        return zero
    features, plan = (
        torch.zeros((1, encoder.embed_dim), device=model.device),
        AudioPlan(frames=(1,), tokens=(1,), num_tokens=1),
    )
    if _takes_part(encoder):
        with evaluating(encoder):
            frame = torch.zeros((1, encoder.mel_bins, 1), device=model.device, dtype=_dtype(encoder))
            features = model.encode_audio(frame, [plan])
    return zero + model.project_audio(features, [plan])[0].float().sum() * 0


def _dtype(module: Any) -> torch.dtype:
    return next((weight.dtype for weight in module.parameters()), torch.float32)


def _takes_part(module: Any) -> bool:
    """Whether a module has to run in every process: a sharded one gathers its weights even when it is frozen."""
    return any(weight.requires_grad or hasattr(weight, "full_tensor") for weight in module.parameters())
