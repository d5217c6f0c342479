"""The models of a server, and how a request's is found."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from polymodal.backends.base import Backend
from polymodal.serving.errors import RequestError
from polymodal.serving.makers import Makers
from polymodal.serving.scheduler import Scheduler
from polymodal.utils.strict import shown


@dataclass(frozen=True)
class Served:
    """What is served, and how much of it a request may ask for."""

    backend: Backend
    scheduler: Scheduler
    name: str  # What requests call it
    max_tokens: int  # The most that an answer may have
    default_tokens: int  # Where a request says nothing
    max_chars: int  # Of all texts of a request: more can be no prompt of this model, however it is cut into tokens
    created: int  # Seconds since 1970
    makers: Makers = field(default_factory=Makers)  # What answers and routes have besides; one of a server

    @property
    def card(self) -> dict[str, Any]:
        """The model as `/v1/models` lists it."""
        modalities = {"input": ["text", *self.backend.takes], "output": self.makers.outputs(self.backend)}
        card = {"id": self.name, "object": "model", "created": self.created, "owned_by": "polymodal"}
        return {**card, "modalities": modalities, "max_completion_tokens": self.max_tokens}


def model_of(models: Mapping[str, Served], name: str) -> Served:
    """The model that a request names."""
    if name not in models:
        told = f"model: {shown(name)} is not served here; there is {' and '.join(map(repr, models))}"
        raise RequestError(told, "model", 404, "model_not_found")
    return models[name]


def check_room(models: Mapping[str, Served]) -> None:
    """Refuse a request before its body is read, where whatever it asks too many wait."""
    for number, served in enumerate(models.values(), start=1):
        try:
            return served.scheduler.check_room()
        except RequestError:
            if number == len(models):
                raise
