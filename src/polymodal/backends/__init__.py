"""Opening a model by name, folder, hub id or endpoint, behind one chat protocol.

Nothing heavy is imported until a model is opened, so that talking to an endpoint loads no torch.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from polymodal.checkpoints.locate import ENDPOINT, find_model, folder_here
from polymodal.errors import CheckpointError, ConfigError, PolymodalError, unknown_name
from polymodal.safety.model_folder import OURS, FolderReport, Kind, check_folder, refuse_adapter
from polymodal.utils.devices import best_device, check_device

if TYPE_CHECKING:
    from polymodal.backends.base import Backend
    from polymodal.checkpoints.model_folder import Loaded
    from polymodal.interop.huggingface.load import Dtype
    from polymodal.modeling.renderers.base import Renderer
    from polymodal.processing.processor import Processor


DEFAULT_RENDERER = "drawer"
"""What draws where no renderer is named: the small model that comes with the package."""
DTYPES = ("float32", "bfloat16", "float16")
"""Types that weights can have in memory."""
NO_CHAT = {
    "whisper": "a Whisper, which writes down speech; its encoder is a part for sound",
    **dict.fromkeys(
        ("clip", "siglip", "siglip2"), "a pair of towers, which `polymodal embed` runs; its vision tower is a part"
    ),
    **dict.fromkeys(("dinov2", "dinov2_with_registers"), "a vision tower, which is a part"),
}
"""`model_type` of folders that hold no model to talk to, and what they are."""

TAKE_VIDEOS = ("llava_onevision",)
"""Of the families that are composed here, those that also take videos, which only their own class computes."""


def load(
    name: str | Path = "default",
    device: str | None = None,
    *,
    revision: str | None = None,
    dtype: Dtype | None = None,
    quantize: str | None = None,
    parts: Mapping[str, str | Path] | None = None,
    base_url: str | None = None,
    api_key: str | None = None,
    allow_http: bool = False,
) -> Backend:
    """Open a model.

    Args:
        name: "default" for the small model that comes with the package; a model folder, ours or of any model of
            transformers that takes images, videos or sounds and writes, or the hub id of one; "openai:MODEL" for one
            behind an OpenAI-compatible endpoint.
        device: Where to put it ("cpu", "cuda", "cuda:1", "mps"); None takes a GPU where there is one.
        revision: Of a hub id: a commit, tag or branch; the newest when None.
        dtype: Of the weights in memory ("float32", "bfloat16", "float16"). Where None, a folder of ours says itself;
            of a published model float32 on a CPU, and what the folder stores on a GPU.
        quantize: On a CPU "int8", "int4" or "float32" for a language model that ONNX Runtime runs (extra `fast`), with
            weights of so many bits; "int8" without the extra, too, at a third of the speed. "auto" is the first where
            it is to be had and a language model has 20 million to 2 billion weights, else None. On a GPU "nf4"
            (bitsandbytes) or "int8-gpu" (torchao). None leaves the model as it is.
        parts: Of a folder of ours that refers to parts, where they are now: "llm", "vision", "audio". What was moved
            along is found without.
        base_url: An endpoint's address; OPENAI_BASE_URL, else OpenAI's own, where None.
        api_key: An endpoint's key; OPENAI_API_KEY where None.
        allow_http: Send the key over http to a host other than this one.

    Returns:
        The model behind the chat protocol.

    Raises:
        CheckpointError: There is no such model, or its folder is damaged.
        ConfigError: An option does not go with this kind of model, or the endpoint's settings cannot be used.
    """
    if str(name).startswith(ENDPOINT):
        from polymodal.backends.openai import open_endpoint

        quantize = None if quantize == "auto" else quantize
        options = {"device": device, "revision": revision, "dtype": dtype, "quantize": quantize, "parts": parts or None}
        for option, value in options.items():
            if value is not None:
                raise ConfigError(f"{name}: an endpoint chooses its {option} itself; leave {option} out")
        model = str(name).removeprefix(ENDPOINT)
        return open_endpoint(model, base_url=base_url, api_key=api_key, allow_http=allow_http)
    if base_url is not None or api_key is not None or allow_http:
        raise ConfigError(
            f"{name}: an address and a key are for endpoints; call the model {ENDPOINT}MODEL if it is one"
        )
    if dtype not in (None, *DTYPES):
        raise unknown_name("dtype", str(dtype), DTYPES)
    if quantize is not None:
        from polymodal.modeling.quantization import AUTO, check_quantize

        device = check_quantize(quantize, device)
        if quantize == AUTO and device != "cpu":
            quantize = None
    if device is not None:
        check_device(device)
    report = check_folder(find_model(name, revision))
    if parts and report.kind != "polymodal":
        raise ConfigError(f"{name}: a published model has its parts in its folder; leave {' and '.join(parts)} out")
    return OPENERS[report.kind](report, Options(str(name), device, dtype, quantize, parts))


def load_renderer(
    name: str | Path | Renderer | None,
    device: str | None = None,
    *,
    base_url: str | None = None,
    api_key: str | None = None,
    allow_http: bool = False,
) -> Renderer:
    """Open what draws.

    Args:
        name: A folder of ours whose model makes images; the folder or hub id of a pipeline of diffusers; "openai:MODEL"
            for one behind an OpenAI-compatible images endpoint, or that endpoint's address where it has one model
            alone; or an open renderer. None for the drawer that comes with the package.
        device: Where to put a pipeline; None takes a GPU where there is one.
        base_url: The address of "openai:MODEL"; OPENAI_BASE_URL, else OpenAI's own, where None.
        api_key: An endpoint's key; OPENAI_API_KEY where None.
        allow_http: Send the key over http to a host other than this one.

    Returns:
        The renderer.

    Raises:
        CheckpointError: There is no such pipeline, or its folder is damaged or not safe to open.
        ConfigError: An option that does not go with it, a model that makes no images, or `diffusers` is not installed.
    """
    name = DEFAULT_RENDERER if name is None else name
    address = isinstance(name, str) and re.match(r"https?://", name)
    if isinstance(name, str) and (address or name.startswith(ENDPOINT)):
        from polymodal.backends.openai.images import open_images

        if device is not None:
            raise ConfigError(f"{name}: an endpoint chooses its device itself; leave device out")
        if address and base_url is not None:
            raise ConfigError(f"{name}: is an address already; leave base_url out, or name {ENDPOINT}MODEL")
        model, url = ("", name) if address else (name.removeprefix(ENDPOINT), base_url)
        return open_images(model, base_url=url, api_key=api_key, allow_http=allow_http)
    if base_url is not None or api_key is not None or allow_http:
        raise ConfigError(f"{name}: an address and a key are for endpoints; call it {ENDPOINT}MODEL if it is one")
    if isinstance(name, str | Path) and (folder_here(name) / OURS).is_file():
        from polymodal.backends.drawing import DrawingModel

        return DrawingModel(load(name, device))
    from polymodal.modeling.renderers import load_renderer as load_pipeline

    return load_pipeline(name, device)


class Options(NamedTuple):
    """How a folder is to be opened; as the arguments of `load`."""

    name: str
    device: str | None
    dtype: Dtype | None
    quantize: str | None
    parts: Mapping[str, str | Path] | None = None


def _open_ours(report: FolderReport, options: Options) -> Backend:
    """Open a model folder of ours."""
    from polymodal.checkpoints.model_folder import load_model
    from polymodal.modeling.lora import merge_adapter
    from polymodal.modeling.quantization import GPU_WAYS

    on_gpu = options.quantize if options.quantize in GPU_WAYS else None
    if (found := _known_graph(report, options)) is not None:
        return _local(load_model(report, llm=found, parts=options.parts), options)
    loaded = load_model(report, quantize=on_gpu, parts=options.parts, dtype=options.dtype)
    if loaded.config.llm.device_map is None:
        loaded.model.to(options.device or best_device())
    if on_gpu is None:  # adding an adapter to rounded weights would round it too
        merge_adapter(loaded.model)
    return _local(loaded, options, report)


def _graph_bits(options: Options) -> int | None:
    """The bits of the graph that an option asks for; None where it asks for none."""
    from polymodal.modeling.onnx_llm import BITS, available

    how = "int8" if options.quantize == "auto" else options.quantize
    return BITS[how] if how in BITS and available() else None


def _known_graph(report: FolderReport, options: Options) -> Any:
    """The graph that was made of a folder's language model before; None where it has to be made."""
    from polymodal.checkpoints.model_folder import llm_files
    from polymodal.modeling.onnx_llm import OnnxLLM, files_key, known_graph

    if (bits := _graph_bits(options)) is None or not (files := llm_files(report, options.parts)):
        return None
    graph = known_graph(files_key(files), bits)
    return None if graph is None else OnnxLLM(graph).eval()


