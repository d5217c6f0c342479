"""The recipes of BLIP-2, shrunk, on drawn shapes: data, tokenizer, both stages, an answer, and the table of figures."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from polymodal.cli import main
from polymodal.errors import ConfigError
from polymodal.training.recipes.pipeline import load_pipeline
from polymodal.training.reporting.log import read_log

BLIP2 = Path(__file__).parents[3] / "recipes" / "blip2"
SMALL = "{num_query_tokens: 4, hidden_size: 16, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 32}"


@pytest.mark.slow
def test_the_recipes_run_one_after_the_other(
    tmp_path: Path, tiny_llm_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "blip2"
    overrides = [
        f"output_dir={out}",
        "stages.data.size=tiny",
        f"stages.stage2.init.model.llm.model_name_or_path={tiny_llm_folder}",
        f"stages.stage2.init.model.projector.qformer={SMALL}",
        f"stages.stage1.init.model.qformer={SMALL}",
        "stages.answer.max_new_tokens=4",
    ]
    for stage in ("stage1", "stage2"):
        overrides += [
            f"stages.{stage}.run.{key}" for key in ("max_steps=3", "log_every=1", "threads=1", "eval_every=3")
        ]
        overrides += [f"stages.{stage}.run.precision=fp32", f"stages.{stage}.batch.global_size=8"]
    assert main(["train", str(BLIP2 / "pipeline.yaml"), *overrides]) == 0
    assert json.loads((out / "answer" / "answer.json").read_text())["usage"]["completion_tokens"] > 0
    assert [line["terms"].keys() for line in read_log(out / "stage1" / "log.jsonl")] == [{"itc", "itm", "itg"}] * 3
    # Both stages read what the tower gave once.
    assert len(list((out / "features").iterdir())) == 1

    capsys.readouterr()
    score = runpy.run_path(str(BLIP2 / "evaluate.py"))["main"]
    found = score(
        [str(out), "--data", str(out / "data" / "val.json"), "--json", str(out / "scores.json"), "--rerank", "3"]
    )
    shown = capsys.readouterr().out
    assert "| image to text @1 |" in shown and "| questions | word recall |" in shown and "matching:" in shown
    assert json.loads((out / "scores.json").read_text()) == json.loads(json.dumps(found))
    held_out = json.loads((out / "data" / "val.json").read_text())
    assert found["captions"]["kinds"][0]["n"] == found["images"] == len(held_out)
    look = read_log(out / "stage1" / "eval.jsonl")[-1]
    assert found["recall"] == pytest.approx(look["recall"], abs=0.1) and found["chance"] == pytest.approx(
        look["chance"]
    )
    assert 0 <= found["matching"]["balanced"] <= 1

    score = ["eval", str(out / "stage1" / "final"), "--task", "retrieval", "--data", str(out / "data" / "val.json")]
    assert main([*score, "--output", str(out / "scores")]) == 0
    assert "image to text @1" in capsys.readouterr().out


def test_arguments_of_a_script_are_checked(tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline.yaml"
    (tmp_path / "script.py").write_text("def main(folder, size=1):\n    (folder / 'size').write_text(str(size))\n")
    pipeline.write_text(
        f"name: x\noutput_dir: {tmp_path}/out\nstages:\n  one: {{make: script.py, arguments: {{size: 3}}}}\n"
    )
    assert main(["train", str(pipeline)]) == 0
    assert (tmp_path / "out" / "one" / "size").read_text() == "3"
    assert main(["train", str(pipeline), "stages.one.arguments={sizes: 3}", f"output_dir={tmp_path}/other"]) == 2
    assert not (tmp_path / "other" / "one").exists()
    with pytest.raises(ConfigError, match=r"stages\.data: build"):
        load_pipeline(BLIP2 / "pipeline.yaml", ["stages.data.build=pears"])
