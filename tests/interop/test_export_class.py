"""Stock folders: what is refused and why, names that other programs read, sizes, adapters, and proof that notices.

That the classes of transformers compute the same is in tests/parity/test_export_families.py.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from polymodal.checkpoints.model_folder import Loaded, load_model, read_config, save_model
from polymodal.config import LoraRecipe, ModelConfig, TemplateConfig
from polymodal.errors import CheckpointError, PolymodalError
from polymodal.interop.huggingface import export as hf_export
from polymodal.interop.huggingface.export import export_hf, write_weights
from polymodal.interop.huggingface.export_chat_template import (
    counts_typed,
    stock_template,
    stock_text,
    with_placeholder,
)
from polymodal.interop.huggingface.export_class import reasons_against, stock_family
from polymodal.interop.huggingface.load import load_hf
from polymodal.messages import Image, assistant, user
from polymodal.modeling.build import build_model
from polymodal.modeling.lora import add_adapters
from polymodal.processing.chat_template.encode import ChatTemplate
from polymodal.safety.model_folder import check_folder
from polymodal.utils.files import shipped_folder
from polymodal.verify.compare import Comparison, verify_export
from polymodal.verify.side_by_side import Check

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "llava_clip_llama_keys.txt"


def build(config: ModelConfig, **changes: Any) -> Loaded:
    """A model with lively weights; changes are sections of the configuration."""
    document = config.model_dump()
    for section, values in changes.items():
        document[section] = {**document[section], **values}
    changed = ModelConfig.model_validate(document)
    torch.manual_seed(3)
    model, tokenizer = build_model(changed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return Loaded(model, tokenizer, changed, [{"stage": "made"}])


@pytest.fixture
def loaded(tiny_model_config: ModelConfig) -> Loaded:
    return build(tiny_model_config)


# --- what cannot be expressed ------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "slices": ({"image": {"image_aspect_ratio": "slice"}}, ["'slice' has no place"]),
    "native": ({"image": {"image_aspect_ratio": "native"}}, ["'native' has no place"]),
    "one linear layer": ({"projector": {"mm_projector_type": "linear"}}, ["'linear'", "mlp2x_gelu"]),
    "three layers": ({"projector": {"mm_projector_type": "mlp3x_gelu"}}, ["'mlp3x_gelu'"]),
    "pixel shuffle": ({"projector": {"mm_projector_type": "pixel_shuffle2_mlp2x_gelu"}}, ["pixel_shuffle2"]),
    "a resampler": (
        {"projector": {"mm_projector_type": "resampler", "resampler": {"num_query_tokens": 4, "num_layers": 1}}},
        ["'resampler'"],
    ),
    "an abstractor": (
        {"projector": {"mm_projector_type": "abstractor",
                       "abstractor": {"num_query_tokens": 4, "hidden_size": 8, "depth": 1}}},
        ["'abstractor'"],
    ),
    "a norm": ({"projector": {"norm": "layer"}}, ["norm 'layer'"]),
    "another width": ({"projector": {"hidden_size": 48}}, ["hidden_size 48", "(32)"]),
    "only the class token": ({"vision": {"mm_vision_select_feature": "cls"}}, ["keeps only the class token"]),
    "another tile": ({"image": {"tile_size": (42, 42)}}, ["(42, 42)", "28x28"]),
    "another colour": ({"image": {"pad_color": (1, 2, 3)}}, ["pad_color (1, 2, 3)", "(127, 127, 127)"]),
    "another layout of tiles": (
        {"image": {"image_aspect_ratio": "anyres", "image_grid_pinpoints": ((28, 56),), "mm_patch_merge_type": "flat",
                   "overview_aspect_ratio": "pad", "several_images": "pad"}},
        ["mm_patch_merge_type 'flat'", "overview_aspect_ratio 'pad'", "several_images 'pad'"],
    ),
    "much at once": (
        {"projector": {"mm_projector_type": "linear", "norm": "layer"}, "vision": {"mm_vision_select_feature": "cls"}},
        ["(1) ", "(2) ", "(3) "],
    ),
    "a Q-Former on a CLIP": (
        {"projector": {"mm_projector_type": "qformer", "norm": "standardize",
                       "qformer": {"num_query_tokens": 2, "hidden_size": 8, "num_hidden_layers": 1,
                                   "num_attention_heads": 2, "intermediate_size": 8}}},
        ["Blip2ForConditionalGeneration", "'eva_clip'", "'pad'", "norm 'standardize'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_every_reason_is_named_and_nothing_is_written(
    name: str, tiny_model_config: ModelConfig, tmp_path: Path
) -> None:
    changes, parts = REFUSED[name]
    with pytest.raises(CheckpointError, match="cannot be written as a") as error:
        export_hf(build(tiny_model_config, **changes), tmp_path / "out")
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), error.value
    assert not list(tmp_path.iterdir())


def test_other_language_models(
    tmp_path: Path, tiny_model_config: ModelConfig, tiny_t5_folder: Path, byte_tokenizer: Any
) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "gpt2")
    Gemma2ForCausalLM(
        Gemma2Config(vocab_size=259, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=16)
    ).save_pretrained(tmp_path / "gemma2")  # fmt: skip
    parts = {
        tmp_path / "gpt2": "transformer.wte.weight",
        tmp_path / "gemma2": "final_logit_softcapping",
        tiny_t5_folder: "encoder-decoder",
    }
    for folder, part in parts.items():
        if folder != tiny_t5_folder:
            byte_tokenizer.save_pretrained(folder)
        llm = {"model_name_or_path": str(folder), "attn_implementation": "eager"}
        with pytest.raises(CheckpointError, match=part):
            export_hf(build(tiny_model_config, llm=llm), tmp_path / "out")


def test_the_default_model_says_why_not(tmp_path: Path, loaded: Loaded) -> None:
    """An EfficientNet has no class in transformers; neither has a projector that is wider than the language model."""
    config = read_config(shipped_folder() / "default")
    assert config.vision is not None
    text = " ".join(reasons_against(loaded.model, config, stock_family(config)))
    assert repr(config.vision.type) in text and "hidden_size" in text


def test_a_template_that_no_string_can_say(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    """Scaffolding that would join with what somebody wrote is kept apart here, and joins in a stock processor."""
    template = "{% for m in messages %}<|{{ m['content'] }}{{ '<|im_end|>' }}{% endfor %}"
    changed = build(tiny_model_config, template={"chat_template": template})
    changed.tokenizer.add_tokens(["|W"])
    with pytest.raises(CheckpointError, match=r"gives other ids for '(text alone|an image)"):
        export_hf(changed, tmp_path / "out")


# --- names, files, tokens ----------------------------------------------------------------------------------------


def test_names_are_those_that_other_programs_read(loaded: Loaded, tmp_path: Path) -> None:
    """The golden list: LLaVA with CLIP and Llama as on the hub, which vLLM and llama.cpp read."""
    export_hf(loaded, tmp_path / "out")
    assert sorted(load_file(tmp_path / "out" / "model.safetensors")) == GOLDEN.read_text().split()


def test_several_files_and_their_index(loaded: Loaded, tmp_path: Path) -> None:
    export_hf(loaded, tmp_path / "one")
    export_hf(loaded, tmp_path / "many", max_shard_bytes=40_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert set(index["weight_map"]) == set(whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    states = [AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict() for name in ("one", "many")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_name_may_come_once(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="two tensors are called a"):
        write_weights(tmp_path, [("a", torch.zeros(2)), ("a", torch.zeros(2))], None, 100)


def test_the_placeholder_becomes_a_token_with_a_row(loaded: Loaded, tmp_path: Path) -> None:
    done = export_hf(loaded, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<image>") == done.image_token_id == 259 and done.rows == 260
    assert tokenizer("a<image>b")["input_ids"].count(259) == 1
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    head = model.lm_head.weight
    assert head.shape[0] == 260
    # The mean of all rows never has the largest logit; besides, the generation settings forbid it.
    torch.testing.assert_close(head[259], head[:259].mean(dim=0))
    assert model.generation_config.suppress_tokens == [259]
    assert any("259" in remark and "260" not in remark for remark in done.remarks)
    assert any("260 rows" in remark for remark in done.remarks)


def test_half_precision_has_bounds_of_its_own(loaded: Loaded, tmp_path: Path) -> None:
    export_hf(loaded, tmp_path / "out", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    parity = verify_export(loaded, tmp_path / "out", tokens=2)
    logits = next(check for check in parity.checks if check.name == "logits")
    assert logits.passed and logits.numbers["tolerance"] == 5e-2 and logits.numbers["max_difference"] > 1e-4


def test_licences_travel(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "LICENSE").write_text("do as you like")
    export_hf(loaded, tmp_path / "out", licences=tmp_path / "from")
    assert (tmp_path / "out" / "LICENSE").read_text() == "do as you like"


# --- adapters ----------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tiny_model_config: ModelConfig) -> Loaded:
    made = build(tiny_model_config)
    add_adapters(made.model, LoraRecipe(lora_r=2, lora_alpha=4))
    for name, parameter in made.model.llm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return made


def test_an_adapter_is_merged_or_kept(adapted: Loaded, tmp_path: Path) -> None:
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        wanted = adapted.model.eval()(ids).logits
    kept = export_hf(adapted, tmp_path / "kept", merge_lora=False)
    assert any("adapter/" in remark for remark in kept.remarks)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "kept")
    with torch.inference_mode():
        assert (base(input_ids=ids).logits[..., :259] - wanted).abs().max() > 1e-2  # without it, it is another model
        both = PeftModel.from_pretrained(base, str(tmp_path / "kept" / "adapter")).eval()
        torch.testing.assert_close(both(input_ids=ids).logits[..., :259], wanted, rtol=1e-4, atol=1e-4)
    touched = {name for name, _ in both.named_parameters() if "lora_" in name}
    assert touched and not any("vision_tower" in name for name in touched)
    assert verify_export(adapted, tmp_path / "kept", tokens=2).passed

    export_hf(adapted, tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter").exists()
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    with torch.inference_mode():
        torch.testing.assert_close(whole(input_ids=ids).logits[..., :259], wanted, rtol=1e-4, atol=1e-4)
    assert verify_export(adapted, tmp_path / "merged", tokens=2).passed


@pytest.mark.parametrize("keep", [False, True])
def test_an_adapter_on_a_tied_head_leaves_the_embeddings_alone(
    keep: bool, tiny_model_config: ModelConfig, tmp_path: Path
) -> None:
    """Merged here, or by somebody else who gets it beside the weights: the head has weights of its own from then on."""
    made = build(tiny_model_config)
    llm: Any = made.model.llm
    llm.lm_head.weight, llm.config.tie_word_embeddings = llm.model.embed_tokens.weight, True
    add_adapters(made.model, LoraRecipe(match="llm.*", lora_r=2, lora_alpha=6, use_rslora=True, lora_dropout=0.1))
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        wanted = made.model.eval()(ids).logits
    export_hf(made, tmp_path / "out", merge_lora=not keep)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not settings["tie_word_embeddings"] and not settings["text_config"]["tie_word_embeddings"]
    stock: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    if keep:
        settings = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
        assert [settings[key] for key in ("r", "lora_alpha", "use_rslora", "lora_dropout")] == [2, 6, True, 0.1]
        stock = PeftModel.from_pretrained(stock, str(tmp_path / "out" / "adapter")).merge_and_unload()
    with torch.inference_mode():
        torch.testing.assert_close(stock.eval()(input_ids=ids).logits[..., :259], wanted, rtol=1e-4, atol=1e-4)
    assert verify_export(made, tmp_path / "out", tokens=2).passed


def test_trained_rows_cannot_be_kept_apart(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    made = build(tiny_model_config)
    add_adapters(made.model, LoraRecipe(lora_r=2, trainable_tokens=(5, 9)), made.tokenizer)
    with pytest.raises(CheckpointError, match="trainable_token_indices"):
        export_hf(made, tmp_path / "out", merge_lora=False)
    assert not list(tmp_path.iterdir())
    export_hf(made, tmp_path / "out")


# --- whole or not there ------------------------------------------------------------------------------------------


def test_an_interrupted_export_leaves_nothing(loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_hf(loaded, tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_export, "write_card", stop)  # the very last step
    for target in ("new", "out"):
        with pytest.raises(KeyboardInterrupt):
            export_hf(loaded, tmp_path / target, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before


def test_a_folder_that_is_there_stays(loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(PolymodalError, match="is there already"):
        export_hf(loaded, tmp_path / "out")


def test_a_weight_that_is_no_number_is_named(loaded: Loaded, tmp_path: Path) -> None:
    loaded.model.llm.model.norm.weight.data[3] = torch.nan
    with pytest.raises(CheckpointError, match=r"llm\.model\.norm\.weight holds NaN"):
        export_hf(loaded, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- the proof notices -------------------------------------------------------------------------------------------


def other_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["multi_modal_projector.linear_2.bias"][5] += 0.05
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>{{", "<|im_start|> {{"))


def other_resize(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    path.write_text(path.read_text().replace('"resample": 3', '"resample": 2'))


def other_mean(folder: Path) -> None:
    path = folder / "preprocessor_config.json"
    document = json.loads(path.read_text())
    document["image_mean"][1] = 0.51
    path.write_text(json.dumps(document))


def other_end(folder: Path) -> None:
    path = folder / "generation_config.json"
    document = json.loads(path.read_text())
    document["suppress_tokens"] = [*range(0, 259, 2)]
    path.write_text(json.dumps(document))


def fewer_tokens(folder: Path) -> None:
    path = folder / "processor_config.json"
    path.write_text(path.read_text().replace('"num_additional_image_tokens": 1', '"num_additional_image_tokens": 0'))


TAMPERED: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tensor": (other_tensor, "logits"),
    "the template": (other_template, "token_ids"),
    "the resize rule": (other_resize, "pixels"),
    "the mean": (other_mean, "pixels"),
    "what is never said": (other_end, "greedy"),
    "the count of tokens": (fewer_tokens, "token_ids"),
}


@pytest.fixture(scope="module")
def exported(tiny_model_config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Loaded, Path]:
    folder = tmp_path_factory.mktemp("export") / "out"
    made = build(tiny_model_config, projector={"norm": "standardize"})
    export_hf(made, folder)
    assert verify_export(made, folder, tokens=4).passed
    return made, folder


@pytest.mark.parametrize("name", list(TAMPERED))
def test_a_tampered_folder_fails(name: str, exported: tuple[Loaded, Path], tmp_path: Path) -> None:
    made, folder = exported
    spoil, check = TAMPERED[name]
    copied = Path(shutil.copytree(folder, tmp_path / "out"))
    spoil(copied)
    parity = verify_export(made, copied, tokens=4)
    failed = [one.name for one in parity.checks if not one.passed]
    assert not parity.passed and check in failed
    assert parity.line.startswith("parity FAILED: ") and "\n" not in parity.line
    assert json.loads((copied / "parity.json").read_text())["passed"] is False


def test_the_stock_class_on_the_source_is_asked_too(exported: tuple[Loaded, Path], tmp_path: Path) -> None:
    """What was read wrongly is written as it was read, and computes what we compute: only the source knows better."""
    source = exported[1]
    read = load_hf(check_folder(source))
    export_hf(read, tmp_path / "right")
    parity = verify_export(read, tmp_path / "right", tokens=2, published=source)
    assert parity.passed and parity.checks[0].name == "source" and parity.checks[0].numbers["max_difference"] < 1e-4
    read.model.llm.get_submodule("model.layers.1.mlp.up_proj").weight.data.mul_(1.5)
    export_hf(read, tmp_path / "wrong")
    assert verify_export(read, tmp_path / "wrong", tokens=2).passed
    parity = verify_export(read, tmp_path / "wrong", tokens=2, published=source)
    assert not parity.passed and "source: the stock class on out gives other logits for one image" in parity.line


def test_a_typed_placeholder_is_no_image(exported: tuple[Loaded, Path], tmp_path: Path) -> None:
    made, folder = exported
    processor = AutoProcessor.from_pretrained(folder)
    said = "Is <image><image> two, <ima"
    for content in (said, [{"type": "text", "text": said}, {"type": "text", "text": "ge> three?"}, {"type": "image"}]):
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        assert "Is < image>< image> two" in text and text.count("<image>") == int(not isinstance(content, str))
    assert "'< image>'" in (folder / "README.md").read_text()
    # A template that takes parts by itself is guarded before it; one that was guarded already stays as it is.
    parts = (
        "{% for m in messages %}{{ m['role'] }}: {% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
        "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    words, image_id, _ = with_placeholder(made.tokenizer, 259)
    words.chat_template = parts
    jinja, _, notes = stock_template(ChatTemplate(words, TemplateConfig(), 259), TemplateConfig(), words, image_id)
    assert jinja.endswith(parts) and len(jinja) > len(parts) and any("'< image>'" in note for note in notes)
    asked = [user(Image(b""), "Say <image>."), assistant("<image>"), user("And?")]
    assert stock_text(words, jinja, asked).count("<image>") == 1
    assert counts_typed(words, parts, "<image>") and not counts_typed(words, jinja, "<image>")
    words.chat_template = jinja
    again = stock_template(ChatTemplate(words, TemplateConfig(), 259), TemplateConfig(), words, image_id)
    assert again[0] == jinja
    # And the proof asks.
    copied = Path(shutil.copytree(folder, tmp_path / "out"))
    path = copied / "chat_template.jinja"
    path.write_text(path.read_text().replace("'< image>'", "'<image>'"))
    parity = verify_export(made, copied, tokens=2)
    assert not parity.passed and "token_ids: a typed '<image>' counts as an image beside one image" in parity.line


def test_further_checks_are_taken_and_missing_programs_are_said(exported: tuple[Loaded, Path]) -> None:
    made, folder = exported

    def asks(comparison: Comparison) -> Check:
        return Check("asks", len(comparison.probes) > 5, {"probes": len(comparison.probes)})

    parity = verify_export(made, folder, checks={"asks": asks, "absent": lambda _: None})
    assert parity.passed and parity.not_run == ("absent",) and parity.checks[0].numbers["probes"] > 5
    nothing = verify_export(made, folder, checks={"absent": lambda _: None})
    assert not nothing.passed and "nothing could be compared" in nothing.line


def test_vllm_is_asked_where_it_is_installed(exported: tuple[Loaded, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that has vLLM's interface and answers with transformers; vLLM itself needs a machine for it."""
    made, folder = exported
    assert verify_export(made, folder, tokens=3).not_run == ("vllm",)
    seen: list[dict[str, Any]] = []

    class Engine:
        def __init__(self, model: str, **options: Any) -> None:
            seen.append(options)
            self.model = AutoModelForImageTextToText.from_pretrained(model)
            self.images = AutoProcessor.from_pretrained(model).image_processor

        def generate(self, prompts: list[dict[str, Any]], params: SimpleNamespace) -> list[Any]:
            return [self.answer(prompt, params) for prompt in prompts]

        def answer(self, prompt: dict[str, Any], params: SimpleNamespace) -> Any:
            ids = [token for i in prompt["prompt_token_ids"] for token in [i] * (16 if i == 259 else 1)]
            media = prompt.get("multi_modal_data")
            pixels = self.images(media["image"], return_tensors="pt") if media else {}
            out = self.model.generate(
                input_ids=torch.tensor([ids]), **pixels, max_new_tokens=params.max_tokens, do_sample=False,
                suppress_tokens=list(params.logit_bias),
            )  # fmt: skip
            return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(out[0, len(ids) :].tolist()))])

    stand_in = SimpleNamespace(LLM=Engine, SamplingParams=SimpleNamespace, __spec__=None)
    monkeypatch.setitem(sys.modules, "vllm", stand_in)  # type: ignore[arg-type]
    parity = verify_export(made, folder, tokens=3)
    assert parity.passed and parity.checks[-1].name == "vllm" and parity.checks[-1].numbers["agreement"] == 1.0
    assert seen[0]["dtype"] == "float32" and seen[0]["limit_mm_per_prompt"] == {"image": 2}
    monkeypatch.setattr(Engine, "answer", lambda *_: SimpleNamespace(outputs=[SimpleNamespace(token_ids=(0, 0, 0))]))
    parity = verify_export(made, folder, tokens=3)
    assert not parity.passed and "vllm: answers part for one image" in parity.line


def test_our_own_folder_exports_alike(tiny_model_folder: Path, tmp_path: Path) -> None:
    """What was saved as a folder of ours and opened again is written the same as from memory."""
    one = load_model(tiny_model_folder)
    export_hf(one, tmp_path / "a")
    save_model(tmp_path / "ours", one.model, one.config, one.tokenizer, llm_trained=True, vision_trained=True)
    export_hf(load_model(tmp_path / "ours"), tmp_path / "b")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