def _open_published(report: FolderReport, options: Options) -> Backend:
    """Open a published model that is composed here, or a folder of the original LLaVA repository."""
    from polymodal.interop.open import open_published
    from polymodal.modeling.quantization import GPU_WAYS

    if options.quantize in GPU_WAYS:
        raise ConfigError(
            f"{options.name}: quantize {options.quantize!r} is not for LLaVA-repository folders; convert it first"
        )
    device = options.device or best_device()
    loaded = open_published(report, options.name, dtype=options.dtype or ("float32" if device == "cpu" else "auto"))
    loaded.model.to(device)
    return _local(loaded, options)


def _open_huggingface(report: FolderReport, options: Options) -> Backend:
    """Open a published model of a family that is composed here, where our parts compute it exactly."""
    from polymodal.interop.huggingface.families import NotExpressibleError
    from polymodal.modeling.quantization import GPU_WAYS

    if report.model_type in TAKE_VIDEOS:
        return _open_transformers(report, options)
    if options.quantize not in GPU_WAYS:  # what transformers quantises while it loads is opened through transformers
        try:
            return _open_published(report, options)
        except NotExpressibleError as error:
            warnings.warn(f"{error}; it is opened through transformers instead", stacklevel=3)
    return _open_transformers(report, options)


def _open_transformers(report: FolderReport, options: Options) -> Backend:
    """Open any other model of transformers that takes media and writes, through its own class."""
    from polymodal.backends.transformers import open_transformers
    from polymodal.backends.transformers.captioner import CAPTIONERS, open_captioner
    from polymodal.backends.transformers.folder import takes_media

    refuse_adapter(report)
    options = options._replace(quantize=None) if options.quantize == "auto" else options  # no graph is made of these
    if options.quantize in ("int4", "float32"):
        raise ConfigError(
            f"{options.name}: quantize {options.quantize!r} is for models that are composed here; use int8"
        )
    model_type = report.model_type
    if model_type is None:
        raise CheckpointError(
            f"{report.folder / 'config.json'}: model_type is missing; this is not a model folder of transformers"
        )
    if model_type in NO_CHAT:
        raise CheckpointError(
            f"{report.folder}: this is {NO_CHAT[model_type]} that a recipe can build a model from, nothing to talk to"
        )
    if model_type in CAPTIONERS:
        device = options.device or best_device()
        return open_captioner(report, device, options.name, options.dtype, options.quantize)
    if not takes_media(model_type):
        raise CheckpointError(
            f"{report.folder}: model type {model_type!r} is not one that transformers takes images and text with, or "
            "sounds; a language model or tower becomes part of a model by a recipe"
        )
    return open_transformers(report, options.device, options.name, options.dtype, options.quantize)


