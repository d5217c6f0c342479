"""Our model folder: what is saved comes back the same, and what does not fit is refused with its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from polymodal.backends import load
from polymodal.checkpoints.model_folder import _hash, load_model, save_model
from polymodal.config import ModelConfig
from polymodal.errors import CheckpointError, PolymodalError
from polymodal.modeling.build import build_model


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
