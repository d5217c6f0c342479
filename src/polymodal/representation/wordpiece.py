"""The text tokenizer of BLIP-2's Q-Former: BERT's WordPiece with the token "[DEC]", read from a folder or trained.

BLIP-2 (Li et al. 2023, arXiv:2301.12597) takes `bert-base-uncased` and adds "[DEC]", which stands in place of "[CLS]"
where the text is to be generated. A small run needs neither BERT's folder nor its 30,522 pieces: `train_wordpiece`
learns them from the run's own captions. The `tokenizers` trainer numbers pieces in the order of a hash table, so that
two runs differ; here the pieces of single letters are numbered beforehand, which leaves nothing to chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import CheckpointError, DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DECODE_TOKEN = "[DEC]"
"""First token of a text that is to be generated, and the tokenizer's `bos_token`."""

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", DECODE_TOKEN)


def train_wordpiece(captions: Sequence[str], size: int = 8000, min_frequency: int = 2) -> PreTrainedTokenizerBase:
    """Learn a WordPiece vocabulary; the same captions give the same vocabulary.

    Args:
        captions: The texts.
        size: Pieces at most, special tokens included.
        min_frequency: How often a pair of pieces must occur to become one.

    Returns:
        A lower-casing BERT tokenizer whose `bos_token` is "[DEC]".

    Raises:
        DataError: There is no text, or it has more different letters than pieces are allowed.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizerFast

    normalise, split = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = {
        word for caption in captions for word, _ in split.pre_tokenize_str(normalise.normalize_str(caption)) if word
    }
    if not words:
        raise DataError("no text to learn a tokenizer from: every caption is empty")
    # The trainer meets letters inside words in random order; as special tokens they have fixed numbers.
    inner = sorted({f"##{letter}" for word in words for letter in word[1:]})
    letters = len({letter for word in words for letter in word}) + len(inner) + len(SPECIAL_TOKENS)
    if letters > size:
        raise DataError(f"the captions need {letters} pieces for their letters alone; allow more than {size}")
    learner: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normalise, split
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=min_frequency,
        special_tokens=[*SPECIAL_TOKENS, *inner],
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    return BertTokenizerFast(vocab=learner.get_vocab(), do_lower_case=True, bos_token=DECODE_TOKEN)


def load_wordpiece(folder: Path | str) -> PreTrainedTokenizerBase:
    """Load a BERT tokenizer, with "[DEC]" added where it is not there yet, as BLIP-2 does.

    Args:
        folder: A folder of `train_wordpiece`'s `save_pretrained`, or of BERT, or a hub id.

    Returns:
        The tokenizer.

    Raises:
        CheckpointError: It cannot be read, or is of another kind than BERT's.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError, ImportError) as error:
        raise CheckpointError(f"text tokenizer {folder}: {first_line(error)}") from error
    lacking = [name for name in ("cls_token", "sep_token", "pad_token") if getattr(tokenizer, name) is None]
    if lacking:
        raise CheckpointError(
            f"text tokenizer {folder}: has no {lacking[0]}; a BERT tokenizer is needed (WordPiece, [CLS] and [SEP])"
        )
    if tokenizer.bos_token != DECODE_TOKEN:
        tokenizer.add_special_tokens({"bos_token": DECODE_TOKEN})
    return tokenizer
