"""Activation checkpointing and compiled layers change memory and speed, never the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, Qwen2Config, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from polymodal.modeling.encoders.audio import WhisperAudioEncoder
from polymodal.modeling.vlm import MultimodalLM
from polymodal.processing.collate import Batch, Sample, collate_packed
from polymodal.training.activation_checkpointing import (
    activation_bytes,
    checkpoint_layers,
    compile_layers,
    free_memory,
    save_memory,
)
from polymodal.training.recipes.load import load_recipe
from polymodal.training.recipes.sft import Recipe
from polymodal.utils.modules import blocks

VOCAB = 50


def make(frozen: bool = False, dropout: float = 0.0) -> MultimodalLM:
    torch.manual_seed(0)
    llm = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
                    num_attention_heads=2, attention_dropout=dropout, initializer_range=0.3)
    )  # fmt: skip
    model = MultimodalLM(llm=llm, image_token_id=VOCAB).train()
    if frozen:
        model.eval().requires_grad_(False)
        model.llm.get_input_embeddings().requires_grad_(True)
    return model


def batch(*lengths: int) -> Batch:
    generator = torch.Generator().manual_seed(sum(lengths))
    return collate_packed(
        [Sample(torch.randint(0, VOCAB, (n,), generator=generator), torch.ones(n, dtype=torch.bool)) for n in lengths]
    )


def run(model: MultimodalLM, packed: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    out = model(**packed.inputs())
    out.loss_sum.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return out.loss_sum.item(), found


@pytest.mark.parametrize(("frozen", "dropout"), [(False, 0.0), (False, 0.3), (True, 0.0)])
def test_checkpointing_is_exact_on_packs_and_keeps_less(frozen: bool, dropout: float) -> None:
    plain, saving = make(frozen, dropout), make(frozen, dropout)
    names = [name for name, _ in saving.named_parameters()]
    plain.prepare_packing()
    saving.prepare_packing()
    checkpoint_layers(blocks(saving.llm))
    kept: dict[str, int] = {}
    results = {}
    for label, model in (("plain", plain), ("saving", saving)):
        sizes: list[int] = []

        def pack(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            torch.manual_seed(5)
            out = model(**batch(7, 3, 12).inputs())
        kept[label] = sum(sizes)
        results[label] = run(model, batch(7, 3, 12))
    assert kept["saving"] < 0.5 * kept["plain"]
    assert results["saving"][0] == results["plain"][0]
    assert all(torch.equal(results["saving"][1][key], value) for key, value in results["plain"][1].items())
    assert [name for name, _ in saving.named_parameters()] == names
    assert out.loss_sum.item() == results["saving"][0]


def test_compiled_layers_share_their_code_and_give_the_same() -> None:
    plain, compiled = make(), make()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    layers = blocks(compiled.llm)
    compiled.prepare_packing()
    torch._dynamo.reset()
    compile_layers(layers, backend)
    checkpoint_layers(layers)
    for lengths in ((7, 3, 12), (4, 4), (9, 2, 2, 5), (20,)):
        expected, found = run(plain, batch(*lengths)), run(compiled, batch(*lengths))
        assert found[0] == pytest.approx(expected[0], rel=1e-6)
        for key, value in expected[1].items():
            assert torch.allclose(found[1][key], value, rtol=1e-5, atol=1e-5), key
    # Two pieces of a layer, before and after attention, each for one and then any length: not one for each pack.
    assert 0 < len(graphs) <= 6
    torch._dynamo.reset()


def recipe(tmp_path: Path, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: r\ninit: {from: x}\ndata: {mix: [{path: y}]}\noutput_dir: z\n")
    return load_recipe(path, list(overrides))


def test_a_bare_on_or_off_is_understood(tmp_path: Path) -> None:
    run = recipe(tmp_path, "run.checkpointing=on", "run.compile=off", "run.feature_cache=off").run
    assert run.checkpointing == "on" and run.compile == "off" and run.feature_cache == "off"


def test_the_recipe_decides_and_auto_looks_at_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert save_memory(recipe(tmp_path), make(), cpu, 10_000, 64) == []
    assert save_memory(recipe(tmp_path, "run.checkpointing=on"), make(), cpu, 10, 64) == ["3 layers checkpointed"]
    assert save_memory(recipe(tmp_path, "run.compile=on"), make(), cpu, 10, 64) == ["3 layers compiled"]
    monkeypatch.setattr("polymodal.training.activation_checkpointing.free_memory", lambda device: 2**20)
    (line,) = save_memory(recipe(tmp_path), make(), cpu, 10, 2048)
    assert line.startswith("3 layers checkpointed: activations may need 0.")
    assert save_memory(recipe(tmp_path, "run.checkpointing=off"), make(), cpu, 10, 2048) == []
    # What counts is how long the samples are, not how long they may be.
    assert save_memory(recipe(tmp_path, "data.max_length=100000"), make(), cpu, 10, 8) == []
    packed = ("batch.packing=pack", "batch.micro_tokens=100000", "batch.global_size=4")
    assert save_memory(recipe(tmp_path, *packed), make(), cpu, 10, 8) == []
    assert free_memory(cpu) > 2**20


def test_an_audio_encoder_that_is_trained_is_checkpointed_too(tmp_path: Path) -> None:
    sizes = {"d_model": 8, "encoder_attention_heads": 2, "encoder_ffn_dim": 8, "max_source_positions": 4}
    for trained, layers in ((False, 3), (True, 5)):
        model = make()
        model.audio_encoder = WhisperAudioEncoder(WhisperEncoder(WhisperConfig(encoder_layers=2, **sizes)))
        model.audio_encoder.requires_grad_(trained)
        done = save_memory(recipe(tmp_path, "run.checkpointing=on"), model, torch.device("cpu"), 10, 64)
        assert done == [f"{layers} layers checkpointed"]


def test_the_estimate_of_activations_is_about_right() -> None:
    model = make()
    sizes: dict[int, int] = {}
    weights = {p.data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.llm.model(inputs_embeds=torch.randn(1, 256, 16), use_cache=False)
    assert 0.6 < activation_bytes(model.llm.config, 256) / sum(sizes.values()) < 1.7


def test_the_estimate_reads_every_kind_of_configuration() -> None:
    wide = Qwen2Config(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)
    assert activation_bytes(wide, 200) == 2 * activation_bytes(wide, 100) > 0
    assert activation_bytes(wide, 100, 4, seen=50) - activation_bytes(wide, 100) == 100 * 4 * 4 * 4 * 50 // 2
    opt = OPTConfig(hidden_size=64, ffn_dim=256, num_hidden_layers=4, num_attention_heads=4)
    assert activation_bytes(opt, 100, 2) * 2 == activation_bytes(opt, 100, 4)
