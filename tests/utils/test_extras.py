"""What is said of an optional package: that it is missing, or that it is there and broken."""

from pathlib import Path

import pytest

from polymodal.cli import main
from polymodal.errors import ConfigError, DataError
from polymodal.utils.extras import extra


def test_a_package_that_is_missing() -> None:
    with pytest.raises(DataError, match=r"^x needs no-such-package, which is not installed: pip install 'a\[b\]'$"):
        extra("no_such_package.inner", "x needs", "a[b]", DataError)


@pytest.mark.parametrize("fault", ["import no_such_thing_either", "raise RuntimeError('made for\\nnumpy 1')", "1 / 0"])
def test_a_package_that_is_broken(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_extra.py").write_text(fault)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ConfigError, match=r"broken-extra, which is installed but cannot be imported: .*\(pip install b"
    ):
        extra("broken_extra", "x needs", "b")


def test_a_broken_package_at_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import polymodal.cli.env as verb

    def broken(_: object) -> int:
        raise ImportError("libfoo.so.3 is missing", name="foo")

    monkeypatch.setattr(verb, "run", broken)
    assert main(["env"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("polymodal: error: foo cannot be imported (libfoo.so.3") and error.count("\n") == 1
    with pytest.raises(ImportError):
        main(["env", "--debug"])
