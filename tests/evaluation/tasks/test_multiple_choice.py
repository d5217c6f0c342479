"""MMMU, MMBench, ScienceQA, A-OKVQA, MMStar: read in every form, asked as published, scored as by hand."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from benchmarks.evaluation.mini import choices
from polymodal.cli import main
from polymodal.errors import ConfigError, DataError, PolymodalError
from polymodal.evaluation.compare import rescore
from polymodal.evaluation.judge import judged
from polymodal.evaluation.results import read_results, read_samples, table
from polymodal.evaluation.runner import limited, prompt_text
from polymodal.evaluation.task import Example
from polymodal.evaluation.tasks import TASKS, find_data, find_task, read_examples
from tests.backends.conftest import FakeServer, server, tiny_vlm  # noqa: F401  # fixtures
from tests.evaluation.tasks.scripted import Says, assert_golden_prompt, plain, predicted, results_of, run_with

NAMES = ("mmmu", "mmbench", "scienceqa", "aokvqa", "mmstar")


@pytest.fixture(autouse=True)
def own_cache(private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def written(name: str, folder: Path, count: int = 4) -> list[Example]:
    choices.WRITERS[name](folder, count)
    return read_examples(TASKS[name], TASKS[name].splits[0], folder)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_question_is_asked_as_published(name: str, tmp_path: Path) -> None:
    choices.WRITERS[name](tmp_path, 8)
    assert_golden_prompt(TASKS[name], tmp_path)


def test_chinese_questions_are_asked_in_chinese(tmp_path: Path) -> None:
    choices.tsv(tmp_path / "MMBench_DEV_CN.tsv", choices.mmbench_rows(2))
    second = read_examples(TASKS["mmbench"], "cn_dev", tmp_path)[1]
    text = prompt_text(second.messages)
    assert text.startswith("<image>Count the shapes.\nWhat does the image show?\nA. ") and text.endswith(
        "\n请直接回答选项字母。"
    )


def test_open_questions_of_mmmu_are_asked_for_a_word(tmp_path: Path) -> None:
    last = next(example for example in written("mmmu", tmp_path) if example.metric == "mmmu_open")
    expected = "<image>How many shapes are in <image 1>?\n\nAnswer the question using a single word or phrase."
    assert prompt_text(last.messages) == expected


def lettered(row: dict[str, Any], name: str) -> dict[str, Any]:
    """A row with the columns A to D instead of a list of options."""
    options = row[name] if isinstance(row[name], list) else json.loads(row[name].replace("'", '"'))
    return {**{key: value for key, value in row.items() if key != name}, **choices.lettered(options)}


def other_forms(name: str, folder: Path) -> list[Path]:
    """The set as parquet of the hub and as VLMEvalKit's table."""
    hub, kit = folder / "hub", folder / "kit"
    if name == "mmmu":
        rows = choices.mmmu_rows(4)
        choices.parquet(hub / "data" / "validation-00000-of-00001.parquet", rows)
        images = [[row[key] for key in row if key.startswith("image_") and row[key]] for row in rows]
        kept = [{k: v for k, v in row.items() if not k.startswith("image_")} for row in rows]
        tables = [{"index": i, **lettered(r, "options"), "split": "validation", "image": images[i]}
                  for i, r in enumerate(kept)]  # fmt: skip
        choices.tsv(kit / "MMMU_DEV_VAL.tsv", [*tables, {**tables[0], "id": "dev_Art_1", "split": "dev"}])
    elif name == "mmbench":
        rows = [{"L2-category" if k == "l2-category" else k: v for k, v in r.items()} for r in choices.mmbench_rows(4)]
        rows = [{**r, "hint": r["hint"] or "nan", **{c: r[c] or "nan" for c in "ABCD"}} for r in rows]
        choices.parquet(hub / "en" / "dev-00000-of-00001.parquet", rows)
        for row in (rows := choices.mmbench_rows(4)):  # passes share the image of the first
            row["image"] = row["image"] if row["index"] < 1_000_000 else str(row["index"] % 1_000_000)
        choices.tsv(kit / "mmbench_dev_20230712.tsv", rows)
    elif name == "scienceqa":
        choices.parquet(hub / "ScienceQA-FULL" / "test-00000-of-00001.parquet", choices.scienceqa_rows(4))
        rows = [{"index": i, **lettered(row, "choices"), "answer": "ABCD"[row["answer"]]}
                for i, row in enumerate(choices.scienceqa_rows(4))]  # fmt: skip
        choices.tsv(kit / "ScienceQA_TEST.tsv", rows)
    elif name == "aokvqa":
        choices.parquet(hub / "data" / "validation-00000-of-00001.parquet", choices.aokvqa_rows(4))
        rows = [{**lettered(row, "choices"), "answer": "ABCD"[row["correct_choice_idx"]]}
                for row in choices.aokvqa_rows(4)]  # fmt: skip
        choices.tsv(kit / "A-OKVQA.tsv", [{k: v for k, v in r.items() if k != "correct_choice_idx"} for r in rows])
    else:
        choices.parquet(hub / "val-00000-of-00001.parquet", choices.mmstar_rows(4))
        rows = []
        for row in choices.mmstar_rows(4):
            question, texts = row["question"].split("\nOptions: ")
            options = [text.split(": ")[1] for text in texts.split(", ")]
            rows.append({**row, "question": question, **choices.lettered(options)})
        choices.tsv(kit / "MMStar.tsv", rows)
    return [hub, kit]


