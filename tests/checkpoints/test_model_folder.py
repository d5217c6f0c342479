"""Our model folder: what is saved comes back the same, and what does not fit is refused with its name."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymodal.backends import load, load_processor
from polymodal.checkpoints.model_folder import _hash, export_whole, load_model, read_history, save_model
from polymodal.config import ModelConfig, RopeScalingConfig
from polymodal.errors import CheckpointError, PolymodalError
from polymodal.modeling.build import build_model
from tests.conftest import tiny_config


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


def logits(folder: Path, image: Path) -> torch.Tensor:
    from polymodal.messages import Image, user
    from polymodal.processing.collate import collate

    backend = load(folder, "cpu")
    batch = collate([backend.processor([user(Image(image), "What is this?")], add_generation_prompt=True)], 0)
    with torch.inference_mode():
        return backend.model(batch.input_ids, None, None, batch.plans, batch.sample_of_image, batch.pixel_values).logits


def test_saving_what_was_loaded_changes_nothing(folder: Path, tmp_path: Path, image_folder: Path) -> None:
    image = next(image_folder.glob("*.jpg"))
    loaded = load_model(folder)
    again = tmp_path / "again"
    save_model(again, loaded.model, loaded.config, loaded.tokenizer, history=[{"name": "x"}], llm_trained=True)
    assert torch.equal(logits(folder, image), logits(again, image))
    assert load_model(again).history == [{"name": "x"}]
    old, new = (json.loads((f / "polymodal.json").read_text()) for f in (folder, again))
    assert old["contract_hash"] == new["contract_hash"]


def test_rope_scaling_is_part_of_the_contract(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    scaling = RopeScalingConfig(rope_type="yarn", factor=4.0)
    llm = tiny_model_config.llm.model_copy(update={"rope_scaling": scaling})
    config = tiny_model_config.model_copy(update={"llm": llm})
    model, tokenizer = build_model(config)
    save_model(tmp_path / "model", model, config, tokenizer, llm_trained=True, vision_trained=True)
    backend = load(tmp_path / "model", "cpu")
    assert backend.context_length == 2048 and backend.processor.positions == 2048
    assert load_processor(tmp_path / "model").positions == 2048
    path = tmp_path / "model" / "polymodal.json"
    kept = json.loads(path.read_text())
    for changed in (None, {**kept["config"]["llm"]["rope_scaling"], "factor": 8.0}):
        document = json.loads(json.dumps(kept))
        document["config"]["llm"]["rope_scaling"] = changed
        path.write_text(json.dumps(document))
        with pytest.raises(CheckpointError, match=r"trained with llm.*refused"):
            load(tmp_path / "model", "cpu")


def test_an_adapter_travels_with_the_model(tiny_model_config: ModelConfig, tmp_path: Path, image_folder: Path) -> None:
    from polymodal.config import LoraRecipe
    from polymodal.modeling.lora import add_adapters

    torch.manual_seed(0)
    model, tokenizer = build_model(tiny_model_config)
    add_adapters(model, LoraRecipe(lora_r=2, lora_alpha=4))
    for name, parameter in model.llm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    save_model(tmp_path / "with", model, tiny_model_config, tokenizer)
    loaded = load_model(tmp_path / "with").model
    ours, theirs = dict(model.llm.named_parameters()), dict(loaded.llm.named_parameters())
    assert ours.keys() == theirs.keys() and any("lora_B" in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # For use the adapter is merged: the same logits with fewer steps. Saved again, it is what it was.
    from polymodal.modeling.lora import merge_adapter

    ids = torch.arange(12)[None]
    with torch.inference_mode():
        apart = loaded(ids).logits
        merge_adapter(loaded)
        together = loaded(ids).logits
    assert torch.allclose(apart, together, atol=1e-5)
    save_model(tmp_path / "again", loaded, tiny_model_config, tokenizer)
    again = dict(load_model(tmp_path / "again").model.llm.named_parameters())
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def spoil_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "projector.safetensors")
        change(tensors)
        save_file(tensors, folder / "projector.safetensors")

    return spoil


def spoil_document(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "polymodal.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return spoil


BIAS = "projector.layers.0.bias"
SPOILED = {
    "missing tensor": (spoil_tensors(lambda t: t.pop(BIAS)), f"missing: {BIAS}"),
    "extra tensor": (spoil_tensors(lambda t: t.update(extra=torch.zeros(1))), "not expected: extra"),
    "misshaped tensor": (
        spoil_tensors(lambda t: t.update({BIAS: torch.zeros(3)})),
        rf"of another shape: {BIAS} \(3,\) for",
    ),
    "NaN": (spoil_tensors(lambda t: t[BIAS].fill_(torch.nan)), f"with NaN or infinity: {BIAS}"),
    "cut file": (lambda f: (f / "projector.safetensors").write_bytes(b"abc"), "damaged, or no safetensors file"),
    "no projector": (lambda f: (f / "projector.safetensors").unlink(), "projector.safetensors is missing"),
    "no document": (lambda f: (f / "polymodal.json").unlink(), "not a polymodal model folder"),
    "no JSON": (lambda f: (f / "polymodal.json").write_text("{"), "not valid JSON"),
    "other format": (spoil_document(lambda d: d.update(format=99)), "another version"),
    "no history": (spoil_document(lambda d: d.pop("history")), "key 'history' is missing"),
    "unknown key": (
        spoil_document(lambda d: d["config"].update(visoin=1)),
        "unknown key 'visoin'; did you mean 'vision'",
    ),
    "edited contract": (spoil_document(lambda d: d["contract"].update(image_token_id=3)), "contract was changed"),
    "edited image rule": (
        spoil_document(lambda d: d["config"]["image"].update(image_aspect_ratio="squash")),
        "trained with image.image_aspect_ratio = 'pad', asked to run with 'squash'",
    ),
    "edited template": (
        spoil_document(lambda d: d["config"]["template"].update(chat_template="vicuna")),
        "trained with template.chat_template = 'tokenizer', asked to run with 'vicuna'",
    ),
}


def before_some_keys(document: dict) -> None:
    """Make it a folder from the time when these settings did not exist."""
    for part in (document["config"], document["contract"]):
        del part["image"]["max_tiles"], part["image"]["image_grid_pinpoints"], part["vision"]["detail"]
    document["contract_hash"] = _hash(document["contract"])


def test_settings_younger_than_a_folder_have_their_default(folder: Path, image_folder: Path) -> None:
    image = next(image_folder.glob("*.jpg"))
    before = logits(folder, image)
    spoil_document(before_some_keys)(folder)
    assert torch.equal(logits(folder, image), before)
    spoil_document(lambda d: d["config"]["image"].update(max_tiles=3))(folder)
    with pytest.raises(PolymodalError, match=r"trained with image.max_tiles = 6, asked to run with 3"):
        load_model(folder)


@pytest.mark.parametrize("what", SPOILED)
def test_a_spoiled_folder_is_refused_with_its_fault(what: str, folder: Path) -> None:
    spoil, expected = SPOILED[what]
    spoil(folder)
    with pytest.raises(PolymodalError, match=expected) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_an_unknown_model_is_named_with_the_known_ones() -> None:
    with pytest.raises(PolymodalError, match="unknown model 'defualt'"):
        load("defualt")
    with pytest.raises(CheckpointError, match="no such model folder"):
        load("some/where/else")
    with pytest.raises(CheckpointError, match="some/where: no such folder here, and not to be had from the hub"):
        load("some/where")


def test_a_folder_in_the_hubs_cache_loads_by_its_id(
    private_cache: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(private_cache / "hub"))
    repository = private_cache / "hub" / "models--me--tiny"
    shutil.copytree(tiny_model_folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert load("me/tiny", "cpu").model.image_token_id == load(tiny_model_folder, "cpu").model.image_token_id
    (repository / "snapshots" / ("0" * 40) / "polymodal.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no polymodal\.json"):
        load("me/tiny")


def test_nothing_is_half_written(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    model, tokenizer = build_model(tiny_model_config)
    next(model.projector.parameters()).data[0, 0] = torch.inf
    with pytest.raises(CheckpointError, match="holds NaN or infinity; nothing was saved"):
        save_model(tmp_path / "out", model, tiny_model_config, tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def adapted(tiny_model_config: ModelConfig, tmp_path: Path) -> Path:
    """A model folder with a LoRA of rank 2 on the attention's projections."""
    from polymodal.config import LoraRecipe
    from polymodal.modeling.lora import add_adapters

    torch.manual_seed(0)
    model, tokenizer = build_model(tiny_model_config)
    add_adapters(model, LoraRecipe(lora_r=2, lora_alpha=4, match="llm.model.layers.*.self_attn.{q,v}_proj"))
    for name, parameter in model.llm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    save_model(tmp_path / "adapted", model, tiny_model_config, tokenizer)
    return tmp_path / "adapted"


