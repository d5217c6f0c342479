"""The runner: batches, threads, kept answers, failures, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import wave
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from polymodal.backends.base import Answer, Backend, Reply, Timing, Usage
from polymodal.errors import ConfigError, DataError, EndpointError, PolymodalError
from polymodal.evaluation import runner
from polymodal.evaluation.results import summarise
from polymodal.evaluation.runner import Run, Settings, check_needs, limited, run_task
from polymodal.evaluation.task import Example, Sample, Task, score_samples
from polymodal.generation.params import GenerationParams
from polymodal.media.audio import open_audio
from polymodal.media.video import sample_frames
from polymodal.messages import Audio, Image, Message, Video, assistant, user

pytestmark = pytest.mark.usefixtures("private_cache")

TASK = Task("toy", "for tests", "exact", ("test",), lambda _folder, _split: ())


def questions(*texts: str, kind: str = "", **more: Any) -> list[Example]:
    return [Example(str(n), (user(text),), (text,), kind, **more) for n, text in enumerate(texts)]


class Echo(Backend):
    """Says the question again, one conversation at a time."""

    name = "echo"

    def __init__(self, fails: Callable[[str], Exception | None] = lambda _: None) -> None:
        self.fails = fails
        self.asked: list[str] = []

    def stream(self, messages: Any, params: GenerationParams | None = None) -> Iterator[Reply]:
        text = messages[-1].text
        self.asked.append(text)
        if (error := self.fails(text)) is not None:
            raise error
        yield Reply(assistant(text), Usage(1, 1, 1), Timing(0, 0, 0, 0, 0), "stop", self.name)


class Batches(Echo):
    """The same in batches, of which it holds so many."""

    name = "batches"

    def __init__(self, most: int = 99, said: str = "out of memory", fails: Any = lambda _: None) -> None:
        super().__init__(fails)
        self.most, self.said = most, said
        self.sizes: list[int] = []

    def generate_batch(self, conversations: Sequence[Any], params: GenerationParams) -> list[Answer]:
        self.sizes.append(len(conversations))
        if len(conversations) > self.most:
            raise RuntimeError(f"CUDA {self.said}: tried to allocate 20 GiB")
        return super().generate_batch(conversations, params)


class Drifting(Batches):
    """Its answers depend on how many are asked."""

    name = "drifting"

    def generate_batch(self, conversations: Sequence[Any], params: GenerationParams) -> list[Answer]:
        self.sizes.append(len(conversations))
        return [f"{messages[-1].text} of {len(conversations)}" for messages in conversations]


TEXTS = [f"question {'x' * (n % 7)} {n}" for n in range(40)]


@pytest.mark.parametrize("size", [1, 3, 16, 99, None])
def test_answers_do_not_depend_on_the_batch_size(size: int | None) -> None:
    run = run_task(Batches(), TASK, questions(*TEXTS), Settings(batch_size=size))
    assert [sample.answer for sample in run.samples] == TEXTS
    assert [sample.id for sample in run.samples] == [str(n) for n in range(40)]
    assert run.batch_size == (size or 16)


def test_identical_questions_are_asked_once_and_each_gets_the_answer() -> None:
    for model in (Batches(), Echo()):
        run = run_task(model, TASK, questions("a", "b", "a", "a"), Settings(batch_size=1))
        assert Counter(model.asked) == {"a": 1, "b": 1} and run.asked == 2
        assert [sample.answer for sample in run.samples] == ["a", "b", "a", "a"]


def test_the_same_words_about_another_image_are_another_question(tmp_path: Path) -> None:
    for n, colour in enumerate(("red", "red", "blue")):
        PILImage.new("RGB", (4, 4), colour).save(tmp_path / f"{n}.png")
    asked = [Example(str(n), (user(Image(tmp_path / f"{n}.png"), "What?"),), ("x",)) for n in range(3)]
    model = Echo()
    run_task(model, TASK, asked, Settings(blind=True))
    assert len(model.asked) == 2 + 2  # two contents, and their greys, since a key is of the image and not of its grey
    asked = [Example("t", (user("only text"),), ("x",))]
    model = Echo()
    run_task(model, TASK, asked, Settings(blind=True))
    assert model.asked == ["only text"]  # there is nothing to hide


@pytest.mark.parametrize("said", ["out of memory", "can't allocate memory"])
def test_memory_running_out_halves_the_batch_and_the_next_run_begins_there(said: str) -> None:
    model = Batches(most=5, said=said)
    run = run_task(model, TASK, questions(*TEXTS))
    assert [sample.answer for sample in run.samples] == TEXTS and run.batch_size == 4
    assert model.sizes[:3] == [16, 8, 4] and max(model.sizes[3:]) == 4
    again = run_task(Batches(most=5), TASK, questions(*TEXTS))
    assert (again.batch_size, again.batch_invariant, again.asked) == (4, True, 0) and again.samples == run.samples
    with pytest.raises(PolymodalError, match="--batch-size 8"):
        run_task(Batches(most=5), TASK, questions(*TEXTS), Settings(batch_size=8))
    with pytest.raises(RuntimeError, match="shapes"):
        run_task(Batches(most=2, said="shapes do not fit"), TASK, questions("1", "2", "3"))


def test_what_does_not_fit_alone_is_a_failed_item() -> None:
    class Small(Batches):
        def generate_batch(self, conversations: Sequence[Any], params: GenerationParams) -> list[Answer]:
            if any("large" in messages[-1].text for messages in conversations):
                raise RuntimeError("out of memory")
            return super().generate_batch(conversations, params)

    run = run_task(Small(), TASK, questions("a", "large", "b"), Settings())
    assert [sample.answer for sample in run.samples] == ["a", None, "b"]
    assert "memory ran out" in str(run.samples[1].error)
    one = run_task(Echo(lambda text: MemoryError() if text == "b" else None), TASK, questions("a", "b"))
    assert [sample.error is None for sample in one.samples] == [True, False]


def test_the_probe_sees_that_a_batch_changes_answers(capsys: pytest.CaptureFixture[str]) -> None:
    same = run_task(Batches(), TASK, questions(*TEXTS), Settings(batch_size=8))
    assert same.batch_invariant is True and capsys.readouterr().err == ""
    assert run_task(Batches(), TASK, questions(*TEXTS), Settings(batch_size=1)).batch_invariant is None
    run = run_task(Drifting(), TASK, questions(*TEXTS), Settings(batch_size=8))
    assert run.batch_invariant is False and "--batch-size 1" in capsys.readouterr().err
    # Who follows the advice gets answers of his own, not those that a batch had given.
    alone = run_task(Drifting(), TASK, questions(*TEXTS), Settings(batch_size=1))
    assert {sample.answer for sample in alone.samples} == {f"{text} of 1" for text in TEXTS}


def test_a_model_without_batches_is_asked_one_by_one() -> None:
    run = run_task(Echo(), TASK, questions(*TEXTS), Settings(batch_size=8))
    assert (run.batch_size, run.batch_invariant) == (1, None)
    assert [sample.answer for sample in run.samples] == TEXTS


class Slow(Echo):
    """Counts how many questions are under way."""

    name = "slow"

    def __init__(self, concurrent: int, seconds: float = 0.05) -> None:
        super().__init__()
        self.concurrent, self.seconds = concurrent, seconds
        self.now = self.most = 0
        self.lock = threading.Lock()

    def stream(self, messages: Any, params: GenerationParams | None = None) -> Iterator[Reply]:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.seconds)
        with self.lock:
            self.now -= 1
        yield from super().stream(messages, params)


def test_an_endpoint_is_asked_several_questions_at_a_time_and_no_more() -> None:
    model = Slow(4)
    assert [s.answer for s in run_task(model, TASK, questions(*TEXTS[:24])).samples] == TEXTS[:24]
    assert model.most == 4


def test_ctrl_c_stops_sending_and_what_was_under_way_is_kept() -> None:
    class Interrupted(Slow):
        def stream(self, messages: Any, params: GenerationParams | None = None) -> Iterator[Reply]:
            if len(self.asked) == 6:
                os.kill(os.getpid(), 2)
            yield from super().stream(messages, params)

    model, again = Interrupted(3), Slow(3)
    model.fingerprint = again.fingerprint  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run_task(model, TASK, questions(*TEXTS))
    assert 6 <= len(model.asked) <= 6 + 2 * 3
    run = run_task(again, TASK, questions(*TEXTS))
    assert [sample.answer for sample in run.samples] == TEXTS
    assert sorted(again.asked + model.asked) == sorted(TEXTS)


def test_a_run_that_was_cut_off_asks_only_what_it_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_task(Drifting(), TASK, questions(*TEXTS), Settings(cached=False))

    class Cut(Drifting):
        def generate_batch(self, conversations: Sequence[Any], params: GenerationParams) -> list[Answer]:
            if len(self.sizes) == 4:
                raise KeyboardInterrupt
            return super().generate_batch(conversations, params)

    cut, rest = Cut(), Drifting()
    cut.fingerprint = rest.fingerprint  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run_task(cut, TASK, questions(*TEXTS))
    run = run_task(rest, TASK, questions(*TEXTS))
    assert (run.batch_size, run.batch_invariant) == (whole.batch_size, whole.batch_invariant)
    assert [(s.id, s.answer, s.score) for s in run.samples] == [(s.id, s.answer, s.score) for s in whole.samples]
    assert cut.sizes == [16, 1, 1, 16] and rest.sizes == [8]


def test_failures_are_counted_and_never_scored_as_answers(tmp_path: Path) -> None:
    PILImage.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    asked = [Example(n, (user(Image(tmp_path / f"{n}.png"), n),), ("(A) a",), metric="mvbench") for n in "abc"]
    empty = Echo()
    run = run_task(Echo(lambda text: PolymodalError("it failed") if text == "b" else None), TASK, asked)
    assert score_samples([Sample("i", "", "", ("(A) a",), "mvbench", {}, {}, "")])[0].score == 1.0  # the official rule
    assert [sample.score for sample in run.samples[1:]] == [0.0, 0.0]
    assert run.samples[1].answer is None and run.samples[2].answer is None and "c.png" in str(run.samples[2].error)
    summary = summarise(TASK, "test", run, Settings())
    assert (summary["n"], summary["failed"]) == (3, 2)
    assert empty.asked == []


def test_the_control_hides_videos_and_sounds_too(tmp_path: Path) -> None:
    pytest.importorskip("av")
    frames = [PILImage.new("RGB", (20, 10), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / "v.gif", save_all=True, append_images=frames[1:], duration=200)
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(np.full(4000, 9000, np.int16).tobytes())

    class Witness(Echo):
        takes = ("image", "video", "audio")

        def generate_batch(self, conversations: Sequence[Any], params: GenerationParams) -> list[Answer]:
            return [self.tell(messages[0].media[0]) for messages in conversations]

        def tell(self, part: Any) -> str:
            if isinstance(part, Audio):
                return f"{open_audio(part.source).seconds} {np.abs(open_audio(part.source).samples).max() > 0}"
            found = sample_frames(part.source, part.num_frames)
            return f"{found.array.shape} {found.times.tolist()} {np.ptp(found.array) > 0}"

    task = replace(TASK, needs=("video", "audio"))
    asked = [
        Example("v", (user(Video(tmp_path / "v.gif", num_frames=3), "What?"),), ("x",)),
        Example("a", (user(Audio(tmp_path / "a.wav"), "What?"),), ("x",)),
        Example("b", (user(Video(tmp_path / "absent.mp4"), "What?"),), ("x",)),
    ]
    check_needs(Witness(), task)
    run = run_task(Witness(), task, asked, Settings(blind=True))
    shape = "(3, 10, 20, 3) [0.0, 0.2, 0.4]"
    assert [sample.answer for sample in run.samples[:2]] == [f"{shape} True", "0.5 True"]
    assert [sample.blind for sample in run.samples[:2]] == [f"{shape} False", "0.5 False"]
    assert run.samples[2].answer is None and "absent.mp4" in str(run.samples[2].error)
    assert "margin" in summarise(task, "", run, Settings())
    with pytest.raises(ConfigError, match=r"asks about video and audio, which .* cannot take"):
        check_needs(Echo(), task)


def test_failures_are_tried_again() -> None:
    first = run_task(Echo(lambda text: PolymodalError("busy") if text == "b" else None), TASK, questions("a", "b"))
    assert [sample.error for sample in first.samples] == [None, "busy"]
    model = Echo()
    assert [s.answer for s in run_task(model, TASK, questions("a", "b")).samples] == ["a", "b"]
    assert model.asked == ["b"]


def test_failures_of_a_corpus_metric_and_of_an_error_rate() -> None:
    captions = [
        Sample(str(n), "", "", (right,), "cider", {}, {}, said)
        for n, (right, said) in enumerate([("a red cat sits here", "a red cat sits here"), ("two dogs run far", None)])
    ]
    scores = [sample.score for sample in score_samples(captions)]
    assert scores[1] == 0.0 and scores[0] is not None and scores[0] > 1
    rates = score_samples([Sample("i", "", "", ("a b",), "wer", {}, {}, None)])
    assert rates[0].score == 1.0


def test_a_control_that_failed_alone_is_no_evidence_for_the_image(tmp_path: Path) -> None:
    PILImage.new("RGB", (4, 4)).save(tmp_path / "a.png")

    class Grey(Echo):
        def stream(self, messages: Any, params: GenerationParams | None = None) -> Iterator[Reply]:
            if isinstance(messages[0].media[0].source, PILImage.Image) and messages[-1].text == "b":
                raise PolymodalError("grey")
            yield from super().stream(messages, params)

    asked = [Example(n, (user(Image(tmp_path / "a.png"), n),), (n,)) for n in "ab"]
    run = run_task(Grey(), TASK, asked, Settings(blind=True))
    assert [(s.score, s.blind_score) for s in run.samples] == [(1.0, 1.0), (1.0, None)]
    summary = summarise(TASK, "", run, Settings())
    assert (summary["margin"], summary["blind_n"]) == (0.0, 1) and run.samples[1].error == "grey"


def unreachable(_: str) -> Exception:
    return EndpointError("http://down: no connection; tried 5 times", "unreachable")


@pytest.mark.parametrize("count", [3, 400])
def test_an_endpoint_that_is_down_ends_the_run_early(count: int) -> None:
    model = Echo(unreachable)
    model.concurrent = 4
    with pytest.raises(EndpointError, match="no connection"):
        run_task(model, TASK, questions(*map(str, range(count))))
    assert len(model.asked) <= runner.PATIENCE + 2 * 4


def test_an_endpoint_that_goes_down_in_the_middle_and_comes_back() -> None:
    model = Echo(lambda text: unreachable(text) if len(model.asked) > 30 else None)
    with pytest.raises(EndpointError, match=r"20 questions in a row reached no server .* goes on"):
        run_task(model, TASK, questions(*map(str, range(200))))
    assert len(model.asked) < 60
    again = Echo()
    run_task(again, TASK, questions(*map(str, range(200))))
    assert len(again.asked) == 170


def test_what_a_server_always_refuses_does_not_end_a_run_that_goes_on() -> None:
    def refuse(text: str) -> Exception | None:
        return EndpointError("filtered") if int(text) < 25 else None

    first = run_task(Echo(refuse), TASK, questions(*map(str, range(200))))
    again = run_task(Echo(refuse), TASK, questions(*map(str, range(200))))
    assert sum(s.error is not None for s in again.samples) == 25 and again.samples == first.samples


def test_a_model_that_always_fails_is_not_asked_for_hours_but_unreadable_images_are_no_sign(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the first 20 questions all failed, so it ends here: too long"):
        run_task(Echo(lambda _: PolymodalError("too long")), TASK, questions(*map(str, range(50))))
    absent = [Example(f"i{n}", (user(Image(tmp_path / "absent.png"), str(n)),), ("x",)) for n in range(30)]
    run = run_task(Echo(), TASK, [*absent, *questions("a", "b")])
    assert sum(sample.error is not None for sample in run.samples) == 30 and run.samples[-1].answer == "b"


def test_a_limit_keeps_together_what_is_scored_together() -> None:
    rows = [
        Example(f"{g}{turn}", (user("x"),), ("x",), "k" if g < 3 else "l", extra={"g": g})
        for turn in "ab"
        for g in range(5)
    ]
    kept = limited(rows, 2, "g")
    assert sorted(example.id for example in kept) == ["0a", "0b", "1a", "1b", "3a", "3b", "4a", "4b"]
    assert [example.id for example in limited(rows, 1)] == ["0a", "3a"]
    assert limited(rows, None) == rows


def test_what_cannot_be_scored_is_said_before_anything_is_asked() -> None:
    model = Echo()
    for more, error, said in [
        ({"metric": "exakt"}, ConfigError, "did you mean 'exact'"),
        ({"metric": "textvqa_accuracy"}, DataError, "toy: question 0: .*"),
        ({"options": {"sloppy": 1}}, ConfigError, "sloppy"),
        ({"metric": "mmbench_extract"}, ConfigError, "needs options"),
    ]:
        with pytest.raises(error, match=said):
            run_task(model, TASK, questions("a", **more))
    with pytest.raises(DataError, match="nothing to ask"):
        run_task(model, TASK, [])
    assert model.asked == []


def test_a_variant_goes_to_the_metrics_that_have_it() -> None:
    asked = [*questions("Black.", metric="vqa_accuracy"), *questions("x")]
    asked = [
        Example(str(n), e.messages, ("black",) * 10 if n == 0 else e.references, metric=e.metric)
        for n, e in enumerate(asked)
    ]
    official, theirs = (run_task(Echo(), TASK, asked, Settings(variant=name)) for name in (None, "lmms_eval"))
    assert [s.score for s in official.samples] == [0.0, 1.0] and [s.score for s in theirs.samples] == [1.0, 1.0]
    assert theirs.samples[0].options == {"variant": "lmms_eval"}
    assert summarise(TASK, "", theirs, Settings(variant="lmms_eval"))["without_variant"] == ["exact"]
    with pytest.raises(ConfigError, match="variant"):
        run_task(Echo(), TASK, asked, Settings(variant="nobodys"))


def test_secret_references_are_not_scored() -> None:
    run = run_task(Echo(), TASK, [Example("s", (user("a"),)), *questions("b")])
    assert [sample.score for sample in run.samples] == [None, 1.0]
    assert summarise(TASK, "", Run(run.samples[:1], run.params, 1, None, 1), Settings())["score"] is None


PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_runner import TASK, TEXTS, Batches, questions
from polymodal.errors import PolymodalError
from polymodal.evaluation.runner import Settings, run_task
fails = (lambda text: PolymodalError("no")) if sys.argv[3] == "fail" else (lambda _: None)
run = run_task(Batches(fails=fails), TASK, questions(*TEXTS, TEXTS[0], TEXTS[1]), Settings(batch_size=4))
Path(sys.argv[2]).write_text(json.dumps([[s.id, s.answer, s.score] for s in run.samples] + [run.asked]))
"""