@pytest.mark.parametrize(("name", "folder"), [("scienceqa", "test"), ("aokvqa", "val2017"), ("pope", "val2014")])
def test_images_are_found_wherever_they_lie(name: str, folder: str, tmp_path: Path) -> None:
    before = plain(written(name, tmp_path))
    (tmp_path / "elsewhere" / "images").mkdir(parents=True)
    (tmp_path / folder).rename(tmp_path / "elsewhere" / "images" / folder)
    assert plain(read_examples(TASKS[name], TASKS[name].splits[0], tmp_path)) == before


@pytest.mark.parametrize("name", NAMES)
def test_every_form_gives_the_same_questions(name: str, tmp_path: Path) -> None:
    official = plain(written(name, tmp_path / "official"))
    for folder in other_forms(name, tmp_path):
        assert plain(read_examples(TASKS[name], TASKS[name].splits[0], folder)) == official, folder
    assert [row[2] for row in official if row[2]], "no images were compared"


def test_mmmu_counts_what_it_draws(tmp_path: Path) -> None:
    examples = written("mmmu", tmp_path, 8)
    right = {e.id.removeprefix("validation_"): e.references[0] for e in examples}
    said: dict[str, str | None] = {
        "Art_1": f"({right['Art_1']})", "Art_2": "(Q)", "Accounting_3": "Hard to say.",
        "Accounting_4": f"The answer is {right['Accounting_4']}.", "Biology_5": right["Biology_5"], "Biology_6": None,
        "Computer_Science_7": right["Computer_Science_7"], "Computer_Science_8": "seven",
    }  # fmt: skip
    said["Art_2"] = next(letter for letter in "ABC" if letter != right["Art_2"])
    run = run_with(TASKS["mmmu"], examples, {f"validation_{name}": answer for name, answer in said.items()})
    drawn = random.Random("0/validation_Accounting_3").choice("ABCD") == right["Accounting_3"]
    document = results_of(TASKS["mmmu"], run)
    assert document["figures"] == {
        "accuracy": (4 + drawn) / 8, "Art and Design": 1 / 2, "Business": (1 + drawn) / 2, "Science": 1 / 2,
        "Tech and Engineering": 1 / 2, "n_random_fallback": 1,
    }  # fmt: skip
    assert "| - n_random_fallback | | | 1 | |" in table([document])
    (path,) = TASKS["mmmu"].submit(run.samples, "val", tmp_path)
    sent = json.loads(path.read_text())
    assert len(sent) == 8 and sent["validation_Art_1"] == right["Art_1"]
    assert sent["validation_Accounting_3"] in "ABCD" and sent["validation_Accounting_4"] == said["Accounting_4"]


