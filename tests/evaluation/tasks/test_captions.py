"""COCO and NoCaps: read in every layout, asked as published, scored and submitted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.evaluation.mini import open_answers as mini
from polymodal.cli import main
from polymodal.evaluation.results import table
from polymodal.evaluation.tasks import TASKS
from polymodal.metrics.captions import cider
from tests.evaluation.tasks.open_answers import (
    change,
    check_fault,
    check_forms,
    check_prompt,
    contents,
    read,
    score,
    submission,
)


@pytest.mark.parametrize(
    ("name", "split", "forms"),
    [
        ("coco_caption", "val2014", ["official", "hub"]),
        ("coco_caption", "val2017", ["official", "tsv"]),
        ("nocaps", "val", ["official", "hub"]),
        ("nocaps", "test", ["official", "hub"]),
    ],
)
def test_every_form_gives_the_same_examples(tmp_path: Path, name: str, split: str, forms: list[str]) -> None:
    check_forms(tmp_path, name, split, forms)


@pytest.mark.parametrize("name", ["coco_caption", "nocaps"])
def test_the_prompt_is_the_published_one(tmp_path: Path, name: str) -> None:
    check_prompt(read(tmp_path, name, TASKS[name].splits[0])[0], name)
    assert TASKS[name].max_new_tokens == 64


def test_karpathys_split_is_a_part_of_val2014(tmp_path: Path) -> None:
    test, whole = (read(tmp_path, "coco_caption", split) for split in ("karpathy", "val2014"))
    assert len(test) == 4 and contents(test) == contents(whole)[::2]


def test_captions_are_scored_together_and_printed_as_papers_print_them(tmp_path: Path) -> None:
    examples = read(tmp_path, "coco_caption", "val2014")
    said = [example.references[1] for example in examples]
    scores = score("coco_caption", "val2014", examples, said)
    expected = cider(said, [example.references for example in examples])
    assert scores["score"] == pytest.approx(sum(expected) / 8) and scores["score"] > 1
    assert scores["figures"]["bleu_4"] == pytest.approx(1) and scores["figures"]["rouge_l"] == pytest.approx(1)
    assert f"| coco_caption val2014 | cider | 8 | {100 * scores['score']:.1f} | " in table([scores])
    assert "| - bleu_4 | | | 100.0 |" in table([scores]) and "%" not in table([scores]).replace("95%", "")
    # One that failed is an empty caption, and costs the mean its share.
    failed = score("coco_caption", "val2014", examples, [None, *said[1:]])
    assert failed["failed"] == 1 and failed["score"] == pytest.approx(sum(expected[1:]) / 8)


def test_nocaps_is_scored_by_domain_with_the_words_of_that_domain(tmp_path: Path) -> None:
    examples = read(tmp_path, "nocaps", "val")
    said = [example.references[0] for example in examples]
    scores = score("nocaps", "val", examples, said)
    own = slice(0, None, 3)
    inside = cider(said[own], [example.references for example in examples[own]])
    assert scores["figures"]["in-domain"] == pytest.approx(sum(inside) / len(inside))
    assert list(scores["figures"]) == ["score", "bleu_4", "rouge_l", "in-domain", "near-domain", "out-domain"]
    hub = score("nocaps", "val", read(tmp_path, "nocaps", "val", "hub"), said)
    assert hub["score"] == scores["score"] and "in-domain" not in hub["figures"]


def test_results_are_coco_results(tmp_path: Path) -> None:
    mini.OFFICIAL["coco_caption"](tmp_path / "coco", 3)
    assert submission("coco_caption", "val2014", tmp_path / "coco", ["A cat.", None]) == (
        b'[{"image_id": 391895, "caption": "A cat."}, {"image_id": 391896, "caption": ""}, '
        b'{"image_id": 391897, "caption": ""}]'
    )
    assert (tmp_path / "coco" / "out" / "captions_val2014_polymodal_results.json").is_file()
    mini.OFFICIAL["nocaps"](tmp_path / "nocaps", 3)
    assert submission("nocaps", "test", tmp_path / "nocaps", ["a", "b", "c"]) == (
        b'[{"image_id": 0, "caption": "a"}, {"image_id": 1, "caption": "b"}, {"image_id": 2, "caption": "c"}]'
    )


def test_secret_captions_give_no_score(tmp_path: Path) -> None:
    examples = read(tmp_path, "nocaps", "test")
    assert score("nocaps", "test", examples, ["a"] * 8)["score"] is None


def test_from_the_folder_to_the_results(
    tmp_path: Path, tiny_model_folder: Path, private_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("coco_caption", "nocaps"):
        mini.OFFICIAL[name](tmp_path / "data" / name, 4)
    names = "coco_caption,nocaps_test"
    argv = ["eval", str(tiny_model_folder), "--tasks", names, "--max-new-tokens", "3", "--limit", "1"]
    assert main([*argv, "--data-root", str(tmp_path / "data"), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert "| coco_caption karpathy | cider | 1 | 0.0 |" in printed.out  # of one image it is 0
    assert "karpathy_polymodal_results.json; 1 of 2 have no answer in it" in printed.err
    found = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    assert found["nocaps_test"]["score"] is None and found["coco_caption_karpathy"]["limit"] == 1
    sent = json.loads((tmp_path / "out" / "nocaps_test" / "nocaps_test_results.json").read_text())
    assert [row["image_id"] for row in sent] == [0, 1, 2, 3] and sent[3]["caption"] == ""


def test_faults_are_one_line(tmp_path: Path) -> None:
    mini.OFFICIAL["coco_caption"](tmp_path / "coco", 2)
    captions, karpathy = (tmp_path / "coco" / name for name in ("captions_val2014.json", "dataset_coco.json"))
    change(captions, lambda d: d.update(annotations=d["annotations"][:5]))
    check_fault(tmp_path / "coco", "coco_caption", "val2014", "row 1: `captions` is empty")
    change(captions, lambda d: d["annotations"][2].update(caption=None))
    check_fault(tmp_path / "coco", "coco_caption", "val2014", "annotation 2: `caption` is None, expected str")
    change(captions, lambda d: d["annotations"][2].update(caption="a", image_id="cat.jpg"))
    check_fault(
        tmp_path / "coco", "coco_caption", "val2014", "annotation 2: `image_id` is 'cat.jpg', expected a number"
    )
    change(karpathy, lambda d: d["images"][0].pop("split"))
    check_fault(tmp_path / "coco", "coco_caption", "karpathy", "row 0: has no `split`")
    mini.HUB["coco_caption"](tmp_path / "hub", 2)
    check_fault(tmp_path / "hub", "coco_caption", "val2017", "COCO_val2014_000000391895.jpg is no image of val2017")
    mini.OFFICIAL["nocaps"](tmp_path / "nocaps", 2)
    images = tmp_path / "nocaps" / "nocaps_val_4500_captions.json"
    change(images, lambda d: d["images"].append(d["images"][0]))
    check_fault(tmp_path / "nocaps", "nocaps", "val", "row 2: `captions` is empty")
