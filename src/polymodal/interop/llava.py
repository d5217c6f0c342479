"""Folders of the original LLaVA repository (haotian-liu/LLaVA, LLaVA-VL/LLaVA-NeXT) as models of ours.

There a LLaVA is a language model with a projector inside it: the `config.json` is the language model's with `mm_*`
keys, and the weights are the language model's with `model.mm_projector.*` among them. The tower is another repository,
named by `mm_vision_tower`, whose folder says how pixels are scaled. Three kinds of folder are left by its training:

    whole       all weights, in shards, mostly as pickles (`pytorch_model-*.bin`)
    projector   stage 1: `config.json` and `mm_projector.bin`
    lora        peft's adapter and `non_lora_trainables.bin`, which holds the projector

Pickles are read only where that is allowed by name, and then as tensors only.

Which prompt the model was trained on is not written anywhere: there it is guessed from words in the folder's name. Here
it follows from the tokenizer and can be said with `template`: the tokenizer's own chat template where it has one;
ChatML or Llama 3 where it has those tokens; else Mistral's for a Mistral and Vicuna's, which LLaVA-1.5 uses, for the
rest. An image is followed by a line break, as there.
"""

import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from polymodal.checkpoints.model_folder import Loaded, load_adapter
from polymodal.config import (
    ImageConfig,
    LLMConfig,
    ModelConfig,
    ProjectorConfig,
    TemplateConfig,
    VisionConfig,
    parse_config,
)
from polymodal.errors import CheckpointError, ConfigError, first_line
from polymodal.interop.huggingface.load import Dtype
from polymodal.modeling.build import build_vision, image_token_id_for
from polymodal.modeling.encoders.hf_vision import FAMILIES, family_of
from polymodal.modeling.encoders.vision import UNUSED_PARTS
from polymodal.modeling.language_model import load_llm, load_tokenizer, quieten_transformers
from polymodal.modeling.pretrained import building, most_parts, probe
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.chat_template.presets import PRESETS
from polymodal.processing.image_config_hf import image_config_from_hf
from polymodal.safety import model_folder
from polymodal.safety.config_json import check_settings, read_json
from polymodal.utils.files import home_path
from polymodal.utils.safetensors_io import DERIVED, check_finite, compare_tensors, copy_tensors, read_tensors

State: TypeAlias = dict[str, torch.Tensor]

BY_TOKENS = ("chatml", "llama3")
"""Presets that a tokenizer's own tokens tell."""

_PREFIXES = re.compile(r"^(module\.)?(base_model\.model\.)?")
_NOT_THE_LANGUAGE_MODELS = re.compile(
    r"mm_|tune_|freeze_|unfreeze_|use_mm|image_|tokenizer_|s2|add_|vision_tower|model_type|architectures|"
    r"transformers_version|_name_or_path|auto_map|torch_dtype|dtype|pos_skipping_range|delay_load"
)
_REFUSED = {
    "mm_use_im_start_end": "tokens around each image",
    "s2": "a tower at several scales",
    "mm_resampler_type": "a resampler behind the tower",
    "mm_use_4_vision_tokens": "another order of tokens",
}
"""Settings that change what is computed and that our parts do not have."""


@dataclass(frozen=True)
class Repo:
    """What such a folder's `config.json` says, in our terms; the weights are not read yet."""

    report: model_folder.FolderReport
    kind: Literal["whole", "projector", "lora"]
    files: list[str]  # The files that hold the weights: all of a whole folder, what is not the adapter's of the others
    adapter: str | None  # The file of a LoRA
    text_settings: Any  # The language model's configuration, of transformers
    tower: str  # The tower's hub id or path
    select_layer: int  # Which hidden state of it; of a tower that is not CLIP the repository always takes -2
    select_feature: Any  # "patch", or "cls_patch" to keep the class token
    projector: ProjectorConfig
    image: dict[str, Any]  # The image rules that differ from the tower's own
    in_tiles: bool  # Whether the canvases of "anyres" count tiles instead of pixels


