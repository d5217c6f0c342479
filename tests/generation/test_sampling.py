"""Choosing ids: what each setting does to the logits, and what a sampler remembers of one answer."""

from __future__ import annotations

import pytest
import torch

from polymodal.errors import ConfigError
from polymodal.generation.params import GenerationParams
from polymodal.generation.sampling import Sampler, sample_next


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", float("inf")), ("temperature", float("nan")), ("seed", 2**64), ("seed", -(2**63) - 1),
     ("repetition_penalty", 1e-45), ("repetition_penalty", float("inf")), ("repetition_penalty", 0.0)],
)  # fmt: skip
def test_settings_that_no_arithmetic_bears(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"GenerationParams: {name}: ") as error:
        GenerationParams(**{name: value})
    assert "\n" not in str(error.value)


def test_top_k_top_p_and_penalty() -> None:
    logits = torch.tensor([[4.0, 3.0, 2.0, -1.0]])
    none = torch.empty((1, 0), dtype=torch.int64)
    generator = torch.Generator().manual_seed(0)

    def drawn(**settings: float) -> set[int]:
        params = GenerationParams(temperature=3.0, **settings)
        return {int(sample_next(logits, params, none, generator)) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.3) == {0}
    penalised = sample_next(logits, GenerationParams(repetition_penalty=2.0), torch.tensor([[0]]), None)
    assert penalised.item() == 1


def choices(logits: list[float], steps: int, **settings: object) -> list[int]:
    choose = Sampler(GenerationParams(**settings), torch.device("cpu"))  # type: ignore[arg-type]
    return [choose(torch.tensor(logits)) for _ in range(steps)]


def test_penalties_count_what_was_made() -> None:
    assert choices([4.0, 3.5, 0.0], 4) == [0, 0, 0, 0]
    assert choices([4.0, 3.5, 0.0], 4, presence_penalty=1.0) == [0, 1, 0, 0]  # once only, however often
    assert choices([4.0, 3.9, 0.0], 6, frequency_penalty=0.3) == [0, 1, 0, 1, 0, 1]
    assert choices([4.0, 3.5, 0.0], 3, presence_penalty=-2.0, logit_bias={1: 1.0}) == [1, 1, 1]
    rows = sample_next(
        torch.tensor([[4.0, 3.5], [4.0, 3.5]]), GenerationParams(frequency_penalty=0.4),
        torch.tensor([[0, 0], [1, 1]]), None,
    )  # fmt: skip
    assert rows.tolist() == [1, 0]


def test_bias_and_min_p() -> None:
    assert choices([4.0, 3.0, 2.0], 1, logit_bias={2: 2.5, 99: 100.0}) == [2]  # an id that the model does not have
    assert choices([4.0, -torch.inf], 1, logit_bias={1: 100.0}) == [0]  # what is forbidden stays so
    drawn = {choices([4.0, 3.0, 2.0, -1.0], 1, temperature=3.0, min_p=0.6, seed=seed)[0] for seed in range(200)}
    assert drawn == {0, 1}


def test_chances_are_those_before_any_setting() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0])
    choose = Sampler(
        GenerationParams(logprobs=2, temperature=0.0, logit_bias={2: 9.0}, presence_penalty=2.0), torch.device("cpu")
    )
    assert [choose(logits), choose(logits)] == [2, 2]
    expected = logits.log_softmax(0).tolist()
    for chance in choose.chances:
        assert (chance.token, chance.logprob) == (2, pytest.approx(expected[2]))
        assert [token for token, _ in chance.likeliest] == [0, 1]
        assert [value for _, value in chance.likeliest] == pytest.approx(expected[:2])


def test_settings_that_are_not_used_leave_no_trace() -> None:
    assert {*GenerationParams().plain} == {
        "max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop"
    }  # fmt: skip
    assert GenerationParams(logit_bias={3: 1.0}).plain["logit_bias"] == {"3": 1.0}
    with pytest.raises(ConfigError, match="logprobs"):
        GenerationParams(logprobs=1, modalities=("text", "image"))
