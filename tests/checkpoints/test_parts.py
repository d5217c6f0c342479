"""A model folder that refers to parts: it opens from anywhere, and after a move finds them by what is in them."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import polymodal
from polymodal.backends import load_processor
from polymodal.checkpoints.parts import part_hash
from polymodal.cli import main
from polymodal.errors import CheckpointError, ConfigError
from recipes.tiny.make_parts import main as make_parts

PICTURE = Path(__file__).parents[2] / "examples/pictures/apple.png"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """parts/ and, composed of them, runs/x/final."""
    folder = tmp_path_factory.mktemp("tree") / "mine"
    make_parts(folder / "parts")
    model = polymodal.compose(vision=folder / "parts/vision", llm=folder / "parts/llm")
    model.save(folder / "runs/x/final")
    return folder


@pytest.fixture
def moved(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same at another place, in another folder, and the first place gone."""
    away = tree.parent / "away"
    shutil.copytree(tree, tmp_path / "there/mine")
    tree.rename(away)
    monkeypatch.chdir("/")
    yield tmp_path / "there/mine"  # type: ignore[misc]
    away.rename(tree)


def answers(folder: Path, **options: object) -> bool:
    model = polymodal.load(folder, "cpu", **options)  # type: ignore[arg-type]
    return isinstance(model.ask("What?", PICTURE), str)


def test_it_opens_from_any_directory(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert answers(tree / "runs/x/final")


def test_a_tree_that_was_moved_whole(moved: Path) -> None:
    assert answers(moved / "runs/x/final")


def test_parts_that_lie_near_under_other_names(moved: Path) -> None:
    (moved / "parts/llm").rename(moved / "runs/my-language-model")
    (moved / "parts/vision").rename(moved / "runs/my-tower")
    assert answers(moved / "runs/x/final")


def test_another_part_under_the_old_name_is_not_taken(moved: Path) -> None:
    make_parts(moved / "others")  # random weights anew
    shutil.rmtree(moved / "parts/llm")
    (moved / "others/llm").rename(moved / "parts/llm")
    model = polymodal.compose(llm=moved / "parts/llm")
    with torch.no_grad():
        model.model.llm.get_input_embeddings().weight += 1
    model.model.llm.save_pretrained(moved / "parts/llm")
    with pytest.raises(CheckpointError, match=r"its language model .*parts/llm is not there"):
        polymodal.load(moved / "runs/x/final")


def test_what_is_missing_is_named_and_pointed_to(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    final = shutil.move(moved / "runs/x/final", tmp_path / "a/b/c/d/e/f/final")
    (tmp_path / "deep/er").mkdir(parents=True)
    parts = shutil.move(moved / "parts", tmp_path / "deep/er/parts")
    for verb, flag, what in (("generate", "llm", "language model"), ("inspect", "vision", "vision tower")):
        assert main([verb, "--model", str(final), "--prompt", "x"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"--{flag} DIR" in error and f"its {what}" in error
    with pytest.raises(CheckpointError, match=r"its vision tower .* --vision DIR"):
        load_processor(final, {"llm": f"{parts}/llm"})
    assert answers(final, parts={"llm": f"{parts}/llm", "vision": f"{parts}/vision"})
    given = ["--llm", f"{parts}/llm", "--vision", f"{parts}/vision"]
    assert main(["inspect", "--model", str(final), "--prompt", "x", *given]) == 0
    whole = tmp_path / "whole"
    assert main(["export", str(final), str(whole), "--format", "folder", *given]) == 0
    shutil.rmtree(parts)
    assert answers(whole)
    with pytest.raises(ConfigError, match="its language model is given, and it holds its own"):
        polymodal.load(whole, parts={"llm": parts})
    with pytest.raises(ConfigError, match="its audio tower is given, and it has none"):
        polymodal.load(whole, parts={"audio": parts})
    with pytest.raises(ConfigError, match="unknown part 'lm'; did you mean 'llm'"):
        polymodal.load(whole, parts={"lm": parts})


def test_another_part_than_it_was_trained_with_is_told(tree: Path, tmp_path: Path) -> None:
    make_parts(tmp_path / "others")
    model = polymodal.compose(llm=tmp_path / "others/llm")
    with torch.no_grad():
        model.model.llm.get_input_embeddings().weight += 1
    model.model.llm.save_pretrained(tmp_path / "others/llm")
    assert part_hash(tmp_path / "others/llm") != part_hash(tree / "parts/llm")
    with pytest.warns(UserWarning, match="trained with another language model than"):
        polymodal.load(tree / "runs/x/final", parts={"llm": tmp_path / "others/llm"})


def test_the_type_of_the_weights(tree: Path) -> None:
    with pytest.warns(UserWarning, match="several times slower"):
        model = polymodal.load(tree / "runs/x/final", "cpu", dtype="bfloat16")
    assert model.model.llm.dtype == torch.bfloat16  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="unknown dtype 'fp16'; did you mean 'float16'"):
        polymodal.load(tree / "runs/x/final", dtype="fp16")  # type: ignore[arg-type]


def test_each_of_several_towers_is_found_and_pointed_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir("/")
    mine = tmp_path / "mine"
    make_parts(mine / "parts")
    shutil.copytree(mine / "parts/vision", mine / "parts/other")
    weights = load_file(mine / "parts/other/model.safetensors")
    save_file({name: tensor + 0.01 for name, tensor in weights.items()}, mine / "parts/other/model.safetensors")
    towers = [mine / "parts/vision", mine / "parts/other"]
    polymodal.compose(vision=towers, llm=mine / "parts/llm").save(mine / "runs/x/final")
    there = Path(shutil.move(mine, tmp_path / "there"))
    (there / "parts/other").rename(there / "runs/second")
    assert answers(there / "runs/x/final")
    far = tmp_path / "deep/er"
    far.mkdir(parents=True)
    (there / "runs/second").rename(far / "second")
    ask = ["inspect", "--model", str(there / "runs/x/final"), "--prompt", "x"]
    capsys.readouterr()  # progress of writing the parts
    assert main(ask) == 2 and "its vision tower 2 " in (error := capsys.readouterr().err)
    assert "--vision DIR --vision DIR (in Python" in error and error.count("\n") == 1
    assert main([*ask, "--vision", str(there / "parts/vision"), "--vision", str(far / "second")]) == 0
    assert answers(there / "runs/x/final", parts={"vision_2": far / "second"})
    with (
        pytest.warns(UserWarning, match="another vision tower 2 than"),
        pytest.raises(CheckpointError, match="trained behind another vision tower"),
    ):
        polymodal.load(there / "runs/x/final", parts={"vision_2": there / "parts/vision"})
