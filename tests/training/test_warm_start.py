"""The warm start and class prototypes, on EfficientNet's own classifier and features made up for the test."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from polymodal.config import ProjectorConfig
from polymodal.errors import ConfigError
from polymodal.media_plan import Size
from polymodal.modeling.encoders.efficientnet import ClassHead, EfficientNetEncoder, load_efficientnet_lite0
from polymodal.modeling.projectors import build_projector
from polymodal.training.sft.class_prototypes import Prototypes, draw_classes
from polymodal.training.sft.warm_start import align_loss, concept_of, write_classes
from polymodal.utils.files import shipped_folder


@pytest.fixture(scope="module")
def encoder() -> EfficientNetEncoder:
    folder = shipped_folder() / "efficientnet_lite0"
    network = load_efficientnet_lite0(folder / "efficientnet_lite0.safetensors")
    return EfficientNetEncoder(network, stages=("stride8", "head"), pool=2)


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    """Features like a network's after its last ReLU, of enough images for a covariance, [4000, 4, E]."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(4000, 1, 1320, generator=generator)
    return torch.relu(0.2 + 0.4 * image + 0.2 * torch.randn(4000, 4, 1320, generator=generator))


@pytest.fixture(scope="module")
def head(encoder: EfficientNetEncoder) -> ClassHead:
    head = encoder.class_head()
    assert head is not None
    return head


def test_the_head_reads_its_own_channels(encoder: EfficientNetEncoder, head: ClassHead) -> None:
    assert head.weight.shape == (1000, 1280) and head.channels == slice(40, 1320) and len(head.names) == 1000
    images = torch.rand(2, 3, 96, 96)
    with torch.inference_mode():
        maps = encoder.network(images)
        # 96 pixels give a 3 x 3 head map; one pooled token an image is the classifier's own pooling.
        encoder_1 = EfficientNetEncoder(encoder.network, stages=("stride8", "head"), pool=1)
        own = encoder_1(images)[:, 0, head.channels] @ head.weight.T + head.bias
        assert torch.allclose(own, encoder.network.logits(maps["head"]), atol=1e-4)
    assert EfficientNetEncoder(encoder.network, stages=("stride8",)).class_head() is None


def test_prototypes_are_what_the_classifier_takes_for_their_class(head: ClassHead, features: torch.Tensor) -> None:
    prototypes = Prototypes.of(head, features)
    sure = (prototypes.means @ head.weight.T + head.bias).softmax(dim=-1)
    assert (sure.argmax(dim=-1) == torch.arange(1000)).float().mean() > 0.9
    classes = torch.arange(64) * 15
    moved = prototypes.move(features[:64], classes, torch.Generator().manual_seed(0))
    assert torch.equal(moved[..., :40], features[:64, :, :40])
    seen = (moved[..., head.channels].mean(dim=1) @ head.weight.T + head.bias).argmax(dim=-1)
    assert (seen == classes).float().mean() > 0.9


def test_classes_written_into_a_projector_speak_their_names(head: ClassHead, features: torch.Tensor) -> None:
    torch.manual_seed(0)
    config = ProjectorConfig(hidden_size=1100, norm="standardize")
    projector: Any = build_projector(config, 1320, Size(2, 2), 16)
    projector.norm.measure(features)
    targets = F.normalize(torch.randn(1000, 16), dim=-1)
    middle = torch.zeros(16)
    prototypes = Prototypes.of(head, features)
    classes = torch.arange(200) * 5
    images = prototypes.move(features[:200], classes, torch.Generator().manual_seed(0))

    def right() -> float:
        with torch.inference_mode():
            said = F.normalize(projector(images).mean(dim=1), dim=-1) @ targets.T
        return float((said.argmax(dim=-1) == classes).float().mean())

    before = right()
    write_classes(projector, head, targets, middle, norm=3.0)
    assert before < 0.05 and right() > 0.5


def test_a_projector_without_room_for_the_classes_is_refused(head: ClassHead) -> None:
    projector: Any = build_projector(ProjectorConfig(hidden_size=64), 1320, Size(2, 2), 16)
    with pytest.raises(ConfigError, match="hidden_size of at least 1000"):
        write_classes(projector, head, torch.zeros(1000, 16), torch.zeros(16), 1.0)


@dataclass
class Case:
    """One caption and the concept in it."""

    caption: str
    concept: str | None


@pytest.mark.parametrize(
    "case",
    [
        Case("A red kangaroo.", "red kangaroo"),
        Case("An Adelaide Rosella", "adelaide rosella"),
        Case("Tulips!", "tulips"),
        Case("A cat, a dog and two green apples.", None),
        Case(".", None),
        Case('The word "Fish".', '"fish"'),
        Case('The number "42".', '"42"'),
        Case('The word "FISH" and a cat.', None),
    ],
)
def test_concepts_of_captions(case: Case) -> None:
    assert concept_of(case.caption) == case.concept


def test_the_loss_is_least_at_the_own_name_and_at_an_embeddings_length() -> None:
    targets = torch.eye(4)
    own = 3.0 * targets[:2, None].expand(2, 5, 4)
    wanted = torch.tensor([0, 1])
    loss, hits = align_loss(own, wanted, targets, torch.zeros(4), norm=3.0)
    other, no_hits = align_loss(own.flip(0), wanted, targets, torch.zeros(4), norm=3.0)
    longer, _ = align_loss(own * 4, wanted, targets, torch.zeros(4), norm=3.0)
    assert hits == 2 and no_hits == 0 and loss < other and loss < longer


def test_shipped_class_names_are_names() -> None:
    names = (shipped_folder() / "efficientnet_lite0" / "classes.txt").read_text().splitlines()
    assert len(names) == 1000 and all(name == name.strip() and "(" not in name for name in names)
    assert names[0] == "fish" and names[207] == "golden retriever" and names[954] == "banana"
    # Everyday words: a breed that few people know is a dog, and every striped or spotted house cat a cat.
    assert names[173] == "dog" and set(names[281:286]) == {"cat"}
    assert Path(shipped_folder() / "efficientnet_lite0" / "README.md").is_file()


def test_every_name_is_drawn_equally_often_and_all_its_classes_take_part() -> None:
    names = ["dog", "cat", "dog", "dog", "rose"]
    drawn = draw_classes(names, 300, torch.Generator().manual_seed(0)).tolist()
    counts = Counter(names[i] for i in drawn)
    assert counts == {"dog": 100, "cat": 100, "rose": 100}
    assert min(Counter(drawn)[i] for i in (0, 2, 3)) > 15
    assert drawn == draw_classes(names, 300, torch.Generator().manual_seed(0)).tolist()
