"""Figures, intervals, controls and the files of a results folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from polymodal.data.load import load_records
from polymodal.errors import ConfigError, DataError, PolymodalError
from polymodal.evaluation import results
from polymodal.evaluation.results import summarise, table
from polymodal.evaluation.runner import Run, Settings
from polymodal.evaluation.task import Figures, Sample, Task, score_samples
from polymodal.evaluation.tasks.questions import data_task, examples_of
from polymodal.generation.params import GenerationParams
from polymodal.metrics.intervals import grouped_interval
from polymodal.utils.files import check_writable

TASK = Task("toy", "for tests", "exact", ("val",), lambda _folder, _split: ())


def sample(number: int, score: float | None, **more: Any) -> Sample:
    values: dict[str, Any] = {
        "id": str(number), "kind": "", "prompt": "p", "references": ("right",), "metric": "exact", "options": {},
        "extra": {}, "answer": "right" if score else "wrong", "score": score,
    }  # fmt: skip
    return Sample(**{**values, **more})


def summary(samples: Sequence[Sample], task: Task = TASK, settings: Settings | None = None) -> dict[str, Any]:
    return summarise(task, "val", Run(list(samples), GenerationParams(), 4, True, len(samples)), settings or Settings())


def test_intervals_of_right_and_wrong_are_wilsons() -> None:
    found = summary([sample(n, float(n < 7)) for n in range(10)])
    assert found["score"] == 0.7 and found["interval"] == pytest.approx((0.3968, 0.8922), abs=1e-4)
    assert "| toy val | exact | 10 | 70.0% | 39.7% to 89.2% |" in table([found])


@pytest.mark.parametrize("count", [1, 2, 5, 29, 200])
@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_no_interval_is_a_point(count: int, score: float) -> None:
    alike = [sample(n, score, blind="x", blind_score=score) for n in range(count)]
    grouped = [replace(s, extra={"image": n // 2}) for n, s in enumerate(alike)]

    def own_figure(samples: Sequence[Sample]) -> Figures:
        return {"f1": 0.999 * sum(s.score or 0.0 for s in samples) / len(samples) + 0.0005}

    for task, samples in (
        (TASK, alike),
        (replace(TASK, group="image"), grouped),
        (replace(TASK, aggregate=own_figure), alike),
    ):
        found = summary(samples, task)
        for name in ("interval", "margin_interval"):
            low, high = found[name]
            assert low < high and high - low > 1 / (count + 4), (name, task)
        assert found["interval"][0] <= found["score"] <= found["interval"][1] and found["n"] == count


def test_figures_in_points_have_an_interval_in_points() -> None:
    def total(samples: Sequence[Sample]) -> Figures:
        return {"total": 2000 * sum(s.score or 0.0 for s in samples) / len(samples)}

    task = replace(TASK, aggregate=total, unit=1)
    right = summary([sample(n, 1.0) for n in range(5)], task)
    assert right["score"] == 2000 and 500 < right["interval"][0] < 1500 and right["interval"][1] == 2000
    wrong = summary([sample(n, 0.0) for n in range(5)], task)
    assert wrong["interval"][0] == 0 and 500 < wrong["interval"][1] < 1500
    some = summary([sample(n, float(n % 3 == 0)) for n in range(90)], task)
    assert 400 < some["interval"][0] < some["score"] < some["interval"][1] < 950
    assert "| 90 | 666.7 |" in table([some])


def test_samples_of_a_group_count_as_one() -> None:
    samples = [sample(n, float(n // 10 % 2), extra={"image": n // 10}) for n in range(200)]
    alone, together = (summary(samples, task)["interval"] for task in (TASK, replace(TASK, group="image")))
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])
    kinds = [replace(s, kind=str(int(s.id) % 2)) for s in samples]
    rows = [summary(kinds, task)["kinds"] for task in (TASK, replace(TASK, group="image"))]
    assert [b["interval"][0] < a["interval"][0] for a, b in zip(*rows, strict=True)] == [True, True]


def test_the_jackknife_of_few_groups_agrees_with_students_interval_of_a_mean() -> None:
    values = [0.1, 0.5, 0.4, 0.9, 0.3]
    low, high = grouped_interval(values, range(5), lambda drawn: sum(drawn) / len(drawn))  # type: ignore[arg-type]
    half = 2.776 * (sum((v - 0.44) ** 2 for v in values) / 4 / 5) ** 0.5
    assert (low, high) == pytest.approx((0.44 - half, 0.44 + half), abs=1e-9)
    assert grouped_interval([1, 1], ["a", "a"], lambda _: 1.0) == (0.0, 1.0)


def test_the_control_and_its_paired_margin() -> None:
    samples = [sample(n, float(n < 8), blind="b", blind_score=float(n < 5)) for n in range(10)]
    found = summary(samples)
    assert (found["blind"], found["margin"], found["blind_n"]) == (0.5, pytest.approx(0.3), 10)
    assert found["margin_interval"][0] < 0.3 < found["margin_interval"][1]
    assert "| 50.0% | +30.0% (" in table([found])


def test_a_constant_answer_is_scored_by_the_metric_that_was_asked_for_and_fast() -> None:
    task = replace(TASK, blind=True)
    black = [sample(n, 0.0, references=(("Black.", "black")[n],) * 10, metric="vqa_accuracy") for n in range(2)]
    by = {v: summary(score_samples(black, v), task, Settings(variant=v))["kinds"][0] for v in (None, "lmms_eval")}
    assert (by[None]["majority"], by["lmms_eval"]["majority"]) == (0.5, 1.0)
    many = [sample(n, 0.0, references=(f"answer {n}",)) for n in range(3000)]
    assert summary(many, task)["kinds"][0]["majority"] > 0  # does not try each answer on each question
    cider = score_samples([sample(n, 0.0, references=(f"a cat {n} sits",), metric="cider") for n in range(3)])
    assert "majority" not in summary(cider, task)["kinds"][0]
    rates = score_samples([sample(n, 0.0, references=("a cat",), metric="wer") for n in range(3)])
    assert "majority" not in summary(rates, replace(task, lower_is_better=True))["kinds"][0]


def test_failed_items_and_secret_answers() -> None:
    found = summary([sample(0, 1.0), sample(1, 0.0, answer=None, error="no"), sample(2, None)])
    assert (found["n"], found["failed"], found["score"]) == (3, 1, 0.5)
    secret = summary([sample(n, None, references=()) for n in range(3)])
    assert secret["score"] is None and "| toy (val) | exact | 3 | - | |" in table([secret])


def test_a_table_survives_the_words_of_strangers() -> None:
    kinds = [sample(n, 1.0, kind=("a|b", "c\nd")[n % 2], blind="x", blind_score=0.0) for n in range(4)]
    lines = table([summary(kinds)]).splitlines()
    assert len(lines) == 5 and r"| - a\|b |" in lines[3] and "| - c d |" in lines[4]


def test_what_stands_in_results_json() -> None:
    class Model:
        name = "m"

        def settings(self) -> dict[str, str]:
            return {"preprocessing": "p", "template": "t"}

    run = Run([sample(0, 1.0)], GenerationParams(), 4, True, 1)
    found: Any = summarise(TASK, "val", run, Settings(limit=3), Model())  # type: ignore[arg-type]
    assert found["versions"]["torch"] and (found["preprocessing_hash"], found["template_hash"]) == ("p", "t")
    assert (found["limit"], found["batch_size"], found["batch_invariant"]) == (3, 4, True)
    assert json.loads(results.as_json(found)) == json.loads(json.dumps(found))


def test_samples_come_back_as_they_were(tmp_path: Path) -> None:
    samples = [
        sample(0, 1.0, answer="a\u2028b\u0085c\x1cd\r\ne", options={"options": {"A": "x"}}, extra={"n": [1, None]}),
        sample(1, None, answer=None, error="\ud800 half", references=(), blind="狗", blind_score=None),
    ]
    results.write_samples(tmp_path / "t" / "samples.jsonl", samples)
    assert results.read_samples(tmp_path / "t") == samples == results.read_samples(tmp_path / "t" / "samples.jsonl")
    assert "狗" in results.as_json({"a": "狗"})


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": "0"}', "sample 1 is no sample"), ("[]", "line 1: expected an object"), ("{", "line 1 is no JSON"),
        ('{"references": "cat"}', "`references` is 'cat'"), ('{"answer": 3}', "`answer` is 3"),
        ('{"options": null}', "`options` is None"), ('{"more": 1}', "more"), ('{"id": 4}', "`id` is 4"),
    ],
)  # fmt: skip
def test_files_that_are_no_samples(line: str, said: str, tmp_path: Path) -> None:
    from dataclasses import asdict

    data = json.loads(line) if line.startswith("{") and line != "{" and "0" not in line else line
    (tmp_path / "samples.jsonl").write_text(
        json.dumps({**asdict(sample(0, 1.0)), **data}) if data is not line else line
    )
    with pytest.raises(DataError, match=said):
        results.read_samples(tmp_path)


def test_a_folder_is_begun_and_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    results.check_folder(folder)
    assert not folder.exists()
    document = results.begin_results(folder, "m", "hash")
    results.check_folder(folder)  # even if the run is killed now
    other = results.begin_results(folder, "m", "hash")  # a second run at the same time
    results.add_task(folder, document, "a", summary([sample(0, 1.0)]), [sample(0, 1.0)])
    results.add_task(folder, other, "b", summary([sample(0, 0.0)]), [sample(0, 0.0)])
    assert (
        set(results.read_results(folder)["tasks"])
        == {"a", "b"}
        == set(results.begin_results(folder, "m", "hash")["tasks"])
    )
    with pytest.raises(ConfigError, match=r"another model \('m', not 'n'"):
        results.begin_results(folder, "n", "other")
    (folder / "results.json").write_text('{"tasks": {"a": {}}}')
    with pytest.raises(DataError, match=r"is no results\.json"):
        results.check_folder(folder)


def test_two_models_that_began_in_one_folder_do_not_mix(tmp_path: Path) -> None:
    one, two = (results.begin_results(tmp_path, name, name) for name in "mn")
    results.add_task(tmp_path, one, "a", summary([sample(0, 1.0)]), [sample(0, 1.0)])
    with pytest.raises(ConfigError, match="another model"):
        results.add_task(tmp_path, two, "b", summary([sample(0, 0.0)]), [sample(0, 0.0)])
    document = results.read_results(tmp_path)
    assert document["model"] == "m" and set(document["tasks"]) == {"a"}


def test_leftovers_of_a_killed_run_are_no_strangers(tmp_path: Path) -> None:
    (tmp_path / ".results.json.1234.tmp").write_text("")
    results.check_folder(tmp_path)
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ConfigError, match="holds something else"):
        results.check_folder(tmp_path)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_writable(tmp_path / "new" / "deep" / "x.json")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for path, said in (
        ("file/x", "cannot be written"),
        (".", "is a folder"),
        ("n" * 300 + "/x/y", "cannot be written"),
    ):
        with pytest.raises(PolymodalError, match=f"--json: .*{said}"):
            check_writable(tmp_path / path, "--json: ")


def data_file(folder: Path, *rows: dict[str, Any]) -> Path:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "a red cat on a mat"}]
    (folder / "own.json").write_text(json.dumps([{"id": "x", "conversations": turns, **row} for row in rows]))
    return folder / "own.json"


def test_ids_of_own_data_are_made_unique(tmp_path: Path) -> None:
    data = data_file(tmp_path, {}, {"id": "x#2"}, {}, {}, {"id": "x#2"})
    ids = [example.id for example in examples_of(load_records(data))]
    assert ids[:2] == ["x", "x#2"] and len(set(ids)) == 5


@pytest.mark.parametrize("metric", ["vqa_accuracy", "anls", "exact", "contains", "cider", "rouge_l", "bleu", "wer"])
def test_own_data_by_every_metric(metric: str, tmp_path: Path) -> None:
    texts = ("a red cat on a mat", "two dogs run there")
    rows = [{"id": str(n), "answers": [text] * 10} for n, text in enumerate(texts)]
    task = data_task(data_file(tmp_path, *rows), metric=metric)
    examples = list(task.read(tmp_path, ""))
    made = [
        Sample(e.id, e.kind, "", e.references, e.metric, e.options, e.extra, text, blind="x")
        for e, text in zip(examples, texts, strict=True)
    ]
    found = summary(score_samples(made), task)
    assert found["score"] <= 0 if metric == "wer" else found["score"] > 0.999
    assert task.lower_is_better == (metric == "wer")
    assert table([found]).startswith("| task |")


def test_own_data_without_answers(tmp_path: Path) -> None:
    for row, said in (({"answers": "cat"}, "list of texts"), ({"answers": ["", "a"]}, "list of texts")):
        with pytest.raises(DataError, match=said):
            examples_of(load_records(data_file(tmp_path, row)))
    with pytest.raises(ConfigError, match="did you mean 'exact'"):
        data_task(tmp_path / "x.json", metric="exakt")


def test_kinds_are_shown_where_there_is_no_other_figure() -> None:
    samples = [sample(n, float(n < 3), kind=("cats", "dogs")[n % 2]) for n in range(4)]
    shown = table([summary(samples)])
    assert "| - cats | exact | 2 | 100.0% |" in shown and "| - dogs | exact | 2 | 50.0% |" in shown
