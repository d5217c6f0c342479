"""What a projector reads beside an image: framed, cut, of the right turn, and never an answer."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from polymodal.config import ImageConfig, LLMConfig, ModelConfig, ProjectorConfig, VisionConfig
from polymodal.errors import ConfigError
from polymodal.media_plan import Size
from polymodal.messages import Image, assistant, system, user
from polymodal.processing.collate import Sample, collate, collate_packed
from polymodal.processing.processor import ContextReader, Processor

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "what", "is", "this", "sure", "?", "red", "[", "]", "sep"]
IMAGE = Image("picture.png")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    inner: Any = Tokenizer(models.WordPiece({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    inner.enable_truncation(3)  # as a saved tokenizer may come
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def test_a_question_is_framed_and_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    reader = ContextReader(tokenizer, 6)
    assert reader.ids("What is this") == tokenizer("What is this", truncation=False)["input_ids"] == [2, 4, 5, 6, 3]
    assert reader.ids("what is this sure ? red") == [2, 4, 5, 6, 7, 3]
    assert reader.ids("") == reader.ids("  \n") == [2, 3]


def test_special_tokens_that_are_typed_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert ContextReader(tokenizer, 9).ids("this [SEP]") == [2, 6, 10, 12, 11, 3]


def test_each_image_has_the_text_of_its_own_turn(tokenizer: PreTrainedTokenizerFast) -> None:
    reader = ContextReader(tokenizer, 9)
    rows = reader(
        [
            system("red"),
            user(IMAGE, "What is", IMAGE, " this?"),
            assistant("red"),
            user("sure?"),
            assistant(IMAGE, "red"),
            user(IMAGE),
        ]
    )
    # No answer is read, not even beside an image that an answer holds.
    assert [row.tolist() for row in rows] == [[2, 4, 5, 6, 8, 3], [2, 4, 5, 6, 8, 3], [2, 3], [2, 3]]


def test_threads_do_not_disturb_each_other(tokenizer: PreTrainedTokenizerFast) -> None:
    reader = ContextReader(tokenizer, 6)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(reader.ids, ["what is this", "red"] * 200))
    assert found == [[2, 4, 5, 6, 3], [2, 9, 3]] * 200


def test_a_tokenizer_without_a_frame_still_gives_one_id(tokenizer: PreTrainedTokenizerFast) -> None:
    inner = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    reader = ContextReader(PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]"), 4)
    assert (reader.ids("red"), reader.ids("")) == ([9], [0])


def test_batches_carry_contexts_in_order_of_images() -> None:
    def sample(*rows: list[int]) -> Sample:
        ids = torch.arange(4)
        return Sample(ids, ids > 1, contexts=tuple(torch.tensor(row) for row in rows))

    samples = [sample([1, 2, 3]), sample(), sample([4], [5, 6])]
    expected = [[1, 2, 3], [4, -1, -1], [5, 6, -1]]
    for batch in (collate(samples, 0), collate(samples, 0, side="left"), collate_packed(samples)):
        assert batch.context_ids is not None and batch.context_ids.tolist() == expected
        assert batch.inputs()["context_ids"] is batch.context_ids
    assert collate([sample()], 0).context_ids is None


def test_a_processor_without_the_tokenizer_is_refused(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    config = ModelConfig(
        vision=VisionConfig(vision_tower="in memory", type="clip"),
        image=ImageConfig(tile_size=(28, 28), image_mean=(0, 0, 0), image_std=(1, 1, 1)),
        projector=ProjectorConfig(mm_projector_type="qformer", qformer={"text_context": True}),
        llm=LLMConfig(model_name_or_path="in memory"),
    )
    with pytest.raises(ConfigError, match="given no context_tokenizer"):
        Processor(config, byte_tokenizer, Size(1, 32), 300)
