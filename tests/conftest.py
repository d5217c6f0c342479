"""Fixtures for everybody: a byte-level tokenizer, and a whole tiny model with random weights, in memory and on disk.

The tiny model is CLIP (28 pixels, patches of 7: 16 tokens a tile) + a two-layer MLP + Llama of width 32. Its answers
are noise; what it is for is everything around them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Before any test imports a library: nothing in the tests may reach for a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from polymodal.config import ModelConfig

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the 256 bytes and three control tokens, with the ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML
    )


def write_tiny_llm(folder: Path, **changes: Any) -> None:
    """Write a random Llama with the byte-level tokenizer as a Hugging Face folder.

    Args:
        folder: Where to.
        changes: Values of `LlamaConfig` that differ from the usual ones.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_byte_tokenizer()
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**values, **changes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_tiny_t5(folder: Path, **changes: Any) -> None:
    """Write a random T5 with the byte-level tokenizer as a Hugging Face folder.

    Args:
        folder: Where to.
        changes: Values of `T5Config` that differ from the usual ones.
    """
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = make_byte_tokenizer()
    values: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    T5ForConditionalGeneration(T5Config(**{**values, **changes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_tiny_tower(folder: Path) -> None:
    """Write a random CLIP vision tower as a Hugging Face folder."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=28,
        patch_size=7,
        projection_dim=16,
    )
    CLIPVisionModel(config).save_pretrained(folder)


def tiny_config(llm: Path, tower: Path, **image: Any) -> ModelConfig:
    """The configuration of the tiny model.

    Args:
        llm: The folder of `write_tiny_llm`.
        tower: The folder of `write_tiny_tower`.
        image: Image rules that differ from padding to one tile.
    """
    from polymodal.config import ImageConfig, LLMConfig, ModelConfig, ProjectorConfig, VisionConfig

    rules: dict[str, Any] = {
        "image_aspect_ratio": "pad",
        "tile_size": (28, 28),
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
    }
    return ModelConfig(
        vision=VisionConfig(vision_tower=str(tower), type="clip"),
        image=ImageConfig(**{**rules, **image}),
        projector=ProjectorConfig(mm_projector_type="mlp2x_gelu"),
        llm=LLMConfig(model_name_or_path=str(llm)),
    )


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """See `make_byte_tokenizer`."""
    return make_byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_llm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama and its tokenizer; do not write into it."""
    folder = tmp_path_factory.mktemp("tiny") / "llm"
    write_tiny_llm(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5 and its tokenizer; do not write into it."""
    folder = tmp_path_factory.mktemp("tiny") / "t5"
    write_tiny_t5(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tower_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP vision tower; do not write into it."""
    folder = tmp_path_factory.mktemp("tiny") / "vision"
    write_tiny_tower(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_ears_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Whisper encoder with windows of a second; do not write into it."""
    import torch
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    folder = tmp_path_factory.mktemp("tiny") / "audio"
    torch.manual_seed(1)
    settings = WhisperConfig(
        d_model=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, max_source_positions=50
    )
    WhisperEncoder(settings).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_config(tiny_llm_folder: Path, tiny_tower_folder: Path) -> ModelConfig:
    """The configuration of the tiny model: one tile, padded."""
    return tiny_config(tiny_llm_folder, tiny_tower_folder)


@pytest.fixture(scope="session")
def tiny_model_folder(tiny_model_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder of ours that carries all its weights; copy it before you change it."""
    import torch

    from polymodal.checkpoints.model_folder import save_model
    from polymodal.modeling.build import build_model

    torch.manual_seed(2)
    model, tokenizer = build_model(tiny_model_config)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_model(folder, model, tiny_model_config, tokenizer, llm_trained=True, vision_trained=True)
    return folder


@pytest.fixture(scope="session")
def senses_config(tiny_model_config: ModelConfig, tiny_ears_folder: Path) -> ModelConfig:
    """The tiny model with a temporal encoder for videos of four frames, and with ears."""
    from polymodal.config import AudioConfig, ProjectorConfig, TemporalAttentionConfig, TemporalConfig, VideoConfig

    temporal = TemporalConfig(
        type="attention", attention=TemporalAttentionConfig(hidden_size=16, num_attention_heads=2)
    )
    projector = ProjectorConfig(mm_projector_type="linear")
    senses = {
        "video": VideoConfig(num_frames=4, temporal=temporal),
        "audio": AudioConfig(audio_tower=str(tiny_ears_folder), stack=2, projector=projector),
    }
    return tiny_model_config.model_copy(update=senses)


@pytest.fixture(scope="session")
def senses_folder(senses_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder of the tiny model with eyes for videos and ears; copy it before you change it."""
    import torch

    from polymodal.checkpoints.model_folder import save_model
    from polymodal.modeling.build import build_model

    torch.manual_seed(2)
    model, tokenizer = build_model(senses_config)
    folder = tmp_path_factory.mktemp("tiny") / "senses"
    trained = {"llm_trained": True, "vision_trained": True, "audio_trained": True}
    save_model(folder, model, senses_config, tokenizer, **trained)
    return folder


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a tiny pipeline of diffusers, by its kind; do not write into it."""
    pytest.importorskip("diffusers")
    from tests.modeling.renderers.pipelines import PIPELINES

    made: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("pipeline") / kind
            PIPELINES[kind](made[kind])
        return made[kind]

    return folder_of


@pytest.fixture(scope="session")
def drawer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random little language model with the image tokenizer of `tests.drawers`; copy it before you change it."""
    import torch

    from polymodal.checkpoints.model_folder import save_model
    from polymodal.config import ModelConfig
    from polymodal.modeling.build import build_model
    from tests.drawers import drawer_recipe

    folder = tmp_path_factory.mktemp("drawer")
    config = ModelConfig.model_validate(drawer_recipe(folder)["init"]["model"])
    torch.manual_seed(2)
    model, tokenizer = build_model(config)
    save_model(folder / "model", model, config, tokenizer, llm_trained=True)
    return folder / "model"


@pytest.fixture(scope="session")
def image_folder() -> Path:
    """The images that ship with the repository."""
    return Path(__file__).resolve().parent.parent / "examples" / "pictures"


@pytest.fixture
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder of this test's own, for polymodal and for the Hugging Face client."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("POLYMODAL_CACHE", str(folder))
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "hub"))
    yield folder
