"""The page beside an export: licences, origins, engines, batches, training, and no place of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from polymodal.checkpoints.model_folder import Loaded
from polymodal.config import ModelConfig
from polymodal.interop.huggingface.export import export_hf
from polymodal.interop.huggingface.export_card import licence_of, origins
from polymodal.modeling.build import build_model

APACHE = "                              Apache License\n                        Version 2.0, January 2004\n"


def loaded(config: ModelConfig, *history: dict[str, Any]) -> Loaded:
    model, tokenizer = build_model(config)
    return Loaded(model.eval(), tokenizer, config, list(history))


def front(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---")[1])
    return found


def copied(source: Path, target: Path, card: str | None, **files: str) -> Path:
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    if card is not None:
        (target / "README.md").write_text(card)
    for name, text in files.items():
        (target / name).write_text(text)
    return target


@pytest.fixture
def licensed(tiny_model_config: ModelConfig, tmp_path: Path) -> ModelConfig:
    """A tower that says its licence in its card, and a language model that has a licence file and a notice."""
    document = tiny_model_config.model_dump()
    tower, llm = Path(document["vision"]["vision_tower"]), Path(document["llm"]["model_name_or_path"])
    card = "---\ntags:\n  - x\nlicense: mit\n---\n# A tower\n"
    document["vision"]["vision_tower"] = str(copied(tower, tmp_path / "home" / "tower", card))
    document["llm"]["model_name_or_path"] = str(
        copied(llm, tmp_path / "home" / "words", None, LICENSE=APACHE, NOTICE="of words")
    )
    return ModelConfig.model_validate(document)


def test_the_card_says_licences_origins_engines_and_training(licensed: ModelConfig, tmp_path: Path) -> None:
    stage = {
        "stage": "one", "trained": ["projector", "lora"], "steps": 7, "samples": 56, "trained_tokens": 900,
        "loss": 1.25,
        "recipe": {
            "init": {"from": str(tmp_path / "runs" / "zero"), "model": {"llm": {"model_name_or_path": "owner/words"}}},
            "data": {"train": [{"path": str(tmp_path / "secret" / "a.json")}], "note": f"see {tmp_path}/secret/b.json"},
        },
    }  # fmt: skip
    export_hf(loaded(licensed, stage), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    matter = front(card)
    assert matter["license"] == "unknown"  # of owner/words nothing is known here
    assert matter["base_model"] == ["owner/words"] and matter["library_name"] == "transformers"
    for row in (
        "| vision tower | tower | mit |",
        "| language model | words | apache-2.0 |",
        "owner/words | not stated",
    ):
        assert row in card
    assert "| one | projector, lora | 7 | 56 | 900 | 1.25 |" in card
    for part in (
        "vllm serve FOLDER",
        "llama.cpp",
        "padding=True",
        "pads on the left",
        '"path": "a.json"',
        "see b.json",
    ):
        assert part in card
    notices = tmp_path / "out" / "licences" / "llm"
    assert (notices / "NOTICE").read_text() == "of words" and (notices / "LICENSE").read_text() == APACHE
    # No file tells where it was made.
    for path in (path for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".md", ".jinja")):
        assert str(tmp_path) not in path.read_text(), path


def test_one_licence_is_the_models(licensed: ModelConfig, tmp_path: Path) -> None:
    made = loaded(licensed, {"stage": "made"})
    assert {origin.licence for origin in origins(made, None)} == {"mit", "apache-2.0"}
    export_hf(made, tmp_path / "two")
    assert front((tmp_path / "two" / "README.md").read_text())["license"] == "other"
    (tmp_path / "home" / "tower" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    source = tmp_path / "source"
    source.mkdir()
    (source / "polymodal.json").write_text("{}")  # a folder of ours is as its parts are, where it says nothing
    export_hf(made, tmp_path / "one", licences=source)
    assert front((tmp_path / "one" / "README.md").read_text())["license"] == "apache-2.0"
    (source / "README.md").write_text("---\nlicense: 'cc-by-nc-4.0'\n---\n")
    export_hf(made, tmp_path / "own", licences=source)
    assert front((tmp_path / "own" / "README.md").read_text())["license"] == "other"


def test_names_of_parts(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    snapshot = "/root/.cache/huggingface/hub/models--Org--a-b.c/snapshots/0123abcd"
    history = [
        {"stage": "a", "source": snapshot, "base": None, "tower": "x" * 5000},
        {"stage": "b", "recipe": {"model": {"llm": {"model_name_or_path": "smollm2"}}}},
        {"stage": "c", "recipe": {"model": {"vision": {"vision_tower": "~nobody-here/x"}}}},
    ]
    found = {o.name: (o.part, o.licence, o.on_hub) for o in origins(loaded(tiny_model_config, *history), None)}
    assert found["Org/a-b.c"] == ("model", None, True)
    assert found["HuggingFaceTB/SmolLM2-135M-Instruct"] == ("llm", "apache-2.0", True)
    assert not any("/root" in name for name in found)


def test_licences_that_folders_state(tmp_path: Path) -> None:
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text("# A\n\nlicense: mit\n")
    assert licence_of(tmp_path) is None
    (tmp_path / "LICENSE.txt").write_text("MIT License\n\nCopyright")
    assert licence_of(tmp_path) == "mit"
    (tmp_path / "README.md").write_text('---\r\nlanguage: en\r\nlicense: "llama2"\r\n---\r\n')
    assert licence_of(tmp_path) == "llama2"
