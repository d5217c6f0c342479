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

import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from polymodal.errors import CheckpointError, ConfigError
from polymodal.safety.config_json import MAX_CONFIG, check_settings, read_json
from polymodal.utils.safetensors_io import TensorInfo, read_header

Kind: TypeAlias = Literal["polymodal", "llava", "huggingface", "transformers", "unknown"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Endings of files that run code when they are opened as they always were."""
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states|trainer_state)[^/]*")
"""What a trainer leaves beside the weights; nobody opens it to run a model."""
SUBFOLDERS = ("llm", "vision", "audio", "adapter", "qformer_tokenizer", "image_tokenizer")
"""Folders inside a model folder that are parts of it."""
WEIGHTS = "model.safetensors"
"""The weights of a model in one file; beside it an index of shards is not read."""
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
OURS = "polymodal.json"
"""The file that makes a folder one of ours."""
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
    OURS,
)
"""The JSON files that decide how a folder is loaded."""
TEMPLATES = "additional_chat_templates"
TEMPLATE_FILES = ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json")
"""Where transformers looks for a chat template, first to last."""

CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "llava_onevision": "LlavaOnevisionForConditionalGeneration",
    "blip-2": "Blip2ForConditionalGeneration",
    "instructblip": "InstructBlipForConditionalGeneration",
}
"""`model_type` of a published model that is composed here -> its class in transformers."""
LLAVA_REPO = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_mixtral": "mixtral",
    "llava_qwen": "qwen2",
    "llava_gemma": "gemma",
}
"""`model_type` in the original LLaVA repository -> of the language model in transformers."""

MAX_INDEX = 64 * 2**20
"""Bytes of an index of shards."""
MAX_TOKENIZER = 512 * 2**20
"""Bytes of a tokenizer.json; the largest published ones have about 40 MB."""


@dataclass(frozen=True)
class FolderReport:
    """A folder that was looked over, and what its files say; whoever opens the folder reads it here."""

    folder: Path
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)  # Each JSON of `CONFIGS`, by its path inside
    headers: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)  # The tensors of each safetensors file
    shards: dict[str, tuple[str, ...]] = field(default_factory=dict)  # The files that each index names
    templates: dict[str, str] = field(default_factory=dict)  # The chat templates' texts
    pickles: tuple[str, ...] = ()  # Files with weights in a pickle; never opened here
    allow_pickle: bool = False  # Whether whoever reads the LLaVA repository's folders may open them

    @property
    def config(self) -> dict[str, Any]:
        """The folder's `config.json`; empty without one."""
        return self.configs.get("config.json", {})

    @property
    def model_type(self) -> str | None:
        """The `model_type` of `config.json`."""
        found = self.config.get("model_type")
        return found if isinstance(found, str) else None

    @property
    def kind(self) -> Kind:
        """Who can open the folder: we, the reader of LLaVA's repository, that of published models, transformers."""
        if OURS in self.configs:
            return "polymodal"
        if self.model_type in LLAVA_REPO and "mm_vision_tower" in self.config:
            return "llava"
        stock, named = CLASSES.get(self.model_type or ""), self.config.get("architectures")
        if stock is not None and (not named or (isinstance(named, list) and stock in named)):
            return "huggingface"
        return "transformers" if "config.json" in self.configs else "unknown"

    @property
    def chat_template(self) -> tuple[str, str] | None:
        """The chat template that transformers would take, and where it is from."""
        for file in TEMPLATE_FILES:
            for label, text in self.templates.items():
                if text and (label == file or label in (f"{file} (default)", f"{file} (None)")):
                    return label, text
        return None

    @property
    def image_processor(self) -> dict[str, Any] | None:
        """How images are scaled, from either of the files that say so; one with a "feature_size" is for sound."""
        nested = self.configs.get("processor_config.json", {}).get("image_processor")
        for found in (nested, self.configs.get("preprocessor_config.json")):
            if isinstance(found, dict) and found and "feature_size" not in found:
                return found
        return None

    def weight_files(self, prefix: str = "") -> list[str]:
        """The files of a model's weights that transformers reads: one file, else the shards that an index names."""
        if prefix + WEIGHTS in self.headers:
            return [prefix + WEIGHTS]
        return [prefix + file for file in self.shards.get(f"{prefix}{WEIGHTS}.index.json", ())]

    def tensors(self, prefix: str = "") -> dict[str, TensorInfo]:
        """The tensors of the folder's own files, or of those of a subfolder; of a model's, those that are read."""
        own = [f for f in self.headers if f.startswith(prefix) and "/" not in f.removeprefix(prefix)]
        return {name: info for file in self.weight_files(prefix) or own for name, info in self.headers[file].items()}


def check_folder(folder: Path, *, allow_pickle: bool = False, weights: bool = True) -> FolderReport:
    """Look a model folder over, ours or a stranger's; each JSON file is parsed once."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such model folder")
    report = FolderReport(folder, allow_pickle=allow_pickle)
    roots = _roots(folder)
    pickles: list[str] = []
    for part in (folder, *(folder / name for name in SUBFOLDERS), *sorted(folder.glob("vision_*"))):
        if part.is_dir():
            names = _checked_files(part, roots)
            prefix = "" if part == folder else f"{part.name}/"
            _check_configs(part, names, prefix, report)
            if weights:
                pickles += [prefix + name for name in _check_weights(part, names, prefix, report)]
    return replace(report, pickles=tuple(pickles))


def refuse_adapter(report: FolderReport) -> None:
    """Refuse a peft adapter among the files of a model: whether it belongs to the model is not for us to guess."""
    if "adapter_config.json" not in report.configs:
        return
    base, whole = report.configs["adapter_config.json"].get("base_model_name_or_path"), report.weight_files()
    what = f"lies beside {whole[0]}, and transformers would add it" if whole else f"is no model, but goes on {base!r}"
    raise CheckpointError(
        f"{report.folder / 'adapter_config.json'}: a peft adapter, which {what}; merge it into the model "
        "(merge_and_unload, then save_pretrained of peft) or move its files elsewhere"
    )


def whole_files(report: FolderReport) -> list[str]:
    """The files of a whole model's weights: those that transformers reads, else the shards of one set, else pickles."""
    if files := report.weight_files():
        return files
    for there, name in ((report.headers, "model.safetensors"), (report.pickles, "pytorch_model.bin")):
        stem, ending = name.split(".")
        if name in there:
            return [name]
        if (report.folder / f"{name}.index.json").is_file():
            named = read_json(report.folder / f"{name}.index.json", MAX_INDEX).get("weight_map")
            return sorted({file for file in (named or {}).values() if file in there})
        if shards := sorted(file for file in there if re.fullmatch(rf"{stem}[^/]*\.{ending}", file)):
            counts = {match[1] for file in shards if (match := re.search(r"-of-(\d+)", file))}
            if counts and counts != {f"{len(shards):05d}"}:
                raise CheckpointError(
                    f"{report.folder}: {', '.join(shards[:4])} are no one set of shards; remove stale ones"
                )
            return shards
    return []


def pickle_error(path: Path, kind: Kind) -> CheckpointError:
    """Build the error for weights that are in a pickle only."""
    cure = (
        "if you trust where it is from, `polymodal convert` it with --allow-pickle: tensors are read from it and "
        "nothing else"
        if kind == "llava"
        else "convert them to safetensors (load them where you trust them, save_pretrained) or take a folder that has "
        "them"
    )
    return CheckpointError(f"{path}: weights in a pickle, which can run code when it is opened; {cure}")


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
    for text, label in {text: label for label, text in report.templates.items() if label.startswith(prefix)}.items():
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


def _check_weights(part: Path, names: Sequence[str], prefix: str, report: FolderReport) -> list[str]:
    """Check the headers and indexes of one folder; gives the names of its pickles."""
    headers = {name: read_header(part / name) for name in names if name.endswith(".safetensors")}
    report.headers.update({prefix + name: header for name, header in headers.items()})
    if WEIGHTS in headers and (left := [name for name in headers if SHARD.fullmatch(name)]):
        warnings.warn(
            f"{part / WEIGHTS} is read, and not the shards beside it ({', '.join(left[:3])}"
            f"{', ...' * (len(left) > 3)}); remove those that are of another model",
            stacklevel=2,
        )
    for name in names:
        if name.endswith(".safetensors.index.json"):
            report.shards[prefix + name] = _check_index(part / name, headers)
    pickles = [name for name in names if name.endswith(PICKLES) and not NO_WEIGHTS.fullmatch(name)]
    safe = any(name.endswith((".safetensors", ".gguf")) for name in names)
    if pickles and not safe and not report.allow_pickle:
        raise pickle_error(part / pickles[0], report.kind)
    return pickles


def _check_index(path: Path, headers: Mapping[str, Mapping[str, TensorInfo]]) -> tuple[str, ...]:
    """Make sure that an index names files of this folder, and tensors that are in them; gives the files."""
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
        if tensor not in headers[file]:
            raise CheckpointError(f"{path}: tensor {tensor[:100]!r} is not in {file}")
    files = tuple(sorted(set(entries.values())))
    for file in files:
        if stale := next((tensor for tensor in headers[file] if entries.get(tensor, file) != file), None):
            raise CheckpointError(
                f"{path}: tensor {stale[:100]!r} is to be in {entries[stale]}, and lies in {file} too"
            )
    return files
