"""The roofline: how fast this machine multiplies matrices, and how many multiplications a step cannot do without."""

from __future__ import annotations

import time

import torch

from benchmarks.training.setting import Shape


def matmul_flops(device: str, precision: str, size: int = 2048, repeats: int = 3) -> float:
    """Measure FLOP/s of a square matrix product; the best of a few, since whatever disturbs only slows.

    Args:
        device: "cpu" or "cuda".
        precision: "fp32" or "bf16".
        size: Side of the matrices.
        repeats: Products.

    Returns:
        Floating-point operations a second.
    """
    if device == "cuda":
        size, repeats = 8192, 10
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        began = time.perf_counter()
        product = left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    del product
    return 2 * size**3 / best


def model_flops(shape: Shape, stage: int, lengths: list[int], targets: list[int], cached: bool) -> float:
    """Operations that one pass over the samples needs, forward and backward.

    Counted: real tokens only, logits only where a token is trained, attention below the diagonal only, the tower's used
    layers forward only; of frozen matrices the gradient of their input, of trained ones of their weights as well.
    Padding, other logits and recomputation are not needed, so a system that does them is further from the roofline.

    Args:
        shape: The model.
        stage: 1, or 2 with the adapter.
        lengths: Tokens of each sample, those of its image included.
        targets: Trained tokens of each sample.
        cached: The tower's features are kept, so the tower is not needed.

    Returns:
        Floating-point operations.
    """
    width, inner, kv = shape.width, shape.inner, shape.width * shape.kv_heads // shape.heads
    sides = [(width, width), (width, kv), (width, kv), (width, width), (width, inner), (width, inner), (inner, width)]
    frozen = shape.layers * sum(a * b for a, b in sides)
    adapter = shape.layers * sum(shape.lora_r * (a + b) for a, b in sides) if stage == 2 else 0
    patches, tower = shape.image_tokens, shape.tower_width
    tower_matrices = (shape.tower_layers - 1) * 12 * tower * tower
    tower_attention = (shape.tower_layers - 1) * 4 * (patches + 1) ** 2 * tower
    stem = 2 * 3 * shape.patch**2 * tower * patches
    one_image = 0 if cached else 2 * tower_matrices * (patches + 1) + tower_attention + stem
    # Forward and weights' gradient of both layers, and the second one's input gradient.
    one_image += 4 * (tower * width + width * width) * patches + 2 * width * width * patches
    total = float(one_image * len(lengths))
    for length, trained in zip(lengths, targets, strict=True):
        total += 4 * frozen * length + 6 * adapter * length
        total += 6 * length * length * width * shape.layers
        total += 4 * width * shape.vocab * trained
    return total
