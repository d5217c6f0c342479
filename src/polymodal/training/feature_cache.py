"""The frozen encoders' output, computed once for each image or sound and read back in every epoch.

The encoder is the same in every step as long as it is frozen, so its work is done once: on a small language model
this saves a quarter of a step, in BLIP-2's first stage two thirds. Features lie in one file, `features.bin`, read
through a memory map, beside `index.jsonl`, which says where each image's rows are. Both only grow; a line of the
index is written after its rows are on disk, so a killed pass goes on where it stopped. The folder's name holds a hash
of the encoder's weights, and an image's key holds its pixels and preprocessing, so nothing stale is ever read.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from polymodal.config import VISION_ORIGINS, ModelConfig
from polymodal.errors import ConfigError, DataError, PolymodalError
from polymodal.modeling.vlm import MultimodalLM
from polymodal.training.reporting.log import append_log
from polymodal.utils.files import make_folder, write_text, writing
from polymodal.utils.progress import log, progress
from polymodal.utils.threads import ahead

MEMORY = "memory"
OFF = "off"
CACHE = "feature cache "


@dataclass
class Broken:
    """Records whose image was readable when they were tokenised and is not any more."""

    file: Path | None  # Lists those that are left out; None: the first one stops the run
    images: dict[str, PolymodalError] = field(default_factory=dict)  # What is wrong with images, by key
    seen: set[str] = field(default_factory=set)

    def note(self, id: str, error: PolymodalError) -> None:
        """Leave a record out, or stop."""
        if self.file is None:
            raise error
        if id not in self.seen:
            self.seen.add(id)
            log(f"left out of its step, {error}")
            append_log(self.file, {"id": id, "error": str(error)})


class FeatureStore:
    """Rows of features by image key."""

    def __init__(self, folder: Path | None, row: tuple[int, ...], dtype: str) -> None:
        self.folder = folder
        self.row = row
        self.dtype = np.dtype(dtype)
        self.where: dict[str, tuple[int, int]] = {}
        self._rows = 0
        self._kept: list[np.ndarray] = []
        self._array: np.ndarray | None = None
        if folder is not None:
            if not folder.is_dir():
                make_folder(folder, CACHE)
            with writing(folder, CACHE):
                self._read_index()

    @classmethod
    def under(cls, where: str, identity: Callable[[], str], row: tuple[int, ...], dtype: str) -> FeatureStore:
        """The store of what an encoder gives, in memory or in a folder that is named after the encoder."""
        return cls(None if where == MEMORY else Path(where) / f"{identity()[:16]}-{dtype}", row, dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one tile's features."""
        return int(np.prod(self.row)) * self.dtype.itemsize

    def _read_index(self, mend: bool = False) -> None:
        """Read where rows are; whoever is about to write also cuts off what a crash left half written."""
        assert self.folder is not None
        data, index = self.folder / "features.bin", self.folder / "index.jsonl"
        held = data.stat().st_size // self.row_bytes if data.is_file() else 0
        good = 0
        if index.is_file():
            for line in index.read_bytes().splitlines(keepends=True):
                try:
                    key, start, count = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n") or start + count > held:
                    break
                self.where[key] = (start, count)
                self._rows = max(self._rows, start + count)
                good += len(line)
        for path, size in ((index, good), (data, self._rows * self.row_bytes)):
            if mend and path.is_file() and path.stat().st_size != size:
                os.truncate(path, size)

    def add(self, entries: Sequence[tuple[str, np.ndarray]]) -> None:
        """Append images. Values past the range of float16 are clipped to it rather than made infinite."""
        start = self._rows
        places = []
        for key, features in entries:
            places.append((key, start, len(features)))
            start += len(features)
        parts = [features for _, features in entries]
        if self.dtype.kind == "f":
            limit = float(np.finfo(self.dtype).max)
            parts = [np.clip(part, -limit, limit).astype(self.dtype) for part in parts]
        block = np.concatenate(parts)
        if self.folder is None:
            self._kept.append(block)
        else:
            lines = "".join(json.dumps(place) + "\n" for place in places)
            with writing(self.folder, CACHE):
                _append(self.folder / "features.bin", np.ascontiguousarray(block).tobytes())
                _append(self.folder / "index.jsonl", lines.encode())
        self.where.update({key: (first, count) for key, first, count in places})
        self._rows = start
        self._array = None

    def array(self) -> np.ndarray:
        """All rows, [rows, P, E]: a memory map, or the array in memory."""
        if self._array is None:
            if self.folder is not None:
                shape = (self._rows, *self.row)
                self._array = np.memmap(self.folder / "features.bin", self.dtype, "r", shape=shape)
            else:
                self._array = np.concatenate(self._kept)
                self._kept = [self._array]
        return self._array

    def gather(self, keys: Sequence[str]) -> torch.Tensor | None:  # -> [N, P, E]
        """Features of images, tiles one after the other."""
        if not keys:
            return None
        try:
            places = [self.where[key] for key in keys]
        except KeyError as error:
            raise DataError(f"no features for image {error}: the cache is not complete") from None
        rows = np.concatenate([np.arange(start, start + count) for start, count in places])
        # Memory of torch's own is aligned; numpy's is not always, and a matrix product may then round otherwise.
        found = torch.empty((len(rows), *self.row), dtype=getattr(torch, self.dtype.name))
        np.take(self.array(), rows, axis=0, out=found.numpy(), mode="clip")
        return found

    def unfinished(self) -> list[str]:
        """The images that a pass was about to encode, in its order, when it was killed."""
        path = self.folder / "pass.json" if self.folder is not None else None
        if path is None or not path.is_file():
            return []
        keys: list[str] = json.loads(path.read_text(encoding="utf-8"))
        return keys

    def begin(self, keys: list[str]) -> list[str]:
        """Write down which images a pass encodes."""
        # What an encoder gives differs in the last bits with the images that go through it together. A pass that
        # was killed goes on with the same groups, so that its run ends as if nothing had happened.
        before = self.unfinished()
        if sorted(before) == sorted(keys):
            return before
        keys = [key for key in keys if key not in self.where]
        if self.folder is not None:
            write_text(self.folder / "pass.json", json.dumps(keys))
        return keys

    def end(self) -> None:
        """Write down that the pass is over."""
        if self.folder is not None:
            with suppress(OSError):  # on a read-only disk; a pass of nothing new may begin again
                (self.folder / "pass.json").unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Let only one process write; the others wait, and see what it wrote. A read-only folder is only read."""
        if self.folder is None:
            yield
            return
        with writing(self.folder, CACHE):
            try:
                handle = (self.folder / "lock").open("w")
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                handle = None
        if handle is None:
            yield
            return
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            self.where.clear()
            self._rows = 0
            self._array = None
            with writing(self.folder, CACHE):
                self._read_index(mend=True)
            yield


def encoder_identity(encoder: torch.nn.Module, config: ModelConfig, more: str = "") -> str:
    """Hash an encoder's configuration, weights and buffers, and what else decides the rows."""
    vision = config.vision
    rules = "" if vision is None else vision.model_dump_json(exclude=VISION_ORIGINS)
    return weights_identity(encoder, rules + more)


