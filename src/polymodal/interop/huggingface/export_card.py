"""The page beside exported weights: licences and origins, how to ask and to serve it, what differs, how it was made.

Folders are published, so nothing of the machine that wrote them is on the page: of a path of the history the last part
is kept. What the parts are licensed under is read from their own cards and licence files, which travel with the export;
what is not said there is called unknown.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from polymodal.checkpoints.locate import HUB_ID
from polymodal.checkpoints.model_folder import CONFIG_NAME, Loaded
from polymodal.modeling.language_model import DEFAULT_LLM, SMOLLM2
from polymodal.utils.files import shipped, write_text
from polymodal.utils.paths import SNAPSHOT, without_places

LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*")
"""Names of the files that travel."""
PARTS_FOLDER = "licences"
"""Where those of the parts go, a folder each."""

_KEYS = {"source": "model", "model_name_or_path": "llm", "base": "llm", "vision_tower": "vision", "tower": "vision"}
_TEXTS = {"Apache License": "apache-2.0", "MIT License": "mit", "BSD 3-Clause": "bsd-3-clause"}
_STATED = re.compile(r"\A---\n.*?^license:[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*$.*?^---$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Origin:
    """Where a part came from."""

    part: str  # "model", "llm" or "vision"
    name: str  # A hub id, or what to call it
    folder: Path | None  # Where it lies here
    licence: str | None  # As its card or licence file says
    on_hub: bool  # Whether the name is a hub id


def origins(loaded: Loaded, source: Path | None) -> list[Origin]:
    """Find where a model's parts came from: its folder, and what its configuration and its history name."""
    config, found = loaded.config, dict[tuple[str, str], Origin]()
    named = [("model", str(source))] if source is not None else []
    named.append(("llm", config.llm.model_name_or_path))
    if config.vision is not None:
        named += [("vision", tower.vision_tower) for tower in config.vision.towers]
    for part, name in [*named, *_named_in(loaded.history)]:
        try:
            origin = _origin(part, name)
        except (OSError, RuntimeError, ValueError):  # a history may name what no system takes for a path
            continue
        if origin is not None:
            found.setdefault((part, origin.name), origin)
    return list(found.values())


def _named_in(document: Any) -> Iterator[tuple[str, str]]:
    """Every part that a history names."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key in _KEYS and isinstance(value, str):
                yield _KEYS[key], value
            else:
                yield from _named_in(value)
    elif isinstance(document, list):
        for value in document:
            yield from _named_in(value)


def _origin(part: str, name: str) -> Origin | None:
    from huggingface_hub import try_to_load_from_cache

    if name == "bundled":
        return None
    if name == DEFAULT_LLM:
        return Origin(part, SMOLLM2, None, "apache-2.0", True)
    if (folder := shipped(name)) is not None:
        return Origin(part, f"{name} (of polymodal)", folder, "apache-2.0", False)
    folder = Path(name).expanduser()
    if found := SNAPSHOT.search(str(folder)):
        return Origin(part, f"{found[1]}/{found[2]}", folder, licence_of(folder), True)
    if folder.is_dir():
        # A folder of ours is made of the other parts, and what lies inside it has no origin of its own.
        ours = any((place / CONFIG_NAME).is_file() for place in (folder, folder.parent))
        licence = licence_of(folder)
        return None if ours and licence is None else Origin(part, folder.name, folder, licence, False)
    if HUB_ID.fullmatch(name) and name[0] != ".":
        cached = try_to_load_from_cache(name, "config.json")
        folder = Path(cached).parent if isinstance(cached, str) else folder
        return Origin(part, name, folder, licence_of(folder), True)
    return Origin(part, folder.name, None, None, False)


def licence_of(folder: Path) -> str | None:
    """What a folder says that it is licensed under, by the hub's names."""
    for name in ("README.md", "MODEL_CARD.md"):
        if (text := _read(folder / name)) and (stated := _STATED.search(text.replace("\r\n", "\n"))):
            return stated[1]
    for path in sorted(path for pattern in LICENCES[:2] for path in folder.glob(pattern) if path.is_file()):
        head = (_read(path) or "")[:400]
        if licence := next((licence for words, licence in _TEXTS.items() if words in head), None):
            return licence
    return None


