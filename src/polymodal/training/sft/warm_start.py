"""Warm start of a projector: meet the language model's word embeddings before any forward pass of it.

Training a projector through a frozen language model is slow, since every sample costs a pass through the whole model
only to move two small matrices. Much of what the projector must learn can be had without it: an image of a sheep
should give tokens near the input embedding of "sheep". So, before stage 1,

1. the projector's `Standardize` layer is measured on the features;
2. where the tower comes with a classifier of its own (EfficientNet's 1,000 ImageNet classes), hidden units of an MLP
   projector are set to the class scores and their outgoing weights to the embeddings of the class names: knowledge
   that the tower was sold with, written down in the language model's terms;
3. the projector is trained by a softmax over the cosine between an image's mean token and all concept names, on
   cached features, with the class prototypes of `training.sft.class_prototypes` mixed in.

This is CLIP's objective (arXiv:2103.00020) against a fixed text table instead of a trained text tower, in the
spirit of frozen-prompt methods such as Frozen (arXiv:2106.13884). Figures are in docs/results.md.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from polymodal.errors import ConfigError
from polymodal.modeling.encoders.efficientnet import ClassHead
from polymodal.modeling.projectors.mlp import LinearProjector, MLPProjector, Standardize
from polymodal.modeling.vlm import MultimodalLM
from polymodal.training.recipes.sft import WarmStartConfig
from polymodal.training.sft.class_prototypes import Prototypes, class_head_of, draw_classes
from polymodal.training.sft.dataset import SFTDataset
from polymodal.utils.progress import log, progress

MAX_WORDS = 4
"""Captions with more words say more than one thing and are no concept."""

CLASS_THRESHOLD = 5.0
"""How far a class score must lie above the mean score before its hidden unit answers."""

SAMPLE_ROWS = 10_000
"""Images from which mean and deviation are measured."""


@dataclass(frozen=True)
class Concepts:
    """Names, and where they lie among the language model's embeddings."""

    names: tuple[str, ...]  # C different names
    targets: Tensor  # [C, D] unit vectors: the mean embedding of a name's tokens, from the middle of the table
    middle: Tensor  # [D] mean of the embedding table
    norm: float  # Mean length of an embedding


def concept_of(caption: str) -> str | None:
    """The name in a short caption: "A red kangaroo." gives "red kangaroo"; None for longer sentences."""
    # Of a caption that quotes what is written, it is the quotation with its marks: `The word "FISH".` gives `"fish"`,
    # so that a written fish lies near an imaged one among the embeddings, but not on it.
    written = re.fullmatch(r'The (?:word|number) ("[^"]+")\.', caption.strip())
    if written:
        return written.group(1).lower()
    name = re.sub(r"^(an?|the)\s+", "", caption.strip().rstrip(".!").strip().lower())
    return name if name and len(name.split()) <= MAX_WORDS else None


def make_concepts(names: Sequence[str], tokenizer: PreTrainedTokenizerBase, table: Tensor) -> Concepts:  # table [V, D]
    """Look names up in the embedding table."""
    middle = table.mean(dim=0)
    # With a space before it, as inside a sentence: that is the token the language model would say.
    rows = [table[tokenizer.encode(f" {name}", add_special_tokens=False)].mean(dim=0) for name in names]
    targets = F.normalize(torch.stack(rows) - middle, dim=-1)
    return Concepts(tuple(names), targets, middle, float(table.norm(dim=1).mean()))


def write_classes(projector: MLPProjector, head: ClassHead, targets: Tensor, middle: Tensor, norm: float) -> None:
    """Set hidden units of a two-layer projector to class scores that speak the class names."""
    # targets [K, D], middle [D]
    linears = [layer for layer in projector.layers if isinstance(layer, torch.nn.Linear)]
    count = len(head.names)
    if len(linears) != 2 or linears[0].out_features < count:
        raise ConfigError(f"warm_start.write_classes needs mlp2x_gelu with a hidden_size of at least {count}")
    first, second = linears
    weight, bias = head.weight - head.weight.mean(dim=0), head.bias - head.bias.mean()
    scale, mean = torch.ones(first.in_features), torch.zeros(first.in_features)
    if isinstance(projector.norm, Standardize):
        scale, mean = projector.norm.scale, projector.norm.mean
    with torch.no_grad():
        first.weight[:count] = 0
        first.weight[:count, head.channels] = weight / scale[head.channels]
        first.bias[:count] = bias + weight @ mean[head.channels] - CLASS_THRESHOLD
        second.weight.mul_(0.3)
        second.weight[:, :count] = targets.T * norm * 0.3
        second.bias.copy_(middle)


