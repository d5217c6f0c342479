"""A model of one's own: from folders and from modules, called, trained, saved and opened again."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as PILImage
from torch import nn
from transformers import (
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    LlamaForCausalLM,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

import polymodal
from polymodal import Image, MultimodalLM, compose, train, user
from polymodal.config import AbstractorConfig, ImageConfig, ProjectorConfig
from polymodal.errors import CheckpointError, ConfigError, PolymodalError
from polymodal.interop.describe import describe
from polymodal.interop.gguf import export as gguf_export
from polymodal.interop.huggingface import export_class
from polymodal.media_plan import Size
from polymodal.modeling.encoders.hf_vision import HFVisionEncoder
from recipes.tiny.make_parts import main as make_parts

PICTURES = Path(__file__).parents[2] / "examples/pictures"
ABSTRACTOR = ProjectorConfig(
    mm_projector_type="abstractor", abstractor=AbstractorConfig(num_query_tokens=4, hidden_size=16, depth=1)
)
RULES = ImageConfig(image_aspect_ratio="pad", tile_size=(56, 56), image_mean=(0.5,) * 3, image_std=(0.5,) * 3)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    make_parts(folder)
    names = ("apple", "penguin", "strawberry")
    rows = [
        {
            "id": name,
            "image": f"{name}.png",
            "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"A {name}."}],
        }
        for name in names
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def model(parts: Path) -> Any:
    return compose(vision=parts / "vision", llm=parts / "llm")


class Patches(nn.Module):
    """A tower of somebody's own: a feature for each patch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 20, 14, 14)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.conv(pixels).flatten(2).transpose(1, 2)


class Fewer(nn.Module):
    """A projector of somebody's own, which makes one token of four."""

    def __init__(self, width: int = 20, out: int = 64) -> None:
        super().__init__()
        self.layer = nn.Linear(4 * width, out)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layer(features.unflatten(1, (-1, 4)).flatten(2))


def test_what_parts_say_themselves_is_not_asked_for(model: Any, parts: Path) -> None:
    config = model.config
    assert config.vision.type == "clip" and config.image.tile_size == (56, 56)
    assert config.image.image_mean == (0.48145466, 0.4578275, 0.40821073)
    assert config.template.chat_template == "tokenizer"
    assert model.takes == ("image",) and model.model.tokens_per_tile == Size(4, 4)


@pytest.mark.parametrize("resolution, ratio", [("slices", "slice"), ("anyres", "anyres")])
def test_resolutions(parts: Path, resolution: Any, ratio: str) -> None:
    model = compose(parts / "vision", llm=parts / "llm", resolution=resolution)
    assert model.config.image.image_aspect_ratio == ratio
    assert (model.model.image_newline is not None) == (ratio == "anyres")
    reply = model.generate(
        [user(Image(PICTURES / "coffee.jpg"), "What?")], polymodal.GenerationParams(max_new_tokens=2)
    )
    assert reply.usage.image_tokens > 16


