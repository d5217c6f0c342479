"""Where a model to be described lies: on this machine, in the hub's cache, or (headers only) on the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from polymodal.checkpoints.locate import HUB_ID
from polymodal.errors import CheckpointError, first_line
from polymodal.safety.model_folder import FolderReport, check_folder
from polymodal.safety.safetensors_header import Header, TensorInfo
from polymodal.utils.files import shipped

# ---- What a folder's weights are made of, from the headers of its files: a tree of parts with their sizes ----


NESTED = {
    "vision_config": ("vision_tower", "vision_model", "visual", "vision_encoder", "vision"),
    "text_config": ("language_model", "text_model"),
    "audio_config": ("audio_tower", "audio_model", "audio_encoder"),
    "qformer_config": ("qformer",),
}
"""Parts of a `config.json` and the names that their weights go by."""


@dataclass(frozen=True)
class Part:
    """A part of a model."""

    name: str  # Its name in the files; "layers × 24" for layers in a row
    parameters: int | None  # How many numbers it has; None where that is not known here
    num_bytes: int | None  # Their size in the files
    dtypes: tuple[str, ...] = ()  # How they are stored, such as ("BF16",), the most frequent first
    kind: str = ""  # Its class, and what its configuration says about its shape
    source: str = ""  # Where it is, if not in the folder
    children: tuple[Part, ...] = field(default=())  # The parts inside it

    def plain(self) -> dict[str, Any]:
        """The part as plain data."""
        return {
            "name": self.name,
            "parameters": self.parameters,
            "bytes": self.num_bytes,
            "dtypes": list(self.dtypes),
            "kind": self.kind,
            "source": self.source,
            "children": [child.plain() for child in self.children],
        }


def part_of(
    name: str, tensors: Mapping[str, TensorInfo], settings: Mapping[str, Any] | None = None, depth: int = 2
) -> Part:
    """Make the tree of some tensors."""
    settings = settings or {}
    sizes: dict[str, int] = {}
    for info in tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.num_bytes
    part = Part(
        name,
        sum(info.numel for info in tensors.values()),
        sum(sizes.values()),
        tuple(sorted(sizes, key=lambda dtype: -sizes[dtype])),
        kind_of(settings),
    )
    if depth == 0:
        return part
    groups = _groups(tensors)
    children = []
    for segment, inside in groups.items():
        nested = next((key for key, names in NESTED.items() if segment in names and key in settings), None)
        children.append(part_of(segment, inside, settings[nested] if nested else None, depth - 1))
    return replace(part, children=tuple(children))


def kind_of(settings: Mapping[str, Any]) -> str:
    """A configuration in a few words: class and shape."""
    architectures = settings.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else settings.get("model_type")
    words = [str(first)] if first else []
    for text, keys in (
        ("{} layers", ("num_hidden_layers", "num_layers", "encoder_layers", "n_layer")),
        ("{} decoder layers", ("num_decoder_layers", "decoder_layers")),
        ("width {}", ("hidden_size", "d_model", "n_embd")),
        ("{} heads", ("num_attention_heads", "num_heads", "encoder_attention_heads", "n_head")),
        ("images of {}", ("image_size",)),
        ("patches of {}", ("patch_size",)),
        ("{} mel bins", ("num_mel_bins",)),
        ("{} queries", ("num_query_tokens",)),
    ):
        value = next((settings[key] for key in keys if isinstance(settings.get(key), int)), None)
        if value is not None:
            words.append(text.format(value))
    return ", ".join(words)


def _groups(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Tensors by the first level of their names that tells them apart, in the order of the names."""
    groups: dict[str, dict[str, TensorInfo]] = {}
    for name, info in sorted(tensors.items(), key=lambda entry: _natural(entry[0])):
        # transformers puts a level "model." around everything but the head.
        segment, _, rest = name.removeprefix("model.").partition(".")
        groups.setdefault(segment, {})[rest] = info
    if all(segment.isdecimal() for segment in groups) and len(groups) > 1:
        return {}
    if len(groups) == 1:
        (inside,) = groups.values()
        return _groups(inside) if all(inside) else {}
    return {_counted(segment, inside): inside for segment, inside in groups.items()}


def _counted(segment: str, inside: Mapping[str, TensorInfo]) -> str:
    """A group's name, with the number of layers in it where that is what it is."""
    numbers = {rest.partition(".")[0] for rest in inside}
    if len(numbers) > 1 and segment.endswith(("s", "layer", "h")) and all(number.isdecimal() for number in numbers):
        return f"{segment} × {len(numbers)}"
    if len(numbers) == 1 and all("." in rest for rest in inside):
        (only,) = numbers
        inner = _counted(only, {rest.partition(".")[2]: info for rest, info in inside.items()})
        return f"{segment}.{inner}" if inner != only else segment
    return segment


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"\.", name)]


SMALL_FILES = ("*.json", "*.jinja", "*.md", "LICENSE*")


def looked_over(name: str) -> FolderReport:
    """Find a model's folder and check it; of a hub id that is not in the cache, fetch what is small."""
    folder = Path(name).expanduser()
    if (ours := shipped(name)) is not None:
        return check_folder(ours)
    if folder.is_dir():
        return check_folder(folder, allow_pickle=True)
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such model folder, and no hub id (owner/name)")
    from huggingface_hub import snapshot_download

    try:
        cached = Path(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        cached = None
    if cached is not None and any(cached.glob("*.safetensors")):
        return check_folder(cached, allow_pickle=True)
    try:
        small = Path(snapshot_download(name, allow_patterns=list(SMALL_FILES)))
        report = check_folder(small, weights=False)
        return FolderReport(small, report.configs, _hub_headers(name), report.templates)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}: no such folder here, and not to be had from the hub ({first_line(error)})"
        ) from error


def _hub_headers(name: str) -> dict[str, Header]:
    """The headers of a repository's safetensors, a few kilobytes of each file."""
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        found = get_safetensors_metadata(name)
    except NotASafetensorsRepoError:
        return {}
    return {
        file: Header(
            {
                tensor: TensorInfo(info.dtype, tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])
                for tensor, info in header.tensors.items()
            },
            {},
        )
        for file, header in found.files_metadata.items()
    }


def referred(source: str) -> Path | None:
    """Find the folder of a part that lies elsewhere."""
    from polymodal.modeling.default_llm import HUB_ID as SMOLLM2
    from polymodal.modeling.default_llm import converted_folder
    from polymodal.modeling.language_model import DEFAULT_LLM

    if source == DEFAULT_LLM:
        if (converted_folder() / "config.json").is_file():
            return converted_folder()
        source = SMOLLM2
    place = shipped(source) or Path(source).expanduser()
    if place.is_dir():
        return place
    if HUB_ID.fullmatch(source):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(source, local_files_only=True))
        except (OSError, ValueError):
            return None
    return None
