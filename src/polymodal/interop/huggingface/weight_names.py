"""Names of weights: between published vision-language models of transformers and our components, in both directions.

One table, `RULES`, is read both ways, so that what is read and what is written cannot drift apart:

    to_ours("llava", "language_model.model.norm.weight")        -> Place("llm", "model.norm.weight")
    to_stock("llava", Place("llm", "model.norm.weight"))        -> "language_model.model.norm.weight"

A `Place` is a component of `MultimodalLM` ("llm", "vision", "projector", "newline") and a name in that component's own
`state_dict()`; that of "vision" is the model which `HFVisionEncoder` wraps.

The same tensor has been spelled in three ways, all of which are read: "hub", as in published folders and as vLLM and
llama.cpp know it, which is the one to write; "transformers", as transformers 5 writes it, where CLIP and SigLIP lost
the level `vision_model`; "memory", the `state_dict()` of transformers' class, which some trainers save.

Names are mapped by prefix: of those that fit, the longest decides. Only names are mapped, no value is changed. One
tensor needs care: `vision_model.post_layernorm` of BLIP-2 is the tower's there and the Q-Former's `ln_vision` here; it
is read into the latter and written from it, so `to_stock` has no name for the tower's own, unused copy.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from polymodal.errors import unknown_name
from polymodal.utils.safetensors_io import DERIVED

Component: TypeAlias = Literal["llm", "vision", "projector", "newline"]
Style: TypeAlias = Literal["hub", "transformers", "memory"]

NEWLINE = "image_newline"
"""The one name of the component "newline"."""

WRAPPED_TOWERS = frozenset({"clip", "siglip", "siglip2"})
"""Towers, of `modeling.encoders.hf_vision.FAMILIES`, that lie one level deeper ("vision_model.") in published folders.
"""


class Place(NamedTuple):
    """A component and the name of a weight in it."""

    component: Component
    name: str


@dataclass(frozen=True)
class Rule:
    """All names of a component that begin alike."""

    component: Component  # Of ours
    ours: str  # What the names begin with here; "" for all
    hub: str | None  # What they begin with in published folders
    transformers: str | None = None  # The same as transformers 5 writes it; as `hub` where None
    memory: str | None = None  # The same in the state of transformers' class; as `hub` where None
    also: tuple[str, ...] = ()  # Further beginnings that are read and never written
    towers: frozenset[str] | None = None  # Written for these towers only; all where None

    def prefix(self, style: Style) -> str | None:
        """What the names begin with in one style; None where they have no place in it."""
        own: str | None = getattr(self, style)
        return self.hub if own is None else own

    def spellings(self) -> tuple[str, ...]:
        """Every beginning that is read."""
        found = (self.hub, self.transformers, self.memory, *self.also)
        return tuple(dict.fromkeys(prefix for prefix in found if prefix is not None))


_LLAVA = (
    Rule("llm", "", "language_model."),
    Rule("llm", "model.", "language_model.model.", memory="model.language_model."),
    Rule("llm", "lm_head.", "language_model.lm_head.", memory="lm_head."),
    Rule("vision", "", "vision_tower.", memory="model.vision_tower."),
    Rule(
        "vision", "", "vision_tower.vision_model.", "vision_tower.", "model.vision_tower.",
        also=("model.vision_tower.vision_model.",), towers=WRAPPED_TOWERS,
    ),
    Rule("projector", "layers.0.", "multi_modal_projector.linear_1.", memory="model.multi_modal_projector.linear_1."),
    Rule("projector", "layers.2.", "multi_modal_projector.linear_2.", memory="model.multi_modal_projector.linear_2."),
)  # fmt: skip

_LLAVA_NEXT = (*_LLAVA, Rule("newline", NEWLINE, NEWLINE, memory=f"model.{NEWLINE}"))

_BLIP2 = (
    Rule("llm", "", "language_model."),
    Rule("vision", "", "vision_model."),
    Rule("vision", "post_layernorm.", None),
    Rule("projector", "qformer.query_tokens", "query_tokens"),
    Rule("projector", "qformer.ln_vision.", "vision_model.post_layernorm."),
    Rule("projector", "qformer.transformer.", "qformer."),
    Rule("projector", "language_projection.", "language_projection."),
)

_INSTRUCTBLIP = (
    *_BLIP2,
    Rule("projector", "qformer.embeddings.", "qformer.embeddings."),
    Rule("projector", "qformer.transformer.layernorm.", "qformer.embeddings.layernorm."),
)

RULES: dict[str, tuple[Rule, ...]] = {
    "llava": _LLAVA,
    "llava_next": _LLAVA_NEXT,
    "llava_onevision": _LLAVA_NEXT,
    "blip-2": _BLIP2,
    "instructblip": _INSTRUCTBLIP,
}
"""`model_type` -> rules."""


def to_ours(model_type: str, name: str) -> Place | None:
    """Find where a published tensor goes."""
    if DERIVED.search(name):
        return None
    best: tuple[int, Place] | None = None
    for rule in _rules(model_type):
        for prefix in rule.spellings():
            if name.startswith(prefix) and (best is None or len(prefix) > best[0]):
                best = len(prefix), Place(rule.component, rule.ours + name[len(prefix) :])
    return best[1] if best is not None else None


def to_stock(model_type: str, place: Place, *, style: Style = "hub", tower: str = "clip") -> str | None:
    """Find the name under which a weight of ours is published."""
    best: Rule | None = None
    for rule in _rules(model_type):
        if rule.component != place.component or not place.name.startswith(rule.ours):
            continue
        if rule.towers is not None and tower not in rule.towers:
            continue
        if best is None or len(rule.ours) >= len(best.ours):  # the later, more special one of two that are as long
            best = rule
    prefix = best.prefix(style) if best is not None else None
    return None if best is None or prefix is None else prefix + place.name[len(best.ours) :]


def _rules(model_type: str) -> tuple[Rule, ...]:
    if model_type not in RULES:
        raise unknown_name("model_type", model_type, RULES)
    return RULES[model_type]
