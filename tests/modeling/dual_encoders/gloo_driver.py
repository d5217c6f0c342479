"""Computes every loss of pairs with one process and with two, joined by gloo; a script of tests.

Each process is a forked child, so torch is imported once. Usage: gloo_driver.py RESULTS.pt, which gets {"one": [what
process 0 found], "two": [process 0, process 1], "unequal": [...], "shapes": [...]}.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from polymodal.errors import PolymodalError
from polymodal.modeling.dual_encoders.gradient_cache import cached_backward, gather, gather_with_grad, process_count
from polymodal.modeling.dual_encoders.losses import (
    clip_loss,
    draw_negatives,
    itc_loss,
    itg_count,
    itg_loss,
    itg_targets,
    itm_inputs,
    itm_loss,
    siglip_loss,
)

TIMEOUT_S = 60
PAIRS, QUERIES, TEXT, WORDS = 8, 3, 5, 7
IDS = torch.tensor([3, 1, 3, 4, 5, 6, 1, 0])


class Step:
    """A step's pairs: this process's rows of a batch that is the same for any number of processes."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.count = PAIRS // process_count()
        self.offset = (dist.get_rank() if process_count() > 1 else 0) * self.count
        self.own = slice(self.offset, self.offset + self.count)
        self.found: dict[str, torch.Tensor] = {}

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def shared(self, *shape: int) -> torch.Tensor:
        """A parameter, the same everywhere."""
        return self.random(*shape).requires_grad_()

    def rows(self, *shape: int) -> torch.Tensor:
        """A leaf that holds this process's rows."""
        return F.normalize(self.random(PAIRS, *shape), dim=-1)[self.own].clone().requires_grad_()

    def keep(self, name: str, loss: torch.Tensor, rows: list[torch.Tensor], shared: list[torch.Tensor]) -> None:
        """Keep the share, its rows' gradients ("rows/") and its parameters' ("sum/", to be added up)."""
        loss.backward()
        self.found[f"sum/{name}"] = loss.detach()
        self.found |= {f"rows/{name}/{i}": leaf.grad for i, leaf in enumerate(rows)}
        self.found |= {f"sum/{name}/{i}": leaf.grad for i, leaf in enumerate(shared)}


def contrastive(step: Step) -> None:
    own_ids = IDS[step.own]
    for ids in (None, IDS):
        image, text, scale, bias = step.rows(4), step.rows(4), step.shared(), step.shared()
        known = (None, None) if ids is None else (own_ids, gather(own_ids))
        everyone = gather_with_grad(image), gather_with_grad(text)
        loss = clip_loss(image, text, scale, *everyone, step.offset, *known)
        step.keep(f"clip {ids is None}", loss, [image, text], [scale])
        for chunk in (None, 3):
            image, text = step.rows(4), step.rows(4)
            loss = siglip_loss(image, text, scale, bias, gather_with_grad(text), step.offset, chunk, *known)
            step.keep(f"siglip {ids is None} {chunk}", loss, [image, text], [bias])


def blip2(step: Step) -> None:
    own_ids = IDS[step.own]
    all_ids = gather(own_ids)
    rows = step.rows(QUERIES, 4), step.rows(4)
    for gathered in (gather, gather_with_grad):
        image, text = (leaf.detach().clone().requires_grad_() for leaf in rows)
        temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        everyone = gathered(image), gathered(text)
        loss, to_text, to_image = itc_loss(image, text, temperature, *everyone, own_ids, all_ids, step.offset)
        step.keep(f"itc {gathered.__name__}", loss, [image, text], [temperature])
    random = torch.Generator().manual_seed(5)
    negative_texts = draw_negatives(to_text, own_ids, all_ids, step.offset, random)
    negative_images = draw_negatives(to_image, own_ids, all_ids, step.offset, random)
    step.found |= {"rows/negative texts": negative_texts, "rows/negative images": negative_images}

    # A head over the image's features and the text's stands in for the joint pass.
    head = step.shared(8, 2)
    images, texts = itm_inputs(negative_images, negative_texts, step.offset)
    image, text = gather_with_grad(step.rows(QUERIES, 4)), gather_with_grad(step.rows(4))
    both = torch.cat([image[images], text[texts][:, None].expand(-1, QUERIES, -1)], dim=-1)
    loss, right = itm_loss(both @ head, pairs=PAIRS)
    step.keep("itm", loss, [], [head])
    step.found["sum/itm right"] = right

    ids = torch.randint(WORDS, (PAIRS, TEXT), generator=step.generator)[step.own]
    lengths = torch.tensor([5, 2, 3, 4, 2, 2, 3, 5])[step.own]
    mask = torch.arange(TEXT)[None] < lengths[:, None]
    count = itg_count(gather(mask))
    decoder_ids, rows, targets = itg_targets(ids, mask, start_id=6)
    table = step.shared(WORDS, WORDS)
    loss = itg_loss(table[decoder_ids].flatten(0, 1)[rows], targets, count=count)
    step.keep("itg", loss, [], [table])


