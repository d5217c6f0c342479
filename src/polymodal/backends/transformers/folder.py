"""Opening any vision-language model of transformers with its own processor, from a folder.

No code of the folder's is run and no pickle is read. Images are resized by Pillow, whatever else is installed, so
that the same image gives the same pixels everywhere.

Several processors (Qwen2-VL, InternVL, LLaVA-OneVision, ...) insist on a component for videos, and those need
torchvision. Images never pass through it, so where torchvision is missing a stand-in takes its place. SmolVLM's
processor also wants num2words, for its sentence about videos; Idefics3's writes the same prompt for images.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from polymodal.errors import CheckpointError, first_line
from polymodal.modeling.language_model import gpu_settings, open_tokenizer, quieten_transformers
from polymodal.modeling.pretrained import attention_of, load_checked, look_over
from polymodal.modeling.quantization import GPU_WAYS, quantize_published
from polymodal.safety.config_json import read_json
from polymodal.utils.safetensors_io import check_finite

COMPONENTS = ("image_processor", "tokenizer", "video_processor")
"""Components of a processor that are opened here; a processor with others is left to transformers."""

IMAGES_ONLY = {"SmolVLMProcessor": "Idefics3Processor"}
"""What does the same for images, where num2words is missing."""

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
        kind or transformers.AutoModelForImageTextToText,
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


def open_processor(folder: Path) -> ProcessorMixin:
    """Open the processor with a Pillow image processor."""
    try:
        kind = _processor_class(folder)
        if kind is not None and set(kind.get_attributes()) <= set(COMPONENTS):
            components = [_component(name, folder) for name in kind.get_attributes()]
            if any(isinstance(component, _NoVideos) for component in components):
                kind = _without_videos(kind)
            settings, _ = kind.get_processor_dict(str(folder))
            processor = kind.from_args_and_dict(components, settings)
        else:
            processor = transformers.AutoProcessor.from_pretrained(
                str(folder), trust_remote_code=False, local_files_only=True
            )
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: its processor cannot be opened ({reason_of(error)})") from error
    for part in ("tokenizer", "image_processor"):
        if getattr(processor, part, None) is None:
            raise CheckpointError(f"{folder}: its processor has no {part}; a model for images and text is needed")
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    if not processor.chat_template and not _puts_images(processor):
        raise CheckpointError(
            f"{folder}: there is no chat template, so how the model wants to be asked is not known; "
            "add chat_template.jinja to the folder"
        )
    return processor


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
    if find_spec("torchvision") is None:
        return _NoVideos()
    return transformers.AutoVideoProcessor.from_pretrained(str(folder), **options)


class _NoVideos(dict[str, Any]):
    """Stands where a video processor has to be and reads no videos; a dict, since processors print what they hold."""

    def __init__(self) -> None:
        super().__init__()
        self.model_input_names: list[str] = []


def _without_videos(kind: Any) -> Any:
    """A processor's class that takes the stand-in."""

    class Images(kind):  # type: ignore[misc]
        def check_argument_for_proper_class(self, name: str, argument: Any) -> Any:
            stands_in = isinstance(argument, _NoVideos)
            return _NoVideos if stands_in else super().check_argument_for_proper_class(name, argument)

    Images.__name__ = kind.__name__
    return Images


def reason_of(error: Exception) -> str:
    """One line of an error; what transformers says often begins with an empty line and runs over many."""
    text = " ".join(str(error).split())
    return text if 0 < len(text) <= 300 else first_line(error)[:300]
