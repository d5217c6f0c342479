"""Parts that a model folder refers to: where each is now, also after a move, known by what is in its files."""

import hashlib
import warnings
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from polymodal.config import ModelConfig, tower_folder
from polymodal.errors import CheckpointError, ConfigError, unknown_name
from polymodal.utils.files import home_path, whole_path

PARTS = {
    "llm": ("model_name_or_path", "language model"),
    "vision": ("vision_tower", "vision tower"),
    "audio": ("audio_tower", "audio tower"),
}
"""Sections of a configuration that name a part: the key, and its name in words; further towers are "vision_2" on."""
LEVELS, MOST = 5, 200
"""Folders above a model that a part is looked for in, and of each, how many of those in it."""


def part_hash(place: Path) -> str | None:
    """A hash of some bytes of the weights in a folder or file; None where there are none."""
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place] if place.is_file() else []
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(str(size).encode())
        with path.open("rb") as file:
            for start in range(0, size, max(1024, size // 64)):
                file.seek(start)
                digest.update(file.read(1024))
    return digest.hexdigest()[:16] if files else None


def part_hashes(config: ModelConfig) -> dict[str, str]:
    """The hashes of the parts that lie on this machine and not in the model's own folder."""
    places = {part: Path(name) for part, name in _names(config).items()}
    found = {part: part_hash(place) for part, place in places.items() if place.is_absolute() and place.exists()}
    return {part: known for part, known in found.items() if known is not None}


def placed(folder: Path, config: ModelConfig, known: Mapping[str, str], given: Mapping[str, Any] | None) -> ModelConfig:
    """The configuration with each part where it is now: where the user says, where it was, or found by its hash."""
    names, given = _names(config), given or {}
    for part, place in given.items():
        if part not in (known_parts := {**PARTS, **names}):
            raise unknown_name("part", part, known_parts)
        if names.get(part) in (None, "bundled"):
            has = "has none" if part not in names else "holds its own"
            raise ConfigError(f"{folder}: a place of its {_called(part)} is given, and it {has}; leave it out")
        if (here := home_path(place)).exists() and known.get(part) not in (None, part_hash(here)):
            warnings.warn(f"{folder}: trained with another {_called(part)} than {place} by its files", stacklevel=4)
    for part, name in names.items():
        new = whole_path(str(given[part])) if part in given else name
        if part not in given and _lost(name) and part in known:
            found = (place for place in _places(folder, Path(name)) if part_hash(place) == known[part])
            new = str(next(found, name))
        if new != name:
            names = {**names, part: new}
    for part, (key, _) in PARTS.items():
        if (section := getattr(config, part)) is not None:
            places = [name for other, name in names.items() if other.startswith("vision")]
            moved = section.at(places) if part == "vision" else section.model_copy(update={key: names[part]})
            config = config.model_copy(update={part: moved})
    return config


def require_parts(folder: Path, config: ModelConfig, unread: tuple[str, ...] = ()) -> None:
    """Name the part that is missing, and how to point to it; some may be left unread."""
    for part, name in _names(config).items():
        if _lost(name) and part not in unread:
            what, _, number = part.partition("_")
            flags = " ".join([f"--{'audio-tower' if what == 'audio' else what} DIR"] * int(number or 1))
            raise CheckpointError(
                f"{folder}: its {_called(part)} {name} is not there; say where it is with {flags} (in Python "
                f'parts={{"{part}": DIR}}), or take along what `polymodal export MODEL DST --format folder` writes'
            )


def _names(config: ModelConfig) -> dict[str, str]:
    """The place of every part, a model's towers in order."""
    sections = {part: getattr(config, part) for part in PARTS}
    names = {part: getattr(sections[part], PARTS[part][0]) for part in PARTS if sections[part] is not None}
    further = config.vision.fused if config.vision is not None else ()
    return names | {tower_folder(number): tower.vision_tower for number, tower in enumerate(further, 1)}


def _called(part: str) -> str:
    """What a part is called; "vision_2" is the second vision tower."""
    name, _, number = part.partition("_")
    return f"{PARTS[name][1]} {number}".rstrip()


def _lost(name: str) -> bool:
    return Path(name).is_absolute() and not Path(name).exists()


def _places(folder: Path, was: Path) -> Iterator[Path]:
    """Where a part may be: as it lay to the folders above the model, then all that lies near."""
    folder = folder.resolve()
    roots = [folder, *islice(folder.parents, LEVELS), Path.cwd()]
    for root in roots:
        yield from (root.joinpath(*was.parts[-count:]) for count in range(min(LEVELS, len(was.parts) - 1), 0, -1))
    for root in roots:
        if root != root.parent and root.is_dir():
            yield from islice((path for path in sorted(root.iterdir()) if path.is_dir()), MOST)
