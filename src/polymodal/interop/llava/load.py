"""Original LLaVA-repository folders as models of ours: what the folder leaves out about images and prompts is added.

Such a folder names its tower and how images are laid out; the tower's own folder says how pixels are scaled. Which
prompt the model was trained on is not written anywhere: there it is guessed from words in the folder's name. Here it
follows from the tokenizer and can be said with `template`: the tokenizer's own chat template where it has one; ChatML
or Llama 3 where it has those tokens; else Mistral's for a Mistral and Vicuna's, which LLaVA-1.5 uses, for the rest. A
image is followed by a line break, as there.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from polymodal.checkpoints.model_folder import Loaded
from polymodal.config import ImageConfig, LLMConfig, ModelConfig, TemplateConfig, VisionConfig
from polymodal.errors import CheckpointError, ConfigError, first_line
from polymodal.interop.huggingface.weight_names import DERIVED
from polymodal.interop.llava.config import EXTRA_FILES, PROJECTOR_FILES, Repo, is_llava_repo, named_base, read_repo
from polymodal.modeling.encoders.hf_vision import FAMILIES
from polymodal.modeling.encoders.vision import UNUSED_PARTS
from polymodal.modeling.language_model import load_llm, load_tokenizer, quieten_transformers
from polymodal.modeling.lora import attach_adapter
from polymodal.processing.chat_template.presets import PRESETS
from polymodal.processing.image_config_hf import image_config_from_hf
from polymodal.safety.config_json import check_settings, read_json
from polymodal.utils.safetensors_io import check_finite, compare_tensors, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from polymodal.modeling.vlm import MultimodalLM


# ---- Tensors of the LLaVA repository's folders, and building `MultimodalLM` from them ----
# One rule finds a tensor's place, whatever a trainer has put in front of its name (`base_model.model.` of peft,
# `module.`
# of a wrapper): what follows `mm_projector.` is the projector's, what follows `vision_tower.vision_tower.` the tower's,
# `image_newline` is the newline, the rest is the language model's.


State = dict[str, torch.Tensor]

_PREFIXES = re.compile(r"^(module\.)?(base_model\.model\.)?")


def sort_state(tensors: Mapping[str, torch.Tensor]) -> dict[str, State]:
    """Sort tensors by component, under the component's own names."""
    found: dict[str, State] = {}
    for full, tensor in tensors.items():
        name = _PREFIXES.sub("", full)
        if DERIVED.search(name):
            continue
        if match := re.search(r"(?:^|\.)mm_projector\.(.+)", name):
            # One linear layer has no number.
            leaf = match[1] if re.fullmatch(r"\d+\..+", match[1]) else f"linear.{match[1]}"
            place = ("projector", leaf if leaf.startswith("linear.") else f"layers.{leaf}")
        elif re.search(r"(?:^|\.)image_newline$", name):
            place = ("newline", "image_newline")
        elif match := re.search(r"(?:^|\.)vision_tower\.vision_tower\.(?:vision_model\.)?(.+)", name):
            place = ("vision", match[1])
        else:
            place = ("llm", name)
        found.setdefault(place[0], {})[place[1]] = tensor
    return found


def read_state(repo: Repo) -> State:
    """Read a folder's weights: all of a whole one, what is not the adapter's of the others."""
    if repo.kind == "whole":
        safe = sorted(name for name in repo.report.headers if name.startswith("model"))
        files = safe or sorted(name for name in repo.report.pickles if name.startswith("pytorch_model"))
    else:
        files = [_one_of(repo, PROJECTOR_FILES if repo.kind == "projector" else EXTRA_FILES)]
    state: State = {}
    for name in files:
        state |= read_file(repo.folder / name)
    return state


def read_file(path: Path) -> State:
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


