"""`polymodal eval`: runs that are killed, output that cannot be written, rescoring, comparing."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image as PILImage

from polymodal.cli import main
from polymodal.evaluation.task import Example, Task
from polymodal.evaluation.tasks import TASKS
from polymodal.messages import user
from tests.backends.conftest import running

pytestmark = pytest.mark.usefixtures("private_cache")

COLOURS = ("red", "green", "blue", "white")


def echo(handler: Any, text: str) -> None:
    body = json.dumps({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}).encode()
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Any]:
    """An endpoint that says how many bytes it was shown, and remembers every question."""
    with running() as server:
        fake: Any = server
        fake.questions = []
        fake.pause = 0.0

        def play(handler: Any) -> None:
            content = json.dumps(fake.bodies[-1]["messages"])
            time.sleep(fake.pause)
            fake.questions.append(content)
            echo(handler, f"seen {len(content)}")

        fake.plays(play)
        yield fake


def rows(folder: Path, count: int = 12, **more: Any) -> Path:
    """A data file of questions about small images."""
    made = []
    for n in range(count):
        PILImage.new("RGB", (8 + n, 8), COLOURS[n % 4]).save(folder / f"{n}.png")
        asked = {"from": "human", "value": f"<image>\nWhich colour{'?' * n}"}
        turns = [asked, {"from": "gpt", "value": COLOURS[n % 4]}]
        made.append({"id": str(n), "image": f"{n}.png", "kind": "exists", "conversations": turns, **more})
    (folder / "rows.json").write_text(json.dumps(made))
    return folder / "rows.json"


def command(*args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "polymodal.cli", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def killed(process: subprocess.Popen[str], when: Callable[[], bool]) -> None:
    """Kill a process as soon as something is so."""
    end = time.monotonic() + 120
    while not when():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def written(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.suffix in (".json", ".jsonl")
    }


def test_a_run_against_an_endpoint_that_was_killed_goes_on(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rows(tmp_path)
    ask = ["eval", "openai:tiny", "--base-url", server.url, "--data", str(data), "--concurrency", "2"]
    server.pause = 0.1
    killed(command(*ask, "--output", tmp_path / "out"), lambda: len(server.questions) >= 7)
    before = len(server.questions)
    server.pause = 0.0
    assert main([*ask, "--output", str(tmp_path / "out")]) == 0
    twice = sum(count - 1 for count in Counter(server.questions).values())
    assert before >= 7 and twice <= 2 and len(server.questions) <= 24 + 2  # only what was under way when it was killed
    asked = len(server.questions)
    assert main([*ask, "--output", str(tmp_path / "out")]) == 0 and len(server.questions) == asked
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "fresh"))
    assert main([*ask, "--output", str(tmp_path / "whole")]) == 0
    assert written(tmp_path / "out") == written(tmp_path / "whole") and len(written(tmp_path / "out")) == 2


def test_a_run_of_a_model_folder_that_was_killed_goes_on(
    tiny_model_folder: Path, private_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rows(tmp_path, 16)
    ask = ["eval", str(tiny_model_folder), "--device", "cpu", "--data", str(data), "--batch-size", "2"]

    def begun() -> bool:
        return any(path.read_bytes().count(b"\n\n") >= 3 for path in private_cache.rglob("answers-*.jsonl"))

    killed(command(*ask, "--output", tmp_path / "out"), begun)
    kept = sum(path.read_bytes().count(b'{"answers"') for path in private_cache.rglob("answers-*.jsonl"))
    assert main([*ask, "--output", str(tmp_path / "out")]) == 0
    lines = [
        json.loads(line) for path in private_cache.rglob("answers-*.jsonl") for line in path.open() if line.strip()
    ]
    assert kept < len(lines) and max(Counter(key for line in lines for key in line["answers"]).values()) == 1
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "fresh"))
    assert main([*ask, "--output", str(tmp_path / "whole")]) == 0
    assert written(tmp_path / "out") == written(tmp_path / "whole")


def test_two_processes_write_what_one_does_and_write_it_once(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = ["eval", str(tiny_model_folder), "--device", "cpu", "--data", str(rows(tmp_path)), "--batch-size", "2"]
    run = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        run.append(str(free.getsockname()[1]))
    argv = [sys.executable, *run, "-m", "polymodal.cli", *ask, "--output", str(tmp_path / "two")]
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=180, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| rows |") == 1 and done.stderr.count("wrote ") == 1
    monkeypatch.setenv("POLYMODAL_CACHE", str(tmp_path / "fresh"))
    assert main([*ask, "--output", str(tmp_path / "one")]) == 0
    assert written(tmp_path / "one") == written(tmp_path / "two")
    assert (tmp_path / "one" / "report.html").read_bytes() == (tmp_path / "two" / "report.html").read_bytes()


def test_two_runs_at_once(server: Any, tmp_path: Path) -> None:
    data = rows(tmp_path)
    server.pause = 0.02
    ask = ["eval", "openai:tiny", "--base-url", server.url, "--data", data]
    both = [command(*ask, "--output", tmp_path / name) for name in "ab"]
    for process in both:
        assert process.wait(120) == 0, process.communicate()[0]
    assert written(tmp_path / "a") == written(tmp_path / "b")
    before = len(server.questions)
    assert main([*map(str, ask), "--output", str(tmp_path / "c")]) == 0 and len(server.questions) == before


def test_failed_items_are_counted_and_the_exit_status_is_1(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows(tmp_path, 4)
    (tmp_path / "1.png").write_bytes(b"no image")
    out = tmp_path / "scores.json"
    ask = ["eval", "openai:tiny", "--base-url", server.url, "--data", str(data), "--output", str(tmp_path / "out")]
    assert main([*ask, "--json", str(out)]) == 1
    said = capsys.readouterr().out
    assert "4 (1 failed)" in said and "1 of 4 items failed" in said
    document = json.loads(out.read_text())
    assert document["tasks"]["rows"]["failed"] == 1 and document["items"][1]["answer"] is None


def test_an_endpoint_that_is_down(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from polymodal.backends.openai import http

    monkeypatch.setattr(http.Endpoint, "_wait", lambda self, error, *_: (_ for _ in ()).throw(error))
    data = rows(tmp_path, 3)
    ask = ["eval", "openai:tiny", "--base-url", "http://127.0.0.1:9/v1", "--data", str(data)]
    assert main([*ask, "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no question was answered" in error
    assert json.loads((tmp_path / "out" / "results.json").read_text())["tasks"] == {}


def test_an_endpoint_that_is_out_of_order(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from polymodal.backends.openai import http

    monkeypatch.setattr(http, "Patience", partial(http.Patience, retries=1, first_wait_s=0.001))
    play, data = server.script[0], rows(tmp_path, 80)
    server.plays(*[play] * 20, lambda handler: handler.send_error(503))
    ask = ["eval", "openai:tiny", "--base-url", server.url, "--data", str(data), "--output", str(tmp_path / "out")]
    assert main([*ask, "--concurrency", "4", "--no-blind"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "20 questions in a row reached no server" in error and "503" in error
    assert len(server.questions) == 20 and len(server.bodies) <= 20 + 2 * (20 + 4)
    server.plays(play)
    assert main([*ask, "--no-blind"]) == 0 and len(server.questions) == 80


def test_outputs_that_cannot_be_written_are_noticed_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = rows(tmp_path, 2)
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text("{")
    for flags, said in [
        (["--output", tmp_path / "file"], "file"),
        (["--output", tmp_path / "file" / "below"], "cannot be written"),
        (["--output", "/proc/nowhere"], "cannot be written"),
        (["--output", tmp_path / "other"], "holds something else"),
        (["--output", tmp_path / "broken"], "cannot be read as results"),
        (["--json", tmp_path / "file" / "x.json"], "--json: "),
        (["--json", tmp_path], "is a folder"),
    ]:
        for task in ([], ["--tasks", "retrieval"]):  # the model is none, and would be the next thing to be said
            assert main(["eval", "no/model", "--data", str(data), *task, *map(str, flags)]) == 2
            error = capsys.readouterr().err
            assert said in error and "no/model" not in error and error.count("\n") == 1, error
    assert (
        main(["eval", "rescore", str(data), "--json", str(tmp_path)]) == 2 and "is a folder" in capsys.readouterr().err
    )


def test_mistakes_in_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_folder: Path
) -> None:
    data = str(rows(tmp_path, 2))
    out = ["--output", str(tmp_path / "out")]
    for args, said in [
        (["m", *out], "nothing to score"),
        (["m", "--data", data, "--limit", "0", *out], "--limit 0"),
        (["m", "--data", data, "--batch-size", "some", *out], "--batch-size some"),
        (["m", "--data", data, "--metric", "anlz", *out], "did you mean 'anls'"),
        (["m", "--data", data, "--metric", "textvqa_accuracy", *out], "question 0"),
        (["m", "--data", data, "--variant", "nobodys", *out], "variant"),
        (["m", "--metric", "anls", *out], "go with --data"),
        (["m", "--tasks", "vqa9", *out], "unknown task"),
        (["m", "--tasks", "demo_nosplit", *out], "splits"),
        (["m", "x", "--data", data, *out], "not understood"),
        ([str(tiny_model_folder), "--device", "cpu", "--data", data, "--concurrency", "3", *out], "--batch-size"),
    ]:
        assert main(["eval", *args]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error


def test_a_folder_belongs_to_one_model_and_keeps_its_other_tasks(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = rows(tmp_path, 4)
    monkeypatch.chdir(tmp_path)
    ask = ["--base-url", server.url, "--data"]
    assert main(["eval", "openai:org/tiny", *ask, str(data)]) == 0
    folder = tmp_path / "runs" / "eval" / "openai_org_tiny"  # the default
    (tmp_path / "more.json").write_text(data.read_text())
    assert main(["eval", "openai:org/tiny", *ask, "more.json", "--limit", "2", "--metric", "contains"]) == 0
    tasks = json.loads((folder / "results.json").read_text())["tasks"]
    assert {name: (task["n"], task["metric"], task["limit"]) for name, task in tasks.items()} == {
        "rows": (4, "exact", None), "more": (2, "contains", 2)
    }  # fmt: skip
    capsys.readouterr()
    assert main(["eval", "openai:other", *ask, str(data), "--output", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "another model ('openai:org/tiny'" in error and "openai:other" in error
    assert json.loads((folder / "results.json").read_text())["tasks"] == tasks


def test_names_of_models_as_names_of_folders() -> None:
    from polymodal.cli.eval import _folder_name

    named = {name: _folder_name(name) for name in ("runs/s/final", "org/m", "..", "/", "./m", "~/m", "x" * 500)}
    assert named == {
        "runs/s/final": "runs_s", "org/m": "org_m", "..": "model", "/": "model", "./m": "_m", "~/m": "__m",
        "x" * 500: "x" * 100,
    }  # fmt: skip


TOY = Task(
    "toy", "for tests", "exact", ("val", "test"),
    lambda _folder, split: [Example(str(n), (user(str(n)),), (f"a{n}",) if split == "val" else ()) for n in range(4)],
    max_new_tokens=4,
)  # fmt: skip


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark of four questions."""
    monkeypatch.setitem(TASKS, "toy", TOY)


