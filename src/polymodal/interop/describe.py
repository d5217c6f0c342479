"""What a model folder is, from its configurations and headers alone: nothing is loaded, nothing is run.

Works for folders of ours, for any folder of Hugging Face's layout (vision-language models, language models, towers,
pairs of towers, Whisper), for the original LLaVA repository's, and for their hub ids. Of a repository that is not in
the hub's cache only the small files and the headers of the weights are fetched.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from polymodal.checkpoints.model_folder import CONFIG_NAME, read_config, read_history, verify_contract
from polymodal.config import ImageConfig, LLMConfig, ModelConfig
from polymodal.errors import PolymodalError
from polymodal.interop.describe_weights import Part, kind_of, looked_over, part_of, referred
from polymodal.interop.llava.config import is_llava_repo
from polymodal.media_plan import Size, plan_image
from polymodal.processing.chat_template.presets import PRESETS
from polymodal.processing.image_config_hf import image_config_from_hf
from polymodal.safety.config_json import read_json
from polymodal.safety.model_folder import MAX_TOKENIZER, FolderReport, check_folder
from polymodal.safety.safetensors_header import TensorInfo

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "image_token")
CARDS = ("README.md", "MODEL_CARD.md")
EXAMPLES = ((336, 336), (480, 640), (1080, 1920))
"""Heights and widths for which visual tokens are said."""


@dataclass(frozen=True)
class Description:
    """A model folder in plain data."""

    name: str  # As it was asked for
    kind: str  # What it is, in words
    folder: str  # Where it is
    parts: tuple[Part, ...]  # Its parts, as a tree
    context: int | None = None  # Positions of the language model; None where there is none or no limit
    vocabulary: int | None = None  # Entries of the tokenizer; None without one
    special_tokens: dict[str, dict[str, Any]] = field(default_factory=dict)  # Role -> text and id
    template: dict[str, str] | None = None  # Where the chat template is from, its hash and its text; None without one
    images: dict[str, Any] = field(default_factory=dict)  # The image rules
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
        parts = [part.plain() for part in self.parts]
        return {**asdict(self), "parts": parts, "parameters": self.parameters, "bytes": self.num_bytes}


def describe(name: str | Path) -> Description:
    """Describe a model."""
    report = looked_over(str(name))
    if (report.folder / CONFIG_NAME).is_file():
        return _ours(str(name), report)
    return _theirs(str(name), report)


def _ours(name: str, report: FolderReport) -> Description:
    """A folder of ours: its own files, and the parts that it refers to."""
    folder = report.folder
    config = read_config(folder)
    parts = [_part_of_ours("llm", config.llm.model_name_or_path, report)]
    if config.vision is not None:
        parts.append(_part_of_ours("vision", config.vision.vision_tower, report))
    own = {n: t for f, h in report.headers.items() if "/" not in f for n, t in h.tensors.items()}
    projector = part_of("projector", own, depth=1)
    if own:
        kind = config.projector.mm_projector_type
        parts.append(Part("projector", projector.parameters, projector.num_bytes, projector.dtypes, kind))
    if "adapter/adapter_config.json" in report.configs:
        settings = report.configs["adapter/adapter_config.json"]
        kind = f"LoRA, r {settings.get('r')}, alpha {settings.get('lora_alpha')}"
        parts.append(_with_kind(part_of("adapter", _tensors(report, "adapter/"), depth=0), kind))
    source = config.template.chat_template
    template: dict[str, str] | None
    if source in PRESETS:
        template = _template(f"preset {source}", PRESETS[source].jinja)
    elif source == "tokenizer":
        template = _folder_template(report)
    else:
        template = _template("polymodal.json", source)
    try:
        broken = None
        verify_contract(folder)
    except PolymodalError as error:
        broken = str(error)
    vocabulary, special = _tokens(report)
    if config.image_token_id is not None:
        special.setdefault("image_token", {"text": "(the placeholder)", "id": config.image_token_id})
    document = report.configs[CONFIG_NAME]
    return Description(
        name=name,
        kind="polymodal model folder",
        folder=str(folder),
        parts=tuple(parts),
        context=_context(_settings_of("llm", config.llm.model_name_or_path, report)),
        vocabulary=vocabulary,
        special_tokens=special,
        template=template,
        images=_used_rules(config.image) if config.image is not None else {},
        history=read_history(folder),
        contract={"sha256": str(document.get("contract_hash")), "broken": broken},
        licence=_licence(folder),
    )


def _theirs(name: str, report: FolderReport) -> Description:
    """A folder of Hugging Face's layout, or the LLaVA repository's."""
    settings = report.configs.get("config.json", {})
    notes = []
    if report.pickles:
        opened = "are never opened" if report.headers else "are not opened here, so their sizes are the files'"
        notes.append(f"weights in pickles ({', '.join(report.pickles[:3])}) {opened}")
    tensors = _tensors(report, "")
    whole = part_of("", tensors, settings)
    parts = whole.children or ((_with_name(whole, "weights"),) if tensors else ())
    if not tensors and report.pickles:
        size = sum((report.folder / file).stat().st_size for file in report.pickles)
        parts = (Part("pickles", None, size, kind=kind_of(settings)),)
    kind = _kind(report)
    if is_llava_repo(report.folder):
        notes.append("`polymodal convert` turns it into a model folder of ours")
    vocabulary, special = _tokens(report)
    return Description(
        name=name,
        kind=kind,
        folder=str(report.folder),
        parts=parts,
        context=_context(settings.get("text_config") or settings),
        vocabulary=vocabulary,
        special_tokens=special,
        template=_folder_template(report),
        images=_rules(report),
        licence=_licence(report.folder),
        notes=notes,
    )


def _part_of_ours(name: str, source: str, report: FolderReport) -> Part:
    """The language model or tower of a folder of ours."""
    settings = _settings_of(name, source, report)
    if source in ("bundled", str((report.folder / name).resolve())):
        return _with_kind(part_of(name, _tensors(report, f"{name}/"), settings, depth=1), kind_of(settings))
    place = referred(source)
    if place is None:
        return Part(name, None, None, kind=source, source=f"{source} (not on this machine)")
    found = check_folder(place)
    whole = part_of(name, _tensors(found, ""), settings, depth=1)
    return Part(
        name, whole.parameters, whole.num_bytes, whole.dtypes, kind_of(settings) or source, source, whole.children
    )


def _settings_of(name: str, source: str, report: FolderReport) -> dict[str, Any]:
    """The `config.json` of a part; empty where it has none or is not on this machine."""
    if f"{name}/config.json" in report.configs:
        return report.configs[f"{name}/config.json"]
    place = referred(source)
    return read_json(place / "config.json") if place is not None and (place / "config.json").is_file() else {}


def _tensors(report: FolderReport, prefix: str) -> dict[str, TensorInfo]:
    """The tensors of a folder's own files, or of one of its subfolders."""
    return {
        tensor: info
        for file, header in report.headers.items()
        if file.startswith(prefix) and "/" not in file.removeprefix(prefix)
        for tensor, info in header.tensors.items()
    }


