"""What a model folder is, from its configurations and headers alone: nothing is loaded, nothing is run.

Works for folders of ours, for any folder of Hugging Face's layout (vision-language models, language models, towers,
pairs of towers, Whisper), for the original LLaVA repository's, and for their hub ids. Of a repository that is not in
the hub's cache only the small files and the headers of the weights are fetched.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from polymodal.checkpoints.locate import HUB_ID, cached_folder, find_model, referred_folder
from polymodal.checkpoints.model_folder import read_document, verify_contract
from polymodal.config import ImageConfig, LLMConfig, ModelConfig, tower_folder
from polymodal.errors import CheckpointError, PolymodalError, first_line
from polymodal.media_plan import Size, plan_image
from polymodal.processing.chat_template.presets import PRESETS
from polymodal.processing.image_config_hf import image_config_from_hf
from polymodal.safety.config_json import read_json
from polymodal.safety.model_folder import MAX_TOKENIZER, OURS, FolderReport, check_folder
from polymodal.utils.files import home_path, shipped
from polymodal.utils.safetensors_io import TensorInfo

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "image_token")
CARDS = ("README.md", "MODEL_CARD.md")
EXAMPLES = ((336, 336), (480, 640), (1080, 1920))
"""Heights and widths for which visual tokens are said."""
SMALL_FILES = ("*.json", "*.jinja", "*.md", "LICENSE*")
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
    children: tuple[Part, ...] = ()  # The parts inside it

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


@dataclass(frozen=True)
class Description:
    """A model folder in plain data."""

    report: FolderReport  # The folder, looked over; no part of the plain data
    name: str  # As it was asked for
    kind: str  # What it is, in words
    folder: str  # Where it is
    parts: tuple[Part, ...]  # Its parts, as a tree
    context: int | None = None  # Positions of the language model; None where there is none or no limit
    vocabulary: int | None = None  # Entries of the tokenizer; None without one
    special_tokens: dict[str, dict[str, Any]] = field(default_factory=dict)  # Role -> text and id
    template: dict[str, str] | None = None  # Where the chat template is from, its hash and its text; None without one
    images: dict[str, Any] = field(default_factory=dict)  # The image rules
    videos: dict[str, Any] = field(default_factory=dict)  # How videos are seen; of a folder of ours that takes them
    sounds: dict[str, Any] = field(default_factory=dict)  # The same of sounds
    history: list[dict[str, Any]] = field(default_factory=list)  # The stages it went through, oldest first
    # Its hash, and why it does not hold, None where it does; None for folders that have none
    contract: dict[str, str | None] | None = None
    licence: str | None = None  # As the card's first lines or the licence file say
    notes: list[str] = field(default_factory=list)  # What a person should know before opening it

    @property
    def parameters(self) -> int | None:
        """All parameters; None where those of a part are not known here."""
        counts = [part.parameters for part in self.parts]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def num_bytes(self) -> int:
        """The size of all weights that are known."""
        return sum(part.num_bytes or 0 for part in self.parts)

    def plain(self) -> dict[str, Any]:
        """The description as plain data."""
        facts = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "report"}
        parts = [part.plain() for part in self.parts]
        return {**facts, "parts": parts, "parameters": self.parameters, "bytes": self.num_bytes}


def describe(name: str | Path) -> Description:
    """Describe a model."""
    report = _looked_over(str(name))
    vocabulary, special = _tokens(report)
    return Description(
        report=report,
        name=str(name),
        folder=str(report.folder),
        vocabulary=vocabulary,
        special_tokens=special,
        licence=_licence(report.folder),
        **(_ours(report, special) if report.kind == "polymodal" else _theirs(report)),
    )


def _ours(report: FolderReport, special: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A folder of ours: its own files, and the parts that it refers to."""
    document = read_document(report.folder, report.configs[OURS])
    config = document.config
    llm, settings = _part_of_ours("llm", config.llm.model_name_or_path, report)
    parts = [llm]
    if config.vision is not None:
        named = enumerate(tower.vision_tower for tower in config.vision.towers)
        parts += [_part_of_ours(tower_folder(number), name, report)[0] for number, name in named]
    if config.audio is not None:
        parts.append(_part_of_ours("audio", config.audio.audio_tower, report)[0])
    parts += _own_parts(config, report.tensors())
    if (lora := report.configs.get("adapter/adapter_config.json")) is not None:
        kind = f"LoRA, r {lora.get('r')}, alpha {lora.get('lora_alpha')}"
        parts.append(replace(_part_of("adapter", report.tensors("adapter/"), depth=0), kind=kind))
    source = config.template.chat_template
    template: tuple[str, str] | None = (OURS, source)
    if source in PRESETS:
        template = (f"preset {source}", PRESETS[source].jinja)
    elif source == "tokenizer":
        template = report.chat_template
    try:
        broken = None
        verify_contract(report.folder, document)
    except PolymodalError as error:
        broken = str(error)
    if config.image_token_id is not None:
        special.setdefault("image_token", {"text": "(the placeholder)", "id": config.image_token_id})
    return {
        "kind": "polymodal model folder",
        "parts": tuple(parts),
        "context": _context(settings),
        "template": _template(template),
        "images": _used_rules(config.image) if config.image is not None else {},
        "videos": config.video.model_dump(mode="json") if config.video is not None else {},
        "sounds": config.audio.model_dump(mode="json") if config.audio is not None else {},
        "history": document.history,
        "contract": {"sha256": document.contract_hash, "broken": broken},
    }