OPENERS: dict[Kind, Callable[[FolderReport, Options], Backend]] = {
    "polymodal": _open_ours,
    "llava": _open_published,
    "huggingface": _open_huggingface,
    "transformers": _open_transformers,
    "unknown": _open_ours,  # which says what is missing
}
"""Who opens a folder, by its kind."""


def _local(loaded: Loaded, options: Options, report: FolderReport | None = None) -> Backend:
    """Put the chat protocol over a model in memory; what its folder was looked over as lets a graph be remembered."""
    from polymodal.backends.local import LocalBackend
    from polymodal.checkpoints.model_folder import llm_files
    from polymodal.modeling.onnx_llm import OnnxLLM, files_key, remember_graph, use_graph, worth_a_graph
    from polymodal.modeling.quantization import INT8, quantize_int8

    bits, model = _graph_bits(options), loaded.model
    if options.quantize == "auto" and not isinstance(model.llm, OnnxLLM) and not worth_a_graph(model.llm):
        bits = None
    try:
        if bits is None and options.quantize == INT8:
            quantize_int8(model)
        elif bits is not None and not isinstance(model.llm, OnnxLLM):
            graph = use_graph(model, bits, loaded.tokenizer)
            if report is not None and (files := llm_files(report, options.parts)):
                remember_graph(files_key(files), graph)
    except PolymodalError as error:  # no graph can be made, or it cannot be written
        without = (INT8, "auto") if isinstance(error, CheckpointError) else ("auto",)
        if bits is None or options.quantize not in without:
            raise
        warnings.warn(f"{options.name}: {error}; it is used without", stacklevel=3)
        if options.quantize == INT8:
            quantize_int8(model)
    return LocalBackend(loaded.model, loaded.tokenizer, loaded.config, name=options.name, history=loaded.history)


