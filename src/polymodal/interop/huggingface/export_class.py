"""A model of ours as a stock class of transformers: which class fits, its `config.json`, its tensors by name.

The other direction of `interop.huggingface.families`: the same table of names (`hf.names.RULES`), read the other way.
What the stock class cannot compute is refused with every reason at once, since a folder that computes nearly the same
is worse than none. Two differences are folded away exactly: a fixed standardisation before the projector goes into its
first linear layer, and layers without a bias get one of zeros where the class insists. The processor and the chat
template are written by `interop.huggingface.export`, which joins this with the raw-input side.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from polymodal.config import ImageConfig, ModelConfig
from polymodal.errors import CheckpointError
from polymodal.interop.huggingface.families import CLASSES
from polymodal.interop.huggingface.weight_names import NEWLINE, Place, Style, to_stock
from polymodal.interop.huggingface.weights import weights_on_meta
from polymodal.modeling.encoders.hf_vision import HFVisionEncoder
from polymodal.modeling.projectors.mlp import Standardize

if TYPE_CHECKING:
    from polymodal.modeling.vlm import MultimodalLM


BLIP = ("blip-2", "instructblip")
_SAME_QFORMER = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "cross_attention_frequency",
)


@dataclass(frozen=True)
class Vocabulary:
    """The placeholder's place in the exported vocabulary."""

    image_token_id: int  # Its id
    rows: int  # Rows of the input embeddings and of the head
    video_token_id: int | None = None  # The id of the tokenizer's "<video>"; None where it has none


def stock_settings(
    model: MultimodalLM, config: ModelConfig, family: str, vocabulary: Vocabulary, dtype: torch.dtype
) -> Any:
    """Make the configuration of the stock class."""
    import transformers

    encoder: Any = model.vision_encoder
    vision, text = _copy(encoder.model.config, dtype), _copy(model.llm.config, dtype)
    text.vocab_size = vocabulary.rows
    common: dict[str, Any] = {"text_config": text, "image_token_index": vocabulary.image_token_id}
    if family in BLIP:
        settings = _blip_settings(model, config, family, vision, common)
    else:
        settings = _llava_settings(model, config, family, vision, common)
        if family == "llava_onevision":
            settings.video_token_index = -1 if vocabulary.video_token_id is None else vocabulary.video_token_id
        settings.tie_word_embeddings = bool(text.tie_word_embeddings)
    settings.architectures = [CLASSES[family]]
    settings.dtype = dtype
    assert isinstance(settings, transformers.PreTrainedConfig)
    return settings


