"""A model of ours as a stock class of transformers: which one, why it may not fit, its `config.json`, its weights.

The other direction of `interop.huggingface.families`, by the same table of names (`weight_names.RULES`). What the stock
class cannot compute is refused with every reason at once, since a folder that computes nearly the same is worse than
none. Two differences are folded away exactly: a fixed standardisation before the projector goes into its first linear
layer, and layers without a bias get one of zeros where the class insists.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from polymodal.checkpoints.model_folder import Loaded
from polymodal.config import ImageConfig, ModelConfig, ProjectorConfig
from polymodal.errors import CheckpointError
from polymodal.interop.huggingface.weight_names import NEWLINE, Place, Style, to_stock
from polymodal.interop.huggingface.weights import weights_on_meta
from polymodal.modeling.encoders.hf_vision import HFVisionEncoder
from polymodal.modeling.projectors.mlp import Standardize
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.image_transform import pad_colour
from polymodal.safety.model_folder import CLASSES
from polymodal.utils.safetensors_io import compare_tensors

BLIP = ("blip-2", "instructblip")
BLIP_TOWERS = ("eva_clip",)
LLAVA_TOWERS = ("clip", "siglip")
"""Towers of the LLaVA classes that both transformers and vLLM open."""
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


def stock_family(config: ModelConfig) -> str:
    """Find the family of stock classes that is nearest to a model."""
    qformer, image = config.projector.qformer, config.image
    if qformer is not None:
        return "instructblip" if qformer.text_context else "blip-2"
    if image is None or image.image_aspect_ratio != "anyres":
        return "llava"
    return "llava_next" if image.anyres_max is None else "llava_onevision"


def stock_type(family: str, kind: str) -> Any:
    """The class of transformers for a part of a family: "ForConditionalGeneration", "Config", "VisionConfig"."""
    import transformers

    return getattr(transformers, CLASSES[family].replace("ForConditionalGeneration", kind))


def refuse(what: str, reasons: Iterable[str]) -> None:
    """Raise where there are reasons."""
    listed = "; ".join(f"({number}) {reason}" for number, reason in enumerate(reasons, 1))
    if listed:
        raise CheckpointError(f"{what}: {listed}")


def reasons_against(model: MultimodalLM, config: ModelConfig, family: str) -> Iterator[str]:
    """Everything that the stock class cannot express."""
    vision, image = config.vision, config.image
    if vision is None or image is None:
        yield "the model has no vision encoder: export its language model with transformers' own save_pretrained"
        return
    yield from against_tower(model, config, BLIP_TOWERS if family in BLIP else LLAVA_TOWERS)
    if vision.mm_vision_select_feature == "cls":
        yield "mm_vision_select_feature 'cls' keeps only the class token: use 'patch' or 'cls_patch'"
    yield from _against_image(image, family)
    if family in BLIP:
        yield from _against_qformer(model, config)
    else:
        yield from against_mlp(config.projector)
        width = model.llm.get_input_embeddings().weight.shape[1]
        if config.projector.hidden_size not in (None, width):
            yield (
                f"projector.hidden_size {config.projector.hidden_size}: the class is as wide as the language model "
                f"between its layers ({width}): leave it out"
            )
    yield from _against_llm(model.llm, family)


def against_tower(model: MultimodalLM, config: ModelConfig, towers: Sequence[str]) -> Iterator[str]:
    """What neither a stock class nor llama.cpp expresses: towers of other kinds, and tiles that are not the tower's."""
    vision, image, encoder = config.vision, config.image, model.vision_encoder
    assert vision is not None and image is not None
    height, width = image.tile_size
    if vision.fused:
        yield f"{1 + len(vision.fused)} vision towers side by side (vision.fused) have no place there: train with one"
    elif not isinstance(encoder, HFVisionEncoder) or vision.type not in towers:
        yield f"vision.type {vision.type!r} has no place there: train with {' or '.join(map(repr, towers))}"
    elif encoder.interpolate:
        tower: Any = encoder.model
        native = tower.config.image_size
        yield (
            f"image.tile_size {image.tile_size} is not the tower's own {native}x{native}, and positions are not "
            "interpolated there: train with the tower's size"
        )
    if height != width:
        yield f"image.tile_size {height}x{width} is not square, as it must be there"


def against_mlp(projector: ProjectorConfig) -> Iterator[str]:
    """What neither the LLaVA classes nor llama.cpp express of a projector."""
    if projector.mm_projector_type != "mlp2x_gelu":
        yield (
            f"mm_projector_type {projector.mm_projector_type!r}: there are two linear layers with GELU between them: "
            "train with 'mlp2x_gelu'"
        )
    if projector.norm == "layer":
        yield "projector.norm 'layer' has no place there: train with 'none' or 'standardize'"


def left_behind(config: ModelConfig) -> list[str]:
    """What neither the stock classes nor llama.cpp are given: parts and rules for videos and sounds."""
    found = []
    if (video := config.video) is not None:
        part = f"its temporal encoder ({video.temporal.type}) and " if video.temporal is not None else ""
        found.append(f"the model goes without its videos: {part}its choice of frames are left out")
    if (audio := config.audio) is not None:
        found.append(f"the model goes without its ears: its audio encoder ({audio.type}) and projector are left out")
    return found


