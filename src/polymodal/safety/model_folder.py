"""Look a model folder over before anything in it is opened: no pickle, no foreign code, no lie about sizes.

A folder from elsewhere is data that a stranger wrote. Loading one must not run code (pickle, `auto_map`, an attention
that is fetched from a repository), must not read files outside of it (`../` in an index, links), must not allocate
what a header merely claims, and must not hang in its chat template. Everything here reads configurations and headers
only, costs milliseconds, and raises one `CheckpointError` that names the file and what is wrong. `.py` files may lie
there; they are never run.

The incidents behind the rules: transformers CVE-2026-4372 (`_attn_implementation_internal`), torch CVE-2025-32434
(pickle in spite of `weights_only`), llama-cpp-python CVE-2024-34359 (chat templates), Ollama CVE-2026-7482 (offsets
past the end of a file).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polymodal.errors import CheckpointError, ConfigError
from polymodal.safety.config_json import MAX_CONFIG, check_settings, read_json
from polymodal.safety.safetensors_header import Header, read_header

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of files that run code when they are opened as they always were."""
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|trainer_state)[^/]*")
"""What a trainer leaves beside the weights; nobody opens it to run a model."""
SUBFOLDERS = ("llm", "vision", "audio", "adapter", "qformer_tokenizer")
"""Folders inside a model folder that are parts of it."""
CONFIGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "adapter_config.json",
    "polymodal.json",
)
"""The JSON files that decide how a folder is loaded."""
TEMPLATES = "additional_chat_templates"

MAX_INDEX = 64 * 2**20
"""Bytes of an index of shards."""
MAX_TOKENIZER = 512 * 2**20
"""Bytes of a tokenizer.json; the largest published ones have about 40 MB."""


@dataclass(frozen=True)
class FolderReport:
    """What was found in a folder while it was looked over."""

    folder: Path  # The folder
    # The content of each JSON file of `CONFIGS`, by its path inside the folder
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    headers: dict[str, Header] = field(default_factory=dict)  # Of each safetensors file
    templates: dict[str, str] = field(default_factory=dict)  # The chat templates' texts
    pickles: tuple[str, ...] = ()  # Files with weights in a pickle; never opened here


def check_folder(folder: Path, *, allow_pickle: bool = False, weights: bool = True) -> FolderReport:
    """Look a model folder over, ours or Hugging Face's."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder")
    report = FolderReport(folder)
    roots = _roots(folder)
    pickles: list[str] = []
    for part in (folder, *(folder / name for name in SUBFOLDERS)):
        if part.is_dir():
            names = _checked_files(part, roots)
            prefix = "" if part == folder else f"{part.name}/"
            _check_configs(part, names, prefix, report)
            if weights:
                pickles += [prefix + name for name in _check_weights(part, names, prefix, report, allow_pickle)]
    return FolderReport(folder, report.configs, report.headers, report.templates, tuple(pickles))


def check_template(text: str, where: str = "chat_template") -> None:
    """Make sure that a chat template reaches for nothing and comes to an end, by rendering a short conversation."""
    # A template that refuses that conversation is fine. `polymodal.safety.jinja_sandbox` keeps its limits in every
    # later rendering.
    import jinja2

    from polymodal.safety.jinja_limits import UnsafeTemplateError
    from polymodal.safety.jinja_sandbox import compile_template

    try:
        render = compile_template(text, share=0.25)
    except UnsafeTemplateError as error:
        raise CheckpointError(f"{where}: {str(error).removeprefix('chat_template: ')}") from None
    except ConfigError:
        return  # no valid jinja; whoever wants to use it is told so
    for content in ("Hello", [{"type": "image"}, {"type": "text", "text": "Hello"}]):
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "Hello"}] * 2
        variables = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
        try:
            render(messages=messages[:3], tools=None, documents=None, add_generation_prompt=True, **variables)
        except UnsafeTemplateError as error:
            raise CheckpointError(f"{where}: {str(error).removeprefix('chat_template: ')}") from None
        except jinja2.sandbox.SecurityError as error:
            raise CheckpointError(f"{where}: {error}") from None
        except (jinja2.TemplateError, TypeError, AttributeError, ValueError, KeyError):
            continue  # it takes content in another form, or refuses this conversation


def _roots(folder: Path) -> tuple[Path, ...]:
    """Where links in a folder may lead: the folder itself, and the blobs of Hugging Face's cache around it."""
    real = folder.resolve()
    in_cache = real.parent.name == "snapshots"
    return (real, real.parent.parent / "blobs") if in_cache else (real,)