def stock_tensors(
    model: MultimodalLM, config: ModelConfig, family: str, rows: int, style: Style = "hub"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the weights under their published names."""
    assert config.vision is not None
    for place, tensor in _places(model, family, rows):
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{place.component}.{place.name} holds NaN or infinity; nothing was written")
        name = to_stock(family, place, style=style, tower=config.vision.type)
        if name is not None:
            yield name, tensor


def check_against_class(model: MultimodalLM, config: ModelConfig, family: str, settings: Any, rows: int) -> None:
    """Build the stock class without memory and compare names and shapes of all weights."""
    import transformers

    assert config.vision is not None
    with weights_on_meta():
        stock = getattr(transformers, CLASSES[family])(_copy(settings, settings.dtype))
    wanted = {name: tuple(tensor.shape) for name, tensor in stock.state_dict().items()}
    found: dict[str, tuple[int, ...]] = {}
    for place, tensor in _places(model, family, rows):
        name = to_stock(family, place, style="memory", tower=config.vision.type)
        if name is not None:
            found[name] = tuple(tensor.shape)
    tied = stock.all_tied_weights_keys
    either = {*tied, *tied.values()}
    missing = sorted(name for name in wanted if name not in found and name not in either)
    extra = sorted(name for name in found if name not in wanted)
    both = sorted(found.keys() & wanted.keys())
    shapes = [f"{name} {found[name]} for {wanted[name]}" for name in both if found[name] != wanted[name]]
    faults = (("missing", missing), ("without a place", extra), ("of another shape", shapes))
    listed = [f"{len(names)} {what}, such as {names[0]}" for what, names in faults if names]
    if listed:
        raise CheckpointError(
            f"the weights do not fit {CLASSES[family]} of this version of transformers: {'; '.join(listed)}"
        )


def plain_state(llm: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The language model's own weights by their own names, an adapter that is beside them left out."""
    tied = dict(getattr(llm, "all_tied_weights_keys", None) or {})
    state: dict[str, torch.Tensor] = {}
    for name, tensor in llm.state_dict().items():
        if any(mark in name for mark in (".lora_", ".token_adapter.trainable_tokens", ".modules_to_save.")):
            continue
        plain = name.replace(".base_layer.", ".").replace(".token_adapter.", ".")
        state[plain] = tensor
    # Two that are tied by name and hold different values were stored apart, and stay so.
    doubled = [name for name, source in tied.items() if name in state and _same(state[name], state.get(source))]
    return {name: tensor for name, tensor in state.items() if name not in doubled}


def _same(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and one.data_ptr() == other.data_ptr()


def _places(model: MultimodalLM, family: str, rows: int) -> Iterator[tuple[Place, torch.Tensor]]:
    """Every weight of ours that is written, changed where it has to be."""
    encoder: Any = model.vision_encoder
    tables = _vocabulary_names(model.llm)
    for name, tensor in plain_state(model.llm).items():
        yield Place("llm", name), _grown(tensor, rows) if name in tables else tensor
    for name, tensor in encoder.model.state_dict().items():
        yield Place("vision", name), tensor
    for name, tensor in projector_state(model, family).items():
        yield Place("projector", name), tensor
    if model.image_newline is not None:
        yield Place("newline", NEWLINE), model.image_newline.data


def _vocabulary_names(llm: Any) -> set[str]:
    """Names of the weights that have a row a token: input embeddings, the head and its bias."""
    modules = [llm.get_input_embeddings(), llm.get_output_embeddings()]
    modules = [getattr(module, "base_layer", module) for module in modules if module is not None]
    found = {name for name, module in llm.named_modules() if any(module is one for one in modules)}
    found = {name.replace(".base_layer", "").replace(".token_adapter", "") for name in found}
    return {f"{name}.{leaf}" for name in found for leaf in ("weight", "bias")}


def _grown(table: torch.Tensor, rows: int) -> torch.Tensor:
    """Add rows to a table; the mean of all rows gives the mean logit, which no sampling prefers."""
    more = rows - len(table)
    if more <= 0:
        return table
    mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
    return torch.cat((table, mean.expand(more, *table.shape[1:])))


def projector_state(model: MultimodalLM, family: str) -> dict[str, torch.Tensor]:
    """The projector's weights, without a standardisation and with the biases that the class insists on."""
    projector: Any = model.projector
    state = {name: tensor for name, tensor in projector.state_dict().items() if not name.startswith("norm.")}
    if family in BLIP:
        weight = state["language_projection.weight"]
        state.setdefault("language_projection.bias", weight.new_zeros(len(weight)))
        return state
    if isinstance(projector.norm, Standardize):
        weight, norm = state["layers.0.weight"].double(), projector.norm
        scaled = weight * norm.scale.double()
        shift = scaled @ norm.mean.double()
        dtype = state["layers.0.weight"].dtype
        state["layers.0.bias"] = (state.get("layers.0.bias", torch.zeros_like(shift)).double() - shift).to(dtype)
        state["layers.0.weight"] = scaled.to(dtype)
        last = state["layers.2.weight"]
        state.setdefault("layers.2.bias", last.new_zeros(len(last)))
    return state


def _llava_settings(model: MultimodalLM, config: ModelConfig, family: str, vision: Any, common: dict[str, Any]) -> Any:
    import transformers

    projector: Any = model.projector
    select, image = config.vision, config.image
    assert select is not None and image is not None  # reasons_against looked
    layer = select.mm_vision_select_layer
    options = {
        **common,
        "vision_config": vision,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": layer if isinstance(layer, int) else list(layer),
        "vision_feature_select_strategy": select_strategy(config),
        "multimodal_projector_bias": config.projector.bias or isinstance(projector.norm, Standardize),
        "tie_word_embeddings": bool(common["text_config"].tie_word_embeddings),
    }
    pinpoints = [list(pinpoint) for pinpoint in image.image_grid_pinpoints]
    if family == "llava":
        return transformers.LlavaConfig(**options, image_seq_length=projector.output_grid.area)
    if family == "llava_next":
        return transformers.LlavaNextConfig(
            **options, image_grid_pinpoints=pinpoints, image_seq_length=projector.output_grid.area
        )
    return transformers.LlavaOnevisionConfig(
        **options, image_grid_pinpoints=pinpoints, vision_aspect_ratio=f"anyres_max_{image.anyres_max}"
    )


def _blip_settings(model: MultimodalLM, config: ModelConfig, family: str, vision: Any, common: dict[str, Any]) -> Any:
    import transformers

    assert config.projector.qformer is not None
    qformer = config.projector.qformer.model_dump()
    options = {
        **common,
        "qformer_config": {
            **{name: qformer[name] for name in _SAME_QFORMER},
            "encoder_hidden_size": vision.hidden_size,
        },
        "num_query_tokens": qformer["num_query_tokens"],
    }
    if family == "blip-2":
        return transformers.Blip2Config(vision_config=vision, **options)
    values = vision.to_dict()
    known = transformers.InstructBlipVisionConfig().to_dict().keys() - {"model_type", "transformers_version"}
    return transformers.InstructBlipConfig(
        vision_config={name: value for name, value in values.items() if name in known}, **options
    )


def select_strategy(config: ModelConfig) -> str:
    """What the LLaVA classes call our choice of positions: "default" drops the first, "full" keeps all."""
    assert config.vision is not None
    return "default" if config.vision.type == "clip" and config.vision.mm_vision_select_feature == "patch" else "full"


def _copy(settings: Any, dtype: torch.dtype) -> Any:
    """A copy of a configuration without where it came from."""
    copied = type(settings).from_dict(settings.to_dict())
    copied.dtype = dtype
    copied._name_or_path = ""
    return copied


# ---- Which stock class of transformers a model of ours fits, and every reason why it does not ----


LLAVA_TOWERS = ("clip", "siglip")
"""Towers of the LLaVA classes that both transformers and vLLM open."""

BLIP_TOWER = "eva_clip"
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def stock_family(config: ModelConfig) -> str:
    """Find the family of stock classes that is nearest to a model."""
    qformer, image = config.projector.qformer, config.image
    if qformer is not None:
        return "instructblip" if qformer.text_context else "blip-2"
    if image is None or image.image_aspect_ratio != "anyres":
        return "llava"
    return "llava_next" if image.anyres_max is None else "llava_onevision"


def reasons_against(model: MultimodalLM, config: ModelConfig, family: str) -> list[str]:
    """List everything that the stock class cannot express."""
    if config.vision is None or config.image is None:
        return ["the model has no vision encoder: export its language model with transformers' own save_pretrained"]
    found = [*_against_tower(model, config, family), *_against_image(config.image, family)]
    found += _against_projector(model, config, family)
    return found + _against_llm(model, family)


def refuse(family: str, reasons: list[str]) -> None:
    """Raise where there are reasons."""
    if reasons:
        listed = "; ".join(f"({number}) {reason}" for number, reason in enumerate(reasons, 1))
        raise CheckpointError(f"this model cannot be written as a {CLASSES[family]}: {listed}")


def _against_tower(model: MultimodalLM, config: ModelConfig, family: str) -> list[str]:
    vision, encoder = config.vision, model.vision_encoder
    assert vision is not None
    towers = (BLIP_TOWER,) if family in BLIP else LLAVA_TOWERS
    if not isinstance(encoder, HFVisionEncoder) or vision.type not in towers:
        return [f"vision.type {vision.type!r} has no place there: train with {' or '.join(map(repr, towers))}"]
    found = []
    native = encoder.model.config.image_size  # type: ignore[union-attr]
    if encoder.interpolate:
        found.append(
            f"image.tile_size {config.image.tile_size if config.image else None} is not the tower's own "
            f"{native}x{native}, and the class does not interpolate: train with the tower's size"
        )
    if vision.mm_vision_select_feature == "cls":
        found.append("mm_vision_select_feature 'cls' keeps only the class token: use 'patch' or 'cls_patch'")
    if family in BLIP:
        last = len(encoder.model.encoder.layers)  # type: ignore[union-attr,arg-type]
        if encoder.select_layers != (last,) or vision.mm_vision_select_feature != "cls_patch":
            found.append("the Q-Former there reads the last layer with the class token: select -1 and 'cls_patch'")
    return found


def _against_image(image: ImageConfig, family: str) -> list[str]:
    found = []
    how, (height, width) = image.image_aspect_ratio, image.tile_size
    if how == "slice":
        return ["image_aspect_ratio 'slice' has no place there: train with 'anyres', or with one tile"]
    if height != width:
        found.append(f"image.tile_size {height}x{width} is not square, as the class needs it")
    mean_colour = tuple(min(max(int(value * 255), 0), 255) for value in image.image_mean)
    pads = how == "pad" or (how == "anyres" and image.several_images == "pad")
    if pads and image.pad_color not in (None, mean_colour):
        found.append(f"image.pad_color {image.pad_color} cannot be said there: only the mean colour {mean_colour} can")
    if family in BLIP and how != "squash":
        found.append(f"image_aspect_ratio {how!r}: BLIP-2's processor squashes images to one tile")
    if how != "anyres":
        return found
    if image.mm_patch_merge_type != "spatial_unpad":
        found.append(f"mm_patch_merge_type {image.mm_patch_merge_type!r}: AnyRes there is always 'spatial_unpad'")
    if image.overview_aspect_ratio != "squash":
        found.append(f"overview_aspect_ratio {image.overview_aspect_ratio!r}: the overview there is squashed")
    wanted = "alike" if family == "llava_next" else "pad"
    if image.several_images != wanted:
        found.append(
            f"several_images {image.several_images!r}: LLaVA-NeXT (no anyres_max) cuts them alike, LLaVA-OneVision "
            "(anyres_max) pads them"
        )
    return found


def _against_projector(model: MultimodalLM, config: ModelConfig, family: str) -> list[str]:
    projector = config.projector
    if family in BLIP:
        assert projector.qformer is not None
        found = []
        if projector.norm != "none":
            found.append(f"projector.norm {projector.norm!r} before the Q-Former's own norm has no place there")
        eps = getattr(getattr(getattr(model.vision_encoder, "model", None), "config", None), "layer_norm_eps", None)
        if eps is not None and eps != projector.qformer.vision_norm_eps:
            found.append(f"qformer.vision_norm_eps {projector.qformer.vision_norm_eps} must be the tower's {eps} there")
        return found
    found = []
    if projector.mm_projector_type != "mlp2x_gelu":
        found.append(
            f"mm_projector_type {projector.mm_projector_type!r}: the class has two linear layers with GELU between "
            "them: train with 'mlp2x_gelu'"
        )
    if projector.norm == "layer":
        found.append("projector.norm 'layer' has no place there: train with 'none' or 'standardize'")
    width = model.llm.get_input_embeddings().weight.shape[1]
    if projector.hidden_size not in (None, width):
        found.append(
            f"projector.hidden_size {projector.hidden_size}: the class is as wide as the language model between its "
            f"layers ({width}): leave it out"
        )
    return found


def _against_llm(model: MultimodalLM, family: str) -> list[str]:
    llm: Any = model.llm
    config, found = llm.config, []
    if config.get_text_config() is not config:
        found.append(f"the language model {type(llm).__name__} is itself made of parts: use one for text alone")
    if any(not tensor.is_floating_point() for tensor in llm.parameters()):
        found.append("the language model's weights are quantised: open it without quantisation")
    if family in BLIP:
        return found
    if config.is_encoder_decoder:
        found.append("an encoder-decoder language model has no place there: only BLIP-2 takes one")
        return found
    names = plain_state(llm)
    strange = next((name for name in names if not name.startswith("model.") and name != "lm_head.weight"), None)
    if strange is not None:
        found.append(f"the language model's {strange} has no place there: only 'model.…' and 'lm_head.weight' have")
    scaled = next((name for name in _AFTER_HEAD if getattr(config, name, None) not in (None, 1, 1.0)), None)
    if scaled is not None:
        found.append(f"the language model changes its logits after the head ({scaled}), which the class leaves out")
    return found