def open_audio_store(model: MultimodalLM, config: ModelConfig, where: str, dtype: str) -> FeatureStore | None:
    """Open the store of a model's audio encoder, a row a token; None for a model without one."""
    encoder: Any = model.audio_encoder
    if encoder is None or config.audio is None:
        return None
    _refuse_trained(encoder, "audio_encoder")
    rules = f"audio {config.audio.type} {config.audio.stack}"
    return FeatureStore.under(where, lambda: weights_identity(encoder, rules), (1, encoder.embed_dim), dtype)


def weights_identity(module: torch.nn.Module, rules: str) -> str:
    """Hash what decides a frozen module's output."""
    digest = hashlib.sha256(rules.encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _refuse_trained(encoder: torch.nn.Module, part: str) -> None:
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    if trained:
        what = part.replace("_", " ")
        raise ConfigError(f"run.feature_cache: the {what} is trained ({part}.{trained[0]}); set it to off")


def open_store(model: MultimodalLM, config: ModelConfig, where: str, dtype: str) -> FeatureStore | None:
    """Open the store of a model's vision encoder; None for a model that only hears."""
    encoder: Any = model.vision_encoder
    if encoder is None or config.image is None:
        if config.audio is not None:
            return None
        raise ConfigError("run.feature_cache: this model has no vision encoder; set it to off")
    _refuse_trained(encoder, "vision_encoder")
    # Of images of any shape a row is a patch, since they have different numbers of these.
    own_shapes = config.image.image_aspect_ratio == "native"
    row = (1 if own_shapes else encoder.grid.area, encoder.embed_dim)
    more = " patch by patch" if own_shapes else ""
    return FeatureStore.under(where, lambda: encoder_identity(encoder, config, more), row, dtype)


Place = TypeVar("Place", bound=Hashable)
Ready = TypeVar("Ready")


def fill_missing(
    store: FeatureStore,
    images: Iterable[tuple[str, Place, int]],  # Key, where it is, tiles or windows
    decode: Callable[[str, Place], Ready],
    encode: Callable[[Sequence[Ready]], Sequence[torch.Tensor]],  # A few at once; of each [n, P, E]
    device: torch.device,
    workers: int,
    broken: Broken,
    what: str = "images",
) -> int:
    """Compute the features that are missing, in groups that a killed run repeats; unreadable images go to `broken`."""

    def decoded(key: str) -> tuple[str, Ready | None]:
        try:
            return key, decode(key, todo[key])
        except PolymodalError as error:
            if broken.file is None:
                raise
            broken.images[key] = error
            return key, None

    # A CPU is twice as fast on tiles that stay in its cache as on large batches.
    tiles_at_once = 4 if device.type == "cpu" else 64
    with store.locked():
        todo: dict[str, Place] = {}
        tiles: dict[str, int] = {}
        unfinished = set(store.unfinished())
        for key, source, count in images:
            if key not in store.where or key in unfinished:
                todo.setdefault(key, source)
                tiles[key] = count
        if not todo:
            return 0
        groups = group_images(store.begin(list(todo)), tiles, tiles_at_once)
        groups = [group for group in groups if any(key not in store.where for key in group)]
        wanted = [key for group in groups for key in group]
        missing = sum(key not in store.where for key in wanted)
        entries = iter(progress(ahead(decoded, wanted, workers, tiles_at_once), f"encoding {what}", len(wanted)))
        for group in groups:
            ready = [(key, made) for key, made in (next(entries) for _ in group) if made is not None]
            encoded = _encode(encode, ready) if ready else []
            if fresh := [entry for entry in encoded if entry[0] not in store.where]:
                store.add(fresh)
        # Let the progress bar see its end.
        for _ in entries:
            raise DataError(f"{what} were decoded that nobody asked for")
        store.end()
        return missing - sum(key in broken.images for key in wanted)


def group_images(keys: Sequence[str], tiles: dict[str, int], at_once: int) -> list[list[str]]:
    """Put images together that go through the encoder at once."""
    groups: list[list[str]] = [[]]
    held = 0
    for key in keys:
        groups[-1].append(key)
        held += tiles[key]
        if held >= at_once:
            groups.append([])
            held = 0
    return [group for group in groups if group]


@torch.no_grad()
def _encode(
    encode: Callable[[Sequence[Ready]], Sequence[torch.Tensor]], ready: Sequence[tuple[str, Ready]]
) -> list[tuple[str, np.ndarray]]:
    """Encode a few images or sounds together."""
    made = encode([item for _, item in ready])
    return [(key, features.float().cpu().numpy()) for (key, _), features in zip(ready, made, strict=True)]


def together(
    encode: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]:
    """An encoder of tiles [N, 3, H, W] as what `fill_missing` asks for."""
    return lambda items: encode(torch.cat(list(items)).to(device)).split([len(item) for item in items])


def patch_by_patch(
    encode: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]], device: torch.device
) -> Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]:
    """An encoder of images of several sizes as what `fill_missing` asks for: of each [n P, 1, E]."""
    return lambda items: [found.flatten(0, 1)[:, None] for found in encode([item.to(device) for item in items])]


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
