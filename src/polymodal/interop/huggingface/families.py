"""What the `config.json` of a published vision-language model of transformers says, in our terms: one reader a family.

    llava            LLaVA-1.5 (arXiv:2310.03744): one tile an image
    llava_next       LLaVA-1.6: AnyRes tiles, rows that end with a newline token
    llava_onevision  LLaVA-OneVision (arXiv:2408.03326): SigLIP, AnyRes with a limit. An image that is alone is cut into
                     tiles; several are padded to one tile each (`ImageConfig.several_images`). Video is not read.
    blip-2           BLIP-2 (arXiv:2301.12597): EVA-CLIP, a Q-Former, OPT or T5
    instructblip     InstructBLIP (arXiv:2305.06500): its Q-Former sees the question too, so that its queries fetch
                     what is asked for; its tokenizer lies in `qformer_tokenizer/`

A setting that our parts cannot express is refused and named, since a model that computes nearly the same is worse than
none. `weights` builds the model from the `Pieces` and fills it, `weight_names` has the one table of tensor names, and
`load` adds what the folder says about images and prompts.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from polymodal.config import ProjectorConfig, QFormerConfig, VisionConfig, parse_config
from polymodal.errors import CheckpointError, unknown_name
from polymodal.modeling.encoders.hf_vision import FAMILIES
from polymodal.modeling.pretrained import building, usable_attention
from polymodal.safety.model_folder import CLASSES, FolderReport


class NotExpressibleError(CheckpointError):
    """A whole and undamaged folder that our parts cannot compute exactly; transformers itself may open it."""


@dataclass(frozen=True)
class Pieces:
    """A published model, taken apart."""

    model_type: str  # As in its `config.json`; a key of `weight_names.RULES`
    vision: VisionConfig  # Which tower, and what of it is used; the tower itself is "bundled"
    projector: ProjectorConfig
    vision_settings: Any  # The tower's configuration, of the class in transformers that `HFVisionEncoder` wraps
    text_settings: Any  # The language model's configuration
    image_token_id: int | None  # The placeholder's id; None where the folder does not say
    newline: bool = False  # It has the learned token that ends a row of an AnyRes canvas
    pinpoints: tuple[tuple[int, int], ...] = ()  # The AnyRes canvases that the model counts with, (height, width)
    vision_aspect_ratio: str | None = None  # LLaVA-OneVision's "anyres_max_N"; None for the others
    prompt: Literal["chat", "plain"] = "chat"  # "plain" is BLIP-2's: the image, then the text as it is


def tower_family(where: str, settings: Any) -> str:
    """Find which of our vision encoders a tower is."""
    for name, family in FAMILIES.items():
        if settings.model_type in family.model_types:
            return name
    raise NotExpressibleError(
        f"{where}: vision_config.model_type {settings.model_type!r} is no tower that is known here "
        f"({', '.join(FAMILIES)})"
    )


def must_be(where: str, key: str, value: object, *allowed: object) -> None:
    """Refuse a setting that our parts cannot express."""
    if value not in allowed:
        raise NotExpressibleError(
            f"{where}: {key} is {value!r}, which cannot be expressed here; it must be "
            f"{' or '.join(repr(choice) for choice in allowed)}"
        )


def llava_pieces(settings: Any, where: str, **more: Any) -> Pieces:
    """Take a LLaVA apart: a tower, two linear layers with GELU between them, a causal language model."""
    must_be(where, "projector_hidden_act", settings.projector_hidden_act, "gelu")
    family = tower_family(where, settings.vision_config)
    layer = settings.vision_feature_layer
    # Tied or not is the whole model's to say; the part for text may disagree.
    text = deepcopy(settings.text_config)
    text.tie_word_embeddings = bool(settings.tie_word_embeddings)
    return Pieces(
        model_type=settings.model_type,
        vision=VisionConfig(
            vision_tower="bundled",
            type=family,
            mm_vision_select_layer=layer if isinstance(layer, int) else tuple(layer),
            mm_vision_select_feature=_selected(settings, family, where),
        ),
        projector=ProjectorConfig(
            mm_projector_type="mlp2x_gelu", bias=bool(getattr(settings, "multimodal_projector_bias", True))
        ),
        vision_settings=settings.vision_config,
        text_settings=text,
        image_token_id=settings.image_token_id,
        **more,
    )


def _selected(settings: Any, family: str, where: str) -> Literal["patch", "cls_patch"]:
    """What "default" (all positions but the first) and "full" (all of them) come to on a tower."""
    strategy = settings.vision_feature_select_strategy
    must_be(where, "vision_feature_select_strategy", strategy, "default", "full")
    must_be(where, "vision_config.num_register_tokens", getattr(settings.vision_config, "num_register_tokens", 0), 0)
    if not FAMILIES[family].class_token and strategy == "default":
        raise NotExpressibleError(
            f"{where}: vision_feature_select_strategy 'default' drops the first position, which is a patch and no "
            f"class token in {family}; that cannot be expressed here"
        )
    return "cls_patch" if strategy == "full" and FAMILIES[family].class_token else "patch"


def read_llava_next(settings: Any, where: str) -> Pieces:
    """Take a LLaVA-NeXT apart."""
    return llava_pieces(settings, where, newline=True, pinpoints=_pinpoints(settings))


def read_onevision(settings: Any, where: str) -> Pieces:
    """Take a LLaVA-OneVision apart."""
    ratio = settings.vision_aspect_ratio
    return llava_pieces(settings, where, newline=True, pinpoints=_pinpoints(settings), vision_aspect_ratio=ratio)


def _pinpoints(settings: Any) -> tuple[tuple[int, int], ...]:
    """The AnyRes canvases of a configuration, (height, width)."""
    return tuple((int(height), int(width)) for height, width in settings.image_grid_pinpoints)


_SAME_NAMES = """
    hidden_size num_hidden_layers num_attention_heads intermediate_size cross_attention_frequency hidden_dropout_prob
    attention_probs_dropout_prob initializer_range layer_norm_eps vocab_size max_position_embeddings pad_token_id