def read_repo(report: model_folder.FolderReport) -> Repo:
    """Read the configuration, and find the files of the weights."""
    folder, document, where = report.folder, report.config, report.folder / "config.json"
    if report.kind != "llava":
        raise CheckpointError(f"{folder}: not a folder of the LLaVA repository (config.json names no mm_vision_tower)")
    there = sorted((*report.headers, *report.pickles))
    adapter = None
    kind: Literal["whole", "projector", "lora"]
    whole = model_folder.whole_files(report)
    if "adapter_config.json" in report.configs:
        if whole:
            model_folder.refuse_adapter(report)
        kind, files = "lora", [_one_of(report, "non_lora_trainables")]
        adapter = _one_of(report, "adapter_model")
    elif whole:
        kind, files = "whole", whole
    elif any(file.startswith("mm_projector.") for file in there):
        kind, files = "projector", [_one_of(report, "mm_projector")]
    else:
        raise CheckpointError(f"{folder}: no weights: neither a model, nor mm_projector.bin, nor an adapter")
    needed = next((file for file in (adapter, *files) if file in report.pickles), None)
    if needed is not None and not report.allow_pickle:
        raise model_folder.pickle_error(folder / needed, report.kind)
    for key, what in _REFUSED.items():
        if document.get(key):
            raise CheckpointError(f"{where}: {key} is {document[key]!r}: {what} cannot be expressed here")
    image, in_tiles = _layout(document, where)
    layer = document.get("mm_vision_select_layer", -2)
    if not isinstance(layer, int):
        raise CheckpointError(f"{where}: mm_vision_select_layer is {layer!r}; a whole number is expected")
    projector = document.get("mm_projector_type", "linear")
    if not re.fullmatch(r"linear|mlp[1-9]x_gelu", str(projector)):
        raise CheckpointError(f"{where}: mm_projector_type is {projector!r}, which cannot be expressed here")
    return Repo(
        report=report,
        kind=kind,
        files=files,
        adapter=adapter,
        text_settings=_text_settings(document, where),
        tower=str(document["mm_vision_tower"]),
        select_layer=layer,
        select_feature=_choice(document, "mm_vision_select_feature", ("patch", "cls_patch"), where),
        projector=ProjectorConfig(mm_projector_type=projector),
        image=image,
        in_tiles=in_tiles,
    )


def _one_of(report: model_folder.FolderReport, stem: str) -> str:
    """The file of that name, as safetensors where there are both."""
    for name, found in ((f"{stem}.safetensors", report.headers), (f"{stem}.bin", report.pickles)):
        if name in found:
            return name
    raise CheckpointError(f"{report.folder}: {stem}.safetensors or {stem}.bin is missing")


def _text_settings(document: dict[str, Any], where: Path) -> Any:
    """The language model's own configuration."""
    from transformers import AutoConfig

    values = {key: value for key, value in document.items() if not _NOT_THE_LANGUAGE_MODELS.match(key)}
    if values.get("rope_scaling") is None:
        values.pop("rope_scaling", None)
    with building(where):
        return AutoConfig.for_model(model_folder.LLAVA_REPO[document["model_type"]], **values)


def _choice(document: dict[str, Any], key: str, choices: tuple[str, ...], where: Path) -> str:
    """A setting that must be one of a few; the first of them where it is left out."""
    given = document.get(key) or choices[0]
    if given not in choices:
        raise CheckpointError(f"{where}: {key} is {given!r}, which cannot be expressed here ({', '.join(choices)})")
    return str(given)


