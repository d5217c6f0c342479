"""Word embeddings of a Q-Former's text path, started from those of a language model.

Where there is no BERT to start from, the words still need not start as noise: a language model knows which of them are
alike. Each piece of the WordPiece vocabulary gets the mean embedding of the language model's tokens for its text,
reduced to the Q-Former's width by principal components and scaled as fresh weights are. Special tokens stay random.
Ours; BLIP-2 starts the whole Q-Former from bert-base-uncased instead (`projectors.qformer_start`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from polymodal.config import LLMConfig
from polymodal.errors import ConfigError
from polymodal.modeling.language_model import load_llm, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTINUES = "##"
"""What WordPiece puts before a piece that goes on a word."""


@torch.no_grad()
def start_words(table: Tensor, tokenizer: PreTrainedTokenizerBase, source: str, deviation: float) -> None:
    """Fill a table of word embeddings.

    Args:
        table: ``[V, H]``, changed in place.
        tokenizer: WordPiece, whose ids are the rows.
        source: A language model: folder, hub id, .gguf file, or "smollm2".
        deviation: Standard deviation that the rows are scaled to.

    Raises:
        CheckpointError: The language model cannot be opened.
        ConfigError: Its embeddings are narrower than H.
    """
    settings = LLMConfig(model_name_or_path=source)
    model: Any = load_llm(settings)
    words = load_tokenizer(settings)
    known: Tensor = model.get_input_embeddings().weight.float()
    width = table.shape[1]
    if known.shape[1] < width:
        raise ConfigError(
            f"init.model.words {source!r} has embeddings of width {known.shape[1]}, the Q-Former needs {width} "
            "(qformer.hidden_size)"
        )
    pieces = {piece: row for piece, row in tokenizer.get_vocab().items() if row not in tokenizer.all_special_ids}
    texts = [p.removeprefix(CONTINUES) if p.startswith(CONTINUES) else f" {p}" for p in pieces]
    # One row for each piece: the mean over the tokens of its text.
    means = torch.stack([known[ids].mean(dim=0) for ids in words(texts, add_special_tokens=False)["input_ids"]])
    centred = means - means.mean(dim=0)
    _, axes = torch.linalg.eigh(centred.T @ centred)  # in rising order
    reduced = centred @ axes[:, -width:].flip(1)
    table[list(pieces.values())] = (reduced * (deviation / reduced.std())).to(table)