def cached(step: Step) -> None:
    """Two micro-batches a process; the encoders are shared, so their gradients add up over processes."""
    image_weight, text_weight, scale = step.shared(4, 6), step.shared(3, 6), step.shared()
    images, words = step.random(PAIRS, 4)[step.own], step.random(PAIRS, 3)[step.own]
    size = step.count // 2
    items = list(zip(images.split(size), words.split(size), IDS[step.own].split(size), strict=True))

    def embed(item: Any) -> Any:
        return [F.normalize(item[0] @ image_weight, dim=-1), F.normalize(item[1] @ text_weight, dim=-1), item[2]], None

    def contrast(image: torch.Tensor, text: torch.Tensor, ids: torch.Tensor) -> Any:
        all_image, all_text = gather_with_grad(image), gather_with_grad(text)
        return {"clip": clip_loss(image, text, scale, all_image, all_text, step.offset, ids, gather(ids))}

    def extra(start: int, item: Any, tensors: Any, carry: Any) -> Any:
        targets = torch.arange(step.offset + start, step.offset + start + len(item[0]))
        return {"extra": ((tensors[0] * tensors[1]).sum(1) - targets).square().sum() / PAIRS}

    terms = cached_backward(embed, contrast, extra, items)
    step.found |= {f"sum/cached {name}": value for name, value in terms.items()}
    weights = (image_weight, text_weight, scale)
    step.found |= {f"sum/cached/{i}": weight.grad for i, weight in enumerate(weights)}


def gathered(step: Step) -> None:
    """Every dtype and shape; integers that a float could not hold."""
    base = torch.arange(PAIRS * 6).view(PAIRS, 2, 3)[step.own]
    for dtype in (torch.int64, torch.int32, torch.uint8, torch.float32, torch.bfloat16, torch.float16):
        step.found[f"all/{dtype}"] = gather((base + (2**53 if dtype is torch.int64 else 0)).to(dtype))
    step.found["all/bool"] = gather(base % 3 == 0)
    step.found["all/flat"] = gather(base[:, 0, 0])
    step.found["all/view"] = gather(base.transpose(1, 2))
    half = torch.ones(step.count, dtype=torch.bfloat16, requires_grad=True)
    (gather_with_grad(half) * (1 + step.offset)).sum().backward()
    step.found["half"] = half.grad


def everything() -> dict[str, torch.Tensor]:
    step = Step()
    for case in (contrastive, blip2, cached, gathered):
        case(step)
    return step.found


def refused(make: Callable[[int], torch.Tensor]) -> list[str]:
    said = []
    for call in (gather, gather_with_grad):
        try:
            call(make(dist.get_rank()))
        except PolymodalError as error:
            said.append(str(error))
    return said


def child(rank: int, world: int, port: int, path: Path, run: Callable[[], Any]) -> None:
    """Compute in this process, write what was found, and end it."""
    signal.alarm(TIMEOUT_S)
    try:
        if world > 1:
            address = f"tcp://127.0.0.1:{port}"
            dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world)
        torch.save(run(), path)
        if world > 1:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def run_in(world: int, folder: Path, run: Callable[[], Any]) -> list[Any]:
    """What each of so many processes found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths, children = [folder / f"{world}-{rank}.pt" for rank in range(world)], []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            child(rank, world, port, paths[rank], run)
        children.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    if any(statuses):
        sys.exit(f"processes ended with {statuses}")
    return [torch.load(path) for path in paths]


def main() -> None:
    results = Path(sys.argv[1])
    torch.set_num_threads(1)
    found = {"one": run_in(1, results.parent, everything), "two": run_in(2, results.parent, everything)}
    found["unequal"] = run_in(2, results.parent, lambda: refused(lambda rank: torch.zeros(3 + rank, 4)))
    found["shapes"] = run_in(2, results.parent, lambda: refused(lambda rank: torch.zeros(3, *[2] * (1 + rank))))
    torch.save(found, results)


if __name__ == "__main__":
    main()
