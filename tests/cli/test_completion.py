"""What a shell offers at Tab, out of the parsers."""

import shutil
import subprocess
from pathlib import Path

import pytest

from polymodal.cli import VERBS, main


def written(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        main(["--completion", shell])
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_offers_verbs_flags_and_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "polymodal.bash"
    script.write_text(written("bash", capsys))

    def offered(*words: str) -> list[str]:
        line = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); _polymodal; echo "${COMPREPLY[@]}"'
        done = subprocess.run(["bash", "-c", line, script, "polymodal", *words], capture_output=True, text=True)
        assert done.returncode == 0 and done.stderr == ""
        return done.stdout.split()

    assert offered("ge") == ["generate"] and set(VERBS) == set(offered(""))
    assert offered("--comp") == ["--completion"]
    assert offered("chat", "--rev") == ["--revision"] and "--stop" in offered("generate", "--")
    assert offered("export", "--format", "fo") == ["folder"]
    assert offered("data", "c") == ["check"] and "--fix" in offered("data", "check", "--f")
    assert offered("chat", "cat.j") == []  # files, by the shell itself


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_have_every_verb(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = written(shell, capsys)
    assert all(f" {verb}" in script or f'"{verb}' in script for verb in VERBS) and "revision" in script
    if (program := shutil.which(shell)) is not None:
        assert subprocess.run([program, "-n"], input=script, text=True).returncode == 0
    else:
        assert "bashcompinit" in script if shell == "zsh" else script.count("complete -c polymodal -n ") > 100


def test_a_shell_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "tcsh"]) == 2
    assert "choose from" in capsys.readouterr().err