@pytest.mark.parametrize(
    "messages",
    [
        [user("What?"), polymodal.assistant("An apple.")],
        [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "An apple."}],
        [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "An apple."}],
        [
            {"role": "user", "content": [{"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "An apple."},
        ],
    ],
)
def test_a_call_takes_every_form_of_conversation(model: Any, messages: Any) -> None:
    out = model(messages, images=[PICTURES / "apple.png"])
    once = model([user(Image(PICTURES / "apple.png"), "What?"), polymodal.assistant("An apple.")])
    assert torch.equal(out.loss, once.loss) and out.loss.requires_grad
    assert out.logits.shape == (out.num_targets, 259)


def test_a_call_takes_tensors_too(model: Any) -> None:
    conversation = [user(Image(PICTURES / "apple.png"), "What?"), polymodal.assistant("An apple.")]
    sample = model.processor(conversation)
    labels = torch.where(sample.loss_mask, sample.input_ids, -100)[None]
    ids, pixels = sample.input_ids[None], sample.pixels[0]
    out = model(input_ids=ids, labels=labels, pixel_values=pixels, attention_mask=torch.ones_like(ids))
    assert torch.allclose(out.loss, model(conversation).loss)
    assert model(input_ids=ids, pixel_values=pixels).logits.shape == (1, ids.shape[1], 259)
    with pytest.raises(PolymodalError, match="placeholders in its rows for 2 images of 16 tokens"):
        model(input_ids=ids, pixel_values=torch.cat((pixels, pixels)))
    with pytest.raises(ConfigError, match="give messages, or input_ids"):
        model()


def test_images_go_to_their_marks(model: Any) -> None:
    apple, penguin = (Image(PICTURES / f"{name}.png") for name in ("apple", "penguin"))
    marked = model("First <image> then <image>?", images=[apple, penguin]).logits
    assert torch.equal(marked, model([user("First ", apple, " then ", penguin, "?")]).logits)
    with pytest.raises(PolymodalError, match="1 more than there are places"):
        model("Here: <image>", images=[apple, penguin])


def test_ten_lines(parts: Path, tmp_path: Path) -> None:
    """The program of the README."""
    model = compose(vision=parts / "vision", projector="mlp2x_gelu", llm=parts / "llm")
    before = model.model.projector.state_dict()["layers.0.weight"].clone()
    rows = {"data": parts / "rows.json", "image_root": PICTURES, "batch_size": 3, "epochs": 10, "log_every": 1}
    train(model, stage="align", output_dir=tmp_path / "align", learning_rate=5e-3, **rows)
    assert not torch.equal(before, model.model.projector.state_dict()["layers.0.weight"])
    train(model, stage="tune", lora_r=4, output_dir=tmp_path / "tune", **rows)
    log = [json.loads(line)["loss"] for line in (tmp_path / "align" / "log.jsonl").read_text().splitlines()]
    assert log[-1] < log[0] and len(model.history) == 2
    answer = model.ask("What?", PICTURES / "apple.png")
    model.save(tmp_path / "mine")
    assert polymodal.load(tmp_path / "mine").ask("What?", PICTURES / "apple.png") == answer
    assert polymodal.load(tmp_path / "tune" / "final").ask("What?", PICTURES / "apple.png") == answer


def test_modules_of_ones_own(parts: Path, tmp_path: Path) -> None:
    llm = LlamaForCausalLM.from_pretrained(parts / "llm")
    model = compose(Patches(), Fewer(), llm, image=RULES)
    assert model.model.tokens_per_tile == Size(2, 2)  # 16 patches, four to a token
    assert model.generate([user(Image(PICTURES / "apple.png"), "What?")]).usage.image_tokens == 4
    rows = {"data": parts / "rows.json", "image_root": PICTURES, "batch_size": 3, "max_steps": 2}
    train(model, stage="align", output_dir=tmp_path / "align", **rows)
    with pytest.raises(CheckpointError, match="compose the model again with it"):
        polymodal.load(tmp_path / "align" / "final")
    with pytest.raises(CheckpointError, match="is a module of yours"):
        model.save(tmp_path / "mine")


def test_a_projector_needs_only_forward(parts: Path) -> None:
    encoder = HFVisionEncoder(CLIPVisionModel.from_pretrained(parts / "vision"), -2, "patch", None)
    model = MultimodalLM(encoder, Fewer(width=48), given(parts)["llm"])
    assert model.tokens_per_tile == Size(2, 2)
    assert model.project(model.encode_images(torch.zeros(1, 3, 56, 56))).shape == (1, 4, 64)


def test_models_of_transformers_are_saved_whole(parts: Path, tmp_path: Path) -> None:
    tower, llm = CLIPVisionModel.from_pretrained(parts / "vision"), LlamaForCausalLM.from_pretrained(parts / "llm")
    model = compose(tower, "linear", llm)
    answer = model.ask("What?", PICTURES / "apple.png")
    model.save(tmp_path / "mine")
    assert polymodal.load(tmp_path / "mine").ask("What?", PICTURES / "apple.png") == answer
    with pytest.raises(PolymodalError, match="is there already"):
        model.save(tmp_path / "mine")


@pytest.fixture(scope="module")
def dino(parts: Path) -> Path:
    """A tower with pixels and patches of its own."""
    torch.manual_seed(1)
    settings = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "mlp_ratio": 2}
    Dinov2Model(Dinov2Config(**settings, image_size=28, patch_size=7)).save_pretrained(parts / "dino")
    return parts / "dino"


