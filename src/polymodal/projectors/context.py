"""The tokenizer of a Q-Former that reads the question beside the picture (InstructBLIP, arXiv:2305.06500).

It is not the language model's. A model folder carries it in `qformer_tokenizer/`; a model that is composed takes it
from where `projector.qformer.tokenizer` or `projector.pretrained` says.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from polymodal.config import ProjectorConfig
from polymodal.errors import CheckpointError, ConfigError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FOLDER = "qformer_tokenizer"


def load_context_tokenizer(config: ProjectorConfig, folder: Path | None = None) -> PreTrainedTokenizerBase | None:
    """Load the Q-Former's tokenizer, where it reads a context.

    Args:
        config: The projector's configuration.
        folder: A model folder of ours; the tokenizer in it goes first.

    Returns:
        The tokenizer (fast); None for a projector that reads no text.

    Raises:
        ConfigError: The configuration does not say where it is, or it has more words than the Q-Former.
        CheckpointError: It cannot be opened.
    """
    from transformers import AutoTokenizer

    if config.qformer is None or not config.qformer.text_context:
        return None
    carried = folder / TOKENIZER_FOLDER if folder is not None else None
    source = config.qformer.tokenizer or config.pretrained
    if carried is not None and carried.is_dir():
        source = str(carried)
    if source is None:
        if carried is not None:
            raise CheckpointError(f"{carried} is missing: the Q-Former reads the question with its own tokenizer")
        raise ConfigError("projector.qformer.text_context needs projector.qformer.tokenizer, a folder or a hub id")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"tokenizer of the Q-Former {source!r}: {first_line(error)}") from error
    if not tokenizer.is_fast:
        raise CheckpointError(f"tokenizer of the Q-Former {source!r}: a tokenizer.json is needed")
    if len(tokenizer) > config.qformer.vocab_size:
        raise ConfigError(
            f"tokenizer of the Q-Former {source!r} has {len(tokenizer)} tokens, "
            f"projector.qformer.vocab_size is {config.qformer.vocab_size}"
        )
    return tokenizer
