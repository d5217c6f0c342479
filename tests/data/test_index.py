"""The index: what comes out of the memory maps is what the processor made, and it is built when it must be."""

from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from polymodal.backends import load_processor
from polymodal.data.index import GrowingArray, Index, Reading, identity, open_array, open_index
from polymodal.data.load import load_records
from polymodal.data.mixture import Joined, Picked
from polymodal.errors import DataError, PolymodalError
from polymodal.processing.processor import Processor


@pytest.fixture(scope="module")
def processor(tiny_model_folder: Path) -> Processor:
    return load_processor(tiny_model_folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = []
    for number in range(9):
        Image.new("RGB", (20 + 4 * number, 30), (number * 20, 40, 90)).save(tmp_path / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhich?"}, {"from": "gpt", "value": f"Number {number}."}]
        rows.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns, "kinds": ["vqa"]})
    rows.append({"conversations": [{"from": "human", "value": "Hi ü"}, {"from": "gpt", "value": "Hello"}]})
    two = [{"role": "user", "content": "<image><image>Same?"}, {"role": "assistant", "content": "No."}]
    rows.append({"id": "two", "images": ["0.png", "8.png"], "messages": two, "source": "pairs"})
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data.jsonl"


def test_rows_come_back_as_the_processor_made_them(data: Path, processor: Processor, tmp_path: Path) -> None:
    index = open_index(tmp_path / "index", Reading(data), processor)
    records = load_records(data)
    assert len(index) == len(records) == 11
    for row, record in enumerate(records):
        assert index.record(row) == record
        expected, found = processor(record.messages, id=record.id, pixels=False), index.sample(row)
        assert (
            found.input_ids.tolist() == expected.input_ids.tolist()
            and found.input_ids.dtype == expected.input_ids.dtype
        )
        assert (
            found.loss_mask.tolist() == expected.loss_mask.tolist()
            and found.loss_mask.dtype == expected.loss_mask.dtype
        )
        assert (found.slots, found.plans, found.media_keys, found.id) == (
            expected.slots,
            expected.plans,
            expected.media_keys,
            expected.id,
        )
        assert index.lengths[row] == len(expected.input_ids)
        assert index.targets[row] == int(expected.loss_mask[1:].sum())
    assert index.images.tolist() == [1] * 9 + [0, 2] and index.tiles.tolist() == [1] * 9 + [0, 2]
    assert len({digest.tobytes() for digest in index.digests}) == 11