def _own_parts(config: ModelConfig, own: Mapping[str, TensorInfo]) -> list[Part]:
    """What only our folder holds: projectors and temporal encoder; the newline of AnyRes counts with the first."""
    video, audio = config.video, config.audio
    kinds = {
        "projector": config.projector.mm_projector_type,
        "temporal_encoder": video.temporal.type if video is not None and video.temporal is not None else "",
        "audio_projector": audio.projector.mm_projector_type if audio is not None else "",
    }
    held: dict[str, dict[str, TensorInfo]] = {}
    for name, info in own.items():
        part = name.partition(".")[0]
        held.setdefault(part if part in kinds else "projector", {})[name] = info
    return [replace(_part_of(name, held[name], depth=0), kind=kind) for name, kind in kinds.items() if name in held]


def _part_of_ours(name: str, source: str, report: FolderReport) -> tuple[Part, dict[str, Any]]:
    """The language model or tower of a folder of ours, and its `config.json`; empty where it is not here."""
    if source in ("bundled", str((report.folder / name).resolve())):
        settings = report.configs.get(f"{name}/config.json", {})
        return _part_of(name, report.tensors(f"{name}/"), settings, depth=1), settings
    place = referred_folder(source)
    if place is None:
        return Part(name, None, None, kind=source, source=f"{source} (not on this machine)"), {}
    found = check_folder(place)
    tensors = found.tensors()
    heard = {key: t for key, t in tensors.items() if name == "audio" and re.match(r"(model\.)?encoder\.", key)}
    whole = _part_of(name, heard or tensors, found.config, depth=1)  # a Whisper's decoder is left out
    return replace(whole, kind=whole.kind or source, source=source), found.config


def _theirs(report: FolderReport) -> dict[str, Any]:
    """A folder of Hugging Face's layout, or the LLaVA repository's."""
    settings, tensors = report.config, report.tensors()
    notes = []
    whole = _part_of("", tensors, settings)
    parts = whole.children or ((replace(whole, name="weights"),) if tensors else ())
    if report.pickles:
        opened = "are never opened" if report.headers else "are not opened here, so their sizes are the files'"
        notes.append(f"weights in pickles ({', '.join(report.pickles[:3])}) {opened}")
        if not tensors:
            size = sum((report.folder / file).stat().st_size for file in report.pickles)
            parts = (Part("pickles", None, size, kind=_kind_of(settings)),)
    if report.kind == "llava":
        notes.append("`polymodal convert` turns it into a model folder of ours")
    return {
        "kind": _kind(report),
        "parts": parts,
        "context": _context(settings.get("text_config") or settings),
        "template": _template(report.chat_template),
        "images": _rules(report),
        "notes": notes,
    }


