"""A small OpenAI-like server in a thread, and tiny random models of several of transformers' classes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

Action = Callable[[Any], None]


class FakeServer:
    """Answers POSTs by a script, one action a request; the last one is repeated. Keeps what it was sent."""

    def __init__(self) -> None:
        self.script: list[Action] = []
        self.paths: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.gone = threading.Event()  # a client hung up in the middle of an answer
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.paths.append(self.path)
                outer.headers.append({k.lower(): v for k, v in self.headers.items()})
                outer.bodies.append(json.loads(body))
                action = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                try:
                    action(self)
                except OSError:
                    outer.gone.set()

            def log_message(self, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.root = f"http://127.0.0.1:{self.http.server_address[1]}"
        self.url = f"{self.root}/v1"

    def plays(self, *actions: Action) -> None:
        """Set the script."""
        self.script[:] = actions


@pytest.fixture
def server() -> Iterator[FakeServer]:
    """A server on a free port of this machine."""
    with running() as fake:
        yield fake


@contextmanager
def running() -> Iterator[FakeServer]:
    """A server that answers in a thread while the block lasts."""
    fake = FakeServer()
    thread = threading.Thread(target=fake.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield fake
    fake.http.shutdown()
    fake.http.server_close()
    thread.join()


CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
TILES = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]


def chatml(image: str, video: str = "", audio: str = "") -> str:
    """A template that writes parts where they are."""
    return (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{% if p['type'] == 'image' %}"
        + image
        + "{% elif p['type'] == 'video' %}"
        + video
        + "{% elif p['type'] == 'audio' %}"
        + audio
        + "{% else %}{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def make_tokenizer(tokens: list[str], template: str, names: dict[str, str] | None = None) -> Any:
    """A tokenizer of the 256 bytes and some special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in [*CONTROL, *tokens]])
    more: dict[str, Any] = {"extra_special_tokens": names} if names else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=template, **more
    )