def _layout(document: dict[str, Any], where: Path) -> tuple[dict[str, Any], bool]:
    """How an image is laid out; where that is left out, the tower's own processor resizes and crops."""
    given = document.get("image_aspect_ratio")
    if given in (None, "square"):
        return {}, False
    if given == "pad":
        return {"image_aspect_ratio": "pad", "resize_short_side": None}, False
    match = re.fullmatch(r"anyres(?:_max_([1-9]\d*))?", str(given))
    if match is None:
        raise CheckpointError(f"{where}: image_aspect_ratio is {given!r}, which cannot be expressed here")
    canvases, in_tiles = _pinpoints(document, where)
    return {
        "image_aspect_ratio": "anyres",
        "resize_short_side": None,
        "image_grid_pinpoints": canvases,
        "mm_patch_merge_type": _choice(document, "mm_patch_merge_type", ("flat", "spatial", "spatial_unpad"), where),
        "anyres_max": int(match[1]) if match[1] else None,
    }, in_tiles


def _pinpoints(document: dict[str, Any], where: Path) -> tuple[tuple[tuple[int, int], ...], bool]:
    """The canvases, which are (width, height) there; a text such as "(1x1),...,(6x6)" counts tiles."""
    given = document.get("image_grid_pinpoints")
    if isinstance(given, str):
        corners = [(int(a), int(b)) for a, b in re.findall(r"\((\d{1,2})x(\d{1,2})\)", given)]
        if corners:
            (a, b), (c, d) = corners[0], corners[-1]
            return tuple((height, width) for width in range(a, c + 1) for height in range(b, d + 1)), True
        try:
            given = json.loads(given.replace("(", "[").replace(")", "]"))
        except ValueError:
            given = None
    pairs = given if isinstance(given, list) else []
    if not pairs or not all(isinstance(p, list) and len(p) == 2 and all(isinstance(n, int) for n in p) for p in pairs):
        raise CheckpointError(f"{where}: image_grid_pinpoints must be pairs of whole numbers, such as [[336, 672]]")
    return tuple((height, width) for width, height in pairs), False


def load_llava_repo(
    report: model_folder.FolderReport,
    *,
    base: str | None = None,
    vision_tower: str | None = None,
    template: str | None = None,
    dtype: Dtype = "float32",
) -> Loaded:
    """Load a folder of the LLaVA repository; what it leaves out about images and prompts is added."""
    quieten_transformers()
    repo, folder = read_repo(report), report.folder
    under = _base_report(repo, base)
    inside = repo.kind == "whole" or under is not None  # what lies in a LLaVA folder becomes part of our model
    llm_config = LLMConfig(model_name_or_path="bundled" if inside else str(base), dtype=dtype)
    vision, image = _images(repo, vision_tower or repo.tower)
    tensors: State = {}
    for file in repo.files:
        found = _read_file(folder / file)
        if twice := sorted(found.keys() & tensors.keys()):
            raise CheckpointError(f"{folder / file}: tensor {twice[0]!r} is in another file too; remove the stale one")
        tensors |= found
    parts = sort_state(tensors)
    llm: PreTrainedModel
    if repo.kind == "whole":
        llm = _build_llm(repo, parts.pop("llm", {}), getattr(torch, dtype), llm_config.attn_implementation)
        tokenizer = load_tokenizer(LLMConfig(model_name_or_path=str(folder.resolve())), folder)
    elif under is not None:
        loaded = load_llava_repo(under, vision_tower=vision_tower, template=template, dtype=dtype)
        llm, tokenizer = loaded.model.llm, loaded.tokenizer
    else:
        llm, tokenizer = load_llm(llm_config), load_tokenizer(llm_config)
    if "llm" in parts:
        names = sorted(parts["llm"])
        raise CheckpointError(f"{folder}: {len(names)} tensors besides the projector's, such as {names[0]}")
    config = ModelConfig(
        vision=vision.model_copy(update={"vision_tower": "bundled"}) if "vision" in parts else vision,
        image=image,
        projector=repo.projector,
        llm=llm_config,
        template=TemplateConfig(
            chat_template=template or _template(repo, tokenizer), image_newline_text="\n", text_restarts=True
        ),
    )
    embeddings = llm.get_input_embeddings().weight
    built = build_vision(config.model_copy(update={"vision": vision}), None, embeddings.shape[1])
    assert built is not None  # there is a tower
    encoder, projector = built
    projector.to(embeddings.device, embeddings.dtype)
    model = MultimodalLM(
        encoder,
        projector,
        llm,
        image_token_id_for(config, tokenizer, llm.get_output_embeddings().weight.shape[0]),
        image_newline=image.mm_patch_merge_type == "spatial_unpad",
        image_mean=image.image_mean,
        image_std=image.image_std,
    )
    _fill_parts(model, folder, parts)
    if repo.adapter is not None:
        tensors = {_PREFIXES.sub("", name): t for name, t in _read_file(folder / repo.adapter).items()}
        load_adapter(model, folder, tensors, folder / repo.adapter)
    entry = {"stage": "LLaVA repository", "source": str(folder), "kind": repo.kind, "base": base, "tower": repo.tower}
    config = config.model_copy(update={"image_token_id": model.image_token_id})
    return Loaded(model.eval(), tokenizer, config, [entry])