def two_processes(folder: Path, how: str = "") -> list[subprocess.CompletedProcess[str]]:
    with __import__("socket").socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(Path(__file__).parent), str(folder / f"{rank}.json"), how],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    return [subprocess.CompletedProcess(p.args, p.wait(120), "", p.stderr.read() if p.stderr else "") for p in started]


def test_two_processes_answer_as_one_and_share_the_questions(tmp_path: Path) -> None:
    for done in two_processes(tmp_path):
        assert done.returncode == 0, done.stderr
    alone = run_task(Batches(), TASK, questions(*TEXTS, TEXTS[0], TEXTS[1]), Settings(batch_size=4, cached=False))
    shares = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for *rows, asked in shares:
        assert rows == [[s.id, s.answer, s.score] for s in alone.samples]
        assert asked == 20  # of 40 questions, two of which stand twice


def test_a_failure_of_one_process_ends_all(tmp_path: Path) -> None:
    begin = time.monotonic()
    for done in two_processes(tmp_path, "fail"):
        assert done.returncode == 1 and "the first 20 questions all failed" in done.stderr
    assert time.monotonic() - begin < 100


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from polymodal.utils.devices import best_device

    assert best_device() == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert best_device() == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert best_device() == "cuda:1"


def test_a_number_without_a_world_is_not_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert len(run_task(Echo(), TASK, questions("a", "b")).samples) == 2


def test_messages_are_what_the_model_gets() -> None:
    seen: list[Message] = []

    class Looks(Echo):
        def stream(self, messages: Any, params: GenerationParams | None = None) -> Iterator[Reply]:
            seen.extend(messages)
            assert params is not None and params.max_new_tokens == 5
            yield from super().stream(messages, params)

    (example,) = questions("a")
    run_task(Looks(), TASK, [example], Settings(max_new_tokens=5))
    assert tuple(seen) == example.messages
