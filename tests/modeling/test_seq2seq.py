"""One sequence of ids, cut into what an encoder reads and what a decoder says."""

from __future__ import annotations

import pytest
import torch

from polymodal.errors import PolymodalError
from polymodal.modeling.seq2seq import IGNORE, move_left, split_rows, take

START = 0


def labelled(*rows: str) -> torch.Tensor:
    """Rows in letters: capitals carry a label, others do not; the label is the letter's number."""
    return torch.tensor([[ord(c) if c.isupper() else IGNORE for c in row] for row in rows])


def letters(split_ids: torch.Tensor) -> list[str]:
    return ["".join(chr(i) if i else "." for i in row) for row in split_ids.tolist()]


def test_rows_are_cut_before_their_answers() -> None:
    split = split_rows(labelled("pppABx", "pCxxxx", "ppppDE"), None, START)
    assert split.source_index.tolist()[0][:3] == [0, 1, 2]
    assert split.source_mask is not None
    assert split.source_mask.tolist() == [[True] * 3 + [False], [True] + [False] * 3, [True] * 4]
    assert letters(split.decoder_input_ids) == [".A", "..", ".D"]  # the start token again on padding
    assert "".join(map(chr, split.targets.tolist())) == "ABCDE"
    assert split.places.tolist() == [0, 1, 2, 4, 5]


def test_rows_of_one_length_need_no_mask() -> None:
    split = split_rows(labelled("ppAB", "ppCx"), None, START)
    assert split.source_mask is None
    assert split.source_index.tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_the_naive_cut(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    length = 12
    rows, mask, expected = [], [], []
    for row in range(4):
        source, answer, tail = draw(1, 5), draw(0, 4), draw(0, 3)
        pad = length - source - answer - tail
        left = row % 2 == 0
        ids = [100 * row + i for i in range(answer)]
        line = [IGNORE] * source + ids + [IGNORE] * tail
        rows.append([IGNORE] * pad + line if left else line + [IGNORE] * pad)
        mask.append([False] * pad + [True] * len(line) if left else [True] * len(line) + [False] * pad)
        begin = pad if left else 0
        # A row without an answer is read whole.
        expected.append((list(range(begin, begin + (source if answer else source + tail))), ids))
    split = split_rows(torch.tensor(rows), torch.tensor(mask), START)
    real = split.source_mask if split.source_mask is not None else torch.ones_like(split.source_index).bool()
    assert [index[kept].tolist() for index, kept in zip(split.source_index, real, strict=True)] == [
        source for source, _ in expected
    ]
    assert split.targets.tolist() == [token for _, ids in expected for token in ids]
    steps = split.decoder_input_ids.shape[1]
    assert steps == max(1, *(len(ids) for _, ids in expected))
    assert split.places.tolist() == [
        row * steps + place for row, (_, ids) in enumerate(expected) for place in range(len(ids))
    ]
    for fed, (_, ids) in zip(split.decoder_input_ids.tolist(), expected, strict=True):
        assert fed[: len(ids)] == [START, *ids][: len(ids)]


def test_the_first_token_is_read_whatever_its_label() -> None:
    split = split_rows(labelled("AB"), None, START)
    assert split.source_index.tolist() == [[0]] and letters(split.targets[None]) == ["B"]


def test_several_answers_are_refused_by_name() -> None:
    with pytest.raises(
        PolymodalError, match=r"sample 1: 3 tokens carry a label, but its last answer has 1.*last_answer"
    ):
        split_rows(labelled("ppABxx", "pABpCx"), None, START)


def test_nothing_to_read_is_refused() -> None:
    mask = torch.tensor([[True] * 4, [False, False, True, True]])
    with pytest.raises(PolymodalError, match="sample 1: nothing stands before its answer"):
        split_rows(labelled("ppAB", "ppAB"), mask, START)


def test_move_left_and_take() -> None:
    mask = torch.tensor([[False, False, True, True], [True, True, True, False]])
    index, real = move_left(mask)
    assert index.shape == (2, 3) and real.tolist() == [[True, True, False], [True, True, True]]
    embeds = torch.arange(8.0).view(2, 4, 1).requires_grad_()
    taken = take(embeds, index)
    assert taken[0, :2, 0].tolist() == [2.0, 3.0] and taken[1, :, 0].tolist() == [4.0, 5.0, 6.0]
    (taken * real[..., None]).sum().backward()
    assert embeds.grad is not None
    assert embeds.grad[..., 0].tolist() == [[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]]