def _base_report(repo: Repo, base: str | None) -> model_folder.FolderReport | None:
    """Look over the language model that a LoRA or projector goes on, where that is a LLaVA folder itself."""
    report, folder = repo.report, repo.report.folder
    if repo.kind == "whole":
        if base is not None:
            raise ConfigError(f"{folder}: the folder holds a whole model; leave the base out")
        return None
    if base is None:
        named = report.configs.get("adapter_config.json", {}).get("base_model_name_or_path")
        named = named or report.config.get("_name_or_path")
        what = "a LoRA" if repo.kind == "lora" else "only a projector"
        hint = f" (it was trained on {str(named)!r})" if named else ""
        raise CheckpointError(
            f"{folder}: holds {what}; name the language model with --base of `polymodal convert`{hint}"
        )
    found = model_folder.check_folder(Path(base), allow_pickle=report.allow_pickle) if Path(base).is_dir() else None
    return found if found is not None and found.kind == "llava" else None


def _images(repo: Repo, tower: str) -> tuple[VisionConfig, ImageConfig]:
    """The tower and the image rules."""
    settings = _tower_file(tower, "config.json")
    check_settings(settings, f"vision tower {tower!r}")
    kind = settings.get("model_type")
    family = family_of(kind)
    if family is None:
        raise CheckpointError(f"vision tower {tower!r}: model_type {kind!r} is none of {', '.join(FAMILIES)}")
    vision = VisionConfig(
        vision_tower=tower,
        type=family,
        # The repository's SigLIP tower has its last layer cut off and takes what is then the last, whatever is asked.
        mm_vision_select_layer=repo.select_layer if family == "clip" else -2,
        mm_vision_select_feature=repo.select_feature,
    )
    image = image_config_from_hf(_tower_file(tower, "preprocessor_config.json"))
    changes = dict(repo.image)
    if repo.in_tiles:
        height, width = image.tile_size
        changes["image_grid_pinpoints"] = tuple((r * height, c * width) for r, c in changes["image_grid_pinpoints"])
    return vision, parse_config(ImageConfig, {**image.model_dump(), **changes}, f"vision tower {tower!r}")


def _tower_file(tower: str, name: str) -> dict[str, Any]:
    """A JSON file of a tower, from its folder or the hub."""
    folder = home_path(tower)
    if folder.is_dir():
        return read_json(folder / name)
    from huggingface_hub import hf_hub_download

    try:
        return read_json(Path(hf_hub_download(tower, name)))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"vision tower {tower!r}: {name} is not to be had ({first_line(error)}); name its folder with "
            "--vision-tower"
        ) from error


