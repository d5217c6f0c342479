"""Models of ours as stock folders: transformers' classes give the same ids, pixels, logits and text, and we read them.

Every model is composed by our configuration from parts on disk; nothing is built by the class it is written as.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5ForConditionalGeneration,
)

from polymodal.checkpoints.model_folder import Loaded, contract_of, own_tensors
from polymodal.config import LoraRecipe, ModelConfig
from polymodal.errors import CheckpointError
from polymodal.generation.generate import generate_ids
from polymodal.generation.params import GenerationParams
from polymodal.interop.huggingface.export import export_hf
from polymodal.interop.huggingface.load import load_hf
from polymodal.messages import Image, Message, assistant, user
from polymodal.modeling.build import build_model
from polymodal.modeling.lora import add_adapters
from polymodal.modeling.projectors.mlp import Standardize
from polymodal.processing.collate import collate
from polymodal.safety.model_folder import check_folder
from polymodal.verify.compare import Comparison, same_in_a_batch, verify_export

TILE, PATCH = 28, 7
TOWER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": TILE,
    "patch_size": PATCH, "initializer_range": 0.1,
}  # fmt: skip
WIDE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.3,
}  # fmt: skip
QFORMER = {
    "num_query_tokens": 6, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "vocab_size": 60, "max_position_embeddings": 80, "max_text_length": 80,
}  # fmt: skip
PINPOINTS = [[28, 56], [56, 28], [56, 56], [28, 84]]
PLAIN = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
PUBLISHED = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
KINDS: dict[str, dict[str, Any]] = {
    "llava_published": {  # a template that takes parts, and a token for images, as published folders have
        "tower": "clip", "llm": "llama", "tokenizer": "published",
        "image": {"image_aspect_ratio": "crop"}, "projector": {"mm_projector_type": "mlp2x_gelu"},
        "template": {"chat_template": PUBLISHED},
    },
    "llava": {
        "tower": "clip", "llm": "llama", "tokenizer": "chatml",
        "image": {"image_aspect_ratio": "pad"}, "projector": {"mm_projector_type": "mlp2x_gelu"},
        "template": {"chat_template": "chatml", "default_system": "Don't \"lie\".\n", "image_newline_text": "\n"},
    },
    "llava_vicuna": {
        "tower": "clip", "llm": "llama", "tokenizer": "legacy",
        "image": {"image_aspect_ratio": "crop", "resize_short_side": 33},
        "projector": {"mm_projector_type": "mlp2x_gelu", "norm": "standardize"},
        "template": {"chat_template": "vicuna", "image_newline_text": "\n"},
    },
    "llava_siglip": {
        "tower": "siglip", "llm": "qwen2", "tokenizer": "first",
        "image": {"image_aspect_ratio": "squash", "resample": "bilinear"},
        "projector": {"mm_projector_type": "mlp2x_gelu", "bias": False},
        "template": {"chat_template": "mistral"}, "vision": {"mm_vision_select_layer": (-1, 1)},
    },
    "llava_plain": {
        "tower": "clip", "llm": "llama", "tokenizer": "bos",
        "image": {"image_aspect_ratio": "squash"},
        "projector": {"mm_projector_type": "mlp2x_gelu", "bias": False, "norm": "standardize"},
        "template": {"chat_template": "plain"}, "vision": {"mm_vision_select_feature": "cls_patch"},
    },
    "llava_next": {
        "tower": "clip", "llm": "llama", "tokenizer": "bos",
        "image": {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad",
                  "image_grid_pinpoints": PINPOINTS},
        "projector": {"mm_projector_type": "mlp2x_gelu"}, "template": {"chat_template": "llama2"},
    },
    "llava_onevision": {
        "tower": "siglip", "llm": "qwen2", "tokenizer": "chatml",
        "image": {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad", "anyres_max": 2,
                  "several_images": "pad", "image_grid_pinpoints": PINPOINTS},
        "projector": {"mm_projector_type": "mlp2x_gelu"}, "template": {"chat_template": "chatml"},
        "vision": {"mm_vision_select_layer": -1},
    },
    "blip2_t5": {
        "tower": "eva_clip", "llm": "t5", "tokenizer": "unigram", "image": {"image_aspect_ratio": "squash"},
        "projector": {"mm_projector_type": "qformer", "qformer": QFORMER, "bias": False},
        "template": {"chat_template": "t5"},
    },
    "blip2_opt": {
        "tower": "eva_clip", "llm": "opt", "tokenizer": "chatml", "image": {"image_aspect_ratio": "squash"},
        "projector": {"mm_projector_type": "qformer", "qformer": QFORMER}, "template": {"chat_template": PLAIN},
    },
    "instructblip": {
        "tower": "eva_clip", "llm": "llama", "tokenizer": "chatml", "image": {"image_aspect_ratio": "squash"},
        "projector": {"mm_projector_type": "qformer", "qformer": {**QFORMER, "text_context": True}},
        "template": {"chat_template": PLAIN},
    },
}  # fmt: skip


def tokenizer_of(hf: SimpleNamespace, kind: str) -> Any:
    if kind == "chatml":
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        return hf.byte_tokenizer(names, bos=None, eos="<|im_end|>", adds_bos=False)
    if kind == "bos":
        return hf.byte_tokenizer(["<s>", "</s>"], bos="<s>", eos="</s>", adds_bos=True)
    if kind == "unigram":
        return hf.unigram_tokenizer()
    if kind == "published":
        tokenizer = hf.byte_tokenizer(["<s>", "</s>"], bos="<s>", eos="</s>", adds_bos=True)
        hf.add_placeholder(tokenizer)
        return tokenizer
    return hf.spiece_tokenizer(["<s>", "</s>"], bos="<s>", eos="</s>", scheme=kind)


def write_llm(hf: SimpleNamespace, folder: Path, kind: str, tokenizer: Any) -> None:
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": None, "bos_token_id": tokenizer.bos_token_id}
    size = len(tokenizer)
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(**WIDE, **ids, vocab_size=size))
    elif kind == "qwen2":  # with spare rows, as Qwen's has
        model = Qwen2ForCausalLM(Qwen2Config(**WIDE, **ids, vocab_size=size + 5, tie_word_embeddings=True))
    elif kind == "opt":
        model = OPTForCausalLM(
            OPTConfig(vocab_size=size, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2,
                      num_attention_heads=4, init_std=0.3, **{**ids, "pad_token_id": tokenizer.pad_token_id})
        )  # fmt: skip
    else:
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=size, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
                     eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
                     decoder_start_token_id=tokenizer.pad_token_id)
        )  # fmt: skip
    hf.lively(model).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_tower(hf: SimpleNamespace, folder: Path, kind: str) -> None:
    if kind == "clip":
        model: Any = CLIPVisionModel(CLIPVisionConfig(**TOWER, projection_dim=16))
    elif kind == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**TOWER))
    else:
        model = Blip2VisionModel(Blip2VisionConfig(**TOWER))
    hf.lively(model).save_pretrained(folder)


def compose(hf: SimpleNamespace, folder: Path, kind: str) -> Loaded:
    """A model of ours with lively weights, from parts that are written to a folder."""
    parts = KINDS[kind]
    torch.manual_seed(0)
    write_llm(hf, folder / "llm", parts["llm"], tokenizer_of(hf, parts["tokenizer"]))
    write_tower(hf, folder / "tower", parts["tower"])
    projector = parts["projector"]
    if projector.get("qformer", {}).get("text_context"):
        hf.word_tokenizer().save_pretrained(folder / "words")
        projector = {**projector, "qformer": {**projector["qformer"], "tokenizer": str(folder / "words")}}
    vision = {"vision_tower": str(folder / "tower"), "type": parts["tower"], **parts.get("vision", {})}
    if parts["tower"] == "eva_clip":
        vision |= {"mm_vision_select_layer": -1, "mm_vision_select_feature": "cls_patch"}
    image = {"tile_size": [TILE, TILE], "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    config = ModelConfig.model_validate(
        {
            "vision": vision,
            "image": {**image, **parts["image"]},
            "projector": projector,
            "llm": {"model_name_or_path": str(folder / "llm")},
            "template": parts["template"],
        }
    )
    model, tokenizer = build_model(config)
    hf.lively(model.projector)
    if model.image_newline is not None:
        model.image_newline.data.normal_()
    norm = getattr(model.projector, "norm", None)
    if isinstance(norm, Standardize):
        norm.mean.uniform_(-2, 2)
        norm.scale.uniform_(0.2, 2)
    return Loaded(model, tokenizer, config, [{"stage": "made", "steps": 3}])


@pytest.fixture(scope="module", params=list(KINDS))
def made(request: pytest.FixtureRequest, hf: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("export")
    loaded = compose(hf, folder, request.param)
    done = export_hf(loaded, folder / "out")
    return SimpleNamespace(kind=request.param, loaded=loaded, done=done, folder=folder / "out")


def test_transformers_gives_the_same(made: Any, hf: SimpleNamespace) -> None:
    """With nothing of ours on the stock side, and every weight of the class read from the files."""
    stock, report = AutoModelForImageTextToText.from_pretrained(made.folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert json.loads((made.folder / "config.json").read_text())["architectures"] == [type(stock).__name__]
    assert made.done.image_token_id < stock.get_input_embeddings().weight.shape[0]
    if made.kind in ("llava_onevision", "llava_plain"):
        return  # the class wants torchvision, and the template drops the question: compared by the next test alone
    processor = AutoProcessor.from_pretrained(made.folder)
    ours = hf.as_backend(made.loaded)
    for row in [[0], [1]] if "blip" in made.kind else [[0], [2, 1]]:
        if "blip" in made.kind:
            given = processor(images=hf.image(row[0]), text=hf.QUESTION, return_tensors="pt")
        else:
            parts = [*({"type": "image", "image": hf.image(i)} for i in row), {"type": "text", "text": hf.QUESTION}]
            given = processor.apply_chat_template(
                [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
        same(stock.eval(), given, ours, [user(*(Image(hf.image(i)) for i in row), hf.QUESTION)])


@torch.inference_mode()
def same(stock: Any, given: Any, ours: Any, asked: list[Message]) -> None:
    """Ids, tiles, logits and ten greedy tokens of one prompt."""
    sample = ours.processor(asked, add_generation_prompt=True)
    new = stock.config.image_token_id
    ids = [new if token == ours.model.image_token_id else token for token in sample.input_ids.tolist()]
    assert ids == given["input_ids"][0].tolist()
    tiles = torch.cat(list(sample.pixels))
    pixels = given["pixel_values"]
    if pixels.ndim == 5:  # filled up with rows of zeros
        pixels = torch.cat([one[: plan.num_tiles] for one, plan in zip(pixels, sample.plans, strict=True)])
    torch.testing.assert_close(tiles, pixels, rtol=0, atol=1e-5)
    made = generate_ids(
        ours.model, collate([sample], 0), GenerationParams(max_new_tokens=10), ours.processor.template.stop_ids,
        len(ours.tokenizer),
    )[0]  # fmt: skip
    answer = stock.generate(**given, max_new_tokens=10, do_sample=False)[0].tolist()
    if ours.model.encoder_decoder:
        assert answer[1:] == made
        answered = ours.processor([*asked, assistant("a cat")])
        labels = answered.input_ids[answered.loss_mask]
        logits = ours.model(**collate([answered], 0).inputs()).logits
        reference = stock(**given, labels=labels[None]).logits[0]
    else:
        assert answer[-len(made) :] == made
        logits = ours.model(**{**collate([sample], 0).inputs(), "labels": None}).logits[0]
        reference = stock(**given).logits[0]
    assert len(logits) == len(reference) > 1 and float(reference.abs().max()) > 0.5
    assert float((logits - reference[:, : logits.shape[1]]).abs().max()) < 1e-4


def test_prompts_of_a_batch_answer_as_they_do_alone(made: Any) -> None:
    """With stock classes alone: `padding_side` of the folder decides, and "right" would answer behind the padding."""
    tokenizer = AutoTokenizer.from_pretrained(made.folder)
    assert tokenizer.padding_side == ("right" if made.loaded.model.encoder_decoder else "left")
    if made.kind in ("llava_onevision", "instructblip"):
        return  # its processor wants torchvision; this one's says why in the card
    comparison = Comparison(made.loaded, made.folder, 8, ())
    pair = [probe for probe in comparison.probes if len(probe.images) == 1][:3]
    batch = comparison.model.generate(**comparison.batch(pair), max_new_tokens=8, do_sample=False)
    for probe, row in zip(pair, batch, strict=True):
        alone = comparison.model.generate(**comparison.batch([probe]), max_new_tokens=8, do_sample=False)[0]
        ends = [made.loaded.tokenizer.eos_token_id, made.loaded.tokenizer.pad_token_id, 0]
        left, right = ([token for token in ids.tolist()[-8:] if token not in ends] for ids in (alone, row))
        assert left[:4] == right[: len(left)][:4]
    comparison.processor.tokenizer.padding_side = "right" if tokenizer.padding_side == "left" else "left"
    comparison.processor.tokenizer.init_kwargs["padding_side"] = comparison.processor.tokenizer.padding_side
    assert not same_in_a_batch(comparison).passed or made.kind == "llava_plain"  # whose prompts are as long


def test_verify_says_so(made: Any) -> None:
    parity = verify_export(made.loaded, made.folder, tokens=8)
    assert parity.passed, parity.line
    document = json.loads((made.folder / "parity.json").read_text())
    assert document["passed"] is True and [check["name"] for check in document["checks"]] == [
        "token_ids", "pixels", "logits", "greedy", "batch"
    ]  # fmt: skip
    numbers = {check["name"]: check["numbers"] for check in document["checks"]}
    assert numbers["logits"]["max_difference"] < 1e-4 and numbers["logits"]["largest_logit"] > 1
    assert numbers["greedy"]["agreement"] == 1.0 and numbers["greedy"]["tokens"] > 8
    assert numbers["pixels"]["sha256_ours"] == numbers["pixels"]["sha256_exported"]
    names = document["probes"]["names"]
    assert "one image" in names and (("two images" in names) == ("blip" not in made.kind))


def tensors_of(loaded: Loaded) -> dict[str, torch.Tensor]:
    encoder: Any = loaded.model.vision_encoder
    found = {f"llm.{name}": tensor for name, tensor in loaded.model.llm.state_dict().items()}
    found |= {f"vision.{name}": tensor for name, tensor in encoder.model.state_dict().items()}
    return found | own_tensors(loaded.model)


def test_reading_and_writing_again_changes_nothing(made: Any, tmp_path: Path) -> None:
    if made.kind == "llava_plain":
        with pytest.raises(CheckpointError, match="leaves out text"):  # what it writes takes no questions
            load_hf(check_folder(made.folder))
        return
    first = load_hf(check_folder(made.folder))
    export_hf(first, tmp_path / "again")
    second = load_hf(check_folder(tmp_path / "again"))
    ours, theirs = tensors_of(first), tensors_of(second)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    contracts = [
        contract_of(one.config, one.model.image_token_id, one.tokenizer, one.model.context_tokenizer)
        for one in (first, second)
    ]
    assert contracts[0] == contracts[1]
    before, after = load_file(made.folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    # And what was read computes what was written.
    parity = verify_export(first, made.folder, tokens=4)
    assert parity.passed, parity.line


def test_a_folder_that_transformers_wrote_comes_back_the_same(made: Any, tmp_path: Path) -> None:
    """Published folder -> ours -> stock folder -> ours: nothing changes, whichever spelling the names had."""
    if made.kind in ("llava_onevision", "llava_plain"):
        return  # its processor wants torchvision; see the test before
    AutoModelForImageTextToText.from_pretrained(made.folder).save_pretrained(tmp_path / "stock")
    AutoProcessor.from_pretrained(made.folder).save_pretrained(tmp_path / "stock")
    first = load_hf(check_folder(tmp_path / "stock"))
    export_hf(first, tmp_path / "out")
    second = load_hf(check_folder(tmp_path / "out"))
    ours, theirs = tensors_of(first), tensors_of(second)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    one, two = (
        contract_of(x.config, x.model.image_token_id, x.tokenizer, x.model.context_tokenizer) for x in (first, second)
    )
    assert one == two


def test_the_card_tells_the_history(made: Any) -> None:
    card = (made.folder / "README.md").read_text()
    assert '"stage": "made"' in card and all(remark in card for remark in made.done.remarks)
    side = "right" if made.loaded.model.encoder_decoder else "left"
    assert f"pads on the {side}" in card and ("vllm serve" in card) == ("blip" not in made.kind)


@pytest.mark.parametrize("kind", ["llava_onevision", "blip2_t5"])
def test_an_adapter_on_the_head_of_tied_words(kind: str, hf: SimpleNamespace, tmp_path: Path) -> None:
    """What was trained is what the stock class computes from the merged weights."""
    loaded = compose(hf, tmp_path, kind)
    llm: Any = loaded.model.llm
    assert llm.get_output_embeddings().weight is llm.get_input_embeddings().weight
    add_adapters(loaded.model, LoraRecipe(lora_r=2, lora_alpha=8, match="llm.*"))
    for name, parameter in llm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.2)
    loaded.model.eval()
    trained = deepcopy(loaded)
    export_hf(loaded, tmp_path / "out")
    parity = verify_export(trained, tmp_path / "out", tokens=4)
    assert parity.passed, parity.line
