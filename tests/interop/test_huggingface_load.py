"""Opening published folders: by path and hub id, with revisions, types, damage, and what is no model to talk to."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    WhisperConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from polymodal.backends import load, load_processor
from polymodal.backends.local import LocalBackend
from polymodal.checkpoints.model_folder import load_model, save_model
from polymodal.config import VisionConfig
from polymodal.errors import CheckpointError, ConfigError
from polymodal.interop.huggingface.families import NotExpressibleError
from polymodal.interop.huggingface.load import load_hf
from polymodal.messages import Image, user
from polymodal.modeling.encoders.vision import build_vision_encoder
from polymodal.safety.model_folder import check_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOWER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "projection_dim": 8,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A LLaVA folder as transformers saves it, in bfloat16."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published") / "llava"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer.backend_tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    settings = LlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    LlavaForConditionalGeneration(settings).bfloat16().save_pretrained(folder)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        pixels, tokenizer, chat_template=TEMPLATE, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture
def copy(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "copy"))


def change_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_load_opens_it_and_says_what_it_was(published: Path) -> None:
    model = load(published, "cpu")
    assert isinstance(model, LocalBackend)
    entry = model.history[0]
    assert (entry["stage"], entry["source"], entry["revision"]) == ("published", str(published), None)
    assert len(entry["files"]["model.safetensors"]["sha256"]) == 64
    assert {weight.dtype for weight in model.model.parameters()} == {torch.float32}
    assert check_folder(published).kind == "huggingface"


def test_each_file_is_read_once(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was checked is what is used: nothing can change between the two."""
    read: list[str] = []
    read_text = Path.read_text

    def watch(path: Path, *args: Any, **kwargs: Any) -> str:
        read.append(path.name)
        return read_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", watch)
    load(published, "cpu")
    assert {"config.json", "processor_config.json", "chat_template.jinja"} <= set(read)
    assert len(read) == len(set(read))


def test_the_type_of_the_weights(published: Path) -> None:
    assert load_hf(check_folder(published), dtype="auto").config.llm.dtype == "bfloat16"
    kept = load(published, "cpu", dtype="bfloat16")
    assert isinstance(kept, LocalBackend)
    assert {weight.dtype for weight in kept.model.parameters()} == {torch.bfloat16}
    assert kept.model.llm.config.dtype is torch.bfloat16
    assert kept.ask("What is this?", image())


def image() -> Any:
    from PIL import Image as PILImage

    return PILImage.new("RGB", (40, 30), (200, 30, 30))


def test_the_processor_alone_is_the_same(published: Path) -> None:
    messages = [user(Image(image()), "What is this?")]
    alone, whole = load_processor(published), load(published, "cpu")
    assert isinstance(whole, LocalBackend)
    first, second = (p(messages, add_generation_prompt=True) for p in (alone, whole.processor))
    assert first.input_ids.tolist() == second.input_ids.tolist()
    assert first.plans == second.plans