def warm_start(
    model: MultimodalLM, tokenizer: PreTrainedTokenizerBase, dataset: SFTDataset, config: WarmStartConfig, seed: int
) -> None:
    """Train the projector towards the embeddings of what the images are called."""
    projector = model.projector
    if dataset.store is None:
        raise ConfigError("warm_start needs cached features: set run.feature_cache")
    assert isinstance(projector, torch.nn.Module)
    generator = torch.Generator().manual_seed(seed)
    device = next(projector.parameters()).device
    rows, labels, names = _labelled(dataset)
    store = dataset.store.array()
    head = class_head_of(model)
    classes = [name.lower() for name in head.names] if head is not None and config.classes else []
    all_names = sorted({*names, *classes})
    number = {name: i for i, name in enumerate(all_names)}
    table = model.llm.get_input_embeddings().weight.detach().float().cpu()
    concepts = make_concepts(all_names, tokenizer, table)
    targets, middle = concepts.targets.to(device), concepts.middle.to(device)
    label_ids = torch.tensor([number[label] for label in labels])

    picks = torch.randperm(len(rows), generator=generator)[:SAMPLE_ROWS]
    sample = torch.from_numpy(store[np.sort(rows[picks.numpy()])]).float()
    norm = getattr(projector, "norm", None)
    if isinstance(norm, Standardize):
        norm.measure(sample)
    prototypes = class_ids = class_order = None
    if head is not None and classes:
        class_ids = torch.tensor([number[name] for name in classes])
        if config.write_classes:
            if not isinstance(projector, MLPProjector):
                raise ConfigError("warm_start.write_classes needs an mlp projector; set it to false")
            write_classes(projector, head, concepts.targets[class_ids], concepts.middle, concepts.norm)
        prototypes = Prototypes.of(head, sample)
        class_order = draw_classes(classes, 20 * len(classes), generator)
    log(f"warm start: {len(rows)} images, {len(names)} names, {len(classes)} classes of the tower")

    parameters = [p for p in projector.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    rising = max(0.05, 2 / config.steps)  # of fewer than two steps it would divide by zero
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, config.steps, pct_start=rising)
    made = int(config.batch_size * config.prototype_share) if prototypes is not None else 0
    right = total = 0.0
    for step in progress(range(config.steps), "warm start", config.steps):
        pick = torch.randint(len(rows), (config.batch_size,), generator=generator)
        features = torch.from_numpy(store[rows[pick.numpy()]]).float()
        wanted = label_ids[pick]
        if made and prototypes is not None and class_ids is not None and class_order is not None:
            kind = class_order[torch.randint(len(class_order), (made,), generator=generator)]
            features[:made] = prototypes.move(features[:made], kind, generator)
            wanted[:made] = class_ids[kind]
        if isinstance(projector, MLPProjector | LinearProjector):  # each token by itself: draw before the work
            tokens = projector(draw_tokens(features, config.tokens, generator).to(device))
        else:
            tokens = draw_tokens(projector(features.to(device)), config.tokens, generator)
        loss, hits = align_loss(tokens, wanted.to(device), targets, middle, concepts.norm)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step >= config.steps - max(1, config.steps // 10):
            right, total = right + hits, total + len(wanted)
    log(f"warm start: {right / total:.1%} of the last images are nearest to their own name of {len(all_names)}")


def align_loss(
    tokens: Tensor, wanted: Tensor, targets: Tensor, middle: Tensor, norm: float, scale: float = 20.0
) -> tuple[Tensor, float]:
    """Softmax over concept names of an image's mean token and of one token, and a pull to an embedding's length."""
    # tokens [N, P, D], wanted [N], targets [C, D], middle [D]
    logits = scale * F.normalize(tokens.mean(dim=1) - middle, dim=-1) @ targets.T
    single = scale * F.normalize(tokens[:, 0] - middle, dim=-1) @ targets.T
    loss = F.cross_entropy(logits, wanted, label_smoothing=0.05)
    loss = loss + 0.3 * F.cross_entropy(single, wanted, label_smoothing=0.05)
    loss = loss + 0.5 * (tokens.norm(dim=-1) / norm - 1).pow(2).mean()
    return loss, float((logits.argmax(dim=-1) == wanted).sum())


def draw_tokens(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw tokens of each image, in random order."""
    # features [N, P, E] -> [N, min(count, P), E]
    places = torch.rand(features.shape[:2], generator=generator)
    seen = places.topk(min(count, features.shape[1]), dim=1).indices.to(features.device)
    return features.gather(1, seen[..., None].expand(-1, -1, features.shape[-1]))


def _labelled(dataset: SFTDataset) -> tuple[np.ndarray, list[str], list[str]]:
    """Feature rows of one-tile images that stand alone with a short caption, their labels, and all names."""
    assert dataset.store is not None
    rows, labels = [], []
    for index, row in dataset.alone():
        record = dataset.prepared.records[index]
        if record.kind not in ("caption", "caption_ocr"):
            continue
        name = concept_of(record.messages[-1].text)
        if name is not None:
            rows.append(row)
            labels.append(name)
    if not rows:
        raise ConfigError("warm_start: no record of kind 'caption' shows one image with a caption of up to 4 words")
    return np.array(rows), labels, sorted(set(labels))
