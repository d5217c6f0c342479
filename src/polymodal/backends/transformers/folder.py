"""Opening any model of transformers that takes images, videos or sounds, with its own processor, from a folder.

No code of the folder's is run and no pickle is read. Images are resized by Pillow, whatever else is installed, so
that the same image gives the same pixels everywhere.

Several processors (Qwen2-VL, InternVL, LLaVA-OneVision, ...) insist on a component for videos. Where transformers has
none that works here (`video_processor`), a stand-in takes its place, and the model takes no videos. So does SmolVLM
where num2words is missing, for its processor's sentence about videos: Idefics3's writes the same prompt for images.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.models.auto import modeling_auto as auto
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.video_processing_utils import VideoProcessorMixin

from polymodal.backends.transformers.video_processor import open_video_processor
from polymodal.errors import CheckpointError, first_line
from polymodal.modeling.language_model import gpu_settings, open_tokenizer, quieten_transformers
from polymodal.modeling.pretrained import attention_of, load_checked, look_over
from polymodal.modeling.quantization import GPU_WAYS, quantize_published
from polymodal.safety.config_json import read_json
from polymodal.utils.safetensors_io import check_finite

MEDIA = ("image_processor", "video_processor", "feature_extractor", "audio_processor")
COMPONENTS = ("tokenizer", *MEDIA)
"""Components of a processor that are opened here; a processor with others is left to transformers."""

IMAGES_ONLY = {"SmolVLMProcessor": "Idefics3Processor"}
"""What does the same for images, where num2words is missing."""

WRITES = {
    "qwen2_5_omni": "Qwen2_5OmniThinkerForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration",
}
"""Of models that also speak, the class of the part that writes."""

NUMBERED = r"\.\d+\."
"""Names of tensors in one of several layers; where the class has no place for it, it is of another model."""

_NAMED_IN = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def open_model(
    folder: Path, device: str, dtype: str | None = None, quantize: str | None = None, kind: Any = None
) -> PreTrainedModel:
    """Load the weights, into the usual class of their model type unless another is given."""
    quieten_transformers()
    on_gpu = quantize in GPU_WAYS
    model: PreTrainedModel = load_checked(
        kind or _model_class(read_json(folder / "config.json")),
        str(folder),
        str(folder),
        look_over(str(folder), str(folder)),
        no_more=NUMBERED,
        dtype=dtype or ("float32" if device == "cpu" else "auto"),
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        generation_config=GenerationConfig(),  # the folder's own may not even open the model
        **attention_of(read_json(folder / "config.json"), str(folder)),
        **({"quantization_config": gpu_settings(str(quantize)), "device_map": {"": device}} if on_gpu else {}),
    )
    if on_gpu:  # it is where it belongs, and its weights are no plain numbers any more
        return model.eval()
    check_finite(model.state_dict(), folder)
    model.to(device).eval()
    if quantize is not None:
        quantize_published(model)
    return model


def _model_class(settings: dict[str, Any]) -> Any:
    """The class to load into; of a model that also speaks, the part that writes."""
    model_type = settings.get("model_type")
    if model_type in WRITES:
        return getattr(transformers, WRITES[model_type])
    if model_type in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return transformers.AutoModelForImageTextToText
    if model_type in auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        return transformers.AutoModelForMultimodalLM
    return transformers.AutoModelForSeq2SeqLM


def takes_media(model_type: str) -> bool:
    """Whether transformers has a class of a type that takes text and images, videos or sounds, and writes text."""
    return (
        model_type in auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        or model_type in WRITES
        or (
            model_type in PROCESSOR_MAPPING_NAMES
            and (
                model_type in auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
                or model_type in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
            )
        )
    )


def open_processor(folder: Path) -> ProcessorMixin:
    """Open the processor with a Pillow image processor."""
    try:
        kind = _processor_class(folder)
        if kind is not None and set(kind.get_attributes()) <= set(COMPONENTS):
            components = [_component(name, folder) for name in kind.get_attributes()]
            if "video_processor" in kind.get_attributes():
                kind = _with_ours(kind)
            settings, _ = kind.get_processor_dict(str(folder))
            processor = kind.from_args_and_dict(components, settings)
        else:
            processor = transformers.AutoProcessor.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: its processor cannot be opened ({reason_of(error)})") from error
    if getattr(processor, "tokenizer", None) is None or not media_of(processor):
        raise CheckpointError(
            f"{folder}: its processor has no tokenizer, or nothing for media; a model for text and images, videos or "
            "sounds is needed"
        )
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    if not processor.chat_template and not _puts_images(processor):
        raise CheckpointError(
            f"{folder}: there is no chat template, so how the model wants to be asked is not known; "
            "add chat_template.jinja to the folder"
        )
    return processor


def media_of(processor: ProcessorMixin) -> tuple[str, ...]:
    """What a processor takes beside text."""
    found = {name: getattr(processor, name, None) for name in MEDIA}
    heard = found["feature_extractor"] is not None or found["audio_processor"] is not None
    seen = found["video_processor"] is not None and not isinstance(found["video_processor"], _NoVideos)
    takes = {"image": found["image_processor"] is not None, "video": seen, "audio": heard}
    return tuple(kind for kind, taken in takes.items() if taken)


def _puts_images(processor: ProcessorMixin) -> bool:
    """Whether a processor puts an image before a text by itself, as PaliGemma's and Kosmos-2's do."""
    try:
        made = processor(images=np.zeros((64, 64, 3), dtype=np.uint8), text="", return_tensors="pt")
        tokens = made["input_ids"] == getattr(processor, "image_token_id", -1)
    except Exception:  # a processor may raise anything at all
        return False
    return bool(tokens.any()) or "image_embeds_position_mask" in made


def open_parts(folder: Path) -> tuple[Any, Any]:
    """Open image processor and tokenizer, where no processor is needed to put the two together."""
    try:
        return _component("image_processor", folder), _component("tokenizer", folder)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: its image processor or tokenizer cannot be opened ({reason_of(error)})"
        ) from error


def _processor_class(folder: Path) -> Any:
    """The class that the folder names, else the usual one of its model type; None where neither says."""
    named = [read_json(folder / file).get("processor_class") for file in _NAMED_IN if (folder / file).is_file()]
    name = next((name for name in named if name is not None), None)
    if name is None:
        name = PROCESSOR_MAPPING_NAMES.get(read_json(folder / "config.json").get("model_type"))
    if name in IMAGES_ONLY and find_spec("num2words") is None:
        name = IMAGES_ONLY[name]
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return found if hasattr(found, "get_attributes") else None


def _component(name: str, folder: Path) -> Any:
    """Open one component of a processor."""
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    if name == "tokenizer":
        return open_tokenizer(str(folder), "its tokenizer", local_files_only=True)
    if name == "image_processor":
        return transformers.AutoImageProcessor.from_pretrained(str(folder), backend="pil", **options)
    if name == "video_processor":
        return open_video_processor(folder) or _NoVideos()
    return transformers.AutoFeatureExtractor.from_pretrained(str(folder), **options)


class _NoVideos(dict[str, Any]):
    """Stands where a video processor has to be and reads no videos; a dict, since processors print what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.model_input_names: list[str] = []


def _with_ours(kind: Any) -> Any:
    """A processor's class that takes the video processors opened here; transformers' own check needs torchvision."""

    class Ours(kind):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            ours = isinstance(argument, _NoVideos | VideoProcessorMixin)
            return type(argument) if ours else super().check_argument_for_proper_class(name, argument)

    Ours.__name__ = kind.__name__
    return Ours


def reason_of(error: Exception) -> str:
    """One line of an error; what transformers says often begins with an empty line and runs over many."""
    text = " ".join(str(error).split())
    return text if 0 < len(text) <= 300 else first_line(error)[:300]
