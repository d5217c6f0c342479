"""Pipelines of diffusers as renderers: text to image, image to image, text to video.

A pipeline's folder is a stranger's: its `model_index.json` names modules that would be imported, and its parts may hold
pickles. So the index may name classes of diffusers and transformers alone, each part is looked over as every model
folder is, and only safetensors are read. A prompt is counted in the pipeline's own tokenizers (77 ids for CLIP): what a
text encoder has no room for is left out at a boundary, and said, where diffusers would cut in the middle of a word.
"""

from __future__ import annotations

import inspect
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from polymodal.errors import CheckpointError, ConfigError, first_line
from polymodal.modeling.language_model import quieten_transformers
from polymodal.modeling.pretrained import building, one_line
from polymodal.modeling.renderers.base import MULTIPLE, Output, Renderer, RenderRequest
from polymodal.safety.config_json import check_settings, read_json
from polymodal.safety.model_folder import check_folder
from polymodal.utils.devices import best_device, check_device
from polymodal.utils.extras import extra

INDEX = "model_index.json"
"""The file that makes a folder a pipeline."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LARGEST_IMAGE = 1024
"""Pixels of the longer side of an image that is drawn over, where no size is asked for."""
RATES = {"Wan": 16.0, "LTX": 24.0, "Hunyuan": 24.0, "CogVideoX": 8.0, "Mochi": 30.0}
"""Frames a second of families of video pipelines, by how their classes' names begin; 8 of all others (AnimateDiff)."""

_CLAUSE = re.compile(r"[,;:.!?](?=\s)|[,;:.!?]$|[，、；：。！？]|\n")
_WORD = re.compile(r"(?<=\S)(?=\s)|(?<=[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")
_UNTRAINED = re.compile(r"newly initialized|\bMISSING\b|not initialized from")


def fetch(name: str) -> Path:
    """Fetch a pipeline's folder from the hub, or find it in the hub's cache."""
    diffusers = _diffusers()
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(f"{name}: no such folder, and no hub id (owner/name)")
    from huggingface_hub import hf_hub_download

    try:
        check_index(Path(hf_hub_download(name, INDEX)))  # before more is fetched for it
        return Path(diffusers.DiffusionPipeline.download(name, use_safetensors=True, trust_remote_code=False))
    except (OSError, ValueError) as error:  # not there, no network, offline mode, no safetensors
        raise CheckpointError(
            f"{name}: no such folder here, and no pipeline to be had from the hub ({first_line(error)})"
        ) from error


def check_index(path: Path) -> dict[str, tuple[str, str]]:
    """Check a pipeline's index; gives its parts' libraries and classes."""
    # diffusers imports the module that a part names, whatever it is, and a list as `_class_name` names a script.
    diffusers = _diffusers()
    index = read_json(path)
    check_settings(index, str(path))
    name = index.get("_class_name")
    known = getattr(diffusers, name, None) if isinstance(name, str) and re.fullmatch(r"[A-Z]\w+", name) else None
    if not (inspect.isclass(known) and issubclass(known, diffusers.DiffusionPipeline)):
        raise CheckpointError(f"{path}: _class_name is {name!r:.80}, which is no pipeline of diffusers")
    parts = {}
    for part, named in index.items():
        if not isinstance(named, list) or named == [None, None] or part.startswith("_"):
            continue
        known_part = re.fullmatch(r"[a-z]\w*", part) and len(named) == 2 and all(isinstance(n, str) for n in named)
        library = named[0] if known_part else ""
        own = re.fullmatch(r"[a-z]\w*", library) and hasattr(diffusers.pipelines, library)
        if not (own or library in ("diffusers", "transformers")) or not re.fullmatch(r"[A-Z]\w+", named[1]):
            raise CheckpointError(f"{path}: {part!r:.60} is {named!r:.80}; no part of diffusers or transformers")
        parts[part] = (named[0], named[1])
    return parts