def test_no_weight_is_in_memory_twice(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules are made without memory; the only tensors are those that were read."""
    from polymodal.interop.huggingface import weights

    made: list[bool] = []
    fill = weights.fill

    def watch(model: Any, *args: Any) -> None:
        made.extend(weight.is_meta for weight in model.parameters())
        fill(model, *args)

    monkeypatch.setattr("polymodal.interop.huggingface.load.fill", watch)
    load_hf(check_folder(published))
    assert made
    assert all(made)


def drop_layer(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["language_model.model.layers.0.mlp.up_proj.weight"]
    tensors["vision_tower.encoder.layers.7.mlp.fc1.bias"] = torch.zeros(24)
    tensors["multi_modal_projector.linear_1.bias"] = torch.zeros(3)


def test_tensors_that_do_not_fit_are_listed_in_one_error(copy: Path) -> None:
    change_weights(copy, drop_layer)
    with pytest.raises(CheckpointError) as error:
        load_hf(check_folder(copy))
    text = str(error.value)
    for part in (
        "1 missing: language_model.model.layers.0.mlp.up_proj.weight",
        "1 not expected: vision_tower.encoder.layers.7.mlp.fc1.bias",
        "1 of another shape: multi_modal_projector.linear_1.bias (3,) for (16,)",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({"x.y": torch.zeros(1)}), "not expected: x.y"),
        (lambda t: t.update({"lm_head.weight": t["language_model.lm_head.weight"].clone()}), "not expected:"),
        (lambda t: t["language_model.model.norm.weight"].fill_(float("nan")), "norm.weight"),
    ],
    ids=["unknown", "twice", "nan"],
)
def test_damaged_weights(copy: Path, change: Callable[[Any], object], message: str) -> None:
    change_weights(copy, change)
    with pytest.raises(CheckpointError, match=message):
        load_hf(check_folder(copy))


def test_parts_that_nothing_reads_may_be_missing(copy: Path) -> None:
    change_weights(copy, lambda t: [t.pop(name) for name in list(t) if "post_layernorm" in name])
    tower = load_hf(check_folder(copy)).model.vision_encoder.model  # type: ignore[union-attr]
    assert tower.post_layernorm.weight.tolist() == [1.0] * 16
    assert tower.post_layernorm.bias.tolist() == [0.0] * 16


def test_tied_weights_as_transformers_ties_them(copy: Path) -> None:
    change_json(copy / "config.json", lambda d: d.update(tie_word_embeddings=True))
    apart = load_hf(
        check_folder(copy)
    ).model.llm  # both are there and differ: the configuration is wrong, the weights are right
    assert not torch.equal(apart.lm_head.weight, apart.model.embed_tokens.weight)
    kept = LlavaForConditionalGeneration.from_pretrained(copy, dtype=torch.float32)
    assert torch.equal(apart.lm_head.weight, kept.lm_head.weight)
    change_weights(copy, lambda t: t.pop("language_model.model.embed_tokens.weight"))
    tied = load_hf(check_folder(copy)).model.llm
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert torch.equal(tied.lm_head.weight, apart.lm_head.weight)


def test_with_an_adapter_it_is_saved_whole(published: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    loaded = load_hf(check_folder(published))
    before = {name: value.clone() for name, value in loaded.model.llm.state_dict().items()}
    adapter = LoraConfig(target_modules=["q_proj", "embed_tokens"], r=2, init_lora_weights=False)
    inject_adapter_in_model(adapter, loaded.model.llm)
    loaded.model.llm.peft_config = {"default": adapter}
    save_model(tmp_path / "ours", loaded.model, loaded.config, loaded.tokenizer)
    again = load_model(tmp_path / "ours")
    written = load_file(tmp_path / "ours" / "llm" / "model.safetensors")
    assert written.keys() == before.keys()
    assert all(torch.equal(written[name], value) for name, value in before.items())
    ids = torch.arange(4)[None]
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, again.model(ids).logits)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("projector_hidden_act", "silu", "projector_hidden_act is 'silu'"),
        ("quantization_config", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised"),
        ("vision_config", {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}, "no class token"),
    ],
)
def test_what_cannot_be_expressed_is_refused(copy: Path, key: str, value: Any, message: str) -> None:
    change_json(copy / "config.json", lambda d: d.update({key: value}))
    with pytest.raises(NotExpressibleError, match=message):
        load_hf(check_folder(copy))


def test_load_falls_back_to_transformers_and_says_so(copy: Path) -> None:
    change_json(copy / "config.json", lambda d: d.update(projector_hidden_act="silu"))
    with pytest.warns(UserWarning, match="projector_hidden_act is 'silu'.*through transformers instead"):
        model = load(copy, "cpu")
    assert not isinstance(model, LocalBackend)
    assert model.name == str(copy)


@pytest.mark.parametrize(
    ("size", "message"), [(42, "tiles of 42x42 pixels, the tower takes 28")], ids=["tiles of another size"]
)
def test_parts_that_do_not_fit(copy: Path, size: int, message: str) -> None:
    def larger(document: dict[str, Any]) -> None:
        document["image_processor"]["size"] = {"shortest_edge": size}
        document["image_processor"]["crop_size"] = {"height": size, "width": size}

    change_json(copy / "processor_config.json", larger)
    with pytest.raises(ConfigError, match=message):
        load_hf(check_folder(copy))


def test_the_chat_template_in_each_of_its_places(copy: Path) -> None:
    def moved_to(name: str) -> list[int]:
        for file in ("chat_template.jinja", "chat_template.json"):
            (copy / file).unlink(missing_ok=True)
        if name == "chat_template.json":
            (copy / name).write_text(json.dumps({"chat_template": TEMPLATE}))
        elif name == "chat_template.jinja":
            (copy / name).write_text(TEMPLATE)
        else:
            change_json(copy / name, lambda d: d.update(chat_template=TEMPLATE))
        return load_processor(copy)([user("Hi")], add_generation_prompt=True).input_ids.tolist()

    places = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json", "processor_config.json")
    first, *others = [moved_to(name) for name in places]
    assert others == [first] * 3
    for name in places[2:]:
        change_json(copy / name, lambda d: d.pop("chat_template"))
    with pytest.raises(CheckpointError, match=r"no chat template.*add chat_template\.jinja"):
        load_processor(copy)


def test_preprocessing_in_a_file_of_its_own(copy: Path) -> None:
    document = json.loads((copy / "processor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(document.pop("image_processor")))
    (copy / "processor_config.json").write_text(json.dumps(document))
    assert load_processor(copy).config.image.tile_size == (28, 28)  # type: ignore[union-attr]
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config\.json"):
        load_processor(copy)


def test_the_placeholder_must_be_a_token_of_its_own(copy: Path) -> None:
    change_json(copy / "config.json", lambda d: d.update(image_token_index=5))
    with pytest.raises(CheckpointError, match="names 5 as the image's token, which is the ordinary token"):
        load_hf(check_folder(copy))


def test_a_template_whose_prompt_would_differ_is_refused(copy: Path) -> None:
    # It changes what people wrote, which never passes through a template here.
    (copy / "chat_template.jinja").write_text(TEMPLATE.replace("else part['text']", "else part['text'] | upper"))
    with pytest.raises(NotExpressibleError, match="its prompt cannot be written here"):
        load_processor(copy)


def test_a_revision_is_fetched_and_written_down(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--owner--llava" / "snapshots" / COMMIT
    shutil.copytree(published, snapshot)
    asked: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        asked.append({"name": name, **options})
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = load("owner/llava", "cpu", revision="v1.0")
    assert isinstance(model, LocalBackend)
    assert (model.history[0]["source"], model.history[0]["revision"]) == ("owner/llava", COMMIT)
    assert (asked[0]["name"], asked[0]["revision"]) == ("owner/llava", "v1.0")
    assert "token" not in asked[0]  # only the environment has it
    assert not any(pattern.endswith((".bin", ".pt", ".py")) for pattern in asked[0]["allow_patterns"])
    with pytest.raises(ConfigError, match="has no revisions"):
        load(published, revision="v1.0")


def test_a_mirror_is_asked_where_the_environment_names_one(tmp_path: Path) -> None:
    paths: list[tuple[str, str | None]] = []

    class Mirror(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append((self.path, self.headers.get("authorization")))
            self.send_response(404)
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Mirror)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    script = "from polymodal.checkpoints.locate import fetch_folder; fetch_folder('owner/llava', 'abc')"
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_secret",
        "PATH": "/usr/bin", "no_proxy": "*",
    }  # fmt: skip

    def run(offline: str) -> str:
        settings = {**environment, "HF_HUB_OFFLINE": offline}
        done = subprocess.run([sys.executable, "-c", script], env=settings, capture_output=True, text=True, check=False)
        assert "owner/llava at abc: no such folder here" in done.stderr
        assert "hf_secret" not in done.stderr
        return done.stderr

    run("1")
    assert paths == []  # offline nothing is asked
    run("0")
    server.shutdown()
    assert ("/api/models/owner/llava/revision/abc", "Bearer hf_secret") in paths


def test_a_whisper_is_no_model_to_talk_to(tmp_path: Path) -> None:
    WhisperConfig().save_pretrained(tmp_path / "whisper")
    with pytest.raises(CheckpointError, match=r"a Whisper, which writes down speech.*nothing to talk to"):
        load(tmp_path / "whisper")


def test_a_tower_of_a_whole_clip_is_a_component_and_no_model_to_talk_to(tmp_path: Path) -> None:
    text = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = CLIPModel(CLIPConfig(vision_config=TOWER, text_config={**text, "vocab_size": 50}, projection_dim=8))
    whole.save_pretrained(tmp_path / "clip")
    encoder = build_vision_encoder(VisionConfig(vision_tower=str(tmp_path / "clip"), type="clip"))
    loaded: Any = encoder
    mine, theirs = loaded.model.state_dict(), whole.vision_model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    with pytest.raises(CheckpointError, match="its vision tower is a part"):
        load(tmp_path / "clip")


def shards(folder: Path, tensors: dict[str, torch.Tensor], count: int) -> None:
    """Write weights in shards with their index."""
    names, index = sorted(tensors), {}
    for number in range(count):
        file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name].clone() for name in names[number::count]}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names[number::count], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


NORM = "language_model.model.norm.weight"


def test_one_file_is_read_and_older_shards_beside_it_are_not(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    shards(copy, {name: tensor * 0.5 for name, tensor in tensors.items()}, 2)
    stock = LlavaForConditionalGeneration.from_pretrained(copy, dtype=torch.float32).state_dict()
    ours = load_hf(check_folder(copy)).model.llm.state_dict()
    assert torch.equal(ours["model.norm.weight"], tensors[NORM].float())
    assert torch.equal(stock["model.language_model.norm.weight"], tensors[NORM].float())
    assert check_folder(copy).tensors().keys() == tensors.keys()


def test_shards_are_those_of_the_index(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    shards(copy, tensors, 3)
    save_file({NORM: tensors[NORM] * 0.5}, copy / "model-00001-of-00002.safetensors")
    ours = load_hf(check_folder(copy)).model.llm.state_dict()
    assert torch.equal(ours["model.norm.weight"], tensors[NORM].float())
    index = json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in index.values() if file != index[NORM])
    save_file({**load_file(copy / other), NORM: tensors[NORM] * 0.5}, copy / other)
    with pytest.raises(CheckpointError, match=rf"tensor '{NORM}' is to be in {index[NORM]}, and lies in {other} too"):
        load(copy)


def test_an_adapter_beside_the_weights_is_not_passed_over(copy: Path, tiny_llm_folder: Path, tmp_path: Path) -> None:
    from polymodal.config import LLMConfig
    from polymodal.modeling.language_model import load_llm

    (copy / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "somewhere"}')
    save_file({"x": torch.ones(1)}, copy / "adapter_model.safetensors")
    reason = r"adapter_config\.json: a peft adapter, which lies beside model\.safetensors, and transformers would"
    with pytest.raises(CheckpointError, match=reason):
        load(copy)
    change_json(copy / "config.json", lambda c: c.update(model_type="idefics3", architectures=["Idefics3Model"]))
    with pytest.raises(CheckpointError, match=reason):
        load(copy)
    llm = Path(shutil.copytree(tiny_llm_folder, tmp_path / "llm"))
    shutil.copy(copy / "adapter_config.json", llm)
    with pytest.raises(CheckpointError, match=reason):
        load_llm(LLMConfig(model_name_or_path=str(llm)))


BUILT = {
    "a giant width": ({"text_config": {"intermediate_size": 2**23}}, "of another shape"),
    "layers without end": ({"text_config": {"num_hidden_layers": 16000}}, "many more layers"),
    "a layer too many": ({"text_config": {"num_hidden_layers": 2}}, "missing"),
    "a tower without end": ({"vision_config": {"num_hidden_layers": 16000}}, "many more layers"),
    "a table of positions": ({"vision_config": {"image_size": 60_000, "patch_size": 1}}, "pixels|position"),
    "no heads": ({"text_config": {"num_attention_heads": 0}}, "cannot be loaded"),
    "an unknown activation": ({"text_config": {"hidden_act": "swoosh"}}, "swoosh"),
    "an unknown rope": ({"text_config": {"rope_parameters": {"rope_type": "spiral"}}}, "spiral"),
    "a norm with NaN": ({"text_config": {"rms_norm_eps": float("nan")}}, "rms_norm_eps is nan"),
    "a tower's norm with NaN": ({"vision_config": {"layer_norm_eps": float("nan")}}, "layer_norm_eps is nan"),
    "a patch of 0": ({"vision_config": {"patch_size": 0}}, "patch_size is 0"),
    "LLaVA's own placeholder": ({"image_token_index": -200, "image_token_id": None}, r"-200 as the image's token"),
    "layers in words": ({"vision_feature_layer": "last"}, "config.json"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "reason"), BUILT.values(), ids=BUILT)
def test_settings_that_no_model_has_are_refused_in_one_line(changes: dict[str, Any], reason: str, copy: Path) -> None:
    def spoil(document: dict[str, Any]) -> None:
        for key, value in changes.items():
            if value is None:
                document.pop(key, None)
            elif isinstance(value, dict):
                document[key].update(value)
            else:
                document[key] = value

    change_json(copy / "config.json", spoil)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(copy, "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="flash attention may run here")
def test_flash_attention_of_a_published_folder_falls_back(copy: Path, published: Path) -> None:
    change_json(copy / "config.json", lambda c: c.update(_attn_implementation="flash_attention_2"))
    change_json(copy / "config.json", lambda c: c["vision_config"].update(attn_implementation="flash_attention_2"))
    with pytest.warns(UserWarning, match="asks for flash_attention_2"):
        asked = load(copy, "cpu").ask("What is this?", image())
    assert asked == load(published, "cpu").ask("What is this?", image())