def build_llm(repo: Repo, state: State, dtype: torch.dtype, attn_implementation: str) -> PreTrainedModel:
    """Build the language model of a whole folder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(repo.text_settings)]
    with torch.device("meta"):
        empty = kind(repo.text_settings)
    # A tied head shares the rows of the input embeddings, and need not be in the file.
    tied = set(empty.all_tied_weights_keys)
    wanted = {n: t for n, t in empty.state_dict().items() if n in state or n not in tied}
    compare_tensors(wanted, state, repo.folder)
    check_finite(state, repo.folder)
    # A copy of our own: what lies in a file that somebody writes anew must not change under the model.
    own = {name: state[name].to(dtype, copy=True) for name in wanted}
    llm: PreTrainedModel = kind.from_pretrained(
        None, config=repo.text_settings, state_dict=own, dtype=dtype, attn_implementation=attn_implementation
    )
    return llm.eval()


def fill_parts(model: MultimodalLM, repo: Repo, parts: Mapping[str, State]) -> None:
    """Copy the projector, the newline and, where it was trained, the tower."""
    projector: Any = model.projector
    state = dict(projector.state_dict())
    given = dict(parts.get("projector", {}))
    if model.image_newline is not None:
        state["image_newline"] = model.image_newline.data
        given |= parts.get("newline", {})
    _copy(state, given, repo.folder)
    if tower := parts.get("vision"):
        encoder: Any = model.vision_encoder
        deepest = max(encoder.select_layers)
        state = encoder.model.state_dict()
        # Layers above the deepest selected one are not run, and the repository may have cut them off.
        kept = {
            name: tensor
            for name, tensor in state.items()
            if name in tower or not (name.startswith(UNUSED_PARTS) or _layer_of(name) >= deepest)
        }
        _copy(kept, {name: t for name, t in tower.items() if name in kept or not name.startswith("head.")}, repo.folder)


def attach_lora(model: MultimodalLM, repo: Repo) -> None:
    """Put a LoRA folder's adapter beside the language model."""
    from peft import LoraConfig

    name = _one_of(repo, ("adapter_model.safetensors", "adapter_model.bin"))
    tensors = {_PREFIXES.sub("", key): tensor for key, tensor in read_file(repo.folder / name).items()}
    try:
        settings = LoraConfig.from_pretrained(str(repo.folder))
    except (ValueError, TypeError, OSError) as error:
        raise CheckpointError(f"{repo.folder}: no settings of a LoRA ({first_line(error)})") from None
    attach_adapter(model, settings, tensors, repo.folder / name)


def _copy(state: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor], where: Path) -> None:
    compare_tensors(state, given, where)
    check_finite(given, where)
    with torch.no_grad():
        for name, tensor in given.items():
            state[name].copy_(tensor)


def _layer_of(name: str) -> int:
    """The number of the layer that a tower's tensor belongs to; -1 for none."""
    match = re.search(r"\blayers?\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _one_of(repo: Repo, names: tuple[str, ...]) -> str:
    for name in names:
        if (repo.folder / name).is_file():
            return name
    raise CheckpointError(f"{repo.folder}: {' or '.join(names)} is missing")


Dtype = Literal["float32", "bfloat16", "float16"]

BY_TOKENS = ("chatml", "llama3")
"""Presets that a tokenizer's own tokens tell."""


def load_llava_repo(
    folder: Path,
    *,
    base: str | None = None,
    vision_tower: str | None = None,
    template: str | None = None,
    allow_pickle: bool = False,
    dtype: Dtype = "float32",
) -> Loaded:
    """Load a folder of the LLaVA repository."""
    import torch

    from polymodal.modeling.build import build_vision, image_token_id_for
    from polymodal.modeling.vlm import MultimodalLM

    quieten_transformers()
    repo = read_repo(folder, allow_pickle=allow_pickle)
    llm_config = _llm_config(repo, base, dtype)
    vision, image = _images(repo, vision_tower or repo.tower)
    parts = sort_state(read_state(repo))
    llm: PreTrainedModel
    if repo.kind == "whole":
        llm = build_llm(repo, parts.pop("llm", {}), getattr(torch, dtype), llm_config.attn_implementation)
        tokenizer = load_tokenizer(LLMConfig(model_name_or_path=str(folder.resolve())))
    elif base is not None and is_llava_repo(Path(base)):
        loaded = load_llava_repo(
            Path(base), vision_tower=vision_tower, template=template, allow_pickle=allow_pickle, dtype=dtype
        )
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
        template=TemplateConfig(chat_template=template or _template(repo, tokenizer), image_newline_text="\n"),
    )
    embeddings = llm.get_input_embeddings().weight
    built = build_vision(config.model_copy(update={"vision": vision}), None, embeddings.shape[1])
    assert built is not None  # there is a tower
    encoder, projector = built
    projector.to(embeddings.device, embeddings.dtype)
    head = llm.get_output_embeddings()
    model = MultimodalLM(
        llm,
        image_token_id_for(config, tokenizer, head.weight.shape[0]),
        encoder,
        projector,
        image_newline=image.mm_patch_merge_type == "spatial_unpad",
        image_mean=image.image_mean,
        image_std=image.image_std,
    )
    fill_parts(model, repo, parts)
    if repo.kind == "lora":
        attach_lora(model, repo)
    entry = {"stage": "LLaVA repository", "source": str(folder), "kind": repo.kind, "base": base, "tower": repo.tower}
    config = config.model_copy(update={"image_token_id": model.image_token_id})
    return Loaded(model.eval(), tokenizer, config, [entry])