def _read(path: Path) -> str | None:
    """The beginning of a file of text."""
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(1 << 16)


def copy_licences(source: Path | None, folder: Path, parts: Sequence[Origin] = ()) -> None:
    """Copy the licence files of a folder, where there is one, and of the parts, each into a folder of its own."""
    places = [(source, folder)] if source is not None else []
    places += [(origin.folder, folder / PARTS_FOLDER / origin.part) for origin in parts if origin.folder is not None]
    for given, target in places:
        if target != folder and given == source:
            continue
        for path in sorted({path for pattern in LICENCES for path in given.glob(pattern) if path.is_file()}):
            target.mkdir(parents=True, exist_ok=True)
            if not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)


def front_matter(parts: Sequence[Origin], library: str) -> str:
    """What the hub reads: the licence, and the models it was made from."""
    stated = {origin.licence for origin in parts}
    licence = "unknown" if not stated or None in stated else "other" if len(stated) > 1 else next(iter(stated))
    bases = list(dict.fromkeys(origin.name for origin in parts if origin.on_hub))
    lines = [f"library_name: {library}", "pipeline_tag: image-text-to-text", f"license: {licence}"]
    if bases:
        lines += ["base_model:", *(f"  - {name}" for name in bases)]
    return "\n".join(["---", *lines, "---"])


def about_licences(parts: Sequence[Origin]) -> str:
    """A table of the parts' origins and licences."""
    what = {"model": "the model itself", "llm": "language model", "vision": "vision tower"}
    rows = [f"| {what[o.part]} | {o.name} | {o.licence or 'not stated: ask its authors'} |" for o in parts]
    return "\n".join(["| Part | From | Licence |", "|---|---|---|", *rows])


def about_training(history: Sequence[dict[str, Any]]) -> str:
    """What was trained in which stage, and the stages in full."""
    stages = [stage for stage in history if isinstance(stage, dict) and isinstance(stage.get("trained"), list)]
    rows = [
        f"| {stage.get('stage', '?')} | {', '.join(map(str, stage['trained']))} "
        + " ".join(f"| {stage.get(key, '?')}" for key in ("steps", "samples", "trained_tokens", "loss"))
        + " |"
        for stage in stages
    ]
    head = ["| Stage | Trained | Steps | Samples | Tokens | Loss |", "|---|---|--:|--:|--:|--:|"]
    table = [*head, *rows, ""] if rows else ["Nothing was trained here.", ""]
    told = [json.dumps(without_places(entry), ensure_ascii=False, sort_keys=True) for entry in history]
    return "\n".join([*table, *(f"- `{entry}`" for entry in told)])


def write_card(
    folder: Path, name: str, kind: str, loaded: Loaded, remarks: Sequence[str], parts: Sequence[Origin], *, chat: bool
) -> None:
    """Write the folder's README: what it is, how to ask it, what is different, how it was made."""
    model, config = loaded.model, loaded.config
    assert config.vision is not None
    components = {
        f"vision tower ({config.vision.type})": model.vision_encoder,
        f"projector ({config.projector.mm_projector_type})": model.projector,
        f"language model ({model.llm.config.model_type})": model.llm,
    }
    sizes = {part: sum(p.numel() for p in module.parameters()) for part, module in components.items() if module}
    several = "`processor.apply_chat_template([chat, chat], padding=True, ...)`"
    call = several if chat else "`processor(images=[...], text=[...], padding=True, ...)`"
    text = Path(__file__).with_name("export_card.jinja").read_text(encoding="utf-8")
    page = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True).from_string(text)
    card = page.render(
        front=front_matter(parts, "transformers"),
        name=name,
        kind=kind,
        sizes=sizes,
        licences=about_licences(parts),
        chat=chat,
        call=call,
        side="right" if model.encoder_decoder else "left",
        remarks=remarks,
        history=about_training(loaded.history) if loaded.history else "(no history)",
    )
    write_text(folder / "README.md", card)
