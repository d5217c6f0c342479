"""Class prototypes: what a tower's features would be for a class that no image of the data shows.

A tower that was trained as a classifier knows many more things than a small dataset shows: EfficientNet-Lite0 tells
1,000 ImageNet classes apart. Under a Gaussian model of its features with one covariance C for all classes, the
weights of a linear classifier are w = C^-1 (mu_class - mu) up to a factor (linear discriminant analysis), so the mean
of a class is mu_class = mu + s C w; mu and C are measured on any images, and s is chosen so that the classifier is
sure of its class. A real image's tokens moved to such a mean have the variety of images and another subject.

They serve twice: in the warm start of the projector, and as caption samples that teach the language model to say the
names. They are features, not images: no dataset's images are used or shipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from polymodal.data.mixture import Joined
from polymodal.data.readers.conversations import Record
from polymodal.errors import ConfigError
from polymodal.messages import Image, assistant, user
from polymodal.modeling.encoders.efficientnet import ClassHead, EfficientNetEncoder
from polymodal.modeling.encoders.vision import FusedEncoder
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Sample
from polymodal.training.recipes.sft import PrototypeConfig
from polymodal.training.sft.dataset import SFTDataset

MEASURED = 4_000
"""Images from which mean and covariance are measured."""

KEPT = 0.5
"""How much of an image's own deviation is kept at the most; with all of it the classifier often changes its mind."""


@dataclass(frozen=True)
class Prototypes:
    """Typical features of each class."""

    head: ClassHead  # The tower's classifier
    means: Tensor  # [K, channels] of each class
    middle: Tensor  # [channels] of ordinary images

    @classmethod
    def of(cls, head: ClassHead, features: Tensor) -> Prototypes:  # features [n, P, E]
        """Work the prototypes out."""
        pooled = features[..., head.channels].float().mean(dim=1)
        return cls(head, class_prototypes(head, pooled), pooled.mean(dim=0))

    def move(self, features: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
        """Move images' tokens to classes."""
        # features [n, P, E], classes [n] -> [n, P, E]
        moved = features.float().clone()
        keep = KEPT * torch.rand((len(moved), 1, 1), generator=generator)
        deviation = moved[..., self.head.channels] - self.middle
        moved[..., self.head.channels] = torch.relu(self.means[classes][:, None] + keep * deviation)
        return moved


def class_prototypes(head: ClassHead, pooled: Tensor, wanted: float = 0.9) -> Tensor:
    """Typical pooled features of each class, without an image of it."""
    # pooled [n, channels] -> [K, channels]
    mean, covariance = pooled.mean(dim=0), torch.cov(pooled.T)
    direction = (head.weight - head.weight.mean(dim=0)) @ covariance
    direction = F.normalize(direction, dim=1) * (pooled - mean).norm(dim=1).mean()
    own = torch.arange(len(direction))
    found = torch.full((len(direction),), torch.nan)
    for scale in torch.linspace(0.2, 6.0, 60):
        sure = (torch.relu(mean + scale * direction) @ head.weight.T + head.bias).softmax(dim=-1)[own, own]
        found = torch.where(found.isnan() & (sure > wanted), scale, found)
    return torch.relu(mean + found.nan_to_num(6.0)[:, None] * direction)


def draw_classes(names: Sequence[str], count: int, generator: torch.Generator) -> Tensor:  # -> [count]
    """Draw classes so that every name comes equally often, however many classes carry it (118 breeds are "dog")."""
    members: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        members.setdefault(name, []).append(number)
    groups = list(members.values())
    chances = torch.rand(count, generator=generator).tolist()
    drawn = [groups[number % len(groups)] for number in range(count)]
    return torch.tensor([group[int(chance * len(group))] for group, chance in zip(drawn, chances, strict=True)])


def class_head_of(model: MultimodalLM) -> ClassHead | None:
    """The classifier that the model's tower was trained with; None where it has none."""
    encoder = model.vision_encoder
    return encoder.class_head() if isinstance(encoder, EfficientNetEncoder | FusedEncoder) else None


def add_samples(dataset: SFTDataset, model: MultimodalLM, config: PrototypeConfig, seed: int) -> SFTDataset:
    """Append caption samples whose features are prototypes."""
    head = class_head_of(model)
    if dataset.store is None or head is None:
        raise ConfigError(
            "prototypes need cached features (run.feature_cache) and a tower with a classifier of its own"
        )
    generator = torch.Generator().manual_seed(seed)
    prepared, store = dataset.prepared, dataset.store
    real = list(dataset.alone())
    if not real:
        raise ConfigError("prototypes: no record shows one image alone, from which they could be measured")
    rows = np.array([row for _, row in real])
    picks = torch.randperm(len(rows), generator=generator)[:MEASURED].numpy()
    prototypes = Prototypes.of(head, torch.from_numpy(store.array()[np.sort(rows[picks])]).float())
    plan = prepared.samples[real[0][0]].plans[0]
    # A sample's key says what it was made from, so that the next run finds it again.
    origin = f"prototype-{prepared.fingerprint[:16]}-{seed}"
    classes = draw_classes(head.names, config.count, generator)
    bases = torch.randint(len(rows), (config.count,), generator=generator)
    questions = torch.randint(len(config.questions), (config.count,), generator=generator)
    records: list[Record] = []
    samples: list[Sample] = []
    for start in range(0, config.count, 256):
        part = slice(start, start + 256)
        features = torch.from_numpy(store.array()[rows[bases[part].numpy()]])
        moved = prototypes.move(features, classes[part], generator)
        fresh = []
        for number, (kind, question) in enumerate(zip(classes[part].tolist(), questions[part].tolist(), strict=True)):
            name = head.names[kind]
            key = f"{origin}-{start + number}"
            answer = f"{'An' if name[0].lower() in 'aeiou' else 'A'} {name}."
            messages = (user(Image(key), config.questions[question]), assistant(answer))
            rendered = dataset.processor.template.render(messages, [plan.num_tokens])
            contexts = dataset.processor.context(messages) if dataset.processor.context is not None else ()
            records.append(Record(id=key, messages=messages, kind="prototype", source="classifier", extra={}))
            samples.append(
                Sample(
                    torch.tensor(rendered.input_ids), torch.tensor(rendered.loss_mask), rendered.slots, (plan,),
                    None, (key,), key, contexts,
                )
            )  # fmt: skip
            if key not in store.where:
                fresh.append((key, moved[number][None].numpy()))
        if fresh:
            store.add(fresh)
    first = len(prepared.samples)
    extended = replace(
        prepared,
        records=Joined([prepared.records, records]),
        samples=Joined([prepared.samples, samples]),
        targets=np.concatenate([prepared.targets, [int(s.loss_mask[1:].sum()) for s in samples]]),
        lengths=np.concatenate([prepared.lengths, [s.input_ids.numel() for s in samples]]),
        sources=(*prepared.sources, (range(first, first + len(samples)), 1.0)),
    )
    return replace(dataset, prepared=extended)
