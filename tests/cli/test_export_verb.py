"""`polymodal export`: what it prints, what it leaves, and its status."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from polymodal.backends import load
from polymodal.checkpoints.model_folder import load_model, save_model
from polymodal.cli import main
from polymodal.config import LoraRecipe, ModelConfig
from polymodal.interop.huggingface import export as hf_export
from polymodal.modeling.build import build_model
from polymodal.modeling.lora import add_adapters


def test_a_stock_folder_with_its_proof(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], image_folder: Path
) -> None:
    model = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    (model / "LICENSE").write_text("terms")
    out = tmp_path / "out"
    asked = [
        {
            "id": f"q{n}",
            "messages": [{"role": "user", "content": f"Is {n} right?"}, {"role": "assistant", "content": "No."}],
        }
        for n in range(5)
    ]
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    argv = ["export", str(model), str(out), "--verify", "--picture", str(image_folder / "coffee.jpg")]
    argv += ["--questions", str(tmp_path / "asked.json"), "--limit", "2"]
    assert main(argv) == 0
    printed = capsys.readouterr()
    assert "parity: token_ids ok, pixels ok, logits ok, greedy ok" in printed.out and "llava" in printed.out
    assert "placeholder" in printed.err
    document = json.loads((out / "parity.json").read_text())
    assert document["passed"] and document["probes"]["names"][-3:] == ["coffee.jpg", "q0", "q2"]
    assert (out / "LICENSE").read_text() == "terms"
    # What was written opens here, too.
    assert load(out, "cpu").ask("What is this?", image_folder / "cat.jpg") is not None

    # And is compared with what the stock class makes of it, not with what was read here.
    assert main(["export", str(out), str(tmp_path / "again"), "--verify"]) == 0
    assert "parity: source ok, token_ids ok" in capsys.readouterr().out

    assert main(argv) == 2  # it is there
    assert "is there already" in capsys.readouterr().err
    assert main([*argv[:3], "--overwrite", "--dtype", "float16", "--max-shard-gb", "0.00005"]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 1 and not (out / "parity.json").exists()


def test_a_failed_proof_is_status_1(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {**hf_export.RESAMPLE_FILTERS, "bicubic": 2}  # as if the resize rule were written wrongly
    monkeypatch.setattr(hf_export, "RESAMPLE_FILTERS", wrong)
    assert main(["export", str(tiny_model_folder), str(tmp_path / "out"), "--verify"]) == 1
    assert "parity FAILED: pixels" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "parity.json").read_text())["passed"] is False


def test_one_folder_of_ours(tiny_model_config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    model, tokenizer = build_model(tiny_model_config)
    add_adapters(model, LoraRecipe(lora_r=2, lora_alpha=4))
    for name, parameter in model.llm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    save_model(tmp_path / "with", model, tiny_model_config, tokenizer)
    argv = ["export", str(tmp_path / "with"), str(tmp_path / "whole"), "--format", "polymodal"]
    assert main([*argv, "--merge-lora"]) == 0
    whole = load_model(tmp_path / "whole")
    assert not (tmp_path / "whole" / "adapter").exists() and (tmp_path / "whole" / "llm").is_dir()
    assert whole.history[-1] == {"stage": "export", "folded_in": ["adapter"]}
    ids = torch.arange(12)[None]
    with torch.inference_mode():
        torch.testing.assert_close(whole.model(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    assert main([*argv, "--overwrite", "--dtype", "bfloat16"]) == 0
    stored = load_file(tmp_path / "whole" / "llm" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert load_model(tmp_path / "whole").config.llm.dtype == "bfloat16"
    for flag in ("--keep-adapter", "--verify"):
        assert main([*argv, "--overwrite", flag]) == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--picture", "x.jpg"], "--image and --questions are for --verify"),
        (["--verify", "--questions", "x.json"], "x.json"),
        (["--verify", "--limit", "0"], "must be at least 1"),
        (["--verify", "--picture", "x.jpg"], "no such file"),
        (["--max-shard-gb", "0"], "must be more than 0"),
        (["--format", "onnx"], "invalid choice"),
        (["--merge-lora", "--keep-adapter"], "not allowed with"),
    ],
)
def test_mistakes_are_one_line(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], part: str
) -> None:
    assert main(["export", str(tiny_model_folder), str(tmp_path / "out"), *flags]) == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["hf", "polymodal"])
@pytest.mark.parametrize("size", [20, 3000, 40_000])  # the first file, the tokenizer, the weights
def test_a_full_disk_is_one_line(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, size: int
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        status = main(["export", str(tiny_model_folder), str(tmp_path / "out"), "--format", kind])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.splitlines()
    assert status == 2 and "out: cannot be written (" in error[-1] and "too large" in error[-1]
    assert not list(tmp_path.iterdir())


def test_reasons_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_config: ModelConfig
) -> None:
    document = tiny_model_config.model_dump()
    document["projector"] = {"mm_projector_type": "linear"}
    config = ModelConfig.model_validate(document)
    model, tokenizer = build_model(config)
    save_model(tmp_path / "model", model, config, tokenizer)
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "(1) mm_projector_type 'linear'" in error and error.count("\n") == 1
