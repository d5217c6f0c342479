"""One vocabulary: room for codes and specials behind a language model's words.

The table is enlarged once, to a multiple of 64 rows. Codes have no name in the tokenizer; the specials have, and are
read from no text that anybody typed. New rows are drawn with the mean and deviation of the others, from a fixed seed,
so that a folder which keeps only an adapter builds the same table again.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from polymodal.config import ModelConfig, VocabularyLayout
from polymodal.config.output import SPECIALS, new_layout
from polymodal.errors import CheckpointError, ConfigError
from polymodal.modeling.tokenizers import ImageTokenizer, load_image_tokenizer
from polymodal.modeling.vlm import MultimodalLM

if TYPE_CHECKING:  # whose module takes a second to load
    from transformers import PreTrainedModel

IMAGE_TOKENIZER = "image_tokenizer"
"""The folder inside a model's own that holds its image tokenizer."""
MULTIPLE = 64


def add_output(
    model: MultimodalLM, tokenizer: PreTrainedTokenizerBase, config: ModelConfig, folder: Path | None = None
) -> None:
    """Give a model an image tokenizer and rows for its codes, where its configuration has them and it has not yet."""
    if config.output is None or model.image_tokenizer is not None:
        return
    if model.encoder_decoder:
        raise ConfigError("output: images are made by a causal language model, and this one is an encoder-decoder")
    images = open_image_tokenizer(config, folder)
    vocabulary = config.output.vocabulary
    if vocabulary is None:
        vocabulary = _new_vocabulary(tokenizer, images.codebook_size)
    rows = _make_room(model.llm, vocabulary.size)
    if vocabulary.text <= model.image_token_id < rows:  # the placeholder stays behind what the head can produce
        model.image_token_id = rows
    model.image_tokenizer, model.vocabulary = images.to(model.device), vocabulary


def open_image_tokenizer(config: ModelConfig, folder: Path | None) -> ImageTokenizer:
    """Load the image tokenizer that a configuration names; it must have as many codes as the model was made for."""
    assert config.output is not None
    name = config.output.image.image_tokenizer
    if name == "bundled" and folder is None:
        raise ConfigError("output.image.image_tokenizer: 'bundled' needs the model's folder; name the tokenizer's own")
    where = Path(name).expanduser() if name != "bundled" or folder is None else folder / IMAGE_TOKENIZER
    if not where.is_dir():
        raise CheckpointError(f"{where}: no folder of an image tokenizer")
    images = load_image_tokenizer(where)
    if (vocabulary := config.output.vocabulary) is not None and vocabulary.image.size != images.codebook_size:
        raise CheckpointError(
            f"{where}: this image tokenizer has {images.codebook_size} codes, the model was made for "
            f"{vocabulary.image.size}; put its own back"
        )
    return images


def _new_vocabulary(tokenizer: PreTrainedTokenizerBase, codes: int) -> VocabularyLayout:
    """Add the specials to the tokenizer, and lay the codes out behind them."""
    names = [*SPECIALS["image"]]
    text = max(tokenizer.get_vocab().values()) + 1
    tokenizer.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
    return new_layout(text, {name: tokenizer.get_vocab()[name] for name in names}, codes)


def _make_room(llm: PreTrainedModel, size: int) -> int:
    """Enlarge a language model's tables to so many rows at least; gives how many there are."""
    embeddings: Any = llm.get_input_embeddings()
    had: int = embeddings.weight.shape[0]
    if size <= had:
        return had
    if any(".lora_" in name or ".token_adapter." in name for name, _ in llm.named_parameters()):
        raise ConfigError("output: the model has an adapter, beside which its table cannot grow; merge it first")
    llm.resize_token_embeddings(size, pad_to_multiple_of=MULTIPLE, mean_resizing=False)
    tables: list[Any] = [llm.get_input_embeddings(), llm.get_output_embeddings()]
    if tables[1] is None or tables[1].weight is tables[0].weight:
        del tables[1]
    generator = torch.Generator().manual_seed(0)
    for table in tables:
        _draw(table, had, generator)
    rows: int = tables[0].weight.shape[0]
    return rows


@torch.no_grad()
def _draw(table: nn.Module, first: int, generator: torch.Generator) -> None:
    """Draw the rows from the first new one on, as the others lie."""
    weight: Any = table.weight
    old, new = weight[:first].float(), weight[first:]
    noise = torch.randn(new.shape, generator=generator).to(old.device)
    new.copy_(old.mean(dim=0) + noise * old.std(dim=0))
    bias: Any = getattr(table, "bias", None)
    if bias is not None:
        bias[first:] = bias[:first].float().mean().to(bias)