def _llm_config(repo: Repo, base: str | None, dtype: Dtype) -> LLMConfig:
    """Where the language model is from; what lies in a LLaVA folder becomes part of our model."""
    if repo.kind == "whole":
        if base is not None:
            raise ConfigError(f"{repo.folder}: the folder holds a whole model; leave the base out")
        return LLMConfig(model_name_or_path="bundled", dtype=dtype)
    if base is None:
        named = named_base(repo.folder)
        what = "a LoRA" if repo.kind == "lora" else "only a projector"
        hint = f" (it was trained on {named!r})" if named else ""
        raise CheckpointError(
            f"{repo.folder}: holds {what}; name the language model with --base of `polymodal convert`{hint}"
        )
    inside = is_llava_repo(Path(base))
    return LLMConfig(model_name_or_path="bundled" if inside else base, dtype=dtype)


def _images(repo: Repo, tower: str) -> tuple[VisionConfig, ImageConfig]:
    """The tower and the image rules."""
    kind = _tower_settings(tower).get("model_type")
    family = next((name for name, found in FAMILIES.items() if kind in found.model_types), None)
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
    height, width = image.tile_size
    changes: dict[str, Any] = {}
    if repo.aspect_ratio == "pad":
        changes = {"image_aspect_ratio": "pad", "resize_short_side": None}
    if repo.aspect_ratio == "anyres":
        scale = (height, width) if repo.in_tiles else (1, 1)
        changes = {
            "image_aspect_ratio": "anyres",
            "resize_short_side": None,
            "image_grid_pinpoints": tuple((rows * scale[0], columns * scale[1]) for rows, columns in repo.pinpoints),
            "mm_patch_merge_type": repo.merge,
            "anyres_max": repo.anyres_max,
        }
    return vision, ImageConfig(**{**image.model_dump(), **changes})


def _template(repo: Repo, tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt, as this file's first lines say."""
    if tokenizer.chat_template:
        return "tokenizer"
    vocabulary = tokenizer.get_added_vocab()
    for name in BY_TOKENS:
        if all(token in vocabulary for token in PRESETS[name].tokens):
            return name
    return "mistral" if repo.text_settings.model_type in ("mistral", "mixtral") else "vicuna"


def _tower_settings(tower: str) -> dict[str, Any]:
    """A tower's `config.json`."""
    settings = _tower_file(tower, "config.json")
    check_settings(settings, f"vision tower {tower!r}")
    return settings


def _tower_file(tower: str, name: str) -> dict[str, Any]:
    """A JSON file of a tower, from its folder or the hub."""
    folder = Path(tower).expanduser()
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