def _kind(report: FolderReport) -> str:
    """What a folder of Hugging Face's layout holds."""
    settings = report.configs.get("config.json", {})
    shape = kind_of(settings)
    name = shape.partition(",")[0]
    if is_llava_repo(report.folder):
        return f"folder of the LLaVA repository ({name})"
    if "adapter_config.json" in report.configs:
        base = report.configs["adapter_config.json"].get("base_model_name_or_path")
        return f"peft adapter for {base}"
    if "format" in settings and str(settings["format"]).startswith("polymodal-"):
        return f"part of a model of ours ({settings['format']})"
    for ending, words in (
        ("ForConditionalGeneration", "model that takes media" if "vision_config" in settings else "encoder-decoder"),
        ("ForCausalLM", "language model"),
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
        if isinstance(vocabulary, dict):
            ids = {**vocabulary, **added}
            size = len(ids)
        else:  # a list of pieces with their scores
            ids = {**{piece[0]: place for place, piece in enumerate(vocabulary)}, **added}
            size = len(ids)
    special: dict[str, dict[str, Any]] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        for role in SPECIAL:
            given = report.configs.get(file, {}).get(role)
            text = given.get("content") if isinstance(given, dict) else given
            if isinstance(text, str):
                special.setdefault(role, {"text": text, "id": ids.get(text)})
    return size, special


def _folder_template(report: FolderReport) -> dict[str, str] | None:
    """The chat template that transformers would take."""
    for wanted in ("chat_template.jinja", "processor_config.json", "chat_template.json", "tokenizer_config.json"):
        for label, text in report.templates.items():
            if label == wanted or label.startswith((f"{wanted} (default", f"{wanted} (None")):
                return _template(label, text)
    return None


def _template(source: str, text: str) -> dict[str, str]:
    return {"source": source, "sha256": hashlib.sha256(text.encode()).hexdigest(), "text": text}


def _used_rules(image: ImageConfig) -> dict[str, Any]:
    """The image rules that have a say under the chosen layout."""
    values = image.model_dump(mode="json", exclude_none=True)
    layout = image.image_aspect_ratio
    drop = {"max_tiles", "thumbnail"} if layout != "slice" else set()
    if layout != "anyres":
        drop |= {"image_grid_pinpoints", "mm_patch_merge_type", "several_images"}
    if layout not in ("anyres", "slice"):
        drop |= {"overview_aspect_ratio"}
    return {key: value for key, value in values.items() if key not in drop}


def _rules(report: FolderReport) -> dict[str, Any]:
    """The preprocessing of a folder of Hugging Face's layout, in our terms where it can be said in them."""
    try:
        image = _image_config(report)
    except PolymodalError as error:
        return {"not ours": str(error)}
    return {} if image is None else _used_rules(image)


def _image_config(report: FolderReport) -> ImageConfig | None:
    settings = report.configs.get("config.json", {})
    ratio = settings.get("vision_aspect_ratio") if settings.get("model_type") == "llava_onevision" else None
    nested = report.configs.get("processor_config.json", {}).get("image_processor")
    plain = report.configs.get("preprocessor_config.json", {})
    for found in (nested, plain):
        if isinstance(found, dict) and found and "feature_size" not in found:  # that one is for sound
            return image_config_from_hf(found, vision_aspect_ratio=ratio)
    return None


def visual_tokens(folder: Path, sizes: Sequence[Size]) -> list[tuple[int, int]]:
    """Count what images take in a published vision-language model, from configurations alone."""
    from polymodal.interop.huggingface.families import read_pieces
    from polymodal.interop.huggingface.weights import compose_vision

    image = _image_config(check_folder(folder, weights=False))
    if image is None:
        return []
    pieces = read_pieces(folder)
    config = ModelConfig(
        vision=pieces.vision, image=image, projector=pieces.projector, llm=LLMConfig(model_name_or_path="bundled")
    )
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


def _with_kind(part: Part, kind: str) -> Part:
    return Part(part.name, part.parameters, part.num_bytes, part.dtypes, kind, part.source, part.children)


def _with_name(part: Part, name: str) -> Part:
    return Part(name, part.parameters, part.num_bytes, part.dtypes, part.kind, part.source, part.children)
