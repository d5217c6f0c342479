"""Video-MME and MVBench: read in every form, asked as published, scored from files of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.evaluation.mini import choices
from polymodal.cli import main
from polymodal.errors import DataError
from polymodal.evaluation.tasks import TASKS, read_examples
from polymodal.messages import Video
from tests.evaluation.tasks.scripted import assert_golden_prompt, plain, predicted

VIDEOMME, MVBENCH = TASKS["videomme"], TASKS["mvbench"]


@pytest.mark.parametrize("name", ["videomme", "mvbench"])
def test_the_first_question_is_asked_as_published(name: str, tmp_path: Path) -> None:
    choices.WRITERS[name](tmp_path, 4)
    assert_golden_prompt(TASKS[name], tmp_path)


def test_every_form_of_videomme_gives_the_same_questions(tmp_path: Path) -> None:
    choices.write_videomme(tmp_path / "official", 6)
    rows = choices.videomme_rows(6)
    choices.parquet(tmp_path / "hub" / "videomme" / "test-00000-of-00001.parquet", rows)
    kept = ("duration", "domain", "sub_category", "task_type", "question", "answer")
    tables = [{"index": i, "video": r["videoID"], "video_path": f"./video/{r['videoID']}.mp4",
               "candidates": r["options"], **{key: r[key] for key in kept}} for i, r in enumerate(rows)]  # fmt: skip
    choices.tsv(tmp_path / "kit" / "Video-MME.tsv", tables)
    official = plain(read_examples(VIDEOMME, "test", tmp_path / "official"))
    for form in ("hub", "kit"):
        assert plain(read_examples(VIDEOMME, "test", tmp_path / form)) == official
    assert [row[0] for row in official] == ["001-1", "001-2", "001-3", "002-1", "002-2", "002-3"]


def test_every_form_of_mvbench_gives_the_same_questions(tmp_path: Path) -> None:
    choices.write_mvbench(tmp_path / "official", 4)
    tables = [{"index": i, "prefix": "video/", "start": None, "end": None, **row}
              for i, row in enumerate(choices.mvbench_rows(4))]  # fmt: skip
    choices.tsv(tmp_path / "kit" / "MVBench.tsv", tables)
    official = plain(read_examples(MVBENCH, "test", tmp_path / "official"))
    assert plain(read_examples(MVBENCH, "test", tmp_path / "kit")) == official
    assert official[0][7] == {"video": "mini0.mp4", "start": 0.5, "end": 4.0} and official[2][7] == {
        "video": "mini1.mp4"
    }


def test_a_video_is_found_where_its_benchmark_keeps_it(tmp_path: Path) -> None:
    choices.write_mvbench(tmp_path, 1)
    choices.save(tmp_path / "video" / "star" / "Charades_v1_480" / "mini0.mp4", b"0")
    (part, _) = read_examples(MVBENCH, "test", tmp_path)[0].messages[1].parts
    file = tmp_path / "video" / "star" / "Charades_v1_480" / "mini0.mp4"
    assert part == Video(file, start=0.5, end=4.0)  # the piece that the question is about


def test_videomme_has_two_denominators(tmp_path: Path) -> None:
    choices.write_videomme(tmp_path, 6)
    said = {e.id: e.references[0] for e in read_examples(VIDEOMME, "test", tmp_path)}
    said |= {"001-2": "i do not know", "002-1": "B" if said["002-1"] == "A" else "A", "002-2": "?"}
    assert predicted(VIDEOMME, tmp_path, said)["figures"] == {
        "accuracy of answers read": 3 / 4, "accuracy of all": 3 / 6, "short, of answers read": 1.0,
        "short, of all": 2 / 3, "medium, of answers read": 1 / 2, "medium, of all": 1 / 3, "n_unread": 2,
    }  # fmt: skip


def test_mvbench_is_a_mean_of_tasks_and_counts_empty_answers(tmp_path: Path) -> None:
    choices.write_mvbench(tmp_path, 5)  # three of the one task, two of the other
    said = {e.id: e.references[0][1:3] for e in read_examples(MVBENCH, "test", tmp_path)}
    said |= {"action_sequence/1": "(Z)", "fine_grained_action/0": ".", "fine_grained_action/1": "(Z)"}
    figures = predicted(MVBENCH, tmp_path, said)["figures"]
    tasks = {"action_sequence": 2 / 3, "fine_grained_action": 1 / 2}  # "." is right by the official rule
    assert figures == {"mean_of_tasks": pytest.approx((2 / 3 + 1 / 2) / 2), **tasks, "n_empty": 1}


def test_answers_are_scored_from_the_command_line(tmp_path: Path, capsys: Any) -> None:
    choices.write_videomme(tmp_path / "data" / "videomme", 3)
    said = {e.id: e.references[0] for e in read_examples(VIDEOMME, "test", tmp_path / "data" / "videomme")}
    path = tmp_path / "said.json"
    path.write_text(json.dumps(said))
    command = ["eval", "rescore", str(path), "--tasks", "videomme", "--data-root", str(tmp_path / "data")]
    assert main(command) == 0
    assert "| videomme test | accuracy of answers read | 3 | 100.0% |" in capsys.readouterr().out
    template = json.loads((tmp_path / "data" / "videomme" / "output_test_template.json").read_text())
    template[0]["questions"][0]["response"] = said["001-1"]  # the others' stay empty: their `answer` is the right one
    path.write_text(json.dumps(template))
    assert main(command) == 0
    assert "| - accuracy of all | | | 33.3% | |" in capsys.readouterr().out
    path.write_text(json.dumps({**said, "001-1": 5}))
    assert main(command) == 2 and "answer 0 (id 001-1): needs a text" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "medium"), [("videomme", "video"), ("mvbench", "video"), ("librispeech", "audio")])
def test_a_model_that_cannot_take_them_is_not_asked(
    name: str, medium: str, tmp_path: Path, tiny_model_folder: Path, capsys: Any
) -> None:
    choices.WRITERS[name](tmp_path, 3)
    command = ["eval", str(tiny_model_folder), "--tasks", name, "--data-root", str(tmp_path), "--device", "cpu"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{name}: asks about {medium}, which " in line and f"`polymodal eval rescore FILE --tasks {name}`" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "file", "data", "says"),
    [
        ("videomme", "output_test_template.json", [{"duration": "short"}], "video 0: has no `questions`"),
        ("videomme", "output_test_template.json", [{"videoID": "a", "questions": [{"question": "?"}]}],
         "video 0: has no options in options"),
        ("mvbench", "action_count.json", [{"video": "a.mp4", "question": "?", "candidates": ["1"], "answer": "2"}],
         "question 0: the answer '2' is none of the candidates"),
        ("mvbench", "action_count.json", [{"video": "a.mp4", "question": "?", "candidates": "1", "answer": "2"}],
         "expected a list of options"),
    ],
)  # fmt: skip
def test_a_broken_file_is_named(name: str, file: str, data: Any, says: str, tmp_path: Path) -> None:
    choices.save(tmp_path / file, data)
    with pytest.raises(DataError, match=says.replace("`", ".")) as error:
        read_examples(TASKS[name], "test", tmp_path)
    assert "\n" not in str(error.value) and file in str(error.value)