def test_released_answers_are_taken_from_their_file(tmp_path: Path) -> None:
    rows = [{**row, "id": row["id"].replace("validation", "test"), "answer": "?"} for row in choices.mmmu_rows(4)]
    choices.parquet(tmp_path / "Art" / "test-00000-of-00001.parquet", rows)
    assert {e.references for e in read_examples(TASKS["mmmu"], "test", tmp_path)} == {()}
    gold = {row["id"]: {"question_type": "short-answer", "ground_truth": ["3", "three"]} for row in rows}
    choices.save(tmp_path / "answer_dict_test.json", gold)
    assert {e.references for e in read_examples(TASKS["mmmu"], "test", tmp_path)} == {("3", "three")}


def mmbench_answers(examples: Sequence[Example]) -> dict[str, str | None]:
    """The second question loses a pass, the third says a text once, the fourth cannot be read once."""
    said: dict[str, str | None] = {e.id: e.references[0] for e in examples}
    options = {e.id: e.options["options"] for e in examples}
    said["2000001"] = next(letter for letter in "ABC" if letter != said["2000001"])
    said["1000002"] = f"It shows {options['1000002'][said['1000002']]}"
    said["1000003"] = "No idea at all, sorry"
    return said


def test_mmbench_needs_every_pass(tmp_path: Path) -> None:
    examples = written("mmbench", tmp_path)
    document = results_of(TASKS["mmbench"], run_with(TASKS["mmbench"], examples, mmbench_answers(examples)))
    assert len(examples) == 14
    assert document["figures"] == {
        "circular, exact matching": 2 / 4, "vanilla, exact matching": 12 / 14, "object_localization": 1 / 2,
        "attribute_recognition": 1 / 2,
    }  # fmt: skip
    low, high = document["interval"]
    assert 0 <= low < 0.5 < high <= 1
    assert "| mmbench en_dev | circular, exact matching | 14 | 50.0% |" in table([document])


def judge_of(examples: Sequence[Example]) -> Any:
    right = next(e.references[0] for e in examples if e.id == "1000003")
    return {
        "right": (lambda _: f"{right}.", 3 / 4, 1, 0, 1),
        "none of them": (lambda _: "Z", 2 / 4, 1, 0, 1),
        "unclear": (lambda _: "it is hard to tell which of the two it might be", 2 / 4, 1, 1, 3),
        "fails": (lambda _: PolymodalError("no answer"), 2 / 4, 1, 1, 3),
        "breaks": (lambda _: RuntimeError("broken"), 2 / 4, 1, 1, 1),
    }


@pytest.mark.parametrize("kind", ["right", "none of them", "unclear", "fails", "breaks"])
def test_a_judge_reads_what_heuristics_cannot(kind: str, tmp_path: Path) -> None:
    examples = written("mmbench", tmp_path)
    answer, circular, read, failed, times = judge_of(examples)[kind]
    run = run_with(TASKS["mmbench"], examples, mmbench_answers(examples))
    judge = Says(answer)
    run.samples = judged(judge, run.samples)
    figures = results_of(TASKS["mmbench"], run)["figures"]
    assert (figures["circular"], figures["n_judged"], figures["n_judge_failed"]) == (circular, read, failed)
    assert len(judge.heard) == times and all("Answer: No idea at all, sorry\n" in text for text in judge.heard)
    again = [s.score for s in run.samples]
    assert [s.score for s in rescore(run.samples)] == again  # a judge's letter is kept
    secret = [replace(s, references=(), score=None, options={"options": s.options["options"]}) for s in run.samples]
    silent = Says(answer)
    assert not any(s.options["judged"] for s in judged(silent, secret)) and not silent.heard
    blind = rescore([replace(s, blind="No idea either, sorry") for s in run.samples])
    assert not any(s.blind_score for s in blind)  # the letter is that of another answer


def test_the_servers_table_has_every_pass(tmp_path: Path) -> None:
    examples = written("mmbench", tmp_path, 2)
    said: dict[str, str | None] = {**{e.id: e.references[0] for e in examples}, "0": "=1+1", "1": None}
    run = run_with(TASKS["mmbench"], examples, said)
    (path,) = TASKS["mmbench"].submit(run.samples, "en_dev", tmp_path)
    head, *rows = openpyxl.load_workbook(path).active.iter_rows(values_only=True)
    assert head == ("index", "question", "A", "B", "C", "D", "answer", "prediction")
    assert [row[0] for row in rows] == [int(e.id) for e in examples]
    first = choices.mmbench_rows(2)[0]
    assert rows[0] == (0, first["question"], *(first[c] for c in "ABCD"), first["answer"], "=1+1")
    assert rows[1][5] is None and rows[1][7] is None


