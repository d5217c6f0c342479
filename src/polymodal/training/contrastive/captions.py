"""Records to pairs: images with their captions as tokens.

All captions are tokenised before the first step, and every image is decoded once, so a record that cannot be used is
found before training. The records of one image in one source are one sample; which of its captions an epoch sees is
drawn (`draws`). Pairs of one image can still meet in a step (two sources, `repeat`, the end of an epoch): they carry
the same image id, by which losses know that neither is the other's negative.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polymodal.data.index import Reading
from polymodal.data.load import iter_rows, row_record
from polymodal.data.mixture import epoch_repeats
from polymodal.errors import DataError, PolymodalError
from polymodal.messages import Image
from polymodal.training.contrastive import augment
from polymodal.training.contrastive.dataset import Pairs
from polymodal.training.contrastive.images import Images, image_numbers, notes_file, scan, source_name
from polymodal.utils.files import write_text
from polymodal.utils.progress import log, progress

if TYPE_CHECKING:
    from polymodal.data.readers.conversations import Record
    from polymodal.messages import Source
    from polymodal.modeling.dual_encoders.base import PairModel
    from polymodal.training.recipes.contrastive import PairRecipe, TextConfig


def prepare_pairs(
    mix: Sequence[tuple[Sequence[Record] | Reading, float]],
    weights: Sequence[float | None],
    model: PairModel,
    images: Images,
    recipe: PairRecipe,
    skipped_file: Path,
) -> Pairs:
    """Read records, tokenise every caption and look at every image once."""
    skip = recipe.data.on_error == "skip"
    faults: list[dict[str, str]] = []
    parts: list[list[_Pair]] = []
    for source, _ in mix:
        part: list[_Pair] = []
        for found in _read(source):
            if isinstance(found, _Pair):
                part.append(found)
            elif not skip:
                raise found[1]
            else:
                faults.append({"id": found[0], "error": str(found[1])})
        parts.append(part)
    folder = Path(recipe.data.index) if recipe.data.index is not None else skipped_file.parent / "index"
    everything = [pair.source for part in parts for pair in part]
    broken = scan(images, everything, notes_file(folder, images.image), recipe.run.workers, "reading images")
    kept: list[list[_Pair]] = []
    for part in parts:
        kept.append([])
        for pair in part:
            error = broken.get(source_name(pair.source))
            if error is None:
                kept[-1].append(pair)
            elif not skip:
                raise type(error)(f"record {pair.id}: {error}")
            else:
                faults.append({"id": pair.id, "error": str(error)})
    if faults:
        write_text(skipped_file, "".join(json.dumps(fault, ensure_ascii=False) + "\n" for fault in faults))
        log(f"left out {len(faults)} records that are no pairs or cannot be read, listed in {skipped_file}")
    if not any(kept):
        raise DataError(f"no pair is left to train on: {len(faults)} records cannot be used, see {skipped_file}")
    return _collect(kept, [repeat for _, repeat in mix], weights, model, images, recipe.text, len(faults))


@dataclass(frozen=True)
class _Pair:
    """A record as a pair."""

    id: str
    source: Source
    captions: tuple[str, ...]


def _read(source: Sequence[Record] | Reading) -> Iterator[_Pair | tuple[str, PolymodalError]]:
    """Records as pairs, or what is wrong with them."""
    if not isinstance(source, Reading):
        for record in source:
            yield _checked(record)
        return
    rows = iter_rows(
        source.path, source.image_root, format=source.format, annotations=source.annotations, prompt=source.prompt
    )
    taken = None
    if source.draw is not None:
        total = sum(1 for _ in source.rows())
        count, seed = source.draw
        if count < total:
            taken = set(np.random.default_rng(seed).permutation(total)[:count].tolist())
    for row in rows:
        if taken is not None and row.number not in taken:
            continue
        try:
            record = row_record(row, kind=source.kind, source=source.source)
        except PolymodalError as error:
            yield str(row.id), error
            continue
        yield _checked(record)


def _checked(record: Record) -> _Pair | tuple[str, PolymodalError]:
    try:
        return _pair_of(record)
    except DataError as error:
        return record.id, error


def _pair_of(record: Record) -> _Pair:
    """A record as a pair."""
    where = f"record {record.id}"
    media = [part for message in record.messages for part in message.media]
    images = [part for part in media if isinstance(part, Image)]
    if len(images) != 1 or len(media) != 1:
        raise DataError(f"{where}: a pair has one image, this record has {len(images)} of {len(media)} media")
    given = record.extra.get("captions")
    if given is None:
        answers = [message.text for message in record.messages if message.role == "assistant"]
        if len(answers) != 1:
            raise DataError(
                f"{where}: its caption is its answer, and it has {len(answers)} of them; give one, or a list `captions`"
            )
        given = answers
    if not isinstance(given, list | tuple) or not given or not all(isinstance(text, str) for text in given):
        raise DataError(f"{where}: `captions` must be a list of texts with one at least")
    captions = tuple(text.strip() for text in given)
    if not all(captions):
        raise DataError(f"{where}: the caption is empty; write one, or take the record out")
    return _Pair(record.id, images[0].source, captions)


def _collect(
    parts: Sequence[Sequence[_Pair]],
    repeats: Sequence[float],
    weights: Sequence[float | None],
    model: PairModel,
    images: Images,
    text: TextConfig,
    left_out: int,
) -> Pairs:
    """Join the records of one image, and tokenise."""
    digest = hashlib.sha256()
    found: list[tuple[_Pair, str, dict[str, None]]] = []
    sizes = []
    for part in parts:
        by_key: dict[str, tuple[_Pair, str, dict[str, None]]] = {}
        for pair in part:
            key = images.seen[source_name(pair.source)].key
            by_key.setdefault(key, (pair, key, {}))[2].update(dict.fromkeys(pair.captions))
        sizes.append(len(by_key))
        found += by_key.values()
    texts = [
        template.replace("{}", caption)
        for _, _, captions in found
        for caption in captions
        for template in text.templates or ("{}",)
    ]
    limit = min(text.max_length or model.max_text, model.max_text)
    tokens = tokenise(model.tokenizer, texts, limit)
    each = len(text.templates) or 1
    ends = np.cumsum([len(captions) * each for _, _, captions in found]).tolist()
    ranges = tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False))
    for _, key, _ in found:
        digest.update(key.encode())
    flat = np.concatenate(tokens)
    starts = np.cumsum([0, *map(len, tokens)]).astype(np.int64)
    digest.update(flat.tobytes() + starts.tobytes() + json.dumps([len(r) for r in ranges]).encode())
    keys = tuple(key for _, key, _ in found)
    ids = tuple(pair.id for pair, _, _ in found)
    borders = np.cumsum([0, *sizes]).tolist()
    spans = [range(start, end) for start, end in pairwise(borders)]
    given = list(weights)
    factors = epoch_repeats(sizes, repeats, given if any(weight is not None for weight in given) else None)
    return Pairs(
        ids=ids,
        keys=augment.sample_keys(ids),
        sources=tuple(pair.source for pair, _, _ in found),
        image_ids=image_numbers(keys),
        captions=ranges,
        tokens=flat,
        starts=starts,
        mixture=tuple(zip(spans, factors, strict=True)),
        left_out={"unusable": left_out} if left_out else {},
        fingerprint=digest.hexdigest(),
        images=keys,
    )


def tokenise(tokenizer: Any, texts: Sequence[str], limit: int) -> list[np.ndarray]:
    """Tokenise texts as the model's own folder does."""
    found: list[np.ndarray] = []
    parts = range(0, len(texts), 1024)
    for start in progress(parts, "tokenising", len(parts)):
        encoded = tokenizer(list(texts[start : start + 1024]), truncation=True, max_length=limit)["input_ids"]
        found += [np.asarray(ids, dtype=np.int32) for ids in encoded]
    for text, ids in zip(texts, found, strict=True):
        if not len(ids):
            raise DataError(f"caption {text!r}: the tokenizer makes no token of it")
    return found