def adapter_says(**values: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return spoil


def adapter_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "adapter" / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return spoil


def first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in sorted(tensors) if part in name)


ADAPTERS = {
    "alpha NaN": (adapter_says(lora_alpha=float("nan")), r"adapter_config\.json: lora_alpha is nan"),
    "alpha of some modules NaN": (adapter_says(alpha_pattern={"q_proj": float("nan")}), "alpha_pattern.q_proj is nan"),
    "alpha infinite": (adapter_says(lora_alpha=float("inf")), "lora_alpha is inf"),
    "alpha 0": (adapter_says(lora_alpha=0), "lora_alpha 0, which is no scale"),
    "alpha a word": (adapter_says(lora_alpha="NaN"), "lora_alpha 'NaN', which is no scale"),
    "r 0": (adapter_says(r=0), r"adapter_config\.json: r is 0; more than 0"),
    "r negative": (adapter_says(r=-4), "r is -4; more than 0"),
    "r of some modules 0": (adapter_says(rank_pattern={"q_proj": 0}), r"says r \[2, 0\], the tensors have \[2\]"),
    "r endless": (adapter_says(r=10**9), r"says r \[1000000000\], the tensors have \[2\]"),
    "r a fraction": (adapter_says(r=1.5), r"says r \[1\.5\]"),
    "r another": (adapter_says(r=1), "cannot be loaded .*size mismatch"),
    "another kind": (adapter_says(peft_type="IA3"), "peft_type is 'IA3'; only LORA"),
    "no modules": (adapter_says(target_modules=["nothing"]), "cannot be loaded .*nothing"),
    "modules it has no tensors for": (adapter_says(target_modules=["q_proj", "v_proj", "o_proj"]), "4 missing.*o_proj"),
    "fewer modules": (adapter_says(target_modules=["q_proj"]), "4 not expected.*v_proj"),
    "an endless expression": (adapter_says(target_modules=r"(m|[a-z.0-9_])*(([a-z0-9_.]+)+)+!"), "too long|cannot be"),
    "a bad expression": (adapter_says(target_modules="(("), r"target_modules: the regular expression '\(\(' is none"),
    "an endless pattern": (adapter_says(rank_pattern={r"(([a-z0-9_.]+)+)+!": 2}), "may take too long"),
    "a shape": (
        adapter_tensors(lambda t: t.update({first(t, "lora_B"): torch.zeros(7, 2)})), "cannot be loaded .*size mismatch"
    ),
    "a transposed tensor": (
        adapter_tensors(lambda t: t.update({first(t, "lora_A"): t[first(t, "lora_A")].T.contiguous()})), "size mismatch"
    ),
    "a tensor gone": (adapter_tensors(lambda t: t.pop(first(t, "lora_B"))), "1 missing"),
    "no tensors": (adapter_tensors(lambda t: t.clear()), r"the tensors have \[\]"),
}  # fmt: skip