def load_processor(name: str | Path = "default", parts: Mapping[str, str | Path] | None = None) -> Processor:
    """Open only a model's processor: everything up to the tensors, without the language model."""
    from polymodal.checkpoints.model_folder import read_document
    from polymodal.checkpoints.parts import require_parts
    from polymodal.interop.huggingface.load import hf_processor
    from polymodal.modeling.language_model import load_tokenizer, quieten_transformers
    from polymodal.modeling.meta_device import llm_positions, media_counts
    from polymodal.modeling.projectors.qformer_files import load_context_tokenizer
    from polymodal.modeling.vocabulary import open_image_tokenizer
    from polymodal.processing.image_codes import ImageCodes
    from polymodal.processing.processor import Processor

    report = check_folder(find_model(name), weights=False)
    if report.kind == "huggingface":
        return hf_processor(report)
    if report.kind in ("llava", "transformers"):
        raise CheckpointError(f"{report.folder}: {_foreign(report)}; `polymodal describe` says what it holds")
    folder, config = report.folder, read_document(report.folder, report.configs.get(OURS), parts).config
    require_parts(folder, config, unread=("llm",))
    quieten_transformers()
    if config.image_token_id is None:
        raise CheckpointError(f"{folder / OURS}: config.image_token_id is missing")
    tokens, window = media_counts(config, folder)
    codes = None
    if config.output is not None and config.output.vocabulary is not None:
        codes = ImageCodes(open_image_tokenizer(config, folder), config.output.vocabulary, config.output.image)
    return Processor(
        config,
        load_tokenizer(config.llm, folder),
        tokens,
        config.image_token_id,
        bool(config.llm.encoder_decoder),
        load_context_tokenizer(config.projector, folder),
        llm_positions(config.llm),
        window,
        codes,
    )


def _foreign(report: FolderReport) -> str:
    """What a folder is whose tiles and tokens are not made here, and which verb takes it."""
    from polymodal.backends.transformers.captioner import CAPTIONERS
    from polymodal.backends.transformers.folder import takes_media

    kind = str(report.model_type)
    if report.kind == "llava":
        return "a folder of the LLaVA repository; `polymodal convert` makes one of ours of it"
    if kind in NO_CHAT:
        return f"this is {NO_CHAT[kind]}; no conversation is made into tokens for it"
    what = "a captioner" if kind in CAPTIONERS else f"a model of type {kind!r}"
    how = "; `polymodal generate` asks it" if kind in CAPTIONERS or takes_media(kind) else ""
    return f"{what}, whose tiles and tokens transformers makes, and not a processor of ours{how}"