def test_limit_keeps_questions_whole(tmp_path: Path) -> None:
    examples = written("mmbench", tmp_path)
    kept = limited(examples, 1, "group")
    assert {e.extra["group"] for e in kept} == {"0", "2"} and len(kept) == 8
    assert len(limited(examples, 1)) == 2


def test_scienceqa_by_image_and_subject(tmp_path: Path) -> None:
    examples = written("scienceqa", tmp_path, 6)
    wrong = {e.id: "BA"[e.references[0] == "B"] for e in examples}
    right = {e.id: e.references[0] for e in examples}
    said: dict[str, str | None] = {
        **wrong,
        "0": right["0"],
        "1": f"The answer is {right['1']}.",
        "2": f"{right['2']}. x",
    }
    figures = results_of(TASKS["scienceqa"], run_with(TASKS["scienceqa"], examples, said))["figures"]
    assert figures == {"IMG": 2 / 4, "all": 3 / 6, "natural science": 2 / 3, "social science": 1 / 3}
    assert [e.extra["image"] for e in examples] == [True, True, False, True, True, False]
    assert not examples[2].messages[0].media


def test_aokvqa_both_ways(tmp_path: Path) -> None:
    examples = written("aokvqa", tmp_path)
    rows = choices.aokvqa_rows(4)
    names = [row["question_id"] for row in rows]
    letter = ["ABCD"[row["correct_choice_idx"]] for row in rows]
    shape = json.loads(rows[0]["direct_answers"].replace("'", '"'))[0]
    spoken = [letter[0], rows[1]["choices"][rows[1]["correct_choice_idx"]], "BA"[letter[2] == "B"], "what?"]
    direct = [shape, "thing", "shape", "anything"]
    said: dict[str, str | None] = {f"{n}/multiple_choice": text for n, text in zip(names, spoken, strict=True)}
    said |= {f"{n}/direct_answer": text for n, text in zip(names, direct, strict=True)}
    run = run_with(TASKS["aokvqa"], examples, said)
    figures = results_of(TASKS["aokvqa"], run)["figures"]
    assert figures == {"multiple_choice": 2 / 4, "direct_answer": pytest.approx((1 + 1 / 3 + 2 / 3) / 3)}
    (path,) = TASKS["aokvqa"].submit(run.samples, "val", tmp_path)
    sent = json.loads(path.read_text())
    assert list(sent) == names
    assert sent[names[0]] == {"multiple_choice": rows[0]["choices"]["ABCD".index(letter[0])], "direct_answer": shape}
    assert sent[names[3]] == {"multiple_choice": "what?", "direct_answer": "anything"}
    assert predicted(TASKS["aokvqa"], tmp_path, sent)["figures"] == figures


def test_mmstar_by_category(tmp_path: Path) -> None:
    examples = written("mmstar", tmp_path)
    said: dict[str, str | None] = {e.id: e.references[0] for e in examples}
    said["1"] = "Z"
    figures = results_of(TASKS["mmstar"], run_with(TASKS["mmstar"], examples, said))["figures"]
    assert figures == {"accuracy": 3 / 4, "coarse perception": 1.0, "instance reasoning": 1 / 2}


