"""Building `MultimodalLM` from a published folder: modules without memory, then the tensors, each exactly once.

The modules are made on torch's meta device and take the tensors of the files as they are, so a model is never in
memory twice. Every tensor is accounted for: what is missing, not expected or of another shape is listed in one error
before a weight is read. Parts of a tower that nothing of ours reads (its pooling head, its last norm) may be missing.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import nn

from polymodal.config import ModelConfig
from polymodal.errors import CheckpointError, ConfigError, first_line
from polymodal.interop.huggingface.families import Pieces
from polymodal.interop.huggingface.weight_names import NEWLINE, Component, Place, to_ours, to_stock
from polymodal.media_plan import Size
from polymodal.modeling.build import check_merge
from polymodal.modeling.encoders.hf_vision import FAMILIES, HFVisionEncoder
from polymodal.modeling.encoders.vision import UNUSED_PARTS, VisionEncoder
from polymodal.modeling.language_model import model_class
from polymodal.modeling.pretrained import MOST_PARTS, building, probe
from polymodal.modeling.projectors import Projector, build_projector
from polymodal.modeling.vlm import MultimodalLM
from polymodal.safety.model_folder import WEIGHTS, FolderReport, refuse_adapter
from polymodal.utils.safetensors_io import DERIVED, SHOWN, check_finite, compare_tensors

INDEX_NAME = f"{WEIGHTS}.index.json"


def compose_vision(
    pieces: Pieces, config: ModelConfig, llm_dim: int, most: int = MOST_PARTS
) -> tuple[VisionEncoder, Projector]:
    """Make encoder and projector without memory for their weights."""
    assert config.vision is not None and config.image is not None  # every family has both
    tile = Size(*config.image.tile_size)
    with building("config.json, vision tower", most), weights_on_meta():
        tower = getattr(transformers, FAMILIES[config.vision.type].model_class)(pieces.vision_settings)
        encoder = HFVisionEncoder(
            tower.eval(), config.vision.mm_vision_select_layer, config.vision.mm_vision_select_feature, tile
        )
        if encoder.interpolate:
            raise ConfigError(
                f"the preprocessor makes tiles of {tile.height}x{tile.width} pixels, the tower takes "
                f"{pieces.vision_settings.image_size} (height x width)"
            )
        projector = build_projector(config.projector, encoder.embed_dim, encoder.grid, llm_dim)
    check_merge(config, projector.output_grid)
    return encoder, projector


def compose(pieces: Pieces, config: ModelConfig, image_token_id: int, most: int = MOST_PARTS) -> MultimodalLM:
    """Make the whole model without memory for its weights."""
    kind = model_class(bool(pieces.text_settings.is_encoder_decoder))
    with building("config.json, language model", most), weights_on_meta():
        llm: transformers.PreTrainedModel = kind.from_config(
            pieces.text_settings, attn_implementation=config.llm.attn_implementation
        )
    encoder, projector = compose_vision(pieces, config, llm.get_input_embeddings().weight.shape[1], most)
    with weights_on_meta():
        return MultimodalLM(
            encoder,
            projector,
            llm,
            image_token_id,
            image_newline=pieces.newline,
            image_mean=config.image.image_mean if config.image is not None else None,
            image_std=config.image.image_std if config.image is not None else None,
        )


def fill(model: MultimodalLM, pieces: Pieces, report: FolderReport, dtype: torch.dtype) -> None:
    """Give a model the weights of a published folder."""
    modules, files = _modules(model), weight_files(report)
    places, absent = compare(model, pieces, report)
    for name in files:
        here = {key: place for key in report.headers[name] if (place := places.get(key)) is not None}
        _read_file(report.folder / name, here, modules, dtype)
    if model.image_newline is not None:
        model.register_parameter(NEWLINE, modules["newline"].get_parameter(NEWLINE))
    _fill_absent(modules, absent, dtype)
    # As transformers ties them: where only one of two is in the files it gives both; two that differ stay apart.
    model.llm.tie_weights(
        missing_keys={place.name for place in absent if place.component == "llm"}, recompute_mapping=False
    )
    model.llm.config.dtype = dtype
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise CheckpointError(f"{report.folder}: no values for {', '.join(left[:SHOWN])}")
    probe(model.eval().llm, report.folder)


def compare(model: MultimodalLM, pieces: Pieces, report: FolderReport) -> tuple[dict[str, Place | None], list[Place]]:
    """Make sure that the files hold this model; gives where each tensor goes, and what they leave out and may."""
    files = weight_files(report)
    places = _places(pieces, report, files)
    return places, _compare(pieces, report, _modules(model), places, files)


def weight_files(report: FolderReport) -> list[str]:
    """Find which files hold a folder's weights."""
    refuse_adapter(report)
    if not (files := report.weight_files()):
        raise CheckpointError(f"{report.folder}: {WEIGHTS} is missing (only safetensors are read)")
    return files