""".split()  # noqa: SIM905
"""Settings of a Q-Former that are called alike there and here."""


def blip_pieces(settings: Any, where: str, *, text_context: bool) -> Pieces:
    """Take a BLIP-2 or InstructBLIP apart."""
    qformer, vision = settings.qformer_config, settings.vision_config
    must_be(where, "qformer_config.hidden_act", qformer.hidden_act, "gelu")
    must_be(where, "qformer_config.use_qformer_text_input", getattr(qformer, "use_qformer_text_input", False), False)
    found = {
        **{name: getattr(qformer, name) for name in _SAME_NAMES},
        "num_query_tokens": settings.num_query_tokens,
        "vision_norm_eps": vision.layer_norm_eps,
        # transformers cuts a question only where it is asked to; no more than this has a place.
        "max_text_length": qformer.max_position_embeddings,
        "text_context": text_context,
    }
    return Pieces(
        model_type=settings.model_type,
        vision=VisionConfig(
            vision_tower="bundled",
            type=tower_family(where, vision),
            mm_vision_select_layer=-1,
            mm_vision_select_feature="cls_patch",
        ),
        projector=ProjectorConfig(
            mm_projector_type="qformer", qformer=parse_config(QFormerConfig, found, f"{where}: qformer_config")
        ),
        vision_settings=_tower_settings(vision),
        text_settings=settings.text_config,
        image_token_id=settings.image_token_id,
        prompt="plain",
    )


def _tower_settings(vision: Any) -> Any:
    """The tower's settings as BLIP-2's class takes them; InstructBLIP's tower is the same under another name."""
    from transformers import Blip2VisionConfig

    if isinstance(vision, Blip2VisionConfig):
        return vision
    values = vision.to_dict()
    shared = Blip2VisionConfig().to_dict().keys() & values.keys() - {"model_type", "transformers_version"}
    return Blip2VisionConfig(**{name: values[name] for name in shared})


READERS: dict[str, Callable[[Any, str], Pieces]] = {
    "llava": llava_pieces,
    "llava_next": read_llava_next,
    "llava_onevision": read_onevision,
    "blip-2": partial(blip_pieces, text_context=False),
    "instructblip": partial(blip_pieces, text_context=True),
}
"""`model_type` -> reader; the keys of `CLASSES`."""


def read_pieces(report: FolderReport) -> Pieces:
    """Read what a published folder's `config.json` says, with transformers' defaults for what it leaves out."""
    from transformers import CONFIG_MAPPING

    where, kind = report.folder / "config.json", str(report.model_type)
    if kind not in READERS:
        raise unknown_name("model_type", kind, READERS)
    if report.kind != "huggingface":
        named = report.config.get("architectures") or report.kind
        raise CheckpointError(f"{where}: holds {named}; {CLASSES[kind]} is needed")
    with building(where):
        settings = CONFIG_MAPPING[kind].from_dict(deepcopy(report.config))
        for part in (settings, settings.vision_config, settings.text_config):
            part._attn_implementation = usable_attention(str(part._attn_implementation or "sdpa"), str(where))
    if getattr(settings, "quantization_config", None):
        raise NotExpressibleError(
            f"{report.folder}: its weights are quantised; open the folder that they were quantised from"
        )
    with building(where):
        return READERS[kind](settings, str(where))