def _against_image(image: ImageConfig, family: str) -> Iterator[str]:
    how = image.image_aspect_ratio
    if how in ("slice", "native"):
        yield f"image_aspect_ratio {how!r} has no place there: train with 'anyres', or with one tile"
        return
    mean_colour = pad_colour(image.model_copy(update={"pad_color": None}))
    pads = how == "pad" or (how == "anyres" and image.several_images == "pad")
    if pads and pad_colour(image) != mean_colour:
        yield f"image.pad_color {image.pad_color} cannot be said there: only the mean colour {mean_colour} can"
    if family in BLIP and how != "squash":
        yield f"image_aspect_ratio {how!r}: BLIP-2's processor squashes images to one tile"
    if how != "anyres":
        return
    if image.mm_patch_merge_type != "spatial_unpad":
        yield f"mm_patch_merge_type {image.mm_patch_merge_type!r}: AnyRes there is always 'spatial_unpad'"
    if image.overview_aspect_ratio != "squash":
        yield f"overview_aspect_ratio {image.overview_aspect_ratio!r}: the overview there is squashed"
    if image.several_images != ("alike" if family == "llava_next" else "pad"):
        yield (
            f"several_images {image.several_images!r}: LLaVA-NeXT (no anyres_max) cuts them alike, LLaVA-OneVision "
            "(anyres_max) pads them"
        )


def _against_qformer(model: MultimodalLM, config: ModelConfig) -> Iterator[str]:
    vision, projector, encoder = config.vision, config.projector, model.vision_encoder
    assert vision is not None and projector.qformer is not None
    if projector.norm != "none":
        yield f"projector.norm {projector.norm!r} before the Q-Former's own norm has no place there"
    if not isinstance(encoder, HFVisionEncoder) or vision.type not in BLIP_TOWERS:
        return
    tower: Any = encoder.model
    if encoder.select_layers != (len(tower.encoder.layers),) or vision.mm_vision_select_feature != "cls_patch":
        yield "the Q-Former there reads the last layer with the class token: select -1 and 'cls_patch'"
    eps = tower.config.layer_norm_eps
    if eps != projector.qformer.vision_norm_eps:
        yield f"qformer.vision_norm_eps {projector.qformer.vision_norm_eps} must be the tower's {eps} there"


def _against_llm(llm: Any, family: str) -> Iterator[str]:
    config = llm.config
    if config.get_text_config() is not config:
        yield f"the language model {type(llm).__name__} is itself made of parts: use one for text alone"
    if any(not tensor.is_floating_point() for tensor in llm.parameters()):
        yield "the language model's weights are quantised: open it without quantisation"
    if family in BLIP:
        return
    if config.is_encoder_decoder:
        yield "an encoder-decoder language model has no place there: only BLIP-2 takes one"
        return
    strange = (name for name in plain_state(llm) if not name.startswith("model.") and name != "lm_head.weight")
    if (name := next(strange, None)) is not None:
        yield f"the language model's {name} has no place there: only 'model.…' and 'lm_head.weight' have"
    scaled = (name for name in _AFTER_HEAD if getattr(config, name, None) not in (None, 1, 1.0))
    if (name := next(scaled, None)) is not None:
        yield f"the language model changes its logits after the head ({name}), which the class leaves out"


def stock_model(
    loaded: Loaded, family: str, tokenizer: Any, image_token_id: int, rows: int, dtype: torch.dtype, style: Style
) -> tuple[Any, list[tuple[str, torch.Tensor]]]:
    """Configuration and weights of the stock class, whose vocabulary has so many rows; they fit the class itself."""
    model, config = loaded.model, loaded.config
    assert config.vision is not None  # reasons_against looked
    settings = _settings(model, config, family, image_token_id, rows, dtype)
    if family == "llava_onevision":
        settings.video_token_index = tokenizer.get_added_vocab().get("<video>", -1)
    weights, tower = _weights(model, family, rows), config.vision.type

    def named(style: Style) -> list[tuple[str, torch.Tensor]]:
        names = [to_stock(family, place, style=style, tower=tower) for place in weights]
        return [(name, tensor) for name, tensor in zip(names, weights.values(), strict=True) if name is not None]

    with weights_on_meta():
        stock = stock_type(family, "ForConditionalGeneration")(_copy(settings, dtype))
    found, tied = dict(named("memory")), stock.all_tied_weights_keys
    one_is_enough = {*tied, *tied.values()} - found.keys()
    wanted = {name: tensor for name, tensor in stock.state_dict().items() if name not in one_is_enough}
    compare_tensors(wanted, found, f"{CLASSES[family]} of this version of transformers")
    return settings, named(style)


