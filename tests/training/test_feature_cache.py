from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from polymodal.config import VISION_ORIGINS, VisionConfig, parse_config
from polymodal.errors import DataError, PolymodalError
from polymodal.training import feature_cache as features
from polymodal.training import train
from polymodal.training.feature_cache import FeatureStore
from polymodal.training.process_group import World
from polymodal.training.recipes.sft import Recipe
from polymodal.training.reporting.log import read_log
from polymodal.training.sft import task as task_module
from polymodal.training.sft.task import SFTTask


def run(plain: dict[str, Any], folder: Path, **settings: Any) -> list[float]:
    data = {**plain, "run": {**plain["run"], **settings}, "output_dir": str(folder)}
    train(parse_config(Recipe, data, "recipe"))
    return [line["loss"] for line in read_log(folder / "log.jsonl")]


def test_cached_equals_uncached(plain: dict[str, Any], tmp_path: Path) -> None:
    plain["optim"]["learning_rate"] = 1e-4  # rounding grows from step to step with the rate
    without = run(plain, tmp_path / "off")
    exact = run(plain, tmp_path / "fp32", feature_cache="memory", feature_dtype="float32")
    half = run(plain, tmp_path / "fp16", feature_cache=str(tmp_path / "cache"))
    # One image alone or several together go through other matrix kernels: equal up to float32 rounding.
    assert np.allclose(exact, without, atol=1e-5)
    assert np.allclose(half, without, atol=1e-3)
    assert half != without


