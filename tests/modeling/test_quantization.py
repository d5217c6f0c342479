"""8-bit weights: what a layer computes, what a whole model answers, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from polymodal.backends import load
from polymodal.backends.local import LocalBackend
from polymodal.checkpoints.model_folder import load_model, save_model
from polymodal.cli import main
from polymodal.config import LLMConfig, ModelConfig
from polymodal.errors import CheckpointError, ConfigError
from polymodal.generation.params import GenerationParams
from polymodal.messages import Image, Message, user
from polymodal.modeling.build import build_model
from polymodal.modeling.language_model import load_llm
from polymodal.modeling.lora import merge_adapter
from polymodal.modeling.quantization import (
    FEW_ROWS,
    STEP,
    Int8Linear,
    check_quantize,
    fast_dtype,
    is_quantized,
    quantize_int8,
    quantize_layers,
    quantize_published,
    quantize_weight,
)
from polymodal.processing.collate import collate

SHAPES = [(1, 1), (7, 5), (33, 1), (1, 17), (16, 15), (3, 4097), (65, 64)]
PARAMS = GenerationParams(max_new_tokens=4)


def layer(out: int, width: int, bias: bool = False, prompt_dtype: torch.dtype | None = torch.float32) -> Int8Linear:
    torch.manual_seed(out * 10_000 + width)
    return Int8Linear(*quantize_weight(torch.randn(out, width)), torch.randn(out) if bias else None, prompt_dtype)


def relative(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """The largest difference beside the largest value."""
    assert got.shape == wanted.shape
    return float((got.double() - wanted.double()).abs().max() / wanted.abs().max())


def exact(x: torch.Tensor, linear: Int8Linear) -> torch.Tensor:
    bias = 0 if linear.bias is None else linear.bias.double()
    return x.double() @ (linear.weight.double() * linear.scale.double()[:, None]).T + bias


@pytest.mark.parametrize(("out", "width"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_many_rows_give_what_the_rounded_weights_give(out: int, width: int, bias: bool) -> None:
    linear = layer(out, width, bias)
    x = torch.randn(FEW_ROWS + 1, width)
    assert relative(linear(x), exact(x, linear)) < 2e-6


@pytest.mark.parametrize(("out", "width"), [(1, 32), (33, 64), (5, 4096)])
@pytest.mark.parametrize("rows", [1, 2, FEW_ROWS])
def test_few_rows_only_round_what_goes_in_and_out_to_bfloat16(out: int, width: int, rows: int) -> None:
    linear = layer(out, width)
    x = torch.randn(rows, width)
    # Each row's product of a rounded input, before its scale, is rounded once: 8 bits, so half of 2 ** -7.
    inside = exact(x.to(torch.bfloat16), linear)
    assert bool(((linear(x).double() - inside).abs() <= inside.abs() * 2**-8 + 1e-5).all())
    assert relative(linear(x), exact(x, linear)) < 2e-2


@pytest.mark.parametrize(("out", "width"), SHAPES)
@pytest.mark.parametrize("rows", [1, FEW_ROWS])
def test_widths_that_the_packed_product_reads_past_take_the_other_way(out: int, width: int, rows: int) -> None:
    """torch 2.13's product kills the process on these; a wrong way would not fail here but end the tests."""
    linear = layer(out, width)
    x = torch.randn(rows, width)
    wanted = exact(x, linear)
    assert relative(linear(x), wanted) < (2e-6 if width % STEP else 2e-2)


def test_the_scales_are_not_rounded_to_bfloat16() -> None:
    weight = torch.full((1, STEP), 4, dtype=torch.int8)
    scale = torch.tensor([1 + 2**-12])
    assert float(Int8Linear(weight, scale)(torch.ones(1, STEP))) == 4 * STEP * (1 + 2**-12)  # 128 is exact in bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [1, FEW_ROWS + 1])
def test_every_floating_type_comes_back_as_it_went_in(dtype: torch.dtype, rows: int) -> None:
    linear = layer(12, 64, bias=True)
    x = torch.randn(rows, 64).to(dtype)
    y = linear(x)
    assert y.dtype is dtype
    assert relative(y, exact(x, linear)) < 2e-2


def test_prompts_in_bfloat16_are_as_exact_as_bfloat16() -> None:
    linear = layer(64, 128, prompt_dtype=torch.bfloat16)
    x = torch.randn(FEW_ROWS + 1, 128)
    assert 0 < relative(linear(x), exact(x, linear)) < 2e-2
    assert fast_dtype() in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32), (32,), (1, 32), (2, 3, 32), (2, 3, 4, 32)])