def _checked_files(folder: Path, roots: Sequence[Path]) -> list[str]:
    """The names of a folder's files; links that lead out of it, and what is no file, are refused."""
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                target = Path(os.path.realpath(entry.path))
                if not any(target == root or root in target.parents for root in roots):
                    raise CheckpointError(
                        f"{entry.path}: a link out of the folder, to {target}; copy the file, or name its own folder"
                    )
                if not target.exists():
                    raise CheckpointError(f"{entry.path}: a link to {target}, which is missing")
            mode = entry.stat().st_mode
            if stat.S_ISDIR(mode):
                continue
            if not stat.S_ISREG(mode):
                raise CheckpointError(f"{entry.path}: neither a file nor a folder")
            names.append(entry.name)
    return sorted(names)


def _check_configs(part: Path, names: Sequence[str], prefix: str, report: FolderReport) -> None:
    """Read and check what decides how a folder is loaded; templates too."""
    for name in CONFIGS:
        if name in names:
            document = read_json(part / name)
            check_settings(document, str(part / name))
            report.configs[prefix + name] = document
            for label, text in _templates_in(document, name):
                report.templates[prefix + label] = text
    jinja = [part / name for name in names if name.endswith(".jinja")]
    if (part / TEMPLATES).is_dir():
        further = _checked_files(part / TEMPLATES, _roots(report.folder))
        jinja += [part / TEMPLATES / name for name in further if name.endswith(".jinja")]
    for path in jinja:
        if path.stat().st_size > MAX_CONFIG:
            raise CheckpointError(f"{path}: {path.stat().st_size:,} bytes are no chat template")
        report.templates[prefix + str(path.relative_to(part))] = path.read_text(encoding="utf-8", errors="replace")
    for label, text in report.templates.items():
        if label.startswith(prefix):
            check_template(text, str(report.folder / label))
    for name in ("tokenizer.json", "vocab.json"):
        if name in names and (part / name).stat().st_size > MAX_TOKENIZER:
            raise CheckpointError(f"{part / name}: {(part / name).stat().st_size:,} bytes are no tokenizer")


def _templates_in(document: Mapping[str, Any], name: str) -> Iterator[tuple[str, str]]:
    """The chat templates inside a JSON file; one, or several with names."""
    value = document.get("chat_template")
    if isinstance(value, str):
        yield name, value
    entries: list[tuple[Any, Any]] = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list):
        entries = [(entry.get("name"), entry.get("template")) for entry in value if isinstance(entry, dict)]
    for key, text in entries:
        if isinstance(text, str):
            yield f"{name} ({key})", text


def _check_weights(
    part: Path, names: Sequence[str], prefix: str, report: FolderReport, allow_pickle: bool
) -> list[str]:
    """Check the headers and indexes of one folder; gives the names of its pickles."""
    for name in names:
        if name.endswith(".safetensors"):
            report.headers[prefix + name] = read_header(part / name)
    for name in names:
        if name.endswith(".safetensors.index.json"):
            _check_index(part / name, {n: report.headers[prefix + n] for n in names if n.endswith(".safetensors")})
    pickles = [name for name in names if name.endswith(PICKLES) and not NO_WEIGHTS.fullmatch(name)]
    safe = any(name.endswith((".safetensors", ".gguf")) for name in names)
    if pickles and not safe and not allow_pickle:
        raise CheckpointError(
            f"{part / pickles[0]}: weights in a pickle, which can run code when it is opened; convert them to "
            "safetensors (load them where you trust them, save_pretrained) or take a folder that has them"
        )
    return pickles


def _check_index(path: Path, headers: Mapping[str, Header]) -> None:
    """Make sure that an index names files of this folder, and tensors that are in them."""
    entries = read_json(path, MAX_INDEX).get("weight_map")
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: weight_map is missing")
    for tensor, file in entries.items():
        if not isinstance(file, str) or file != os.path.basename(file) or "\\" in file or ".." in file:
            raise CheckpointError(f"{path}: {str(file)[:100]!r} lies out of the folder (tensor {tensor[:100]!r})")
        if not file.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {file[:100]!r} is no safetensors file")
        if file not in headers:
            raise CheckpointError(f"{path}: shard {file} is missing")
        if tensor not in headers[file].tensors:
            raise CheckpointError(f"{path}: tensor {tensor[:100]!r} is not in {file}")
