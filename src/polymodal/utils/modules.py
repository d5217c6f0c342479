"""Small helpers for torch modules: names by glob, eval mode for a while, transformer blocks, what is frozen."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import translate
from typing import Any, Protocol

from torch import nn

from polymodal.errors import unknown_name


class ModuleLike(Protocol):
    """What our interfaces take from `nn.Module`, which all that implement them are."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move the weights, or change their type.

        Args:
            *args: A device, a type, or both.
            **kwargs: The same by name.

        Returns:
            Itself.
        """

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Iterate over the weights.

        Args:
            recurse: Those of submodules too.

        Returns:
            The weights.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Give the weights by name."""
        ...


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch dropout and running statistics off for a while, then put every part back into the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated layers of a network: the children of its longest module lists of one class."""
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList) and len(part) > 1]
    inside = {id(inner) for part in lists for layer in part for inner in layer.modules() if inner is not layer}
    return [layer for part in lists if id(part) not in inside and len({type(x) for x in part}) == 1 for layer in part]


def frozen(module: ModuleLike) -> bool:
    """Whether no parameter of a module is trained."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def expand_braces(pattern: str) -> list[str]:
    """Expand `{a,b}` as a shell does; nested braces are not supported."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    head, tail = pattern[: found.start()], pattern[found.end() :]
    return [whole for choice in found.group(1).split(",") for whole in expand_braces(head + choice + tail)]


def match_names(pattern: str, names: Iterable[str], kind: str) -> list[str]:
    """Names that a glob matches; `*` crosses dots."""
    names = list(names)
    compiled = [re.compile(translate(choice)) for choice in expand_braces(pattern)]
    found = [name for name in names if any(regex.match(name) for regex in compiled)]
    if not found:
        raise unknown_name(f"{kind}: no name matches", pattern, names if len(names) < 40 else _shorten(names))
    return found


def _shorten(names: list[str]) -> list[str]:
    """One name for each run of numbered layers, so that the error can list what there is."""
    return sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names})