def _kind(report: FolderReport) -> str:
    """What a folder of Hugging Face's layout holds."""
    settings, shape = report.config, _kind_of(report.config)
    name = shape.partition(",")[0]
    if report.kind == "llava":
        return f"folder of the LLaVA repository ({name})"
    if "adapter_config.json" in report.configs:
        base = report.configs["adapter_config.json"].get("base_model_name_or_path")
        return f"peft adapter for {base}"
    if "format" in settings and str(settings["format"]).startswith("polymodal-"):
        return f"part of a model of ours ({settings['format']})"
    for ending, words in (
        ("ForConditionalGeneration", "model that takes media" if "vision_config" in settings else "encoder-decoder"),
        ("ForCausalLM", "model that takes media" if "vision_config" in settings else "language model"),
        ("ForQuestionAnswering", "model that takes media" if "vision_config" in settings else "answers about texts"),
        ("VisionModel", "vision tower"),
        ("ForImageTextRetrieval", "scorer of images and texts"),
    ):
        if name.endswith(ending):
            return f"{words} ({shape})" if settings.get("model_type") != "whisper" else f"speech model ({shape})"
    if "vision_config" in settings and "text_config" in settings:
        return f"pair of towers for images and texts ({name})"
    return f"model of transformers ({shape})" if name else "folder without a config.json"


def _context(settings: dict[str, Any]) -> int | None:
    for key in ("max_position_embeddings", "n_positions", "max_target_positions"):
        if isinstance(settings.get(key), int):
            return int(settings[key])
    return None


def _tokens(report: FolderReport) -> tuple[int | None, dict[str, dict[str, Any]]]:
    """Size of the tokenizer and its special tokens with their ids."""
    ids: dict[str, int] = {}
    size = None
    path = report.folder / "tokenizer.json"
    if path.is_file():
        document = read_json(path, MAX_TOKENIZER)
        vocabulary = (document.get("model") or {}).get("vocab") or {}
        added = {entry["content"]: entry["id"] for entry in document.get("added_tokens") or []}
        if not isinstance(vocabulary, dict):  # a list of pieces with their scores
            vocabulary = {piece[0]: place for place, piece in enumerate(vocabulary)}
        ids = {**vocabulary, **added}
        size = len(ids)
    special: dict[str, dict[str, Any]] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        for role in SPECIAL:
            given = report.configs.get(file, {}).get(role)
            text = given.get("content") if isinstance(given, dict) else given
            if isinstance(text, str):
                special.setdefault(role, {"text": text, "id": ids.get(text)})
    return size, special


def _template(found: tuple[str, str] | None) -> dict[str, str] | None:
    """A chat template as plain data, from where it lies and its text."""
    if found is None:
        return None
    return {"source": found[0], "sha256": hashlib.sha256(found[1].encode()).hexdigest(), "text": found[1]}


def _used_rules(image: ImageConfig) -> dict[str, Any]:
    """The image rules that have a say under the chosen layout."""
    values = image.model_dump(mode="json", exclude_none=True)
    layout = image.image_aspect_ratio
    drop = {"max_tiles", "thumbnail"} if layout != "slice" else set()
    if layout != "anyres":
        drop |= {"image_grid_pinpoints", "several_images"} | ({"mm_patch_merge_type"} if layout != "native" else set())
    if layout not in ("anyres", "slice"):
        drop |= {"overview_aspect_ratio"}
    return {key: value for key, value in values.items() if key not in drop}


def _rules(report: FolderReport) -> dict[str, Any]:
    """The preprocessing of a folder of Hugging Face's layout, in our terms where it can be said in them."""
    if report.image_processor is None:
        return {}
    ratio = report.config.get("vision_aspect_ratio") if report.model_type == "llava_onevision" else None
    try:
        return _used_rules(image_config_from_hf(report.image_processor, vision_aspect_ratio=ratio))
    except PolymodalError as error:
        return {"not ours": str(error)}


