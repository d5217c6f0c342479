"""Warm start of a summary projector: say what is where in an image, in word embeddings, before the language model.

`training.sft.warm_start` teaches one name an image, to each patch alone. Where records tell what lies where (`places`:
a phrase and its box, in parts of the tile's sides), much more can be had without a pass through the language model:

- a patch says what covers it, its colour too where the phrase has one;
- the first summary token says everything that is there, the following ones one thing after the other, from left to
  right, two a thing: its name; then its colour, how many there are of it, or where it is ("left", "top") and how big;
- what is written (phrases in quotation marks) is spelled after that, token by token of the language model.

It is set prediction, as DETR's (arXiv:2005.12872) without its matching, since the order is known, in a space that the
language model reads. Class prototypes of the tower are mixed in as they are there.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from polymodal.errors import ConfigError
from polymodal.media_plan import Size
from polymodal.modeling.projectors.mlp import Standardize
from polymodal.modeling.projectors.summary import SummaryProjector
from polymodal.modeling.vlm import MultimodalLM
from polymodal.training.recipes.sft import SceneWarmStartConfig
from polymodal.training.sft.audio_warm_start import descend
from polymodal.training.sft.class_prototypes import Prototypes, class_head_of, draw_classes
from polymodal.training.sft.dataset import SFTDataset
from polymodal.training.sft.warm_start import SAMPLE_ROWS, concept_of, write_classes
from polymodal.utils.progress import log

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
ATTRIBUTE_NAMES = 8
"""A first word of as many different phrases is no part of a name ("red circle", "red heart", ...)."""
SIZES = {"small": (0.0, 0.06), "big": (0.35, 2.0)}
"""Parts of the image that something small, or big, takes."""
MIDDLE = (0.4, 0.6)
"""Between these a box lies in the middle."""
UNITS = 4
"""The most words a token is taught at once."""
HELD_OUT = 50
"""One of so many images is not trained on, and scored at the end."""

Unit = str | int  # A phrase, or a token of the language model


class Place(NamedTuple):
    """Something in an image, and its box in parts of the sides."""

    phrase: str
    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def area(self) -> float:
        """Its part of the image."""
        return (self.x1 - self.x0) * (self.y1 - self.y0)


def places_of(extra: Mapping[str, object], caption: str) -> list[Place]:
    """What a record says lies where; of a short caption alone, the thing it names, everywhere."""
    given = extra.get("places")
    if isinstance(given, list):
        return [Place(str(phrase), *map(float, box)) for phrase, *box in given]
    name = concept_of(caption)
    return [Place(name, 0.0, 0.0, 1.0, 1.0)] if name else []


def bare(phrase: str) -> str:
    """A phrase without its article, in small letters; what is written stays as it is."""
    if phrase.startswith('"'):
        return phrase
    return re.sub(r"^(an?|the|some)\s+(pair of\s+)?", "", phrase.strip().rstrip(".").lower())


def attributes_of(phrases: Iterable[str]) -> frozenset[str]:
    """First words that stand before many different names: colours and the like."""
    rests: dict[str, set[str]] = {}
    for phrase in phrases:
        first, _, rest = phrase.partition(" ")
        if rest and not phrase.startswith('"'):
            rests.setdefault(first, set()).add(rest)
    return frozenset(first for first, names in rests.items() if len(names) >= ATTRIBUTE_NAMES)


def split(phrase: str, attributes: frozenset[str]) -> tuple[str, tuple[str, ...]]:
    """The name in a phrase, and the attributes before it."""
    words, found = phrase.split(" "), []
    while len(words) > 1 and words[0] in attributes:
        found.append(words.pop(0))
    return " ".join(words), tuple(found)


def where(place: Place) -> tuple[str, ...]:
    """In words, where a box lies, and whether it is small or big."""
    x, y = (place.x0 + place.x1) / 2, (place.y0 + place.y1) / 2
    words = ["left"] * (x < MIDDLE[0]) + ["right"] * (x > MIDDLE[1]) + ["top"] * (y < MIDDLE[0])
    words += ["bottom"] * (y > MIDDLE[1])
    sizes = [word for word, (low, high) in SIZES.items() if low <= place.area < high]
    return (*(words or ["middle"]), *sizes)


def said(
    places: Sequence[Place], attributes: frozenset[str], spell: Mapping[str, Sequence[int]], queries: int, grid: Size
) -> dict[int, tuple[Unit, ...]]:
    """What each token is taught: units by the token's place among the summary and the patches."""
    things = [place for place in places if not place.phrase.startswith('"')]
    named = {place: split(bare(place.phrase), attributes) for place in places}
    groups: dict[tuple[str, tuple[str, ...]], list[Place]] = {}
    for place in sorted(things, key=lambda p: (p.x0 + p.x1, p.y0 + p.y1)):
        groups.setdefault(named[place], []).append(place)
    slots: list[tuple[Unit, ...]] = [tuple(dict.fromkeys(name for name, _ in groups))]
    for (name, own), members in groups.items():
        count = NUMBERS[len(members) - 1 : len(members)]
        slots += [(name,), (*own, *(count if len(members) > 1 else where(members[0])))]
    written = [place for place in places if place.phrase.startswith('"')]
    for place in sorted(written, key=lambda p: (round(p.y0, 1), p.x0)):
        slots += [(token,) for token in spell[place.phrase]]
    taught = {number: units for number, units in enumerate(slots[:queries]) if units}
    for number in range(grid.area):
        row, column = divmod(number, grid.width)
        x, y = (column + 0.5) / grid.width, (row + 0.5) / grid.height
        over = [p for p in places if p.x0 <= x <= p.x1 and p.y0 <= y <= p.y1]
        if over:
            top = min(over, key=lambda p: p.area)
            name, own = named[top]
            taught[queries + number] = tuple(spell[top.phrase]) if top.phrase.startswith('"') else (name, *own)
    return {number: units[:UNITS] for number, units in taught.items()}