def test_a_secret_split_is_asked_and_sent(tmp_path: Path, tiny_model_folder: Path, capsys: Any) -> None:
    rows = [{k: v for k, v in row.items() if k != "answer"} for row in choices.mmbench_rows(1)]
    choices.tsv(tmp_path / "data" / "MMBench_TEST_EN_V11.tsv", rows)
    out = tmp_path / "out"
    command = ["eval", str(tiny_model_folder), "--tasks", "mmbench_en_test_v11", "--data-root", str(tmp_path / "data")]
    assert main([*command, "--output", str(out), "--device", "cpu", "--max-new-tokens", "2"]) == 0
    assert read_results(out)["tasks"]["mmbench_en_test_v11"]["score"] is None
    sheet = openpyxl.load_workbook(out / "mmbench_en_test_v11" / "mmbench_en_test_v11.xlsx").active
    assert sheet.max_row == 5 and {row[6] for row in sheet.iter_rows(min_row=2, values_only=True)} == {None}
    assert "| mmbench (en_test_v11) | mmbench extract | 4 | - |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "break_it", "says"),
    [
        ("mmbench", lambda rows: rows[1].pop("question"), "line 3: the column `question` is empty"),
        ("mmbench", lambda rows: [row.pop("question") for row in rows], "line 2: the column `question` is not there"),
        ("mmbench", lambda rows: rows.append(rows[0]), "question 0 comes twice"),
        ("mmbench", lambda rows: rows[1].update(image="!" * 200), "`image` is no base64"),
        ("mmbench", lambda rows: rows[1].update(image="77"), "is the index of no row with an image"),
        ("mmbench", lambda rows: [rows[1].update({c: "nan"}) for c in "ABCD"], "has no options in A, B, ..."),
        ("mmbench", lambda rows: rows[1].update(index="one"), "`index` is 'one', expected a number"),
    ],
)
def test_a_broken_table_is_named(name: str, break_it: Any, says: str, tmp_path: Path) -> None:
    rows = choices.mmbench_rows(2)
    break_it(rows)
    choices.tsv(tmp_path / "MMBench_DEV_EN.tsv", rows)
    with pytest.raises(DataError, match=says.replace("`", ".").replace("(", ".")) as error:
        read_examples(TASKS[name], "en_dev", tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_cell_that_is_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written("mmbench", tmp_path)
    monkeypatch.setattr("polymodal.evaluation.files.MAX_CELL", 100)
    before = csv.field_size_limit(50)
    try:
        with pytest.raises(DataError, match=r"DEV_EN.tsv: after line 1: field larger .* at most 100 characters"):
            read_examples(TASKS["mmbench"], "en_dev", tmp_path)
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mmmu_validation", "mmmu has the splits val, test, dev"),
        ("mmbench_dev", "mmbench has the splits en_dev"),
        ("mmbnch", "did you mean 'mmbench'"),
    ],
)
def test_a_wrong_split_names_those_there_are(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        find_task(name)


def test_an_empty_folder_says_what_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of MMBench_DEV_EN.tsv, mmbench_dev_2\*.tsv, en/dev-\*.parquet is in it"):
        read_examples(TASKS["mmbench"], "en_dev", tmp_path)


def evaluated(model: str, data: Path, out: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    command = ["eval", model, "--tasks", "mmmu,mmbench", "--data-root", str(data), "--output", str(out), *flags]
    code = main([*command, "--limit", "1", "--max-new-tokens", "3"])
    return code, read_results(out)["tasks"]


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    for name in ("mmmu", "mmbench"):
        choices.WRITERS[name](folder / name, 4)
    return folder


def test_a_model_of_ours_from_the_folder_to_the_table(
    two_sets: Path, tiny_model_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    code, tasks = evaluated(str(tiny_model_folder), two_sets, tmp_path / "out", "--device", "cpu")
    assert code == 0 and {name: task["n"] for name, task in tasks.items()} == {"mmmu_val": 2, "mmbench_en_dev": 8}
    assert {p.name for p in (tmp_path / "out" / "mmbench_en_dev").iterdir()} == {"samples.jsonl", "mmbench_en_dev.xlsx"}
    shown = capsys.readouterr().out
    assert "| mmmu val | accuracy | 2 |" in shown and "| mmbench en_dev | circular, exact matching | 8 |" in shown
    assert main(["eval", "rescore", str(tmp_path / "out" / "mmmu_val"), "--variant", "vlmevalkit"]) == 0
    assert "| - n_random_fallback | | | 0 | |" in capsys.readouterr().out


def test_a_model_of_transformers(two_sets: Path, tiny_vlm: Any, tmp_path: Path) -> None:  # noqa: F811
    code, tasks = evaluated(str(tiny_vlm("smolvlm")), two_sets, tmp_path / "out", "--device", "cpu")
    assert code == 0 and {name: task["failed"] for name, task in tasks.items()} == {"mmmu_val": 0, "mmbench_en_dev": 0}


def test_an_endpoint_and_its_judge(two_sets: Path, server: FakeServer, tmp_path: Path, capsys: Any) -> None:  # noqa: F811
    def reply(handler: Any) -> None:
        asks = json.dumps(server.bodies[-1])
        text = "A" if server.bodies[-1]["model"] == "judge" else "Well, who knows" if "image_url" in asks else "A"
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        body = json.dumps({"object": "chat.completion", "model": "m", "choices": [choice]}).encode()
        handler.send_response(200)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    server.plays(reply)
    flags = ("--base-url", server.url, "--concurrency", "1", "--judge", "openai:judge")
    code, tasks = evaluated("openai:tiny", two_sets, tmp_path / "out", *flags)
    assert code == 0 and tasks["mmbench_en_dev"]["judge"] == "openai:judge"
    figures = tasks["mmbench_en_dev"]["figures"]
    assert (figures["circular"], figures["n_judged"], figures["n_judge_failed"]) == (0.0, 8, 0)
    samples = read_samples(tmp_path / "out" / "mmbench_en_dev")
    assert all(s.options["judged"] == {"Well, who knows": "A"} for s in samples) and figures["vanilla"] == 2 / 8
    kept = ["eval", "rescore", str(tmp_path / "out" / "mmbench_en_dev"), "--base-url", server.url]
    assert main([*kept, "--judge", "openai:judge"]) == 0
    assert "| mmbench en_dev | circular | 8 | 0.0% |" in capsys.readouterr().out


def test_a_judge_needs_something_to_judge(two_sets: Path, capsys: Any) -> None:
    assert main(["eval", "default", "--tasks", "mmmu", "--data-root", str(two_sets), "--judge", "default"]) == 2
    assert "--judge default: none of mmmu is read by a judge" in capsys.readouterr().err


HUB = {  # a file of each split, as the hub has it
    "mmmu_val": "Art/validation-00000-of-00001.parquet", "mmmu_test": "Art/test-00000-of-00001.parquet",
    "mmbench_en_dev": "en/dev-00000-of-00001.parquet", "mmbench_cn_test": "cn/test-00000-of-00001.parquet",
    "scienceqa_val": "ScienceQA-FULL/validation-00000-of-00001.parquet",
    "aokvqa_val": "data/validation-00000-of-00001-b2bd0de231b6326a.parquet", "mmstar_val": "mmstar.parquet",
    "pope_test": "data/test-00000-of-00003.parquet", "mme_test": "data/test-00000-of-00004.parquet",
    "videomme_test": "videomme/test-00000-of-00001.parquet", "mvbench_test": "json/action_count.json",
    "librispeech_test_clean": "data/librispeech_test_clean-00000-of-00001.parquet",
}  # fmt: skip


@pytest.mark.parametrize("name", list(HUB))
def test_only_a_splits_own_files_are_fetched(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(hub: str, repo_type: str, allow_patterns: list[str]) -> str:
        asked.update(hub=hub, patterns=allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    task, split = find_task(name)
    assert find_data(task, split, None) == tmp_path and asked["hub"] == task.hub
    fetched = [other for other, file in HUB.items() if any(fnmatch(file, pattern) for pattern in asked["patterns"])]
    assert [other for other in fetched if find_task(other)[0] is task] == [name]
    assert set(task.hub_files) <= set(task.splits)


def test_a_split_that_the_hub_has_not_is_named() -> None:
    with pytest.raises(DataError, match="lmms-lab-encoder/MMBench has no split en_dev_v11"):
        find_data(*find_task("mmbench_en_dev_v11"), None)


def test_scienceqas_validation_is_found_on_the_hub(tmp_path: Path) -> None:
    choices.parquet(tmp_path / "ScienceQA-FULL" / "validation-00000-of-00001.parquet", choices.scienceqa_rows(2))
    assert len(read_examples(TASKS["scienceqa"], "val", tmp_path)) == 2