def test_two_towers_side_by_side_are_trained_saved_and_opened_again(parts: Path, dino: Path, tmp_path: Path) -> None:
    model = compose([parts / "vision", dino], llm=parts / "llm")
    (second,) = model.config.vision.fused  # type: ignore[union-attr]
    assert (second.type, second.image_mean) == ("dinov2", (0.485, 0.456, 0.406))  # the first has CLIP's
    assert model.model.tokens_per_tile == Size(4, 4) and model.model.vision_encoder.embed_dim == 48 + 24
    rows = {"data": parts / "rows.json", "image_root": PICTURES, "batch_size": 3, "max_steps": 1, "log_every": 1}

    def losses(folder: Path) -> list[float]:
        return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]

    cached = {"run__feature_cache": "memory", "run__feature_dtype": "float32", "precision": "fp32"}
    before = {name: value.clone() for name, value in model.model.projector.state_dict().items()}
    train(model, stage="align", output_dir=tmp_path / "kept", **cached, **rows)
    model.model.projector.load_state_dict(before)
    train(model, stage="align", output_dir=tmp_path / "align", **cached | {"run__feature_cache": "off"}, **rows)
    torch.testing.assert_close(losses(tmp_path / "kept"), losses(tmp_path / "align"), atol=1e-5, rtol=1e-5)
    frozen = tmp_path / "align/final"
    assert not list(frozen.glob("vision*"))  # both lie elsewhere, unchanged
    answer = model.ask("What?", PICTURES / "apple.png")
    assert polymodal.load(frozen).ask("What?", PICTURES / "apple.png") == answer

    both = "{projector,vision_encoder.towers.1}.*"
    was = [value.clone() for value in model.model.vision_encoder.state_dict().values()]
    train(model, stage="align", output_dir=tmp_path / "seen", learning_rate=1e-2, train__0__match=both, **rows)
    changed = {
        name.split(".")[1]
        for (name, value), old in zip(model.model.vision_encoder.state_dict().items(), was, strict=True)
        if not torch.equal(value, old)
    }
    assert changed == {"1"}
    final = tmp_path / "seen/final"
    assert [path.name for path in sorted(final.glob("vision*"))] == ["vision", "vision_2"]
    opened = polymodal.load(final)
    out, again = (each([user(Image(PICTURES / "apple.png"), "What?")]).logits for each in (model, opened))
    torch.testing.assert_close(again, out)
    sizes = {part.name: part.parameters for part in describe(final).parts}
    assert sizes["vision"] > sizes["vision_2"] > 0  # type: ignore[operator]


def test_modules_stand_beside_towers_that_are_loaded(parts: Path, dino: Path, tmp_path: Path) -> None:
    towers = [CLIPVisionModel.from_pretrained(parts / "vision"), dino]
    made, named = compose(towers, "linear", parts / "llm"), compose([parts / "vision", dino], "linear", parts / "llm")
    apple = [user(Image(PICTURES / "apple.png"), "What?")]
    assert torch.equal(made(apple).logits, named(apple).logits)
    made.save(tmp_path / "mine")
    assert [path.name for path in sorted((tmp_path / "mine").glob("vision*"))] == ["vision"]
    torch.testing.assert_close(polymodal.load(tmp_path / "mine")(apple).logits, made(apple).logits)
    shutil.move(dino, parts / "elsewhere")
    with pytest.raises(CheckpointError, match=r"its vision tower 2 .* --vision DIR --vision DIR .*vision_2"):
        polymodal.load(tmp_path / "mine", parts={})
    opened = polymodal.load(tmp_path / "mine", parts={"vision_2": parts / "elsewhere"})
    shutil.move(parts / "elsewhere", dino)
    torch.testing.assert_close(opened(apple).logits, made(apple).logits)
    own = compose([parts / "vision", Patches()], "linear", parts / "llm")
    assert own.model.vision_encoder.embed_dim == 48 + 20
    with pytest.raises(CheckpointError, match=r"vision_encoder is a module of yours \(Patches\)"):
        own.save(tmp_path / "own")


