"""Bad model folders: each is refused with its reason, before anything large is made, without running any of its code.

Every folder starts as a good one and is spoiled in one place. Code that a folder would have run leaves a marker; the
network is cut off.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import socket
import struct
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from polymodal.backends import load
from polymodal.checkpoints.model_folder import load_model
from polymodal.config import LLMConfig, VisionConfig
from polymodal.errors import CheckpointError
from polymodal.modeling.encoders.vision import build_vision_encoder
from polymodal.modeling.language_model import load_llm, load_tokenizer
from polymodal.safety.config_json import read_json
from polymodal.safety.model_folder import check_folder, check_template
from polymodal.utils.safetensors_io import check_finite, compare_tensors, read_header

MARKER = "code_was_run"
MODEL = "model.safetensors"
EVIL = f"open({MARKER!r}, 'w').close()\n"


@pytest.fixture(autouse=True)
def cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, and at the end no marker: relative to the current folder, beside the weights, or anywhere."""

    def no_network(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("something asked for the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob(MARKER))


@pytest.fixture
def llm(tiny_llm_folder: Path, tmp_path: Path) -> Path:
    """A language model's folder that a test may spoil."""
    return Path(shutil.copytree(tiny_llm_folder, tmp_path / "llm"))


@pytest.fixture
def model(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A model folder of ours that a test may spoil."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


class Evil:
    """Leaves the marker when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, (EVIL,)


def change(name: str, **values: Any) -> Callable[[Path], None]:
    """Set keys of a JSON file."""

    def spoil(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


def write(name: str, content: str | bytes) -> Callable[[Path], None]:
    """Write a file."""
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def only_pickles(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / MODEL).unlink()
        (folder / name).write_bytes(pickle.dumps({"weight": Evil()}))

    return spoil


def auto_map(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "modeling_evil.py").write_text(EVIL)
        change(name, auto_map={"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"})(
            folder
        )

    return spoil


def parts_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's header and data."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def header(edit: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change a safetensors header and leave the data as it is."""

    def spoil(folder: Path) -> None:
        entries, data = parts_of(folder / MODEL)
        edit(entries)
        text = json.dumps(entries).encode()
        (folder / MODEL).write_bytes(struct.pack("<Q", len(text)) + text + data)

    return spoil


NORM = "model.norm.weight"
FIRST = "lm_head.weight"


def entry(**values: Any) -> Callable[[Path], None]:
    return header(lambda entries: entries[NORM].update(values))


def claims_a_terabyte(entries: dict[str, Any]) -> None:
    begin = max(e["data_offsets"][1] for name, e in entries.items() if name != "__metadata__")
    entries["giant"] = {"dtype": "F32", "shape": [1 << 19, 1 << 19], "data_offsets": [begin, begin + (1 << 40)]}


def overlapping(entries: dict[str, Any]) -> None:
    entries[NORM]["data_offsets"] = entries["model.layers.0.input_layernorm.weight"]["data_offsets"]


def shards(**weight_map: Any) -> Callable[[Path], None]:
    """Split the weights in two files with an index, then change entries of it."""

    def spoil(folder: Path) -> None:
        tensors = load_file(folder / MODEL)
        (folder / MODEL).unlink()
        index = {}
        for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
            file = f"model-0000{number}-of-00002.safetensors"
            save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(names, file)
        document = {"metadata": {}, "weight_map": index | weight_map}
        (folder / f"{MODEL}.index.json").write_text(json.dumps(document))

    return spoil


def link(name: str, target: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return spoil


def damaged(reason: str) -> str:
    """What the format's library says, with the file in front."""
    return rf"model\.safetensors: damaged, or no safetensors file \(.*{reason}"


def longer_name(entries: dict[str, Any]) -> None:
    entries["x" * 2000] = entries.pop(NORM)


HUGE_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}"
BAD = {
    "a pickle": (only_pickles("pytorch_model.bin"), r"pytorch_model\.bin: weights in a pickle"),
    "a pickle of another name": (only_pickles("consolidated.00.pth"), r"consolidated\.00\.pth: weights in a pickle"),
    "a checkpoint": (only_pickles("model.ckpt"), "weights in a pickle"),
    "auto_map": (auto_map("config.json"), r"config\.json: auto_map asks for code.*'llama': remove the key"),
    "the tokenizer's auto_map": (auto_map("tokenizer_config.json"), r"tokenizer_config\.json: auto_map asks for code"),
    "auto_map of an unknown type": (
        lambda folder: (auto_map("config.json")(folder), change("config.json", model_type="evil")(folder)),
        "a model that transformers knows by itself is needed",
    ),
    "trust_remote_code": (change("config.json", trust_remote_code=True), "trust_remote_code is set"),
    "an attention from a repository": (
        change("config.json", _attn_implementation_internal="evil/attention"),
        r"config\.json: _attn_implementation_internal is 'evil/attention', which would be fetched",
    ),
    "an attention of one part": (
        change("config.json", text_config={"attn_implementation": "evil/attention:fast"}),
        r"text_config\.attn_implementation is 'evil/attention:fast'",
    ),
    "an attention by path": (change("config.json", _attn_implementation="../x"), "_attn_implementation is '../x'"),
    "attentions by part": (change("config.json", attn_implementation={"text": "evil/x"}), "is 'evil/x'"),
    "experts from a repository": (change("config.json", experts_implementation="evil/x"), "is 'evil/x'"),
    "a negative size": (change("config.json", hidden_size=-1), r"hidden_size is -1, which is no model's"),
    "a giant size": (change("config.json", vocab_size=10**12), "vocab_size is 1000000000000, which is no model's"),
    "a giant width": (change("config.json", hidden_size=10**9), "hidden_size is 1000000000, which is no model's"),
    "no JSON": (write("config.json", '{"model_type":'), r"config\.json: not valid JSON"),
    "a list": (write("config.json", "[]"), r"config\.json: an object was expected"),
    "deep JSON": (write("config.json", '{"a":' * 90 + "1" + "}" * 90), "nested more than 64 levels deep"),
    "bottomless JSON": (write("config.json", '{"a":' * 50_000 + "1" + "}" * 50_000), "nested more than 64 levels deep"),
    "a giant number": (write("config.json", '{"a":' + "9" * 5000 + "}"), "not valid JSON"),
    "large JSON": (write("config.json", '{"a": "' + "x" * (17 * 2**20) + '"}'), "are no configuration"),
    "no UTF-8": (write("config.json", b'{"a": "\xff"}'), "not valid JSON"),
    "a template that loops": (write("chat_template.jinja", HUGE_LOOP), r"chat_template\.jinja: it loops or calls too"),
    "another template that loops": (
        lambda f: ((f / "additional_chat_templates").mkdir(), write("additional_chat_templates/x.jinja", HUGE_LOOP)(f)),
        r"x\.jinja: it loops",
    ),
    "a template inside JSON": (change("tokenizer_config.json", chat_template=HUGE_LOOP), "config.json: it loops"),
    "one of several templates": (
        change("tokenizer_config.json", chat_template=[{"name": "x", "template": "{{ ''.__class__ }}"}]),
        r"tokenizer_config\.json \(x\): line 1 asks for Python's own attribute '__class__'",
    ),
    "a template that walks": (write("chat_template.jinja", "{{ ''.__class__.__mro__ }}"), "Python's own attribute"),
    "a template that walks in secret": (
        write("chat_template.jinja", "{{ ''['__cla' ~ 'ss__']['x'] }}"), "access to attribute '__class__'"
    ),
    "a template that reads": (write("chat_template.jinja", "{% include '/etc/passwd' %}"), "asks for another file"),
    "a template without end": (write("chat_template.jinja", "x" * 2**24 + "x"), "are no chat template"),
    "an empty file": (write(MODEL, b""), damaged("header too small")),
    "a pickle under another name": (write(MODEL, pickle.dumps({"weight": Evil()})), damaged("header too large")),
    "a giant header": (write(MODEL, struct.pack("<Q", 10 * 2**30) + b"{}"), damaged("header too large")),
    "a cut header": (write(MODEL, struct.pack("<Q", 9_000_000) + b"{}"), damaged("invalid header length")),
    "a header that is no object": (write(MODEL, struct.pack("<Q", 2) + b"[]"), damaged("invalid type: sequence")),
    "a bottomless header": (
        write(MODEL, struct.pack("<Q", 250_001) + b'{"a":' * 50_000 + b" "), damaged("recursion limit exceeded")
    ),
    "a name twice": (
        write(MODEL, struct.pack("<Q", 16) + b'{"a": {},"a":{}}'), damaged("invalid JSON in header")
    ),
    "overlapping tensors": (header(overlapping), damaged(r"invalid offset for tensor `model\..*norm\.weight`")),
    "a terabyte": (header(claims_a_terabyte), damaged("not fully covered")),
    "past the end": (lambda f: os.truncate(f / MODEL, (f / MODEL).stat().st_size - 8), damaged("not fully covered")),
    "bytes of nobody": (lambda f: (f / MODEL).open("ab").write(b"1234"), damaged("not fully covered")),
    "a hole": (header(lambda entries: entries.pop(FIRST)), damaged("invalid offset for tensor")),
    "another dtype": (entry(dtype="F16"), damaged("invalid shape, data type, or offset")),
    "an unknown dtype": (entry(dtype="F99"), damaged("unknown variant `F99`")),
    "a wrong shape": (entry(shape=[33]), damaged("invalid shape, data type, or offset")),
    "a negative shape": (entry(shape=[-32]), damaged("integer `-32`, expected usize")),
    "a giant shape": (entry(shape=[1 << 62] * 9), damaged("overflow computing buffer size")),
    "offsets the wrong way": (entry(data_offsets=[128, 0]), damaged(rf"invalid offset for tensor `{NORM}`")),
    "a fraction": (entry(shape=[32.0]), damaged("floating point `32.0`, expected usize")),
    "a missing field": (header(lambda e: e[NORM].pop("dtype")), damaged("missing field `dtype`")),
    "a giant name": (header(longer_name), r"model\.safetensors: the name of a tensor has more than 1,000 characters"),
    "metadata of another kind": (header(lambda e: e.update(__metadata__={"a": {}})), damaged("invalid type: map")),
    "an index that leads out": (shards(x="../../x.safetensors"), r"'../../x\.safetensors' lies out of the folder"),
    "an absolute index": (shards(x="/etc/passwd"), "'/etc/passwd' lies out of the folder"),
    "an index for Windows": (shards(x="..\\evil.safetensors"), "lies out of the folder"),
    "an index of pickles": (shards(x="evil.bin"), "'evil.bin' is no safetensors file"),
    "a missing shard": (shards(x="model-00003-of-00003.safetensors"), "shard model-00003-of-00003.safetensors is mis"),
    "a tensor that is not there": (shards(x="model-00001-of-00002.safetensors"), "tensor 'x' is not in model-00001"),
    "an index of numbers": (shards(x=1), "lies out of the folder"),
    "an empty index": (write(f"{MODEL}.index.json", "{}"), "weight_map is missing"),
    "a link out": (link("tokenizer.json", "/etc/hostname"), r"tokenizer\.json: a link out of the folder, to /etc/"),
    "a link up": (link("config.json", "../../config.json"), "a link out of the folder"),
    "a link to nothing": (link("config.json", "nothing.json"), "which is missing"),
    "a link to itself": (link("config.json", "config.json"), "config.json"),
    "a pipe": (lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")), "neither a file nor a folder"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "reason"), BAD.values(), ids=BAD)
def test_bad_folders_are_refused_before_they_are_opened(
    spoil: Callable[[Path], object], reason: str, llm: Path
) -> None:
    check_folder(llm)
    spoil(llm)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=reason) as caught:
            check_folder(llm)
        # The largest file of these tests has 17 MB; it is not read either.
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    with pytest.raises(CheckpointError, match=reason):
        load_llm(LLMConfig(model_name_or_path=str(llm)))


TOKENIZERS = ("the tokenizer's auto_map", "a template that loops", "a template that walks", "a link out", "no JSON")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_is_not_opened_in_a_bad_folder(name: str, llm: Path) -> None:
    spoil, reason = BAD[name]
    spoil(llm)
    with pytest.raises(CheckpointError, match=reason):
        load_tokenizer(LLMConfig(model_name_or_path=str(llm)))


TOWERS = ("a pickle", "auto_map of an unknown type", "an attention from a repository", "a cut header", "a link up")


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_is_not_opened_in_a_bad_folder(name: str, tiny_tower_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_tower_folder, tmp_path / "tower"))
    spoil, reason = BAD[name]
    spoil(folder)
    with pytest.raises(CheckpointError, match=reason):
        build_vision_encoder(VisionConfig(vision_tower=str(folder), type="clip"))


@pytest.mark.parametrize("part", ["llm", "vision", ""])
@pytest.mark.parametrize("name", ["a pickle", "a cut header", "an attention from a repository", "a link up"])
def test_the_parts_of_our_folder_are_looked_over(name: str, part: str, model: Path) -> None:
    spoil, reason = BAD[name]
    if part == "":
        shutil.copytree(model / "llm", model, dirs_exist_ok=True)
        for own in ("projector.safetensors",):
            (model / own).unlink()
    spoil(model / part)
    with pytest.raises(CheckpointError, match=reason):
        load(model)


def nan(folder: Path) -> None:
    tensors = load_file(folder / MODEL)
    tensors[NORM][3] = torch.nan
    save_file(tensors, folder / MODEL, metadata={"format": "pt"})


def test_nan_weights_are_named(llm: Path, model: Path, tiny_tower_folder: Path, tmp_path: Path) -> None:
    nan(llm)
    with pytest.raises(CheckpointError, match=rf"1 with NaN or infinity: {NORM}"):
        load_llm(LLMConfig(model_name_or_path=str(llm)))
    nan(model / "llm")
    with pytest.raises(CheckpointError, match=rf"1 with NaN or infinity: {NORM}"):
        load_model(model)
    tower = Path(shutil.copytree(tiny_tower_folder, tmp_path / "tower"))
    tensors = load_file(tower / MODEL)
    name = next(name for name in tensors if name.endswith("layers.0.mlp.fc1.weight"))
    tensors[name][0, 0] = torch.inf
    save_file(tensors, tower / MODEL, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 with NaN or infinity: .*layers\.0\.mlp\.fc1\.weight"):
        build_vision_encoder(VisionConfig(vision_tower=str(tower), type="clip"))


def test_tensors_that_do_not_fit_are_listed() -> None:
    wanted = {"a": torch.zeros(2), "b": torch.zeros(3), "c": (4,), "d": torch.zeros(1)}
    found = {"b": torch.zeros(3), "c": torch.zeros(2, 2), "d": [1], **{f"x{i}": (1,) for i in range(6)}}
    with pytest.raises(CheckpointError) as caught:
        compare_tensors(wanted, found, "here")
    assert str(caught.value) == (
        "here: tensors do not fit (1 missing: a; 6 not expected: x0, x1, x2, x3 ...; "
        "1 of another shape: c (2, 2) for (4,))"
    )
    compare_tensors({"a": (2,)}, {"a": torch.zeros(2)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_finite_weights(dtype: torch.dtype) -> None:
    large = torch.full((1000,), 400.0).to(dtype)  # the sum of float16 overflows, the numbers do not
    state = {"large": large, "ids": torch.arange(3)}
    check_finite(state)
    bad = large.clone()
    bad[7] = torch.nan
    with pytest.raises(CheckpointError, match="1 with NaN or infinity: bad"):
        check_finite({**state, "bad": bad})


def test_what_is_harmless_stays_allowed(llm: Path) -> None:
    (llm / "modeling_llama.py").write_text(EVIL)
    (llm / "training_args.bin").write_bytes(pickle.dumps(Evil()))
    (llm / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))  # beside safetensors: never opened
    change("config.json", auto_map={}, _attn_implementation="paged|sdpa", attn_implementation={"a": None})(llm)
    (llm / "link.json").symlink_to("config.json")
    report = check_folder(llm)
    assert report.pickles == ("pytorch_model.bin",)
    assert report.headers[MODEL][NORM].shape == (32,)
    assert report.configs["config.json"]["model_type"] == "llama"
    assert any("<|im_start|>" in text for text in report.templates.values())
    load_llm(LLMConfig(model_name_or_path=str(llm)))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "llava"}, "huggingface"),
        ({"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}, "huggingface"),
        ({"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}, "transformers"),
        ({"model_type": "llava", "mm_vision_tower": "x"}, "llava"),
        ({"model_type": "llava", "architectures": 5}, "transformers"),
        ({"model_type": ["llava"]}, "transformers"),
        (None, "unknown"),
    ],
)
def test_the_kind_of_a_folder(config: dict[str, Any] | None, kind: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert check_folder(tmp_path).kind == kind
    (tmp_path / "polymodal.json").write_text("{}")
    assert check_folder(tmp_path).kind == "polymodal"


def test_pickles_are_let_through_only_where_that_is_said(llm: Path) -> None:
    only_pickles("pytorch_model.bin")(llm)
    assert check_folder(llm, allow_pickle=True).pickles == ("pytorch_model.bin",)
    assert check_folder(llm, weights=False).pickles == ()


def test_the_hubs_cache_links_to_its_blobs(llm: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    blobs = snapshot.parent.parent / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(llm.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert check_folder(snapshot).headers
    load_llm(LLMConfig(model_name_or_path=str(snapshot)))
    (snapshot / "other.json").symlink_to("../../../secret.json")
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        check_folder(snapshot)


def test_sharded_safetensors_are_fine(llm: Path) -> None:
    shards()(llm)
    assert len(check_folder(llm).headers) == 2
    load_llm(LLMConfig(model_name_or_path=str(llm)))


def test_a_template_that_refuses_the_conversation_is_fine() -> None:
    check_template("{{ raise_exception('give tools') }}")
    check_template("{{ messages[0].content.nothing.more }}")
    check_template("{% this is no jinja")


def test_the_configuration_of_a_hub_id_is_looked_over_too(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"model_type": "llama", "_attn_implementation_internal": "evil/attention"}
    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", lambda *_args, **_kwargs: (settings, {}))
    with pytest.raises(CheckpointError, match=r"'owner/name': _attn_implementation_internal is 'evil/attention'"):
        load_llm(LLMConfig(model_name_or_path="owner/name"))
    settings["model_type"] = "clip"
    with pytest.raises(CheckpointError, match=r"'owner/name': _attn_implementation_internal is 'evil/attention'"):
        build_vision_encoder(VisionConfig(vision_tower="owner/name", type="clip"))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such model folder"):
        check_folder(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"nothing\.json: cannot be read \(No such file"):
        read_json(tmp_path / "nothing.json")
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors: cannot be read"):
        read_header(tmp_path / "nothing.safetensors")


def test_no_bit_flip_gets_past_us_that_the_library_refuses(tmp_path: Path) -> None:
    path = tmp_path / MODEL
    save_file({"a": torch.ones(3, 2), "b.c": torch.ones(4, dtype=torch.float16), "e": torch.ones(0, 5)}, path)
    whole = path.read_bytes()
    names = read_header(path).keys()
    assert names == {"a", "b.c", "e"}
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    chance = random.Random(0)
    agreed = 0
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 1, 2, 8))):
            place = chance.randrange(length)
            data[place] = (
                chance.choice(b'0123456789[]{},:"ab \x00\xff') if chance.random() < 0.7 else chance.randrange(256)
            )
        path.write_bytes(data[: len(data) - chance.choice((0, 0, 0, 1))])
        try:
            with safe_open(path, "pt") as file:
                theirs = set(file.keys())
        except (SafetensorError, OSError):
            theirs = None
        try:
            ours = set(read_header(path))
        except CheckpointError:
            ours = None
        assert ours is None or ours == theirs
        agreed += ours == theirs
    assert agreed > 560


def test_shards_beside_one_whole_file_are_named_once(llm: Path) -> None:
    """transformers reads the one file; the shards are what an earlier save left, or a later one."""
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    for name in (first, second):
        shutil.copy(llm / "model.safetensors", llm / name)
    with pytest.warns(UserWarning, match=r"model\.safetensors is read, and not the shards") as caught:
        load_llm(LLMConfig(model_name_or_path=str(llm)))
    told = {str(warning.message) for warning in caught if "shards" in str(warning.message)}
    assert len(told) == 1 and f"({first}, {second})" in told.pop()
    (llm / "model.safetensors").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_folder(llm)