@pytest.mark.parametrize(("spoil", "reason"), ADAPTERS.values(), ids=ADAPTERS)
def test_a_spoiled_adapter_is_refused_with_its_fault(spoil: Callable[[Path], None], reason: str, adapted: Path) -> None:
    spoil(adapted)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_model(adapted)
    assert "\n" not in str(caught.value) and time.monotonic() - start < 10


def test_a_pattern_gives_the_adapter_that_a_list_gives(adapted: Path, image_folder: Path) -> None:
    image = next(image_folder.glob("*.jpg"))
    listed = logits(adapted, image)
    adapter_says(target_modules=r".*\.self_attn\.(q|v)_proj", exclude_modules=r".*mlp.*")(adapted)
    assert torch.equal(logits(adapted, image), listed)
    adapter_says(exclude_modules=r"((.|[a-z])*)*((.|[.])*)*!")(adapted)  # which Python's own would try for years
    assert torch.equal(logits(adapted, image), listed)


def test_expressions_have_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from polymodal.modeling import lora

    monkeypatch.setattr(lora, "MATCH_SECONDS", 0.2)
    slow = r"(?:(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*))\9\8\7\6\5x?\1\2\3\4b"
    with pytest.raises(CheckpointError, match=r"target_modules: the regular expression .* takes too long to match"):
        lora.match_in_time(slow, ["model.layers.0.self_attn.q_proj.b" * 3], "adapter: target_modules")