def _template(repo: Repo, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt, as this file's first lines say."""
    if tokenizer.chat_template:
        return "tokenizer"
    vocabulary = tokenizer.get_added_vocab()
    for name in BY_TOKENS:
        if all(token in vocabulary for token in PRESETS[name].tokens):
            return name
    return "mistral" if repo.text_settings.model_type in ("mistral", "mixtral") else "vicuna"


def sort_state(tensors: Mapping[str, torch.Tensor]) -> dict[str, State]:
    """Sort tensors by component, under the component's own names."""
    # One rule finds a tensor's place, whatever a trainer has put in front of its name (`base_model.model.` of peft,
    # `module.` of a wrapper).
    found: dict[str, State] = {}
    for full, tensor in tensors.items():
        name = _PREFIXES.sub("", full)
        if DERIVED.search(name):
            continue
        if match := re.search(r"(?:^|\.)mm_projector\.(.+)", name):
            # One linear layer has no number.
            place = ("projector", f"layers.{match[1]}" if re.fullmatch(r"\d+\..+", match[1]) else f"linear.{match[1]}")
        elif re.search(r"(?:^|\.)image_newline$", name):
            place = ("newline", "image_newline")
        elif match := re.search(r"(?:^|\.)vision_tower\.vision_tower\.(?:vision_model\.)?(.+)", name):
            place = ("vision", match[1])
        else:
            place = ("llm", name)
        found.setdefault(place[0], {})[place[1]] = tensor
    return found


def _read_file(path: Path) -> State:
    """Read one file of tensors; of a pickle nothing but tensors is taken."""
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the pickle's age; what counts is whether tensors come out
            # The old format, which is no archive, cannot be mapped into memory.
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # the unpickler fails in every way there is on a file that is none
        raise CheckpointError(f"{path}: not a file of tensors only ({first_line(error)})") from None
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    ):
        raise CheckpointError(f"{path}: not a file of tensors by name")
    return dict(found)


def _build_llm(repo: Repo, state: State, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    """Build the language model of a whole folder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(repo.text_settings)]
    where = repo.report.folder / "config.json"
    with building(where, most_parts(state)), torch.device("meta"):
        empty = kind(repo.text_settings)
    # A tied head shares the rows of the input embeddings, and need not be in the file.
    tied = set(empty.all_tied_weights_keys)
    wanted = {n: t for n, t in empty.state_dict().items() if n in state or n not in tied}
    compare_tensors(wanted, state, repo.report.folder)
    check_finite(state, repo.report.folder)
    # A copy of our own: what lies in a file that somebody writes anew must not change under the model.
    own = {name: state[name].to(dtype, copy=True) for name in wanted}
    with building(where):
        llm: PreTrainedModel = kind.from_pretrained(
            None, config=repo.text_settings, state_dict=own, dtype=dtype, attn_implementation=attn_implementation
        )
    probe(llm.eval(), where)
    return llm


def _fill_parts(model: MultimodalLM, folder: Path, parts: Mapping[str, State]) -> None:
    """Copy the projector, the newline and, where it was trained, the tower."""
    projector: Any = model.projector
    state = dict(projector.state_dict())
    given = dict(parts.get("projector", {}))
    if model.image_newline is not None:
        state["image_newline"] = model.image_newline.data
        given |= parts.get("newline", {})
    copy_tensors(state, given, folder)
    if tower := parts.get("vision"):
        encoder: Any = model.vision_encoder
        deepest = max(encoder.select_layers)
        # Layers above the deepest selected one are not run, and the repository may have cut them off.
        kept = {
            name: tensor
            for name, tensor in encoder.model.state_dict().items()
            if name in tower or not (name.startswith(UNUSED_PARTS) or _layer_of(name) >= deepest)
        }
        given = {name: t for name, t in tower.items() if name in kept or not name.startswith("head.")}
        copy_tensors(kept, given, folder)


def _layer_of(name: str) -> int:
    """The number of the layer that a tower's tensor belongs to; -1 for none."""
    match = re.search(r"\blayers?\.(\d+)\.", name)
    return int(match[1]) if match else -1