def text_config(tokenizer: Any, **more: Any) -> dict[str, Any]:
    """A language model's configuration for a tokenizer."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return {**TEXT, **ends, "vocab_size": len(tokenizer), **more}


def llava_next(folder: Path) -> Any:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, LlavaNextProcessor
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer = make_tokenizer(["<image>"], chatml("<image>\n"))
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = LlavaNextConfig(
        text_config=text_config(tokenizer, model_type="llama"),
        vision_config={**TOWER, "model_type": "clip_vision_model"},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
    )
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    LlavaNextProcessor(
        LlavaNextImageProcessorPil(**size, image_grid_pinpoints=pinpoints), tokenizer, patch_size=7,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)  # fmt: skip
    return LlavaNextForConditionalGeneration(config)


def idefics3(folder: Path) -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = make_tokenizer(
        ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *TILES], chatml("<image>")
    )
    config = Idefics3Config(
        text_config=text_config(tokenizer, model_type="llama"),
        vision_config=TOWER,
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    images = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    Idefics3Processor(
        images, tokenizer, image_seq_len=4, chat_template=tokenizer.chat_template
    ).save_pretrained(folder)  # fmt: skip
    return Idefics3ForConditionalGeneration(config)


def smolvlm(folder: Path) -> Any:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    tokenizer = make_tokenizer(
        ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *TILES], chatml("<image>")
    )
    config = SmolVLMConfig(
        text_config=text_config(tokenizer, model_type="llama"),
        vision_config=TOWER,
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    images = SmolVLMImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    save_parts(folder, tokenizer, images, {"processor_class": "SmolVLMProcessor", "image_seq_len": 4})
    return SmolVLMForConditionalGeneration(config)


def qwen2_5_vl(folder: Path) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokens = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    template = chatml(*(f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video")))
    tokenizer = make_tokenizer(tokens, template)
    start, end, image, video = tokenizer.convert_tokens_to_ids(tokens)
    config = Qwen2_5_VLConfig(
        text_config=text_config(tokenizer, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}),
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1], "spatial_merge_size": 2,
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)
    save_parts(folder, tokenizer, images, {"processor_class": "Qwen2_5_VLProcessor"})
    return Qwen2_5_VLForConditionalGeneration(config)


def internvl(folder: Path) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    names = {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }  # fmt: skip
    tokenizer = make_tokenizer(list(names.values()), chatml("<IMG_CONTEXT>\n", "<video>\n"), names)
    config = InternVLConfig(
        text_config=text_config(tokenizer, model_type="qwen2"),
        vision_config={**TOWER, "image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True, max_patches=4)
    save_parts(folder, tokenizer, images, {"processor_class": "InternVLProcessor", "image_seq_length": 4})
    return InternVLForConditionalGeneration(config)


def gemma3(folder: Path) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3Processor
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    names = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = make_tokenizer(list(names.values()), chatml("<start_of_image>"), names)
    soft, begin, end = tokenizer.convert_tokens_to_ids(list(names.values()))
    config = Gemma3Config(
        text_config=text_config(tokenizer, head_dim=8, sliding_window=32),
        vision_config=TOWER,
        mm_tokens_per_image=4,
        image_token_id=soft,
        boi_token_index=begin,
        eoi_token_index=end,
        tie_word_embeddings=False,
    )
    Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 28, "width": 28}), tokenizer, image_seq_length=4,
        chat_template=tokenizer.chat_template,
    ).save_pretrained(folder)  # fmt: skip
    return Gemma3ForConditionalGeneration(config)


def llava_next_video(folder: Path) -> Any:
    from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tokenizer = make_tokenizer(["<image>", "<video>"], chatml("<image>\n", "<video>\n"))
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    config = LlavaNextVideoConfig(
        text_config=text_config(tokenizer, model_type="llama"),
        vision_config={**TOWER, "model_type": "clip_vision_model"},
        image_token_index=image, video_token_index=video, image_grid_pinpoints=pinpoints,
    )  # fmt: skip
    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    images = LlavaNextImageProcessorPil(**size, image_grid_pinpoints=pinpoints)
    settings = {"patch_size": 7, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    save_parts(folder, tokenizer, images, {"processor_class": "LlavaNextVideoProcessor", **settings})
    save_videos(folder, "LlavaNextVideoVideoProcessor", **size)
    return LlavaNextVideoForConditionalGeneration(config)


def llava_onevision(folder: Path) -> Any:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    tokenizer = make_tokenizer(["<image>", "<video>"], chatml("<image>\n", "<video>\n"))
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    config = LlavaOnevisionConfig(
        text_config=text_config(tokenizer, model_type="qwen2"),
        vision_config={**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=image, video_token_index=video, image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_2",
    )  # fmt: skip
    size = {"size": {"height": 28, "width": 28}}
    images = LlavaOnevisionImageProcessorPil(**size, image_grid_pinpoints=pinpoints)
    settings = {"num_image_tokens": 16, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_2"}
    save_parts(folder, tokenizer, images, {"processor_class": "LlavaOnevisionProcessor", **settings})
    save_videos(folder, "LlavaOnevisionVideoProcessor", **size)
    return LlavaOnevisionForConditionalGeneration(config)


EARS: dict[str, Any] = {
    "num_mel_bins": 16, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "d_model": 32,
}  # fmt: skip


def qwen2_audio(folder: Path) -> Any:
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        WhisperFeatureExtractor,
    )

    tokens = ["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    tokenizer = make_tokenizer(tokens, chatml("", "", "<|audio_bos|><|AUDIO|><|audio_eos|>\n"))
    config = Qwen2AudioConfig(
        text_config=text_config(tokenizer, model_type="qwen2"),
        audio_config={**EARS, "model_type": "qwen2_audio_encoder", "max_source_positions": 100},
        audio_token_index=tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
    )
    ears = WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    Qwen2AudioProcessor(ears, tokenizer, chat_template=tokenizer.chat_template).save_pretrained(folder)
    return Qwen2AudioForConditionalGeneration(config)


def qwen2_5_omni(folder: Path) -> Any:
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    names = {f"{kind}_token": f"<|{kind.upper()}|>" for kind in ("image", "video", "audio")}
    names |= {f"{kind}_{end}_token": f"<|{kind}_{end}|>" for kind in ("vision", "audio") for end in ("bos", "eos")}
    template = chatml(*(f"<|{kind}_bos|><|{media}|><|{kind}_eos|>" for kind, media in (
        ("vision", "IMAGE"), ("vision", "VIDEO"), ("audio", "AUDIO"))))  # fmt: skip
    tokenizer = make_tokenizer(list(names.values()), template, names)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    config = Qwen2_5OmniThinkerConfig(
        text_config=text_config(tokenizer, max_position_embeddings=2048, rope_parameters={
            "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}),
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32,
            "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1], "spatial_merge_size": 2,
        },
        audio_config={**EARS, "max_source_positions": 100, "n_window": 10, "output_dim": 32},
        audio_token_index=ids["audio_token"], image_token_index=ids["image_token"],
        video_token_index=ids["video_token"], vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"], audio_start_token_id=ids["audio_bos_token"],
        audio_end_token_id=ids["audio_eos_token"],
    )  # fmt: skip
    images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=112 * 112)
    save_parts(folder, tokenizer, images, {"processor_class": "Qwen2_5OmniProcessor"})
    ears = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 16, "chunk_length": 2}
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **ears}))
    return Qwen2_5OmniThinkerForConditionalGeneration(config)


def save_videos(folder: Path, kind: str, **settings: Any) -> None:
    """Write the settings of a video processor."""
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"video_processor_type": kind, **settings}))


def save_parts(folder: Path, tokenizer: Any, images: Any, settings: dict[str, Any]) -> None:
    """Write a processor whose class cannot be made here, part by part as the hub's folders have them."""
    images.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps(settings))


VLMS: dict[str, Callable[[Path], Any]] = {
    "llava_next": llava_next,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "qwen2_5_vl": qwen2_5_vl,
    "internvl": internvl,
    "gemma3": gemma3,
    "llava_next_video": llava_next_video,
    "llava_onevision": llava_onevision,
    "qwen2_audio": qwen2_audio,
    "qwen2_5_omni": qwen2_5_omni,
}


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a tiny random model of a family; do not write into it."""
    import torch

    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("vlm") / family
            folder.mkdir()
            torch.manual_seed(0)
            model = VLMS[family](folder).eval()
            model.get_output_embeddings().weight.data.mul_(30)  # sharp logits: text that no rounding can turn
            model.save_pretrained(folder)
            made[family] = folder
        return made[family]

    return folder_of