def count_calls(processor: Processor, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    call = Processor.__call__

    def counted(self: Processor, messages: Any, **options: Any) -> Any:
        seen.append(options.get("id", ""))
        return call(self, messages, **options)

    monkeypatch.setattr(Processor, "__call__", counted)
    return seen


def test_it_is_built_once_and_again_when_something_changed(
    data: Path, processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, news = count_calls(processor, monkeypatch), []
    first = open_index(tmp_path / "index", Reading(data), processor)
    assert len(seen) == 11
    assert open_index(tmp_path / "index", Reading(data), processor).folder == first.folder
    assert len(seen) == 11
    # Another image under the same name: found by its time and size, and rebuilt in the same place.
    Image.new("RGB", (50, 50)).save(data.parent / "3.png")
    second = open_index(tmp_path / "index", Reading(data), processor, log=news.append)
    assert len(seen) == 22 and second.folder == first.folder and "3.png changed" in news[0]
    assert second.media_keys(3) != first.media_keys(3)
    # Another template, other labels, another data file: other indices.
    other = processor.with_template("vicuna")
    assert identity(Reading(data), other) != identity(Reading(data), processor)
    assert open_index(tmp_path / "index", Reading(data), other).folder != first.folder
    assert open_index(tmp_path / "index", Reading(data, kind="ocr"), processor).record(0).kind == "ocr"
    data.write_text(data.read_text().replace("Number 5.", "Number five."))
    assert open_index(tmp_path / "index", Reading(data), processor).folder != first.folder


def test_a_broken_row_stops_the_build_or_is_listed(data: Path, processor: Processor, tmp_path: Path) -> None:
    lines = data.read_text().splitlines()
    lines[4] = lines[4][:30]
    data.write_text("\n".join(lines) + "\n")
    (data.parent / "7.png").write_bytes(b"not an image")
    with pytest.raises(PolymodalError, match="line 5"):
        open_index(tmp_path / "index", Reading(data), processor)
    assert not list((tmp_path / "index").glob("data-*"))  # nothing half written
    index = open_index(tmp_path / "index", Reading(data), processor, skip_errors=True)
    assert [(fault["row"], fault["where"]) for fault in index.faults] == [
        (4, f"{data}: line 5"),
        (7, f"{data}: line 8"),
    ]
    assert index.rows.tolist() == [0, 1, 2, 3, 5, 6, 8, 9, 10]
    with pytest.raises(DataError, match="line 5"):  # opened by a run that does not allow it
        open_index(tmp_path / "index", Reading(data), processor)


def test_a_draw_takes_the_same_rows_every_time(data: Path, processor: Processor, tmp_path: Path) -> None:
    index = open_index(tmp_path / "a", Reading(data, draw=(4, (7, 0))), processor)
    expected = np.sort(np.random.default_rng([7, 0]).permutation(11)[:4])
    assert index.rows.tolist() == expected.tolist()
    assert [index.record(i).id for i in range(4)] == [load_records(data)[i].id for i in expected]
    assert len(open_index(tmp_path / "a", Reading(data, draw=(400, (7, 0))), processor)) == 11


def test_of_several_that_build_at_once_one_does_it(
    data: Path, processor: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = count_calls(processor, monkeypatch)
    with ThreadPoolExecutor(3) as pool:  # the lock is on the file, so threads stand for processes
        found = [pool.submit(open_index, tmp_path / "index", Reading(data), processor) for _ in range(3)]
        assert {len(future.result()) for future in found} == {11}
    assert len(seen) == 11


def test_what_a_killed_build_left_behind_goes(data: Path, processor: Processor, tmp_path: Path) -> None:
    index = open_index(tmp_path / "index", Reading(data), processor)
    shutil.rmtree(index.folder)
    left = tmp_path / "index" / f".{index.folder.name}.0a1b2c3d.tmp"
    left.mkdir()
    (left / "tokens.npy").write_bytes(b"half")
    again = open_index(tmp_path / "index", Reading(data), processor)
    assert again.folder == index.folder and len(again) == 11 and not left.exists()


def test_a_damaged_index_says_so(data: Path, processor: Processor, tmp_path: Path) -> None:
    index = open_index(tmp_path / "index", Reading(data), processor)
    (index.folder / "tokens.npy").write_bytes(b"")
    with pytest.raises(DataError, match=r"the index is damaged.*remove the folder"):
        Index(index.folder)


def test_captions_without_images_or_rows_of_text_alone_work(processor: Processor, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    (tmp_path / "text.jsonl").write_text(json.dumps({"conversations": turns}) + "\n")
    index = open_index(tmp_path / "index", Reading(tmp_path / "text.jsonl"), processor)
    assert index.sample(0).plans == () and index.changed_media() == ""


def test_a_folder_that_cannot_be_written(data: Path, processor: Processor, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        open_index(tmp_path / "file", Reading(data), processor)


def test_growing_arrays_are_ordinary_npy_files(tmp_path: Path) -> None:
    array = GrowingArray(tmp_path / "a.npy", "<i4", (3,))
    parts = [np.arange(3 * n).reshape(n, 3) for n in (1, 5, 0, 200)]
    for part in parts:
        array.append(part)
    array.close()
    found = np.load(tmp_path / "a.npy")
    assert found.dtype == np.int32 and np.array_equal(found, np.concatenate(parts))
    assert os.stat(tmp_path / "a.npy").st_size == 128 + found.nbytes
    empty = GrowingArray(tmp_path / "b.npy", "|u1", (32,))
    empty.close()
    assert open_array(tmp_path / "b.npy").shape == (0, 32)


def test_lazy_sequences_are_like_lists() -> None:
    parts = [Picked(lambda row: row * 10, np.array([3, 1])), [], [7, 8, 9]]
    joined: Joined[int] = Joined(parts)
    assert [*joined] == [30, 10, 7, 8, 9] and len(joined) == 5
    assert joined[-1] == 9 and joined[np.int64(2)] == 7 and joined[1:4] == [10, 7, 8]
    with pytest.raises(IndexError):
        joined[5]