def shorten(text: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning that fits, to the end of a clause, else of a word; of one endless word, of a character."""
    if fits(text):
        return text
    ends = [sorted({m.end() for m in pattern.finditer(text)}) for pattern in (_CLAUSE, _WORD)]
    clause, word = (_last(places, text, fits) for places in ends)
    # A clause that would cost more than half of what there is room for is broken.
    best = clause if 2 * clause >= word else word
    return text[: best or _last(list(range(1, len(text))), text, fits)].rstrip(" \n,;:，、；：")


def _last(places: list[int], text: str, fits: Callable[[str], bool]) -> int:
    """The last of the places up to which a text fits; 0 where none does."""
    low, high = 0, len(places)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(text[: places[middle]]) else (low, middle)
    return places[low - 1] if low else 0


class DiffusersRenderer(Renderer):
    """A pipeline of diffusers."""

    def __init__(self, folder: Path, name: str | None = None, device: str | None = None) -> None:
        self.name = name or str(folder)
        diffusers = _diffusers()
        if not (folder / INDEX).is_file():
            raise CheckpointError(f"{folder}: no pipeline of diffusers, which has a {INDEX}; name the folder that does")
        if device is not None:
            check_device(device)
        for part in check_index(folder / INDEX):
            if (inner := folder / part).is_dir():
                check_folder(inner)
                for file in inner.glob("*_config.json"):
                    check_settings(read_json(file), str(file))
        device = device or best_device()
        diffusers.utils.logging.disable_progress_bar()
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        with building(folder), _whole(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # later releases say `dtype`
            self.pipe = diffusers.DiffusionPipeline.from_pretrained(
                str(folder), torch_dtype=dtype, use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
            self.pipe.to(device)
        self.pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
        self._takes = _parameters(self.pipe)
        if "prompt" not in self._takes:
            raise CheckpointError(f"{self.name}: a {self._kind}, which takes no prompt; name a text-to-image pipeline")
        if any(name.startswith("audio_") for name in self._takes):
            raise CheckpointError(f"{self.name}: a {self._kind} makes sound; name one that draws images or videos")
        self.output: Output = "video" if "num_frames" in self._takes else "image"
        self.rate = next((rate for begin, rate in RATES.items() if self._kind.startswith(begin)), Renderer.rate)

    @property
    def _kind(self) -> str:
        return type(self.pipe).__name__

    def render(self, request: RenderRequest, prompt_embeds: torch.Tensor | None = None) -> np.ndarray:
        """Draw; `prompt_embeds` [1, L, E] take the prompt's place, as `FeatureRelay` makes them."""
        pipe, size = self.pipe, {"width": request.width, "height": request.height}
        given: dict[str, Any] = {}
        if request.image is not None:
            pipe = pipe if "image" in self._takes else self._from_image
            image = _start(request)
            given = {"image": image, "strength": request.strength}
            size = {"width": image.width, "height": image.height}
        takes = _parameters(pipe)
        if request.image is not None and "strength" in takes and (request.steps or 50) * request.strength < 1:
            raise ConfigError(
                f"{self.name}: of {request.steps} steps, a strength of {request.strength:g} leaves none; raise either"
            )
        if request.image is None and takes.get("image", 0) is inspect.Parameter.empty:
            raise ConfigError(f"{self.name}: a {self._kind} starts from an image; give one (image)")
        asked: dict[str, Any] = {
            "num_inference_steps": request.steps,
            "guidance_scale": request.guidance,
            "num_frames": request.frames,
        }
        # Few are made for a rate; of the others it only says how fast they play.
        asked |= {name: request.fps for name in ("frame_rate", "fps") if name in takes}
        given |= {name: value for name, value in (asked | size).items() if value is not None}
        given |= self._texts("negative_prompt", request.negative_prompt, takes) if request.negative_prompt else {}
        if prompt_embeds is None:
            given |= self._texts("prompt", request.prompt, takes)
        else:
            given["prompt_embeds"] = prompt_embeds.to(pipe.device, pipe.dtype)
        if left := [name for name in given if name not in takes and name not in ("strength", *size)]:
            warnings.warn(f"{self.name}: a {type(pipe).__name__} takes no {', '.join(left)}; left out", stacklevel=2)
        given = {name: value for name, value in given.items() if name in takes}
        if "output_type" in takes:
            given["output_type"] = "np"
        made = self._run(pipe, given, request.seed)
        if request.frames and self.output == "video" and len(made) != request.frames:  # Wan takes 4n + 1
            warnings.warn(f"{self.name}: made {len(made)} frames, not {request.frames}, as its kind can", stacklevel=2)
        return made

    def _run(self, pipe: Any, given: dict[str, Any], seed: int) -> np.ndarray:
        """Run the pipeline; what it refuses is one line."""
        # A generator on the CPU gives the same numbers whatever the device is; few pipelines draw from torch's own.
        generator = torch.Generator("cpu").manual_seed(seed)
        try:
            with torch.no_grad(), torch.random.fork_rng([pipe.device] if pipe.device.type == "cuda" else []):
                torch.manual_seed(seed)
                made = pipe(**given, generator=generator)
        except torch.OutOfMemoryError:
            raise ConfigError(f"{self.name}: the GPU's memory is too small; ask for less (width, height)") from None
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            raise ConfigError(f"{self.name}: {type(pipe).__name__} cannot draw this ({one_line(error)})") from error
        if any(getattr(made, "nsfw_content_detected", None) or ()):
            warnings.warn(f"{self.name}: its safety checker painted the image black; ask for another", stacklevel=3)
        found = next((made[key] for key in ("images", "frames") if key in made), None)
        values = np.asarray(found[0] if found is not None else (), np.float32)
        if not values.size or not np.isfinite(values).all():
            raise CheckpointError(f"{self.name}: made values that are no numbers; its weights are damaged")
        return (values.clip(0, 1) * 255).round().astype(np.uint8)

    @torch.no_grad()
    def encode(self, prompt: str) -> torch.Tensor:  # [1, L, E]
        """What the pipeline's text encoder gives for a prompt: the target of a `FeatureRelay`."""
        if not hasattr(self.pipe, "encode_prompt"):
            raise ConfigError(f"{self.name}: a {self._kind} does not encode a prompt apart")
        takes = inspect.signature(self.pipe.encode_prompt).parameters
        given = self._texts("prompt", prompt, _parameters(self.pipe))
        plain = {"device": self.pipe.device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
        found = self.pipe.encode_prompt(**{name: value for name, value in (given | plain).items() if name in takes})
        return found[0] if isinstance(found, tuple) else found

    @cached_property
    def _from_image(self) -> Any:
        """The same weights as a pipeline that starts from an image."""
        try:
            made = _diffusers().AutoPipelineForImage2Image.from_pipe(self.pipe)
        except ValueError:
            raise ConfigError(f"{self.name}: a {self._kind} cannot start from an image; leave it out") from None
        made.set_progress_bar_config(disable=not sys.stderr.isatty())
        return made

    def _texts(self, name: str, text: str, takes: dict[str, Any]) -> dict[str, str]:
        """A prompt for each of the pipeline's tokenizers, each as long as its text encoder reads."""
        # Flux and Stable Diffusion 3 give a T5 the whole prompt, and CLIP the beginning.
        found = {}
        for suffix in ("", "_2", "_3"):
            tokenizer = getattr(self.pipe, f"tokenizer{suffix}", None)
            if suffix and (tokenizer is None or f"{name}{suffix}" not in takes):
                continue
            found[f"{name}{suffix}"] = self._shortened(name, text, tokenizer, takes)
        return found

    def _shortened(self, name: str, text: str, tokenizer: Any, takes: dict[str, Any]) -> str:
        limits = [getattr(tokenizer, "model_max_length", None), takes.get("max_sequence_length")]
        most = min((limit for limit in limits if isinstance(limit, int)), default=None)
        if tokenizer is None or most is None or most > 1 << 20:
            return text
        # Longer ones are cut by us, so what the tokenizer says of them is nothing to anybody.
        count = lambda part: len(tokenizer(part, truncation=False, verbose=False).input_ids)  # noqa: E731
        kept = shorten(text, lambda part: count(part) <= most)
        if kept != text:
            rest = " ".join(text[len(kept) :].lstrip(" ,;:").split())
            shown = rest if len(rest) <= 200 else f"{rest[:140]} ... {rest[-50:]}"
            warnings.warn(
                f"{self.name}: the {name.replace('_', ' ')} takes {count(text):,} tokens and its "
                f"{type(tokenizer).__name__} has room for {most}; left out: {shown!r}",
                stacklevel=4,
            )
        return kept


def _start(request: RenderRequest) -> Any:
    """The image to start from, in the size that is asked for, else in its own."""
    from PIL import Image

    assert request.image is not None
    image = Image.fromarray(request.image)
    if request.width and request.height:
        return image.resize((request.width, request.height), Image.Resampling.LANCZOS)
    scale = min(1.0, LARGEST_IMAGE / max(image.size))
    sides = [max(MULTIPLE, int(side * scale) // MULTIPLE * MULTIPLE) for side in image.size]
    return image.resize((sides[0], sides[1]), Image.Resampling.LANCZOS)


def _parameters(pipe: Any) -> dict[str, Any]:
    """What a pipeline can be given, with its defaults."""
    return {name: one.default for name, one in inspect.signature(pipe.__call__).parameters.items() if name != "self"}


def _diffusers() -> Any:
    quieten_transformers()  # before the first look at it, which says what is not installed
    return extra("diffusers", "drawing needs", "polymodal[diffusion]")


@contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """While active, weights that are missing in the files raise, where the libraries would warn and draw lots."""
    seen: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if _UNTRAINED.search(text := record.getMessage()):
                seen.append(" ".join(text.split()))

    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.level, logger.propagate = [Listener()], logging.WARNING, False
    try:
        yield
    finally:
        for logger, settings in zip(loggers, before, strict=True):
            logger.handlers, logger.level, logger.propagate = settings
    if seen:
        raise CheckpointError(f"{folder}: weights are missing in its files ({seen[0][:200]}); fetch it again")