def scene_warm_start(
    model: MultimodalLM,
    tokenizer: PreTrainedTokenizerBase,
    dataset: SFTDataset,
    config: SceneWarmStartConfig,
    seed: int,
    bf16: bool = False,
) -> None:
    """Train a summary projector to say what is where."""
    projector, store = model.projector, dataset.store
    if not isinstance(projector, SummaryProjector):
        raise ConfigError("scene_warm_start is for mm_projector_type 'summary'; warm_start for the others")
    if store is None or model.vision_encoder is None:
        raise ConfigError("scene_warm_start needs cached features: set run.feature_cache")
    generator = torch.Generator().manual_seed(seed)
    device = next(projector.parameters()).device
    rows, scenes = [], []
    for index, row in dataset.alone():
        record = dataset.prepared.records[index]
        if places := places_of(record.extra, record.messages[-1].text):
            rows.append(row)
            scenes.append(places)
    if not rows:
        raise ConfigError("scene_warm_start: no record of one image has `places` or a caption of up to 4 words")
    phrases = {place.phrase for places in scenes for place in places}
    attributes = attributes_of({bare(phrase) for phrase in phrases})
    spell = {p: tokenizer.encode(p.strip('"'), add_special_tokens=False) for p in phrases if p.startswith('"')}
    queries, grid = projector.queries, model.vision_encoder.grid
    taught = [said(places, attributes, spell, queries, grid) for places in scenes]
    head = class_head_of(model)
    classes = [name.lower() for name in head.names] if head is not None else []
    units: list[Unit] = list(dict.fromkeys(u for each in taught for some in each.values() for u in some))
    number = {unit: place for place, unit in enumerate(units)}
    for name in classes:
        if number.setdefault(name, len(units)) == len(units):
            units.append(name)
    wanted = np.full((len(rows), queries + grid.area, UNITS), -1, dtype=np.int32)
    for one, each in zip(wanted, taught, strict=True):
        for token, some in each.items():
            one[token, : len(some)] = [number[unit] for unit in some]

    table = model.llm.get_input_embeddings().weight.detach().float().cpu()
    middle, length = table.mean(dim=0), float(table.norm(dim=1).mean())
    ids = [[u] if isinstance(u, int) else tokenizer.encode(f" {u}", add_special_tokens=False) for u in units]
    targets = F.normalize(torch.stack([table[each].mean(dim=0) for each in ids]) - middle, dim=-1)
    array = store.array()
    picks = torch.randperm(len(rows), generator=generator)[:SAMPLE_ROWS].numpy()
    sample = torch.from_numpy(array[np.sort(np.array(rows)[picks])]).float()
    if isinstance(projector.mlp.norm, Standardize):
        projector.mlp.norm.measure(sample)
    prototypes = class_ids = order = None
    if head is not None and config.prototype_share:
        class_ids = torch.tensor([number[name] for name in classes])
        if config.write_classes:
            write_classes(projector.mlp, head, targets[class_ids], middle, length)
        prototypes, order = Prototypes.of(head, sample), draw_classes(classes, 20 * len(classes), generator)
    del sample
    targets, middle = targets.to(device), middle.to(device)
    train = np.array([i for i in range(len(rows)) if i % HELD_OUT])
    store_rows = np.array(rows)
    log(f"scene warm start: {len(rows)} images, {len(units)} names and words, {len(attributes)} attributes")

    def batch(some: np.ndarray) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(array[store_rows[some]]).float(), torch.from_numpy(wanted[some]).long()

    def scores(features: Tensor) -> tuple[Tensor, Tensor]:  # tokens [B, Q, D], and their cosines with units [B, Q, C]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            tokens = projector(features.to(device)).float()
        return tokens, F.normalize(tokens - middle, dim=-1)

    parameters = [p for p in projector.parameters() if p.requires_grad]
    made = int(config.batch_size * config.prototype_share) if prototypes is not None else 0

    def loss() -> Tensor:
        features, labels = batch(train[torch.randint(len(train), (config.batch_size,), generator=generator).numpy()])
        if made and prototypes is not None and class_ids is not None and order is not None:
            kind = order[torch.randint(len(order), (made,), generator=generator)]
            features[:made] = prototypes.move(features[:made], kind, generator)
            labels[:made] = -1
            labels[:made, :2, 0] = class_ids[kind][:, None]  # the summary, and the first thing's name
            labels[:made, queries:, 0] = class_ids[kind][:, None]
        tokens, directions = scores(features)
        drawn = torch.rand(labels.shape[:2], generator=generator) < config.patches / grid.area
        drawn[:, :queries] = True
        drawn &= labels[..., 0] >= 0
        own = labels[drawn].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = (config.scale * directions[drawn.to(device)]) @ targets.T
        logits = logits.float().log_softmax(dim=-1)
        mask = (own >= 0).float()
        unsaid = -((logits.gather(1, own.clamp_min(0)) * mask).sum(1) / mask.sum(1)).mean()
        return unsaid + 0.5 * (tokens.norm(dim=-1) / length - 1).pow(2).mean()

    descend(parameters, config, "scene warm start", loss, rising=0.05)
    held = np.arange(0, len(rows), HELD_OUT)
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    with torch.no_grad():
        for chosen in np.array_split(held, max(1, len(held) // 64)):
            features, labels = batch(chosen)
            best = (scores(features)[1] @ targets.T).argmax(dim=-1).cpu()
            hit = (labels == best[..., None]).any(dim=-1)
            told = labels[..., 0] >= 0
            parts = (("first name", slice(1, 2)), ("summary", slice(0, queries)), ("patches", slice(queries, None)))
            for name, part in parts:
                right[name] += int(hit[:, part].sum())
                total[name] += int(told[:, part].sum())
    of = ", ".join(f"{name} {right[name] / max(total[name], 1):.1%}" for name in total)
    log(f"scene warm start: of {len(held)} images not trained on, nearest to what they should say: {of}")