def visual_tokens(report: FolderReport, sizes: Sequence[Size]) -> list[tuple[int, int]]:
    """Count tokens and tiles that images take in a published vision-language model, from configurations alone."""
    import torch

    from polymodal.interop.huggingface.families import read_pieces
    from polymodal.interop.huggingface.load import image_rules
    from polymodal.interop.huggingface.weights import compose_vision

    pieces = read_pieces(report)
    image, bundled = image_rules(report, pieces), LLMConfig(model_name_or_path="bundled")
    config = ModelConfig(vision=pieces.vision, image=image, projector=pieces.projector, llm=bundled)
    with torch.device("meta"):
        _, projector = compose_vision(pieces, config, llm_dim=1)
    plans = [plan_image(size, image, projector.output_grid) for size in sizes]
    return [(plan.num_tokens, plan.num_tiles) for plan in plans]


def _licence(folder: Path) -> str | None:
    """The licence, as the model card's first lines or the licence file say."""
    for name in CARDS:
        path = folder / name
        if not path.is_file() or path.stat().st_size > 2**22:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        front = re.match(r"\A---\s*\n(.*?)\n---", text, re.DOTALL)
        found = dict(re.findall(r"^(licen[cs]e(?:_name)?):[ \t]*(.+)$", front[1], re.MULTILINE)) if front else {}
        said = found.get("license_name") or found.get("license") or found.get("licence")
        if said:
            return f"{said.strip().strip(chr(34) + chr(39))} ({name})"
        if re.search(r"\blicen[cs]e", text, re.IGNORECASE):
            return f"see {name}"
    for path in sorted(folder.glob("LICENSE*")):
        lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if lines:
            return f"{lines[0].strip()[:80]} ({path.name})"
    return None


def _part_of(
    name: str, tensors: Mapping[str, TensorInfo], settings: Mapping[str, Any] | None = None, depth: int = 2
) -> Part:
    """Make the tree of some tensors."""
    settings = settings or {}
    sizes: Counter[str] = Counter()
    for info in tensors.values():
        sizes[info.dtype] += info.num_bytes
    children = []
    for segment, inside in (_groups(tensors) if depth > 0 else {}).items():
        nested = next((key for key, names in NESTED.items() if segment in names and key in settings), None)
        children.append(_part_of(segment, inside, settings[nested] if nested else None, depth - 1))
    count, dtypes = sum(info.numel for info in tensors.values()), tuple(dtype for dtype, _ in sizes.most_common())
    return Part(name, count, sizes.total(), dtypes, _kind_of(settings), children=tuple(children))


def _kind_of(settings: Mapping[str, Any]) -> str:
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


def _looked_over(name: str) -> FolderReport:
    """Find a model's folder and check it; of a hub id that is not in the cache, fetch what is small."""
    if (folder := shipped(name) or home_path(name)).is_dir():
        return check_folder(folder, allow_pickle=True)
    if folder.is_file():
        find_model(name)  # which says what it is
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such model folder, and no hub id (owner/name)")
    from huggingface_hub import snapshot_download

    cached = cached_folder(name)
    if cached is not None and any(cached.glob("*.safetensors")):
        return check_folder(cached, allow_pickle=True)
    try:
        small = Path(snapshot_download(name, allow_patterns=list(SMALL_FILES)))
        return replace(check_folder(small, weights=False), headers=_hub_headers(name))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{name}: no such folder here, and not to be had from the hub ({first_line(error)})"
        ) from error


def _hub_headers(name: str) -> dict[str, dict[str, TensorInfo]]:
    """The headers of a repository's safetensors, a few kilobytes of each file."""
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        found = get_safetensors_metadata(name)
    except NotASafetensorsRepoError:
        return {}
    return {
        file: {tensor: TensorInfo(info.dtype, tuple(info.shape)) for tensor, info in header.tensors.items()}
        for file, header in found.files_metadata.items()
    }