def test_an_adapter_alone_says_what_it_is(adapted: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a peft adapter, which is no model, but goes on .*merge it"):
        load(adapted / "adapter")


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_a_file_is_no_model(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"model.{kind}"
    file.write_bytes(b"GGUF" + bytes(64))
    hint = "llama.cpp runs" if kind == "gguf" else f"such as {tmp_path}"
    with pytest.raises(CheckpointError, match=rf"model\.{kind}: a file, and a model is a folder; .*{hint}"):
        load(file)


def test_parts_by_relative_path_are_found_from_everywhere(
    tiny_llm_folder: Path, tiny_tower_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, image_folder: Path
) -> None:
    shutil.copytree(tiny_llm_folder, tmp_path / "here" / "llm")
    shutil.copytree(tiny_tower_folder, tmp_path / "here" / "towers" / "clip")
    monkeypatch.chdir(tmp_path / "here")
    config = tiny_config(Path("llm"), Path("towers/clip"))
    config = config.model_copy(update={"llm": config.llm.model_copy(update={"model_name_or_path": "./llm"})})
    torch.manual_seed(0)
    model, tokenizer = build_model(config)
    save_model(tmp_path / "model", model, config, tokenizer)
    image = next(image_folder.resolve().glob("*.jpg"))
    before = logits(tmp_path / "model", image)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits(tmp_path / "model", image), before)


def test_another_tower_in_the_place_of_the_one_it_was_trained_with(
    tiny_llm_folder: Path, tiny_tower_folder: Path, tmp_path: Path
) -> None:
    tower = Path(shutil.copytree(tiny_tower_folder, tmp_path / "tower"))
    config = tiny_config(tiny_llm_folder, tower)
    model, tokenizer = build_model(config)
    save_model(tmp_path / "model", model, config, tokenizer)
    load_model(tmp_path / "model")
    tensors = load_file(tower / "model.safetensors")
    name = next(name for name in tensors if "layers.0.mlp.fc1.weight" in name)
    save_file({**tensors, name: tensors[name] * 1.5}, tower / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"trained behind another vision tower than '.*tower' is now"):
        load_model(tmp_path / "model")


def test_an_unknown_type_of_weights_is_named() -> None:
    with pytest.raises(PolymodalError, match="unknown dtype 'fp16'; did you mean 'float16'"):
        load("default", dtype="fp16")  # type: ignore[arg-type]


def test_a_whole_folder_tells_nothing_of_the_machine_that_wrote_it(
    tiny_model_config: ModelConfig, tmp_path: Path
) -> None:
    """Folders are published: of each path in the history the name is left."""
    model, tokenizer = build_model(tiny_model_config)
    recipe = {"name": "a", "data": {"mix": [{"path": str(tmp_path / "secret" / "mine.json")}]}}
    history = [{"stage": "a", "trained": ["projector"], "source": f"{tmp_path}/base", "recipe": recipe}]
    save_model(tmp_path / "own", model, tiny_model_config, tokenizer, history=history)
    export_whole(tmp_path / "own", tmp_path / "whole")
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert str(tmp_path.parent).encode() not in path.read_bytes(), path
    told = json.loads((tmp_path / "whole" / "polymodal.json").read_text())["history"]
    assert told[0]["source"] == "base" and told[0]["recipe"]["data"]["mix"] == [{"path": "mine.json"}]
    assert told[-1]["stage"] == "export"


@pytest.mark.parametrize("history", ["text", [1], {"a": 1}, [{"trained": 5}]])
def test_a_history_of_another_form_is_refused(folder: Path, history: object) -> None:
    path = folder / "polymodal.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"history": history}))
    with pytest.raises(CheckpointError, match=r"polymodal\.json: history must be a list of stages"):
        read_history(folder)