def test_a_second_run_encodes_nothing(plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = str(tmp_path / "cache")
    first = run(plain, tmp_path / "one", feature_cache=cache)

    def never(*_args: Any) -> None:
        raise AssertionError("the encoder ran again")

    monkeypatch.setattr(features, "_encode", never)
    assert run(plain, tmp_path / "two", feature_cache=cache) == first


def test_a_pass_that_was_killed_goes_on(plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    whole = run(plain, tmp_path / "whole", feature_cache="memory")
    add, calls = FeatureStore.add, []

    def die(store: FeatureStore, entries: Any) -> None:
        add(store, entries[:3])
        calls.append(len(entries))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FeatureStore, "add", die)
        run(plain, tmp_path / "run", feature_cache=str(cache))
    index = next(cache.glob("*/index.jsonl"))
    assert len(index.read_text().splitlines()) == 3
    with index.open("a") as handle:
        handle.write('["cut by a cra')
    with index.with_name("features.bin").open("ab") as handle:
        handle.write(b"half a row")
    assert run(plain, tmp_path / "run", feature_cache=str(cache)) == whole
    assert all(len(json.loads(line)) == 3 for line in index.read_text().splitlines())


@pytest.mark.parametrize("on_disk", [True, False])
def test_store_gives_back_what_was_put_in(tmp_path: Path, on_disk: bool) -> None:
    store = FeatureStore(tmp_path / "s" if on_disk else None, (2, 3), "float16")
    rng = np.random.default_rng(0)
    images = {str(n): rng.normal(size=(1 + n % 3, 2, 3)).astype(np.float32) for n in range(7)}
    items = list(images.items())
    store.add(items[:4])
    store.add(items[4:])
    found = store.gather(["5", "0", "5"])
    assert found is not None
    wanted = np.concatenate([images["5"], images["0"], images["5"]]).astype(np.float16)
    assert torch.equal(found, torch.from_numpy(wanted))
    assert store.gather([]) is None
    with pytest.raises(DataError, match="not complete"):
        store.gather(["9"])


def test_huge_values_stay_finite() -> None:
    store = FeatureStore(None, (1, 2), "float16")
    store.add([("a", np.array([[[1e9, -1e9]]], dtype=np.float32))])
    found = store.gather(["a"])
    assert found is not None and bool(torch.isfinite(found).all())


def test_other_weights_are_another_cache(plain: dict[str, Any]) -> None:
    from polymodal.training.sft.task import load_inputs

    parts = load_inputs(parse_config(Recipe, plain, "recipe"))
    encoder = parts.model.vision_encoder
    assert isinstance(encoder, torch.nn.Module)
    before = features.encoder_identity(encoder, parts.config)
    assert features.encoder_identity(encoder, parts.config) == before
    with torch.no_grad():
        next(iter(encoder.parameters())).add_(1e-3)
    assert features.encoder_identity(encoder, parts.config) != before


def test_each_of_several_towers_has_a_say_in_the_caches_name(plain: dict[str, Any], tmp_path: Path) -> None:
    from polymodal.training.sft.task import load_inputs

    tower = plain["init"]["model"]["vision"]["vision_tower"]

    def inputs(**further: Any) -> Any:
        vision = {"vision_tower": tower, "type": "clip", "fused": [{"vision_tower": tower, "type": "clip", **further}]}
        model = {**plain["init"]["model"], "vision": vision}
        return load_inputs(parse_config(Recipe, {**plain, "init": {"model": model}}, "recipe"))

    parts, others = inputs(), inputs(image_mean=[0.4] * 3, image_std=[0.5] * 3)
    known = features.encoder_identity(parts.model.vision_encoder, parts.config)
    assert features.encoder_identity(others.model.vision_encoder, others.config) != known
    assert features.encoder_identity(inputs(revision="main").model.vision_encoder, parts.config) == known
    with torch.no_grad():
        parts.model.vision_encoder.towers["1"].model.embeddings.class_embedding.add_(1e-3)
    assert features.encoder_identity(parts.model.vision_encoder, parts.config) != known
    # Of one tower all is as it was before there could be several.
    single = VisionConfig(vision_tower=tower, type="clip").model_dump_json(exclude=VISION_ORIGINS)
    assert single == (
        '{"type":"clip","mm_vision_select_layer":-2,"mm_vision_select_feature":"patch","pool":null,"stages":null,'
        '"detail":null}'
    )


def test_a_killed_pass_goes_on_with_the_same_groups(
    plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes through the encoder together decides the last bits, so a resumed pass must not group anew."""
    cache, groups = tmp_path / "cache", []
    inner = features._encode

    def counted(encode: Any, images: Any) -> Any:
        groups.append([key for key, _ in images])
        if len(groups) == 3:
            raise KeyboardInterrupt
        return inner(encode, images)

    monkeypatch.setattr(features, "_encode", counted)
    with pytest.raises(KeyboardInterrupt):
        run(plain, tmp_path / "one", feature_cache=str(cache))
    (folder,) = cache.iterdir()
    # The index lost a line of the second group as well, as in a kill in the middle of an append.
    lines = (folder / "index.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "index.jsonl").write_bytes(b"".join(lines[:-1]))
    run(plain, tmp_path / "one", feature_cache=str(cache))
    assert groups[3] == groups[1] and groups[4] == groups[2]
    assert not (folder / "pass.json").exists()
    whole = tmp_path / "whole"
    run(plain, tmp_path / "two", feature_cache=str(whole))
    (other,) = whole.iterdir()
    found = [FeatureStore(f, (4, 24), "float16") for f in (folder, other)]
    assert found[0].where.keys() == found[1].where.keys()
    for key in found[0].where:
        one, two = (store.gather([key]) for store in found)
        assert one is not None and two is not None and torch.equal(one, two)


def test_only_what_the_steps_see_is_encoded(plain: dict[str, Any], tmp_path: Path) -> None:
    plain["batch"] = {"global_size": 3}
    seen = run(plain, tmp_path / "few", feature_cache=str(tmp_path / "cache"), max_steps=2, eval_generations=0)
    index = next((tmp_path / "cache").glob("*/index.jsonl"))
    few = len(index.read_text().splitlines())
    assert 1 <= few <= 6
    whole = run(plain, tmp_path / "whole", feature_cache="memory", max_steps=2, eval_generations=0)
    assert np.allclose(seen, whole)
    run(plain, tmp_path / "more", feature_cache=str(tmp_path / "cache"), max_steps=30, eval_generations=0)
    assert len(index.read_text().splitlines()) == 24


def test_a_disk_that_cannot_be_written_is_one_line(
    plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PolymodalError, match=r"feature cache .*file.*: cannot be written"):
        run(plain, tmp_path / "one", feature_cache=str(tmp_path / "file"))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(features, "_append", full)
    with pytest.raises(PolymodalError, match=r"feature cache .*cache.*No space left on device.*make room"):
        run(plain, tmp_path / "two", feature_cache=str(tmp_path / "cache"))
    monkeypatch.undo()
    opened = Path.open

    def read_only(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if "cache" in path.parts and mode != "r":
            raise OSError(30, "Read-only file system")
        return opened(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(PolymodalError, match="Read-only file system"):
        run(plain, tmp_path / "three", feature_cache=str(tmp_path / "cache"))


@pytest.fixture
def read_only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make everything under a folder fail to be written, as on a read-only disk; root is not held up by modes."""
    whole = Path.open

    def guard(folder: Path) -> None:
        def refuse(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if path.is_relative_to(folder) and set(mode) & set("wa+x"):
                raise OSError(errno.EROFS, "Read-only file system")
            return whole(path, mode, *rest, **named)

        monkeypatch.setattr(Path, "open", refuse)
        monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: refuse(path, "w"))
        monkeypatch.setattr(os, "truncate", lambda path, _size: refuse(Path(path), "w"))

    return guard


def test_a_read_only_cache_is_read_and_one_that_lacks_an_image_says_so(
    plain: dict[str, Any], tmp_path: Path, read_only: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = run(plain, tmp_path / "one", feature_cache=str(cache))
    index = next(cache.glob("*/index.jsonl"))
    kept = index.read_bytes()
    index.with_name("pass.json").write_text("[]")
    read_only(cache)
    assert run(plain, tmp_path / "two", feature_cache=str(cache)) == first
    monkeypatch.undo()
    index.write_bytes(kept[: kept.rfind(b"\n", 0, -1) + 1])
    read_only(cache)
    with pytest.raises(PolymodalError, match=r"cannot be written \(Read-only file system\)") as error:
        run(plain, tmp_path / "three", feature_cache=str(cache))
    assert str(cache) in str(error.value) and "\n" not in str(error.value)


def test_a_full_disk_is_one_line(plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_path: Path, _data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features, "_append", full)
    with pytest.raises(PolymodalError, match=r"cannot be written \(No space left on device\)") as error:
        run(plain, tmp_path / "one", feature_cache=str(tmp_path / "cache"))
    assert str(tmp_path / "cache") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["warm_start", "prototypes"])
def test_a_short_try_out_of_a_warm_start_encodes_a_part(
    plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """The steps' images, and the images that the means are measured on."""
    monkeypatch.setattr(task_module, "SAMPLE_ROWS", 5)
    monkeypatch.setattr(task_module, "MEASURED", 5)
    sections = {"warm_start": {"steps": 3}, "prototypes": {"count": 7, "questions": ["What?"]}}
    counted: dict[int | None, int] = {}
    for steps in (1, None):
        data = {**plain, part: sections[part], "batch": {"global_size": 2}, "output_dir": str(tmp_path / f"{steps}")}
        data["run"] = {**plain["run"], "feature_cache": "memory", "max_steps": steps}
        made = SFTTask(parse_config(Recipe, data, "recipe"), World())
        made.choose_parameters()
        (tmp_path / f"{steps}").mkdir()
        dataset = made.make_dataset(tmp_path / f"{steps}")
        assert dataset.store is not None
        counted[steps] = len(dataset.store.where)
        assert {row for _, row in dataset.alone()} <= set(range(counted[steps]))
    assert 1 <= counted[1] <= 7 and counted[None] == 24