@contextmanager
def weights_on_meta() -> Iterator[None]:
    """While active, modules made by this thread have weights without memory; buffers are made as ever."""
    register, thread = nn.Module.register_parameter, threading.get_ident()

    def on_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and threading.get_ident() == thread and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _modules(model: MultimodalLM) -> dict[str, nn.Module]:
    """The components as `Place` calls them; the newline is put into a module of its own."""
    encoder: Any = model.vision_encoder
    projector: Any = model.projector
    modules: dict[str, nn.Module] = {"llm": model.llm, "vision": encoder.model, "projector": projector}
    if model.image_newline is not None:
        modules["newline"] = nn.Module()
        modules["newline"].register_parameter(NEWLINE, model.image_newline)
    return modules


def _places(pieces: Pieces, report: FolderReport, files: list[str]) -> dict[str, Place | None]:
    """Where each tensor of the files goes; None for one that has no place, or whose place another one has taken."""
    found: dict[str, Place | None] = {}
    for name in (name for file in files for name in report.headers[file] if not DERIVED.search(name)):
        place = to_ours(pieces.model_type, name)
        found[name] = None if place in found.values() else place
    return found


def _compare(
    pieces: Pieces,
    report: FolderReport,
    modules: Mapping[str, nn.Module],
    places: dict[str, Place | None],
    files: list[str],
) -> list[Place]:
    """List what does not fit in one error; give back what the files leave out and may."""
    # Tensors that no part of ours has and that nothing would read are struck off `places`.
    given = {name: info for file in files for name, info in report.headers[file].items() if name in places}
    name_of = {place: name for name, place in places.items()}
    wanted: dict[str, Any] = {}
    absent: list[Place] = []
    components: tuple[Component, ...] = ("llm", "vision", "projector", "newline")
    in_llm = {place.name for place in name_of if place is not None and place.component == "llm"}
    llm: Any = modules["llm"]
    for component in (component for component in components if component in modules):
        for leaf, tensor in modules[component].state_dict().items():
            place = Place(component, leaf)
            if place in name_of:
                wanted[name_of.pop(place)] = tensor
            elif _optional(place, llm, in_llm):
                absent.append(place)
            else:
                stock = to_stock(pieces.model_type, place, tower=pieces.vision.type)
                wanted[stock or f"{component} {leaf}"] = tensor
    for left, name in name_of.items():
        if left is not None and _unused(left):
            del given[name], places[name]
    compare_tensors(wanted, given, report.folder)
    return absent


def _optional(place: Place, llm: Any, given: set[str]) -> bool:
    """Whether a tensor need not be in the files: nothing reads it, or another one that is there stands for it."""
    if place.component != "llm":
        return _unused(place)
    tied = llm.all_tied_weights_keys
    source = tied.get(place.name, place.name)
    return any(name in given for name in (source, *(target for target, of in tied.items() if of == source)))


def _unused(place: Place) -> bool:
    return place.component == "vision" and place.name.startswith(UNUSED_PARTS)


def _read_file(path: Path, places: Mapping[str, Place], modules: Mapping[str, nn.Module], dtype: torch.dtype) -> None:
    """Hand one file's tensors to the modules."""
    states: dict[str, dict[str, torch.Tensor]] = {}
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            for name, place in places.items():
                tensor = file.get_tensor(name)
                check_finite({name: tensor}, path)
                kind = _dtype_of(place, tensor, modules["llm"], dtype)
                # A copy of our own: what lies in a file that somebody writes anew must not change under the model.
                states.setdefault(place.component, {})[place.name] = tensor.to(kind, copy=True)
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({first_line(error)})") from None
    for component, state in states.items():
        modules[component].load_state_dict(state, strict=False, assign=True)


def _dtype_of(place: Place, tensor: torch.Tensor, llm: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The type to keep a tensor in; some layers of T5 overflow in float16, and transformers keeps them apart too."""
    if not tensor.is_floating_point():
        return tensor.dtype
    apart = getattr(llm, "_keep_in_fp32_modules", None) or ()
    if dtype is torch.float16 and place.component == "llm" and set(place.name.split(".")) & set(apart):
        return torch.float32
    return dtype


def _fill_absent(modules: Mapping[str, nn.Module], absent: list[Place], dtype: torch.dtype) -> None:
    """Give values to what no file holds and nothing reads, so that the tower can be saved and moved."""
    norm = modules["projector"].state_dict()
    state: dict[str, torch.Tensor] = {}
    for place in absent:
        if place.component != "vision":
            continue
        shape = modules["vision"].state_dict()[place.name].shape
        leaf = place.name.removeprefix("post_layernorm.")
        ours = norm.get(f"qformer.ln_vision.{leaf}")
        if leaf != place.name and ours is not None:
            state[place.name] = ours.detach().clone()  # BLIP-2's norm is the Q-Former's here
        else:
            ones = place.name.endswith("norm.weight")
            state[place.name] = torch.ones(shape, dtype=dtype) if ones else torch.zeros(shape, dtype=dtype)
    if state:
        modules["vision"].load_state_dict(state, strict=False, assign=True)
