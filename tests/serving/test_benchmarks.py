"""The programs that ask a server: measuring it, wearing it down, comparing it with another one."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("hypothesis")

from benchmarks import client_check, serving, soak
from benchmarks.serve_process import Server
from tests.serving.conftest import Running


def test_one_client_asks_several_servers(tiny: Running, capsys: pytest.CaptureFixture[str]) -> None:
    assert client_check.main([f"{tiny.url}/v1", f"{tiny.url}/v1=tiny"]) == 0
    assert "8 questions, 2 servers, 0 answers that differ" in capsys.readouterr().out


def test_another_answer_is_seen(tiny: Running, told: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model, server = told()
    model.steps.release(10_000)
    assert client_check.main([f"{tiny.url}/v1", f"{server.url}/v1"]) == 1
    assert "another answer" in capsys.readouterr().out


def test_a_server_is_measured(
    tiny: Running, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WHOLE": 8, "STREAMED": 4, "STREAMS": (1, 4)}.items():
        monkeypatch.setattr(serving, name, value)
    server: Any = SimpleNamespace(url=tiny.url, peak=321.0)
    rows = {"polymodal serve": serving.Row(server, "tiny", {}), "llama.cpp Q8_0": serving.Row(server, "tiny", {})}
    serving.measure(rows, tiny.backend, 2)  # type: ignore[arg-type]
    assert {what: len(values) for what, values in rows["polymodal serve"].took.items()} == {
        "bare": 2, "whole": 2, "second": 2, "first": 2, "1": 1, "4": 1, "peak": 1,
    }  # fmt: skip
    serving.report(rows, {"stand-in: transformers": "does not start"})
    said = capsys.readouterr().out
    for line in (
        "321.0",
        "the server adds",
        "x the throughput of one",
        "prompts go one after the other",
        "as fast as llama.cpp Q8_0",
        "cannot: does not",
    ):
        assert line in said


def test_images_of_two_runs_differ() -> None:
    assert len({serving.picture(number) for number in (0, 1, 256)}) == 3


@pytest.mark.parametrize("number", range(3))
def test_damage_leaves_json_and_changes_it(number: int) -> None:
    draw = random.Random(number)
    for route in soak.routes():
        for body in route.bodies:
            if isinstance(body, dict):
                assert any(soak.mutated(body, draw) != body for _ in range(5)), route.path
            else:
                assert soak.flipped(body, draw) != body


def test_a_fault_of_a_server_is_found(tiny: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that answers with 500 is told from one that refuses."""
    monkeypatch.setattr(soak, "MODEL", "tiny")
    where: Any = SimpleNamespace(url=tiny.url)
    fuzzer = soak.Fuzzer(where, 0)
    fuzzer.routes = [route for route in fuzzer.routes if route.path == "/v1/chat/completions"]
    fuzzer.some()
    assert not fuzzer.faults and fuzzer.statuses["/v1/chat/completions"][400] > 10
    monkeypatch.setattr("polymodal.serving.app.read_request", lambda *_: 1 / 0)
    fuzzer.some()
    assert any("500" in fault for fault in fuzzer.faults)


@pytest.mark.parametrize(
    ("kept", "rest", "limit", "files", "told"),
    [
        ((100, 400), (1000, 1049), 512, (13, 20), []),  # caches that fill up are no growth
        ((100, 400), (1000, 1051), 512, (13, 13), ["memory beside the caches grew by 5.1%"]),
        ((400, 100), (1000, 1200), 512, (13, 13), ["memory beside the caches grew by 20.0%"]),  # nor do they hide one
        ((100, 400), (1000, 1000), 399, (13, 13), ["caches hold 400 MB, more than the 399 that they may"]),
        ((100, 100), (1000, 1000), 512, (13, 30), ["open files grew from 13 to 30"]),
    ],
)
def test_memory_is_judged_beside_the_caches(
    kept: tuple[int, int],
    rest: tuple[int, int],
    limit: int,
    files: tuple[int, int],
    told: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    server: Any = SimpleNamespace(alive=True, log="")
    sizes = [
        soak.Size(second, rest[late] + kept[late], kept[late], limit, files[late])
        for second in range(0, 1200, 10)
        for late in [int(second > 700)]
    ]
    assert soak.watched(server, sizes, 20) == told
    assert soak.watched(server, sizes[:1], 20) == []  # of a machine so slow that there was one look
    said = capsys.readouterr().out
    assert f"{kept[0]:7} {kept[1]:6}  {kept[1] / kept[0] - 1:+.1%}" in said and f"of {limit} MB at most" in said


def test_caches_tell_what_they_hold(tiny: Running) -> None:
    server = Server(None, tiny.url, None)  # type: ignore[arg-type]  # a server in this process
    assert tiny.post(soak.asks(soak.parts()["image"]) | {"model": "tiny"}).status_code == 200
    batcher = tiny.scheduler.batcher
    assert batcher is not None and batcher.prefixes is not None
    held = batcher.media.nbytes + batcher.prefixes.nbytes
    assert held > 1000 and server.kept == (pytest.approx(held / 2**20), 512 + 256)


@pytest.mark.slow
def test_both_modes(senses_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soak.main(["--fuzz", "0.1", "--soak", "0.1", "--clients", "3", "--model", str(senses_folder)])
    said = capsys.readouterr().out
    faults = [line for line in said.splitlines() if line.startswith("FAULT") and "caches grew" not in line]
    assert not faults and "routes: /v1/chat/completions" in said and "told to wait" in said