def test_leading_axes_are_kept(shape: tuple[int, ...]) -> None:
    linear = layer(12, 32)
    x = torch.randn(shape)
    assert linear(x).shape == (*shape[:-1], 12)
    turned = torch.randn(32, 5).T  # not contiguous
    assert torch.equal(linear(turned), linear(turned.contiguous()))


def test_each_weight_is_off_by_half_a_scale_at_most() -> None:
    weight = torch.randn(50, 30) * torch.logspace(-6, 6, 50)[:, None]  # rows of very different size
    rounded, scale = quantize_weight(weight)
    back = Int8Linear(rounded, scale).dequantized()
    assert bool(((back - weight).abs() <= scale[:, None] * 0.5001).all())
    assert torch.equal(rounded.abs().amax(dim=1), torch.full((50,), 127, dtype=torch.int8))


def test_rows_of_zeros_and_of_the_smallest_numbers_stay_finite() -> None:
    weight = torch.zeros(3, STEP)
    weight[1] = 1e-45
    rounded, scale = quantize_weight(weight)
    assert bool(torch.isfinite(scale).all())
    assert torch.equal(rounded[[0]], torch.zeros(1, STEP, dtype=torch.int8))
    for rows in (1, FEW_ROWS + 1):
        assert torch.equal(Int8Linear(rounded, scale)(torch.ones(rows, STEP)), torch.zeros(rows, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_with_their_name(value: float) -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight.data[1, 2] = value
    with pytest.raises(CheckpointError, match=r"^1: .*NaN or infinity"):
        quantize_layers(module)


def test_the_state_goes_round() -> None:
    first, second = layer(9, STEP, bias=True), layer(9, STEP, bias=True)
    for name, tensor in second.state_dict().items():
        second.get_buffer(name).copy_(torch.zeros_like(tensor))
    second.load_state_dict(first.state_dict())
    assert sorted(first.state_dict()) == ["bias", "scale", "weight"]
    for rows in (1, FEW_ROWS + 1):
        x = torch.randn(rows, STEP)
        assert torch.equal(first(x), second(x))


def test_conv1d_of_gpt2_is_a_linear_layer_that_lies_on_its_side() -> None:
    from transformers.pytorch_utils import Conv1D

    module = nn.Sequential(Conv1D(6, 4))
    module[0].weight.data.normal_(), module[0].bias.data.normal_()
    x = torch.randn(FEW_ROWS + 1, 4)
    wanted = module(x).detach()
    assert quantize_layers(module) == ["0"]
    assert relative(module(x), wanted) < 3e-2


def test_a_tied_head_gets_a_copy_and_the_embeddings_stay(tiny_model_config: ModelConfig) -> None:
    model, _ = build_model(tiny_model_config)
    model.llm.lm_head.weight = model.llm.get_input_embeddings().weight
    before = model.llm.get_input_embeddings().weight.clone()
    vision = {name: tensor.clone() for name, tensor in model.vision_encoder.state_dict().items()}
    names = quantize_int8(model)
    assert "lm_head" in names and len(names) == 2 * 7 + 1
    assert isinstance(model.llm.lm_head, Int8Linear)
    assert torch.equal(model.llm.get_input_embeddings().weight, before)
    assert not is_quantized(model.vision_encoder) and not is_quantized(model.projector)
    assert all(torch.equal(tensor, vision[name]) for name, tensor in model.vision_encoder.state_dict().items())


def test_layers_can_be_left_alone(tiny_model_config: ModelConfig) -> None:
    model, _ = build_model(tiny_model_config)
    names = quantize_int8(model, skip=["lm_head", "*.layers.0.*"])
    assert len(names) == 7 and all(".layers.1." in name for name in names)
    assert type(model.llm.lm_head) is nn.Linear
    other, _ = build_model(tiny_model_config)
    with pytest.raises(ConfigError, match=r"skip: no linear layer is called 'head'; the first one is 'model\."):
        quantize_int8(other, skip=["head"])
    assert not is_quantized(other)


def test_a_quantised_model_answers_and_its_logits_are_near(tiny_model_folder: Path, image_folder: Path) -> None:
    image = next(image_folder.glob("*.jpg"))
    plain, rounded = load(tiny_model_folder, "cpu"), load(tiny_model_folder, quantize="int8")
    assert isinstance(plain, LocalBackend) and isinstance(rounded, LocalBackend)
    assert is_quantized(rounded.model.llm) and not is_quantized(plain.model.llm)
    reply = rounded.generate([_question(image)], PARAMS)
    assert reply.usage.completion_tokens > 0
    wanted, got = (_logits(backend, image) for backend in (plain, rounded))
    assert 0 < relative(got, wanted) < 0.05


def test_a_merged_adapter_becomes_part_of_the_weights(tiny_model_config: ModelConfig) -> None:
    from polymodal.config import LoraRecipe
    from polymodal.modeling.lora import add_adapters

    torch.manual_seed(0)
    model, _ = build_model(tiny_model_config)
    add_adapters(model, LoraRecipe(lora_r=2, lora_alpha=4))
    for name, parameter in model.llm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        with pytest.raises(ConfigError, match="adapter is not merged"):
            quantize_int8(model)
        merge_adapter(model)
        names = quantize_int8(model)
        assert len(names) == 15 and not any("lora" in name or "base_layer" in name for name in names)
        assert 0 < relative(model(ids).logits, wanted) < 0.05
    assert not any("lora" in name for name, _ in model.llm.named_modules())


def test_training_saving_and_quantising_twice_are_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    loaded = load_model(tiny_model_folder)
    with pytest.raises(ConfigError, match="in training"):
        quantize_int8(loaded.model.train())
    quantize_int8(loaded.model.eval())
    with pytest.raises(ConfigError, match="quantised already"):
        quantize_int8(loaded.model)
    with pytest.raises(ConfigError, match="cannot be trained"):
        loaded.model.train()
    loaded.model.eval()
    with pytest.raises(CheckpointError, match="rounded to 8 bits"):
        save_model(tmp_path / "out", loaded.model, loaded.config, loaded.tokenizer)
    assert not (tmp_path / "out").exists()


def test_a_published_model_keeps_its_tower() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision, text = CLIPVisionConfig(**small, image_size=8, patch_size=4), LlamaConfig(**small, vocab_size=40)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=39)
    model = LlavaForConditionalGeneration(config).eval()
    names = quantize_published(model)
    assert len(names) == 8
    assert all(name.startswith(("model.language_model.", "lm_head")) for name in names)


@pytest.mark.parametrize(
    ("how", "device", "said"),
    [
        ("int9", None, "did you mean 'int8'"),
        ("int8", "cuda", "is for the CPU"),
        ("nf4", "cpu", "needs a GPU; on a CPU use int8"),
        ("int8-gpu", "cpu", "needs a GPU; on a CPU use int8"),
    ],
)
def test_ways_that_do_not_fit_are_refused_before_anything_is_loaded(how: str, device: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load("default", device, quantize=how)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for how, package in (("nf4", "bitsandbytes"), ("int8-gpu", "torchao")):
        with pytest.raises(ConfigError, match=f"needs {package}, which is not installed"):
            check_quantize(how, None)


def test_what_transformers_is_asked_for_on_a_gpu(tiny_llm_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings reach `from_pretrained`; what it makes of them needs a GPU."""
    import transformers

    asked: dict[str, Any] = {}

    def from_pretrained(source: str, **options: Any) -> Any:
        if options["device_map"] == "meta":  # laid out first, without memory and without a quantizer
            assert "quantization_config" not in options
            return None, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
        asked.update(options)
        raise OSError("no GPU here")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(CheckpointError, match="no GPU here"):
        load_llm(LLMConfig(model_name_or_path=str(tiny_llm_folder)), "nf4")
    settings = asked["quantization_config"]
    assert asked["device_map"] == {"": "cuda"}
    assert settings.load_in_4bit and settings.bnb_4bit_quant_type == "nf4"
    with pytest.raises(CheckpointError):
        load_llm(LLMConfig(model_name_or_path=str(tiny_llm_folder)))
    assert asked["device_map"] is None


def test_an_endpoint_cannot_be_quantised() -> None:
    with pytest.raises(ConfigError, match="leave quantize out"):
        load("openai:some-model", quantize="int8")


def test_the_command_line_passes_it_on(
    tiny_model_folder: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(next(image_folder.glob("*.jpg")))
    rest = ["--image", image, "--prompt", "What?", "--max-new-tokens", "2", "--model", str(tiny_model_folder)]
    assert main(["generate", *rest, "--quantize", "int8"]) == 0
    assert main(["generate", *rest, "--quantize", "int9"]) == 2
    assert "unknown quantize 'int9'; did you mean 'int8'" in capsys.readouterr().err


def _question(image: Path) -> Message:
    return user(Image(image), "What is this?")


def _logits(backend: LocalBackend, image: Path) -> torch.Tensor:
    batch = collate([backend.processor([_question(image)], add_generation_prompt=True)], 0)
    with torch.inference_mode():
        return backend.model(batch.input_ids, None, None, batch.plans, batch.sample_of_image, batch.pixel_values).logits
