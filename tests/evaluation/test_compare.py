"""Two runs beside each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polymodal.errors import DataError
from polymodal.evaluation import results
from polymodal.evaluation.compare import compare, difference_table, rescore, sign_test
from polymodal.evaluation.runner import Run, Settings
from polymodal.evaluation.task import Sample, Task
from polymodal.generation.params import GenerationParams

TASK = Task("toy", "for tests", "exact", ("val",), lambda _folder, _split: ())


def samples(scores: dict[str, float], **more: Any) -> list[Sample]:
    made = [
        Sample(n, "", f"p {n}", ("r",), "exact", {}, {}, "r" if score else "w", score=score)
        for n, score in scores.items()
    ]
    return [replace(sample, **more) for sample in made]


class Model:
    """What of a model stands in results."""

    def __init__(self, **settings: str) -> None:
        self.given = {"preprocessing": "p", "template": "t"} | settings

    def settings(self) -> dict[str, str]:
        return self.given


def folder(
    path: Path, made: list[Sample], model: str = "m", how: Model | None = None, tokens: int = 8, batch: int = 4,
    invariant: bool | None = True, variant: str | None = None, task: Task = TASK,
) -> Path:  # fmt: skip
    run = Run(made, GenerationParams(max_new_tokens=tokens), batch, invariant, len(made))
    document = results.begin_results(path, model, model)
    summary = results.summarise(task, "val", run, Settings(variant=variant), how or Model())  # type: ignore[arg-type]
    results.add_task(path, document, "toy_val", summary, made)
    return path


FIRST = {str(n): float(n < 10) for n in range(20)}
SECOND = {str(n): float(3 <= n < 18) for n in range(20)}  # 3 lost, 8 won


def test_paired_values_by_hand(tmp_path: Path) -> None:
    (found,) = compare(folder(tmp_path / "a", samples(FIRST)), folder(tmp_path / "b", samples(SECOND), "other"))
    assert (found.n, found.scores, found.better, len(found.flipped)) == (20, (0.5, 0.75), 8, 11)
    # McNemar's exact test of 8 against 3: 2 (C(11,0) + C(11,1) + C(11,2) + C(11,3)) / 2^11 = 2 * 232 / 2048
    assert found.p_value == pytest.approx(0.2265625)
    assert found.interval[0] < 0.25 < found.interval[1]
    assert [(a.id, a.score, b.score) for a, b in found.flipped][:4] == [
        ("0", 1, 0), ("1", 1, 0), ("2", 1, 0), ("10", 0, 1)
    ]  # fmt: skip
    assert found.changed == ("model",)
    shown = difference_table([found])
    assert "| toy_val | 20 | 50.0% | 75.0% | +25.0% (" in shown and "| 0.227 | 8 | 3 |" in shown


@pytest.mark.parametrize(
    ("ups", "downs", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (5, 5, 1.0), (9, 1, 22 / 1024), (1, 9, 22 / 1024)],
)
def test_the_sign_test(ups: int, downs: int, p: float) -> None:
    assert sign_test(ups, downs) == pytest.approx(p)


def test_the_sign_test_of_many_goes_over_smoothly() -> None:
    assert sign_test(530, 470) == pytest.approx(sign_test(531, 470), rel=0.1)
    assert 0 <= sign_test(200_000, 100_000) < 1e-12 and sign_test(10**6, 10**6) == 1.0


def test_what_changed(tmp_path: Path) -> None:
    same = samples(FIRST)
    base = folder(tmp_path / "base", same)
    cases: list[tuple[tuple[str, ...], dict[str, Any]]] = [
        ((), {}),
        (("model",), {"model": "n"}),
        (("prompt",), {"made": samples(FIRST, prompt="other")}),
        (("prompt",), {"how": Model(template="u")}),
        (("extraction",), {"made": samples(FIRST, options={"variant": "x"})}),
        (("extraction",), {"made": samples(FIRST, metric="contains")}),
        (("decoding",), {"tokens": 9}),
        (("preprocessing",), {"how": Model(preprocessing="q")}),
        (("data",), {"made": samples(FIRST, references=("r", "s"))}),
        ((), {"batch": 1, "invariant": None}),
        (("decoding",), {"batch": 8, "invariant": False}),
        (("model", "prompt", "decoding"), {"model": "n", "tokens": 9, "how": Model(template="u")}),
    ]
    for number, (changed, how) in enumerate(cases):
        (found,) = compare(base, folder(tmp_path / str(number), **{"made": same, **how}))
        assert found.changed == changed, how
        assert found.p_value == 1.0 and found.flipped == ()
    assert "toy_val: run in the same way" in difference_table(compare(base, tmp_path / "0"))


def test_other_versions_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = folder(tmp_path / "a", samples(FIRST))
    monkeypatch.setattr(results, "versions", lambda: {"torch": "99"})
    two = folder(tmp_path / "b", samples(FIRST))
    assert compare(one, two)[0].changed == ("versions",)


def test_runs_of_different_items_are_compared_on_those_in_common(tmp_path: Path) -> None:
    few = {name: score for name, score in SECOND.items() if int(name) < 5} | {"x": 1.0}
    (found,) = compare(folder(tmp_path / "a", samples(FIRST)), folder(tmp_path / "b", samples(few)))
    assert (found.n, found.only, found.scores, found.changed) == (5, (15, 1), (1.0, 0.4), ("data",))
    assert "15 examples only in the first, 1 only in the second" in difference_table([found])
    with pytest.raises(DataError, match="no example in common"):
        compare(tmp_path / "a", folder(tmp_path / "c", samples({"y": 1.0})))


def test_secret_and_failed_items(tmp_path: Path) -> None:
    made = samples({"0": 1.0, "1": 1.0})
    failed = [made[0], replace(made[1], answer=None, error="no", score=0.0)]
    (found,) = compare(folder(tmp_path / "a", made), folder(tmp_path / "b", failed))
    assert len(found.flipped) == 1
    secret = [replace(sample, score=None, references=()) for sample in made]
    with pytest.raises(DataError, match="scored no example"):
        compare(tmp_path / "a", folder(tmp_path / "c", secret))


def test_less_is_better_for_error_rates(tmp_path: Path) -> None:
    one, two = (samples({"0": a, "1": b}, metric="wer") for a, b in ((0.5, 0.2), (0.1, 0.3)))
    (found,) = compare(folder(tmp_path / "a", one), folder(tmp_path / "b", two))
    assert found.better == 1
    (found,) = compare(folder(tmp_path / "c", two), folder(tmp_path / "d", samples({"0": 0.1, "1": 0.1}, metric="wer")))
    assert (found.better, len(found.flipped)) == (1, 1)


def test_files_of_samples_say_how_far_they_are_known(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", samples(FIRST)), folder(tmp_path / "b", samples(SECOND), "n")
    for one, two in (
        (a / "toy_val", b / "toy_val"),
        (a / "toy_val" / "samples.jsonl", b / "toy_val" / "samples.jsonl"),
    ):
        (found,) = compare(one, two)
        assert (found.task, found.changed, found.known, found.n) == ("toy_val", ("model",), True, 20)
    results.write_samples(tmp_path / "loose" / "samples.jsonl", samples(FIRST))
    results.write_samples(tmp_path / "loose2" / "samples.jsonl", samples(SECOND))
    (found,) = compare(tmp_path / "loose", tmp_path / "loose2" / "samples.jsonl")
    assert (found.changed, found.known) == ((), False)
    assert "no results.json tells" in difference_table([found])


def test_folders_that_have_no_task_in_common(tmp_path: Path) -> None:
    one = folder(tmp_path / "a", samples(FIRST))
    results.begin_results(tmp_path / "b", "m", "m")
    with pytest.raises(DataError, match="no task is in both"):
        compare(one, tmp_path / "b")


def test_rescoring_by_another_metric_leaves_out_options_that_it_has_not() -> None:
    made = samples({"0": 0.0}, metric="mmbench_extract", options={"options": {"A": "r", "B": "x"}}, answer="R")
    assert [s.score for s in rescore(made, "exact")] == [1.0]
    assert [s.score for s in rescore([replace(made[0], references=("A",))])] == [1.0]