def _settings(
    model: MultimodalLM, config: ModelConfig, family: str, image_token_id: int, rows: int, dtype: torch.dtype
) -> Any:
    """The configuration of the stock class."""
    encoder: Any = model.vision_encoder
    projector: Any = model.projector
    vision, image, qformer = config.vision, config.image, config.projector.qformer
    assert vision is not None and image is not None  # reasons_against looked
    tower, text = _copy(encoder.model.config, dtype), _copy(model.llm.config, dtype)
    text.vocab_size = rows
    options: dict[str, Any] = {"text_config": text, "image_token_index": image_token_id}
    if qformer is not None:
        same = stock_type(family, "QFormerConfig")().to_dict()
        given = {name: value for name, value in qformer.model_dump().items() if name in same}
        options["qformer_config"] = {**given, "encoder_hidden_size": tower.hidden_size}
        options["num_query_tokens"] = qformer.num_query_tokens
    else:
        layer = vision.mm_vision_select_layer
        drops_first = vision.type == "clip" and vision.mm_vision_select_feature == "patch"  # its class token
        options |= {
            "projector_hidden_act": "gelu",
            "vision_feature_layer": layer if isinstance(layer, int) else list(layer),
            "vision_feature_select_strategy": "default" if drops_first else "full",
            "multimodal_projector_bias": config.projector.bias or isinstance(projector.norm, Standardize),
            "tie_word_embeddings": bool(text.tie_word_embeddings),
        }
    if family == "instructblip":  # its towers have a class of their own, with fewer settings than BLIP-2's
        same = stock_type(family, "VisionConfig")().to_dict().keys() - {"model_type", "transformers_version"}
        tower = {name: value for name, value in tower.to_dict().items() if name in same}
    if family in ("llava", "llava_next"):
        options["image_seq_length"] = projector.output_grid.area
    if family in ("llava_next", "llava_onevision"):
        options["image_grid_pinpoints"] = [list(pinpoint) for pinpoint in image.image_grid_pinpoints]
    if family == "llava_onevision":
        options["vision_aspect_ratio"] = f"anyres_max_{image.anyres_max}"
    settings = stock_type(family, "Config")(vision_config=tower, **options)
    settings.architectures = [CLASSES[family]]
    settings.dtype = dtype
    return settings


def _weights(model: MultimodalLM, family: str, rows: int) -> dict[Place, torch.Tensor]:
    """Every weight that is written, changed where it has to be."""
    encoder: Any = model.vision_encoder
    by_token = {parameter.data_ptr() for table in token_tables(model.llm) for parameter in table.parameters()}
    states: dict[Any, Mapping[str, torch.Tensor]] = {
        "llm": {
            name: grown(tensor, rows) if tensor.data_ptr() in by_token else tensor
            for name, tensor in plain_state(model.llm).items()
        },
        "vision": encoder.model.state_dict(),
        "projector": projector_state(model, family),
        "newline": {} if model.image_newline is None else {NEWLINE: model.image_newline.data},
    }
    weights = {Place(part, name): tensor for part, state in states.items() for name, tensor in state.items()}
    for place, tensor in weights.items():
        refuse_nan(f"{place.component}.{place.name}", tensor)
    return weights


def token_tables(llm: Any) -> list[Any]:
    """The modules with a row a token: input embeddings, and the head where there is one."""
    return [table for table in (llm.get_input_embeddings(), llm.get_output_embeddings()) if table is not None]


def plain_state(llm: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The language model's own weights by their own names, an adapter that is beside them left out."""
    state = {
        name.replace(".base_layer.", ".").replace(".token_adapter.", "."): tensor
        for name, tensor in llm.state_dict().items()
        if not any(mark in name for mark in (".lora_", ".token_adapter.trainable_tokens", ".modules_to_save."))
    }
    # Two that are tied by name and hold different values were stored apart, and stay so.
    tied = dict(getattr(llm, "all_tied_weights_keys", None) or {})
    pairs = [(name, source) for name, source in tied.items() if name in state and source in state]
    doubled = [name for name, source in pairs if state[name].data_ptr() == state[source].data_ptr()]
    return {name: tensor for name, tensor in state.items() if name not in doubled}


def grown(table: torch.Tensor, rows: int) -> torch.Tensor:
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
    elif isinstance(projector.norm, Standardize):
        first, last, norm = state["layers.0.weight"], state["layers.2.weight"], projector.norm
        scaled = first.double() * norm.scale.double()
        shift = scaled @ norm.mean.double()
        state["layers.0.bias"] = (state.get("layers.0.bias", torch.zeros_like(shift)).double() - shift).to(first.dtype)
        state["layers.0.weight"] = scaled.to(first.dtype)
        state.setdefault("layers.2.bias", last.new_zeros(len(last)))
    return state


def refuse_nan(name: str, tensor: torch.Tensor) -> None:
    """Make sure that a weight is finite."""
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{name} holds NaN or infinity; nothing was written")


def _copy(settings: Any, dtype: torch.dtype) -> Any:
    """A copy of a configuration without where it came from."""
    copied = type(settings).from_dict(settings.to_dict())
    copied.dtype = dtype
    copied._name_or_path = ""
    return copied