def test_what_towers_side_by_side_cannot_is_one_line(parts: Path, dino: Path) -> None:
    with pytest.raises(ConfigError, match=r"'native': towers side by side \(vision.fused\) take tiles of one size"):
        compose([parts / "vision", dino], llm=parts / "llm", resolution="native")
    model = compose([parts / "vision", dino], llm=parts / "llm")
    for reasons in (gguf_export.reasons_against(model.model, model.config),
                    export_class.reasons_against(model.model, model.config, "llava")):  # fmt: skip
        assert "2 vision towers side by side (vision.fused) have no place there: train with one" in list(reasons)


def given(parts: Path) -> dict[str, Any]:
    return {"llm": LlamaForCausalLM.from_pretrained(parts / "llm")}


@pytest.mark.parametrize(
    "build, told",
    [
        (lambda p: compose(vision=p / "visoin", llm=p / "llm"), "visoin"),
        (lambda p: compose(vision=p / "llm", llm=p / "llm"), "'llama' is no vision tower known here: clip"),
        (lambda p: compose(given(p)["llm"], "linear", Patches()), "the order is vision, projector, llm"),
        (lambda p: compose(Patches(), "linear", Fewer(), image=RULES), "Fewer is no language model"),
        (lambda p: compose(Patches(), Fewer(), p / "llm"), "does not say how it wants its images"),
        (lambda p: compose(Patches(), Fewer(out=7), p / "llm", image=RULES), "width 7, and the language model"),
        (lambda p: compose(Patches(), Fewer(width=3), p / "llm", image=RULES), "Fewer was run on [1, 16, 20]"),
        (lambda p: compose(p / "vision", "mlp2x_gleu", p / "llm"), "mlp2x_gleu"),
        (lambda p: compose(p / "vision", llm=p / "llm", resolution="any"), "one of fixed, slices, anyres, native"),
        (lambda p: compose(p / "vision", 3, p / "llm"), "projector: a int"),
        (lambda p: compose(p / "vision", llm=p / "llm", device="cuda:977"), "'cuda:977' is not on this machine"),
        (lambda p: compose(p / "vision", llm=p / "llm", device="gpu"), "choose cpu, cuda, cuda:NUMBER or mps"),
        (lambda p: compose(p / "vision", llm=p / "llm", dtype="fp16"), "did you mean 'float16'?"),
        (lambda p: MultimodalLM(given(p)["llm"], Fewer(), Patches()), "vision_encoder is a language model"),
        (lambda p: MultimodalLM(Patches(), Fewer(), Fewer()), "llm is a Fewer"),
        (lambda p: MultimodalLM(Patches(), Fewer()), "llm is missing"),
        (lambda p: MultimodalLM(Patches(), Fewer(), given(p)["llm"]), "an `output_grid`"),
        (lambda p: MultimodalLM(Patches(), llm=given(p)["llm"]), "projector is missing"),
        (lambda p: train(p / "none.yaml"), "none.yaml"),
        (lambda p: train(3), "takes a recipe file or a model"),
        (lambda p: train(compose(llm=p / "llm"), stage="align", data=p), "this model has none; take 'tune'"),
        (lambda p: train(compose(llm=p / "llm")), "in a `stage`: 'align' or 'tune'"),
        (lambda p: train("x.yaml", lerning_rate=1), "did you mean 'learning_rate'"),
        (lambda p: train("x.yaml", data="a"), "leave data and stage out"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_clear_line(parts: Path, build: Callable[[Path], Any], told: str) -> None:
    with pytest.raises(PolymodalError) as error:
        build(parts)
    assert told in str(error.value) and "\n" not in str(error.value)


def test_a_recipe_with_values_changed(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {
        "name": "x", "init": {"model": {"llm": {"model_name_or_path": str(parts / "llm")}}}, "output_dir": "out",
        "data": {"mix": [{"path": str(parts / "text.json")}]}, "train": [{"match": "llm.*", "train": True}],
    }  # fmt: skip
    (parts / "text.json").write_text(
        json.dumps([{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}])
    )
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    final = train(tmp_path / "recipe.yaml", output_dir=tmp_path / "run", max_steps=1, optim__clip=0.5)
    assert final == tmp_path / "run" / "final"
    assert "clip: 0.5" in (tmp_path / "run" / "recipe.yaml").read_text()


@pytest.mark.parametrize("projector, tokens", [("mlp2x_gelu", Size(4, 4)), ("avg_pool2_linear", Size(2, 2))])
def test_native_resolution(parts: Path, tmp_path: Path, projector: str, tokens: Size) -> None:
    made = compose(vision=parts / "vision", projector=projector, llm=parts / "llm", resolution="native")
    assert made.config.image is not None and made.config.image.tile_size == (56, 56)
    assert made.model.tokens_per_tile == tokens and made.model.image_newline is not None
    wide = Image(PILImage.new("RGB", (112, 56), "red"))
    plan = made.processor([user(wide, "What?")], pixels=False).plans[0]
    assert plan.tokens == Size(tokens.height, 2 * tokens.width) and plan.num_tokens == plan.tokens.area + tokens.height
    out = made(images=[wide, PICTURES / "apple.png"], messages="<image> or <image>?")
    assert torch.isfinite(out.logits).all()
    made.save(tmp_path / "model")
    assert polymodal.load(tmp_path / "model").ask("What?", PICTURES / "apple.png") == made.ask(
        "What?", PICTURES / "apple.png"
    )


def test_native_resolution_of_naflex_reads_its_own_rules(parts: Path, tmp_path: Path) -> None:
    widths = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    Siglip2VisionModel(Siglip2VisionConfig(**widths, num_patches=16, patch_size=8)).save_pretrained(tmp_path)
    assert compose(vision=tmp_path, llm=parts / "llm").config.image.tile_size == (32, 32)
    rules = {"image_processor_type": "Siglip2ImageProcessor", "patch_size": 8, "max_num_patches": 25, "resample": 2,
             "image_mean": [0.4, 0.5, 0.6], "image_std": [0.5, 0.5, 0.5], "do_resize": True}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(rules))
    image = compose(vision=tmp_path, llm=parts / "llm", resolution="native").config.image
    assert (image.tile_size, image.resample, image.image_mean) == ((40, 40), "bilinear", (0.4, 0.5, 0.6))


@pytest.mark.parametrize(
    "vision, projector, said",
    [
        ("vision", "qformer", "'native' gives each image a grid of its own, and projector 'qformer' makes 32 tokens"),
        ("vision", "resampler", "take linear, an MLP, pixel_shuffle<r> or avg_pool<r>"),
        ("vision", ABSTRACTOR, "'abstractor' makes 4 tokens of one of 4x4"),
        ("efficientnet_lite0", "linear", "efficientnet_lite0 takes tiles of one size"),
    ],
)
def test_native_resolution_refuses_what_wants_one_grid(parts: Path, vision: str, projector: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose(parts / vision if vision == "vision" else vision, projector, parts / "llm", resolution="native")


def test_native_resolution_refuses_a_module_that_pools_and_a_tile_of_broken_patches(parts: Path) -> None:
    image = RULES.model_copy(update={"image_aspect_ratio": "native"})
    with pytest.raises(ConfigError, match="takes tiles of one size"):
        compose(Patches(), Fewer(), parts / "llm", image=image)
    with pytest.raises(ConfigError, match="makes 4 tokens of one of 4x4"):
        compose(parts / "vision", Fewer(48), parts / "llm", image=image)
    with pytest.raises(ConfigError, match="tile_size 60x60 is not made of these; set it to 56x56"):
        compose(parts / "vision", "linear", parts / "llm", image=image.model_copy(update={"tile_size": (60, 60)}))