@pytest.mark.usefixtures("toy")
def test_predictions_in_every_form_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right = {str(n): f"a{n}" for n in range(3)} | {"3": "wrong"}
    forms: dict[str, str] = {
        "object": json.dumps(right),
        "results": json.dumps({"results": [{"image_id": int(k), "caption": v} for k, v in right.items()]}),
        "array": json.dumps([{"questionId": k, "prediction": v, "answer": "a0"} for k, v in right.items()], indent=1),
        "lines": "\n".join(json.dumps({"question_id": int(k), "text": v}) for k, v in right.items()) + "\n\n",
        "bom": "\ufeff" + "\r\n".join(json.dumps({"id": k, "response": v}) for k, v in right.items()),
        "unicode": "\n".join(f'{{"id": "{k}", "answer": "{v}", "note": "a\u2028b"}}' for k, v in right.items()),
    }  # fmt: skip
    for name, text in forms.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
        assert (
            main(
                [
                    "eval",
                    "rescore",
                    str(tmp_path / name),
                    "--tasks",
                    "toy_val",
                    "--json",
                    str(tmp_path / "new" / "s.json"),
                ]
            )
            == 0
        )
        (task,) = json.loads((tmp_path / "new" / "s.json").read_text())["tasks"]
        assert (task["score"], task["n"], task["split"]) == (0.75, 4, "val"), name
    assert "| toy val | exact | 4 | 75.0% |" in capsys.readouterr().out
    (tmp_path / "one").write_text('{"id": 2, "answer": "a2"}')
    assert main(["eval", "rescore", str(tmp_path / "one"), "--tasks", "toy", "--allow-missing"]) == 0
    assert "| toy val | exact | 1 | 100.0% |" in capsys.readouterr().out
    assert main(["eval", "rescore", str(tmp_path / "object"), "--tasks", "toy_test"]) == 0
    assert "| toy (test) | exact | 4 | - |" in capsys.readouterr().out  # its answers are secret


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"0": "a", "1": "b"}', "2 of 4 questions have no answer (2, 3)"),
        ('{"0": "a", "1": "b", "2": "c", "3": "d", "9": "e"}', "1 ids are not in the split, first '9'"),
        ('{"0": "a", "0": "b", "2": "c", "3": "d"}', "id 0 comes twice"),
        ('[{"id": 0, "answer": "a"}, {"id": "0", "answer": "b"}]', "id 0 comes twice"),
        ('{"0": 3, "1": "b", "2": "c", "3": "d"}', "found int"),
        ('[{"id": 0, "answer": ["a"]}]', "found list"),
        ('[{"id": 0}]', "found none"),
        ('[{"answer": "a"}]', "needs an id"),
        ('[{"id": true, "answer": "a"}]', "needs an id"),
        ("[1]", "needs an id"),
        ("3", "expected a list"),
        ('{"id": 0, "answer": "a"}\n{"id": 1, ', "line 2 is no JSON"),
        ('[{"id": 0, "answer": "a"}', "is no JSON"),
        ("", "4 of 4 questions have no answer"),
        ("[" * 100000, "nested too deeply"),
    ],
)
def test_predictions_that_cannot_be_used(text: str, said: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "p.json").write_text(text)
    assert main(["eval", "rescore", str(tmp_path / "p.json"), "--tasks", "toy"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and len(error) < 600, error


def test_kept_answers_are_scored_again(server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = rows(tmp_path, 4, answers=["seen", "s"])
    ask = ["eval", "openai:tiny", "--base-url", server.url, "--data", str(data), "--output", str(tmp_path / "out")]
    assert main(ask) == 0
    before = len(server.questions)
    folder = tmp_path / "out" / "rows"
    capsys.readouterr()
    for path in (folder, folder / "samples.jsonl", tmp_path / "out"):
        for flags, score in (([], "exact | 4 | 0.0%"), (["--metric", "contains"], "contains | 4 | 100.0%")):
            assert main(["eval", "rescore", str(path), *flags]) == 0
            assert f"| rows | {score} |" in capsys.readouterr().out
    for args, said in (
        ([str(folder), "--metric", "foo"], "unknown metric 'foo'"),
        ([str(folder), "--metric", "textvqa_accuracy"], "question 0"),
        ([str(folder), "--variant", "x"], "--variant x: metric 'exact' has no variants"),
        ([str(tmp_path / "none")], "no such file"),
        ([str(folder), "--output", str(tmp_path / "new")], "--json"),
        ([str(data)], "line 1"),
    ):
        assert main(["eval", "rescore", *args]) == 2
        assert said in capsys.readouterr().err
    assert main(["eval", "rescore"]) == 2 and "needs a samples.jsonl" in capsys.readouterr().err
    assert len(server.questions) == before


def test_two_runs_beside_each_other(server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = rows(tmp_path, 4, answers=["seen"])
    ask = ["eval", "openai:tiny", "--base-url", server.url, "--data", str(data), "--no-blind"]
    assert main([*ask, "--output", str(tmp_path / "a")]) == 0
    assert main([*ask, "--metric", "contains", "--max-new-tokens", "5", "--output", str(tmp_path / "b")]) == 0
    capsys.readouterr()
    scores = tmp_path / "diff.json"
    assert main(["eval", "diff", str(tmp_path / "a"), str(tmp_path / "b"), "--json", str(scores)]) == 0
    (task,) = json.loads(scores.read_text())["tasks"]
    assert (task["p_value"], task["better"], len(task["flipped"])) == (0.125, 4, 4)
    said = capsys.readouterr().out
    assert "changed: extraction, decoding\n" in said and "| 0.125 | 4 | 0 |" in said
    assert re.search(r"0: 'seen \d+' \(0.00\) -> 'seen \d+' \(1.00\); right: 'seen'", said)
    assert main(["eval", "diff", str(tmp_path / "a"), str(tmp_path / "none")]) == 2
    assert "none: cannot be read as results" in capsys.readouterr().err
    assert main(["eval", "diff", str(tmp_path / "a")]) == 2 and "two results folders" in capsys.readouterr().err


def test_a_variant_that_some_tasks_lack(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TASKS, "toy", TOY)
    monkeypatch.setitem(TASKS, "toy2", replace(TOY, name="toy2", metric="anls"))
    ask = ["eval", "openai:tiny", "--base-url", server.url, "--output", str(tmp_path / "out"), "--variant", "lmms_eval"]
    assert main([*ask, "--tasks", "toy,toy2"]) == 0
    assert "toy: --variant lmms_eval: metric 'exact' has no variants; it is scored by its own rule" in (
        capsys.readouterr().err
    )
    tasks = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    assert {name: task["variant"] for name, task in tasks.items()} == {"toy_val": None, "toy2_val": "lmms_eval"}
    assert main([*ask, "--tasks", "toy"]) == 2 and "has no variants" in capsys.readouterr().err
    assert main(["eval", "rescore", str(tmp_path / "out"), "--variant", "lmms_eval"]) == 0
    said = capsys.readouterr()
    assert "| toy val |" in said.out and "toy_val: --variant lmms_eval: metric 'exact' has no variants" in said.err
    for path, variant in (("out/toy_val", "lmms_eval"), ("out", "nobodys")):
        assert main(["eval", "rescore", str(tmp_path / path), "--variant", variant]) == 2
        assert "variant" in capsys.readouterr().err


def test_the_list_of_tasks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "tasks"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("demo", "retrieval", "zero-shot"))


def test_several_tasks_and_the_files_of_a_server(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def submit(samples: Any, split: str, folder: Path) -> list[Path]:
        (folder / "answers.json").write_text(json.dumps({s.id: s.answer for s in samples}))
        return [folder / "answers.json"]

    monkeypatch.setitem(TASKS, "toy", replace(TOY, submit=submit))
    monkeypatch.setitem(TASKS, "toy2", replace(TOY, name="toy2"))
    ask = ["eval", "openai:tiny", "--base-url", server.url, "--output", str(tmp_path / "out")]
    assert main([*ask, "--tasks", "toy_test, toy2,toy_test"]) == 0
    document = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(document["tasks"]) == ["toy_test", "toy2_val"] and document["tasks"]["toy_test"]["score"] is None
    assert len(json.loads((tmp_path / "out" / "toy_test" / "answers.json").read_text())) == 4
    assert len(server.questions) == 4  # both ask the same
    said = capsys.readouterr()
    assert "| toy (test) | exact | 4 | - |" in said.out and "answers.json" in said.err
