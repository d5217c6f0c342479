"""Plans against what is measured: parameters and types of real models, activations that autograd really keeps."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from polymodal.backends.local import processor_of
from polymodal.checkpoints.model_folder import save_model
from polymodal.cli import main
from polymodal.config import (
    AudioConfig,
    LLMConfig,
    ModelConfig,
    ProjectorConfig,
    TemporalAttentionConfig,
    TemporalConfig,
    VideoConfig,
    VisionConfig,
    parse_config,
)
from polymodal.errors import CheckpointError, ConfigError
from polymodal.media_plan import Size
from polymodal.messages import Audio, Image, Video, user
from polymodal.modeling.build import build_model
from polymodal.modeling.lora import NF4_BYTES
from polymodal.modeling.meta_device import PUBLISHED_SHAPES, outline
from polymodal.planning.activation_trace import Load, id_of, trace
from polymodal.planning.plan import DEVICES, GIB, Question, TrainingPlan, plan_model, plan_training
from polymodal.planning.sample import PaperVideo, plan_media
from polymodal.planning.starting_point import starting_point
from polymodal.processing.collate import as_one, collate
from polymodal.processing.processor import Processor
from polymodal.training.optimizer import apply_policy
from polymodal.training.recipes.load import load_recipe
from polymodal.training.recipes.sft import Recipe
from tests.modeling.test_vlm_senses import clip, tone

RECIPES = Path(__file__).parents[2] / "recipes"
# As published (model pages, papers); of Vicuna and SmolLM2 as of the models that they are tuned from.
PUBLISHED = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
    "lmsys/vicuna-7b-v1.5": 6_738_415_616,
    "lmsys/vicuna-13b-v1.5": 13_015_864_320,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "openai/clip-vit-large-patch14-336": 303_507_456,
    "openai/whisper-base": 20_590_592,  # its encoder
    "google/siglip-base-patch16-224": 92_884_224,
    "google/siglip-so400m-patch14-384": 428_225_600,
}


@pytest.fixture(autouse=True)
def no_hub(private_cache: Path) -> None:
    """An empty Hugging Face cache: the table of shapes is what is tested."""


def recipe_of(plain: dict[str, Any], **changes: Any) -> Recipe:
    return parse_config(Recipe, {**plain, **changes}, "test")


def plan(recipe: Recipe, **question: Any) -> TrainingPlan:
    return plan_training(recipe, starting_point(recipe), Question(**{"device": "cpu", **question}))


def test_every_known_shape_has_a_published_count() -> None:
    assert PUBLISHED.keys() == PUBLISHED_SHAPES.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_shapes_have_the_published_parameters(name: str, tiny_model_config: ModelConfig) -> None:
    if PUBLISHED_SHAPES[name]["model_type"] == "whisper":
        config = tiny_model_config.model_copy(update={"audio": AudioConfig(audio_tower=name)})
        assert sum(p.numel() for p in outline(config).model.audio_encoder.parameters()) == PUBLISHED[name]
        return
    kind = {"clip_vision_model": "clip", "siglip_vision_model": "siglip"}.get(PUBLISHED_SHAPES[name]["model_type"])
    if kind is None:
        built = outline(ModelConfig(llm=LLMConfig(model_name_or_path=name)))
        assert sum(p.numel() for p in built.model.parameters()) == PUBLISHED[name]
        return
    side = PUBLISHED_SHAPES[name]["image_size"]
    assert tiny_model_config.image is not None
    config = tiny_model_config.model_copy(
        update={
            "vision": VisionConfig(vision_tower=name, type=kind),
            "image": tiny_model_config.image.model_copy(update={"tile_size": (side, side)}),
        }
    )
    tower: Any = outline(config).model.vision_encoder
    assert sum(p.numel() for p in tower.parameters()) == PUBLISHED[name]


def test_an_outline_has_the_names_shapes_and_types_of_the_real_model(tiny_model_config: ModelConfig) -> None:
    real = build_model(tiny_model_config)[0].state_dict()
    empty = outline(tiny_model_config).model.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in real.items()} == {k: (v.shape, v.dtype) for k, v in empty.items()}
    assert all(value.is_meta for value in empty.values())


RULES: dict[str, dict[str, Any]] = {
    "projector": {"train": [{"match": "projector.*", "train": True}]},
    "whole": {"train": [{"match": "{projector,llm}.*", "train": True}]},
    "tower": {"train": [{"match": "*", "train": True}]},
    "lora": {"train": [{"match": "projector.*", "train": True}], "lora": {"lora_r": 4, "lora_alpha": 8}},
}


@pytest.mark.parametrize("sizes", [[(28, 28)], [(84, 28), (30, 50)]], ids=["tiles", "native"])
@pytest.mark.parametrize("rules", RULES)
def test_activations_are_those_that_autograd_really_keeps(
    rules: str, sizes: list[tuple[int, int]], plain: dict[str, Any], tmp_path: Path
) -> None:
    """The real model, real tensors, real forward; the plan saw none of them."""
    if len(sizes) > 1:
        plain["init"]["model"]["image"]["image_aspect_ratio"] = "native"
    recipe = recipe_of(plain, **RULES[rules])
    assert recipe.init.model is not None
    model, tokenizer = build_model(recipe.init.model)
    apply_policy(model, recipe.train, recipe.lora, recipe.optim)
    processor = Processor(recipe.init.model, tokenizer, model.tokens_per_tile, model.image_token_id)
    from PIL import Image as Pillow

    from polymodal.messages import Image, assistant, user

    images = [Image(Pillow.new("RGB", size)) for size in sizes]
    sample = processor([user(*images, "Which colour is it? " * 4), assistant("x")])
    assert sample.pixels is not None
    labels = torch.full_like(sample.input_ids, -100)
    labels[-1] = sample.input_ids[-1]  # one target: the head, which the plan counts by rule, weighs nothing
    own = {id_of(p) for p in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if id_of(tensor) not in own:
            kept[id_of(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(
            sample.input_ids[None],
            labels=labels[None],
            plans=sample.plans,
            sample_of_image=[0] * len(images),
            pixel_values=as_one(sample.pixels),
        )
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())

    empty = outline(recipe.init.model)
    apply_policy(empty.model, recipe.train, recipe.lora, recipe.optim)
    visual = sum(p.num_tokens for p in sample.plans)
    paper = plan_media([Size(h, w) for w, h in sizes], [], [], [], recipe.init.model, model.tokens_per_tile, None)
    shapes = paper.own_shapes(recipe.init.model)
    assert shapes == (() if len(sizes) == 1 else tuple(p.tile for p in sample.plans))
    load = Load(1, len(sample.input_ids), 1, tiles=paper.tiles, visual_tokens=visual, own_shapes=shapes)
    planned = trace(empty, load, bf16=False)
    assert planned.kept == pytest.approx(measured, rel=0.05)
    assert planned.kept_checkpointed < planned.kept


def test_flops_are_those_of_the_matrices_and_of_attention(tiny_model_config: ModelConfig) -> None:
    built = outline(ModelConfig(llm=tiny_model_config.llm))
    llm: Any = built.model.llm
    llm.requires_grad_(True)
    rows, tokens, targets = 3, 50, 7
    matrices = sum(p.numel() for name, p in llm.named_parameters() if name.endswith("_proj.weight"))
    head = 2 * rows * targets * llm.lm_head.weight.numel()
    attention = 2 * 2 * rows * tokens**2 * 32 * llm.config.num_hidden_layers
    cost = trace(built, Load(rows, tokens, targets, 0, 0), bf16=False)
    assert cost.forward_flops == 2 * rows * tokens * matrices + attention + head
    # Twice the forward pass for matrices; attention's backward computes its scores once more.
    assert cost.backward_flops == 4 * rows * tokens * matrices + 2.5 * attention + 2 * head


def test_memory_follows_what_is_trained_and_how_it_is_sharded(plain: dict[str, Any]) -> None:
    whole = recipe_of(plain, **RULES["whole"])
    image = (Size(28, 28),)
    one = plan(whole, images=image)
    trained = sum(one.trained.values())
    assert one.trained["vision_encoder"] == 0 and trained == one.parameters["llm"] + one.parameters["projector"]
    assert (one.memory["gradients"], one.memory["optimizer"]) == (4 * trained, 8 * trained)
    ddp = plan(whole, images=image, devices=4, engine="ddp")
    assert ddp.memory["gradient buckets"] == 4 * trained and ddp.memory["weights"] == one.memory["weights"]
    shared = plan(whole, images=image, devices=4, engine="fsdp2")
    assert (shared.memory["gradients"], shared.memory["optimizer"]) == (trained, 2 * trained)
    # A frozen tower is whole on every device under FSDP2.
    assert -(-one.memory["weights"] // 4) < shared.memory["weights"] < one.memory["weights"]
    assert shared.total < ddp.total
    small = plan(recipe_of(plain, **RULES["projector"]), images=image)
    assert small.memory["optimizer"] < one.memory["optimizer"] / 2


def test_checkpointing_is_chosen_where_it_does_not_fit_otherwise(
    plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(plain, **RULES["whole"])
    asked: dict[str, Any] = {"images": (Size(28, 28),), "rows": 8, "text_tokens": 400}
    with monkeypatch.context() as patched:
        patched.setitem(DEVICES, "large", (1e12, 80))
        large = plan(recipe, device="large", **asked)
        needed = (large.total - large.activations_kept + large.activations_checkpointed) / GIB
        patched.setitem(DEVICES, "small", (1e12, needed + 1e-5))
        patched.setitem(DEVICES, "too small", (1e12, needed - 1e-5))
        small, hopeless = plan(recipe, device="small", **asked), plan(recipe, device="too small", **asked)
    assert not large.checkpointing and large.fits
    assert small.checkpointing and small.fits and hopeless.checkpointing and not hopeless.fits
    assert small.flops_per_sample > large.flops_per_sample
    assert large.memory["activations"] == small.activations_kept > small.memory["activations"]


def test_images_of_their_own_shape_on_paper(plain: dict[str, Any], capsys: Any, tmp_path: Path) -> None:
    plain["init"]["model"]["image"]["image_aspect_ratio"] = "native"
    found = [plan(recipe_of(plain), images=(size,)) for size in (Size(28, 28), Size(28, 56), Size(56, 56))]
    assert [each.visual_tokens for each in found] == [(4,), (8,), (16,)]
    assert found[0].memory["tower at work"] * 4 == found[2].memory["tower at work"]
    assert found[0].flops_per_sample < found[1].flops_per_sample < found[2].flops_per_sample
    cached = recipe_of(plain, run={**plain["run"], "feature_cache": str(tmp_path)})
    assert plan(cached, images=(Size(28, 56),)).visual_tokens == (8,)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    assert main(["plan", str(tmp_path / "recipe.yaml"), "--image", "56x28", "--device", "cpu"]) == 0
    assert "8" in capsys.readouterr().out


def test_visual_tokens_are_the_processors(tiny_model_config: ModelConfig, plain: dict[str, Any]) -> None:
    assert tiny_model_config.image is not None
    image = {
        "image_aspect_ratio": "anyres",
        "tile_size": [28, 28],
        "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
        "mm_patch_merge_type": "spatial_unpad",
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    plain["init"]["model"]["image"] = image
    recipe = recipe_of(plain, train=[{"match": "{projector.*,image_newline}", "train": True}])
    assert recipe.init.model is not None
    model, tokenizer = build_model(recipe.init.model)
    processor = Processor(recipe.init.model, tokenizer, model.tokens_per_tile, model.image_token_id)
    from PIL import Image as Pillow

    sizes = [Size(40, 90), Size(90, 40), Size(7, 300)]
    wanted = [processor.plan(Pillow.new("RGB", (size.width, size.height))) for size in sizes]
    found = plan(recipe, images=tuple(sizes))
    assert found.visual_tokens == tuple(p.num_tokens for p in wanted)
    assert found.tiles == tuple(p.num_tiles for p in wanted)
    assert found.tokens == sum(found.visual_tokens) + 128


def test_tokens_of_videos_and_sounds_are_the_processors(tiny_model_config: ModelConfig, tmp_path: Path) -> None:
    config, ears = senses(tiny_model_config, tmp_path)
    model, tokenizer = build_model(config)
    folder = tmp_path / "model"
    save_model(folder, model, config, tokenizer, llm_trained=True, vision_trained=True)
    film, voice = clip(tmp_path / "a.mkv", frames=20, sound=True), tone(tmp_path / "a.wav", 2.3)
    processor = processor_of(model, tokenizer, config)
    asked = [user(Image(film_still(tmp_path)), Video(film, fps=2.0), Video(film, fps=2.0, audio=True), Audio(voice))]
    wanted = processor(asked, pixels=False).plans
    clips = tuple(PaperVideo(file=film, fps=2.0) for _ in range(2))
    found = plan_model(str(folder), Question((Size(30, 40),), videos=clips, sounds=(voice, 1.0)))
    assert [video.tokens for video in found.videos] == [wanted[1].num_tokens, wanted[2].num_tokens]
    assert [video.frames for video in found.videos] == [4, 4] and found.visual_tokens == (wanted[0].num_tokens,)
    assert [sound.tokens for sound in found.sounds] == [wanted[4].num_tokens, wanted[3].num_tokens]
    assert found.tokens == sum(plan.num_tokens for plan in wanted) + 128
    # Every part is counted as it is, and where the tower lies inside the folder too.
    save_model(folder, model, config, tokenizer, llm_trained=True, audio_trained=True, replace=True)
    shutil.rmtree(ears)
    real = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    counted = plan_model(str(folder), Question()).parameters
    assert counted == {name: count for name, count in real.items() if count}
    assert counted["temporal_encoder"] and counted["audio_encoder"] and counted["audio_projector"]


def film_still(folder: Path) -> str:
    from PIL import Image as Pillow

    Pillow.new("RGB", (40, 30)).save(folder / "still.png")
    return str(folder / "still.png")


def senses(config: ModelConfig, folder: Path) -> tuple[ModelConfig, Path]:
    """The tiny model with a temporal and an audio encoder, and the folder of the latter."""
    whisper = WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=32, max_source_positions=50
    )
    WhisperEncoder(whisper).save_pretrained(folder / "ears")
    attention = TemporalAttentionConfig(hidden_size=16, num_attention_heads=2)
    video = VideoConfig(num_frames=4, max_frames=4, temporal=TemporalConfig(type="attention", attention=attention))
    audio = AudioConfig(
        audio_tower=str(folder / "ears"), stack=2, projector=ProjectorConfig(mm_projector_type="linear")
    )
    return config.model_copy(update={"video": video, "audio": audio}), folder / "ears"


def keep(own: set[int], pieces: dict[int, torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    if id_of(tensor) not in own:
        pieces[id_of(tensor)] = tensor
    return tensor


def test_activations_of_temporal_and_audio_encoders_are_those_that_autograd_keeps(
    tiny_model_config: ModelConfig, tmp_path: Path
) -> None:
    config, _ = senses(tiny_model_config, tmp_path)
    model, tokenizer = build_model(config)
    film, voice = clip(tmp_path / "a.mp4"), tone(tmp_path / "a.wav", 2.0)
    sample = processor_of(model, tokenizer, config)([user(Video(film), Audio(voice), Image(film_still(tmp_path)), "?")])
    labels = torch.full_like(sample.input_ids, -100)
    labels[-1] = sample.input_ids[-1]
    load = Load(rows=1, tokens=len(sample.input_ids), targets=1, tiles=5, visual_tokens=0, frames=(4,), windows=2)
    load = replace(load, window_frames=100, visual_tokens=sum(plan.num_tokens for plan in sample.plans))
    for part in ("temporal_encoder", "audio_encoder"):
        kept = {}
        for trained in (False, True):
            own = {id_of(p) for p in [*model.parameters(), *model.buffers()]}
            empty = outline(config)
            for each in (model, empty.model):
                each.requires_grad_(False)
                each.llm.requires_grad_(True)
                getattr(each, part).requires_grad_(trained)
            pieces: dict[int, torch.Tensor] = {}

            def pack(
                tensor: torch.Tensor, own: set[int] = own, pieces: dict[int, torch.Tensor] = pieces
            ) -> torch.Tensor:
                if id_of(tensor) not in own:
                    pieces[id_of(tensor)] = tensor
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                model(**{**collate([sample], 0).inputs(), "labels": labels[None], "target_places": None})
            measured = sum(tensor.untyped_storage().nbytes() for tensor in pieces.values())
            planned = trace(empty, load, bf16=False)
            assert planned.kept == pytest.approx(measured, rel=0.05)
            kept[trained] = planned.kept
        assert kept[True] > 1.05 * kept[False]


def test_an_hour_of_video_on_paper(tiny_llm_folder: Path, tiny_model_folder: Path, capsys: Any) -> None:
    target = [str(tiny_model_folder), "video.max_frames=4096", "video.temporal.type=spatio_temporal_pool"]
    assert main(["plan", *target, "--video", "1h", "--fps", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["videos"] == [{"wanted": 3600, "frames": 3600, "limit": "", "tokens": 7200, "tokens_of_all": 7200}]
    assert found["tokens"] == 7328 and found["too_long"] and found["rope_factor"] == 14.32  # of 512 positions
    assert found["kv_bytes"] == 7328 * 2 * 2 * 2 * 8 * 4  # both of 2 layers of 2 heads of 8 numbers
    assert main(["plan", *target, "llm.rope_scaling={rope_type: yarn, factor: 16}", "--video", "3600@1280x720"]) == 0
    out = capsys.readouterr().out
    assert "7328 tokens of 8192" in out and "TOO LONG" not in out
    # A million tokens, where the model's own limit is said too.
    assert main(["plan", str(tiny_model_folder), "video.max_frames=64", "--video", "18h", "--fps", "1"]) == 0
    out = capsys.readouterr().out
    assert "64,800 frames, 64 taken (video.max_frames 64): 1,024 tokens" in out
    assert "1,036,928 tokens in all" in out and "factor of 2025.25" in out
    budget = ["video.max_frames=64", "video.max_tokens=100", "--video", "90s", "--num-frames", "32"]
    assert main(["plan", str(tiny_model_folder), *budget]) == 0
    assert "32 frames, 6 taken (video.max_tokens 100): 96 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--video", "x.mp4"], "--video 'x.mp4': no such file; or write 8@1280x720"),
        (["--video", "8@720"], "--video '720': write a size as WIDTHxHEIGHT"),
        (["--video", "0s"], "no such file"),
        (["--audio", "-3"], "no such file"),
        (["--audio", "3 s"], "no such file"),
        (["--document", "9@1x"], "--document '1x'"),
        (["--video", "8@7x7"], "not made for videos"),
        (["--audio", "3s"], "has no audio encoder"),
        (["video.max_frames=9", "--video", "99999999999h", "--fps", "10"], "at most 1,000,000 are planned"),
        (["video.max_frames=9", "--video", "999999999@7x7"], "a video of 1e+09 frames: at most 1,000,000"),
        (["--video", "9s", "--fps", "0"], "--fps is 0"),
        (["--video", "9s", "--fps", "1", "--num-frames", "2"], "not allowed with"),
    ],
)
def test_media_that_cannot_be_planned(
    flags: list[str], words: str, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tiny_model_folder), *flags]) == 2
    assert words in capsys.readouterr().err


def test_pages_are_images(tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tiny_model_folder), "--document", "3@850x1100", "--image", "30x20", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == [[20, 30], *[[1100, 850]] * 3] and found["tokens"] == 4 * 16 + 128
    assert main(["plan", str(tiny_model_folder), "--document", "3@850x1100", "--image", "30x20"]) == 0
    out = capsys.readouterr().out
    assert out.count("16 tokens in 1 tile\n") == 1 and out.count("16 tokens in 1 tile, 3 times\n") == 1


def test_steps_and_hours(plain: dict[str, Any], tmp_path: Path) -> None:
    del plain["run"]["max_steps"]
    recipe = recipe_of(plain, run={"epochs": 2, "precision": "fp32"})
    counted = plan(recipe, images=(Size(28, 28),))
    assert counted.steps == round(2 * 25 / 8) and counted.hours is None and counted.fits is None
    captions = tmp_path / "captions"
    captions.mkdir()
    for name in ("a.jpg", "a.txt", "b.jpg", "b.txt"):
        (captions / name).touch()
    folder = {"data": {"mix": [{"path": str(captions)}]}, "run": {"epochs": 2}, "batch": {"global_size": 1}}
    assert plan(recipe_of(plain, **folder)).steps == 4
    timed = plan(recipe, images=(Size(28, 28),), rows=8000, samples_per_second=10.0, devices=2, engine="ddp")
    assert (timed.steps, timed.samples) == (2000, 16000) and timed.hours == pytest.approx(16000 / 20 / 3600)
    short = plan(recipe_of(plain, run={"epochs": 1}, batch={"global_size": 8, "last_step": "short"}), rows=11)
    assert (short.steps, short.samples) == (2, 11)
    peak = plan(recipe, rows=8000, device="a100-40gb", utilization=0.5)
    assert peak.hours == pytest.approx(16000 * peak.flops_per_sample / (0.5 * DEVICES["a100-40gb"][0]) / 3600)


@pytest.mark.slow
def test_llava15_is_near_what_was_published() -> None:
    """8 A100: 3.5 hours for stage 1, 10 for stage 2; assumed are 40 % of the peak, and 40 and 250 tokens of text."""
    image = (Size(480, 640),)
    found = {}
    for stage, engine, rows, text in (("stage1", "ddp", 558128, 40), ("stage2", "fsdp2", 665298, 250)):
        path = RECIPES / "llava15" / f"{stage}.yaml"
        recipe = load_recipe(path)
        question = Question(image, text, text // 2, rows, devices=8, engine=engine, device="a100-80gb")
        found[stage] = plan_training(recipe, starting_point(recipe, path), question)
    assert [plan.visual_tokens for plan in found.values()] == [(576,), (576,)]
    assert found["stage1"].trained["projector"] == 20_979_712
    assert [plan.steps for plan in found.values()] == [2180, 5198]
    assert found["stage1"].hours == pytest.approx(3.5, rel=0.3) and found["stage2"].hours == pytest.approx(10, rel=0.3)
    assert all(plan.fits for plan in found.values())
    # Published to need offloading on 40 GB; whole on one device it cannot fit at all.
    assert found["stage2"].total > 20 * GIB


@pytest.mark.parametrize(("precision", "value_bytes"), [("fp32", 4), ("bf16", 2)])
def test_four_bits_shrink_the_frozen_weights(plain: dict[str, Any], precision: str, value_bytes: int) -> None:
    size = {}
    for bits in (False, True):
        rules = {**RULES["lora"], "lora": {"lora_r": 4, "load_in_4bit": bits, "trainable_tokens": ["<new>"]}}
        run = {**plain["run"], "precision": precision}
        size[bits] = plan(recipe_of(plain, run=run, **rules)).memory["weights"]
    matrices = 2 * (32 * 32 * 2 + 2 * 32 * 16 + 3 * 32 * 64)
    assert size[False] - size[True] == round(matrices * (value_bytes - NF4_BYTES))


def test_the_command_prints_plans_of_recipes_pipelines_and_models(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, plain: dict[str, Any], tiny_model_folder: Path
) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "one.yaml").write_text(yaml.safe_dump(plain))
    second = {**plain, **RULES["lora"], "name": "two", "init": {"from": plain["output_dir"] + "/final"}}
    (folder / "two.yaml").write_text(yaml.safe_dump({**second, "output_dir": str(tmp_path / "two")}))
    stages = {"first": {"recipe": "one.yaml"}, "second": {"recipe": "two.yaml"}, "out": {"export": "second"}}
    both = {"name": "both", "output_dir": str(tmp_path / "both"), "stages": stages}
    (folder / "both.yaml").write_text(yaml.safe_dump(both, sort_keys=False))
    flags = ["--image", "20x30", "--rows", "80", "--device", "h100-80gb"]
    assert main(["plan", str(folder / "both.yaml"), *flags]) == 0
    text = capsys.readouterr().out
    for words in ("4 tokens in 1 tile", "fits h100-80gb", "as tiny will leave it", "all stages", "MiB", "assumed:"):
        assert words in text, words
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": i, "samples_per_s": v}) + "\n" for i, v in enumerate([1, 30, 20])))
    changed = ["run.max_steps=4", *flags, "--log", str(log), "--json"]
    assert main(["plan", str(folder / "two.yaml"), *changed]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == 4 and found["hours"] == pytest.approx(32 / 20 / 3600) and found["total"] > GIB
    assert (
        found["model"].endswith("one.yaml will leave it") and 0 < found["trained"]["llm"] < found["parameters"]["llm"]
    )
    assert main(["plan", str(tiny_model_folder), "--image", "50x50", "--text-tokens", "10"]) == 0
    text = capsys.readouterr().out
    assert "16 tokens in 1 tile" in text and "26 tokens of 512" in text
    assert main(["plan", "default", "--image", "100x50", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["llm"] > 134_000_000


@pytest.mark.parametrize(
    ("arguments", "needle"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        (["somebody/something"], "--fetch"),
        (["not-a-model"], "no such model folder"),
        (["default", "run.epochs=1"], "unknown key 'run'"),
        (["default", "--image", "50"], "WIDTHxHEIGHT"),
        (["lmsys/vicuna-7b-v1.5", "--image", "50x50"], "no vision encoder"),
        (["{stage1}", "--device", "a100"], "'a100-40gb'"),
        (["{stage1}", "--engine", "fsdp"], "'fsdp2'"),
        (["{stage1}", "--devices", "2", "--engine", "single"], "need an engine"),
        (["{stage1}", "--devices", "0"], "--devices"),
        (["{stage1}", "--utilization", "1.5"], "--utilization"),
        (["{stage1}", "--answer-tokens", "999"], "answer tokens"),
        (["{stage1}", "--log", "nowhere.jsonl"], "nowhere.jsonl"),
        (["{stage1}", "optim.learnin_rate=1"], "'learning_rate'"),
        (["{stage2}", "init.from=nowhere/final"], "no recipe beside this one"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], needle: str, capsys: pytest.CaptureFixture[str]) -> None:
    places = {f"{{{stage}}}": str(RECIPES / "siglip_qwen25" / f"{stage}.yaml") for stage in ("stage1", "stage2")}
    assert main(["plan", *[places.get(argument, argument) for argument in arguments]]) == 2
    error = capsys.readouterr().err
    assert needle in error and error.count("\n") == 1


def test_a_stage_may_add_senses(tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    temporal = "{type: attention, attention: {hidden_size: 16, num_attention_heads: 2}}"
    (path := tmp_path / "stage.yaml").write_text(
        f"name: eyes\ninit: {{from: {tiny_model_folder}, video: {{num_frames: 4, temporal: {temporal}}}}}\n"
        "data: {mix: [{path: nowhere.json}]}\ntrain: [{match: 'temporal_encoder.*', train: true}]\noutput_dir: out\n"
    )
    assert main(["plan", str(path), "--video", "2s"]) == 0
    assert "4 frames: 64 tokens" in capsys.readouterr().out


def test_image_rules_may_change_but_not_the_tile(tmp_path: Path) -> None:
    path = RECIPES / "llava_next" / "stage2.yaml"
    with pytest.raises(ConfigError, match="the model takes tile_size"):
        recipe = load_recipe(path, ["init.image.tile_size=[224, 224]"])
        starting_point(recipe, path)
    with pytest.raises(CheckpointError, match="no such model folder"):
        starting_point(load_recipe(path), tmp_path / "alone.yaml")


BAD_CONFIGS: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "not valid JSON"),
    "a list": ([1], "an object was expected"),
    "null": (None, "an object was expected"),
    "no model_type": ({"model_type": None}, "knows no model_type"),
    "an unknown one": ({"model_type": "no-such"}, "knows no model_type 'no-such'"),
    "no heads": ({"num_attention_heads": 0}, "cannot be loaded"),
    "no word": ({"vocab_size": 0}, "vocab_size is 0"),
    "a word for a size": ({"hidden_size": "wide"}, "hidden_size"),
    "a list for a size": ({"hidden_size": [64]}, "hidden_size"),
    "a billion layers": ({"num_hidden_layers": 10**9}, "which is no model's"),
    "an activation": ({"hidden_act": "superrelu"}, "superrelu"),
    "a RoPE": ({"rope_parameters": {"rope_type": "spiral"}}, "spiral"),
    "half a RoPE": ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
    "an attention": ({"_attn_implementation": "owner/kernel"}, "owner/kernel"),
    "odd heads": ({"head_dim": 3}, "cannot be loaded"),
}


OF_LLMS = ("no word", "a RoPE", "half a RoPE", "odd heads", "no model_type", "an unknown one")


@pytest.mark.parametrize(
    ("part", "what"),
    [(part, what) for part in ("llm", "tower") for what in BAD_CONFIGS if part == "llm" or what not in OF_LLMS],
)
def test_a_bad_config_is_one_line(
    part: str, what: str, plain: dict[str, Any], tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever transformers raises on it, of a language model and of a vision tower."""
    folder = Path(shutil.copytree(tiny / part, tmp_path / "bad"))
    change, needle = BAD_CONFIGS[what]
    if isinstance(change, dict):
        change = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(change if isinstance(change, str) else json.dumps(change))
    model = plain["init"]["model"]
    if part == "llm":
        model["llm"]["model_name_or_path"] = str(folder)
    else:
        model["vision"]["vision_tower"] = str(folder)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(plain))
    for target in [str(tmp_path / "recipe.yaml"), *([str(folder)] if part == "llm" and what != "odd heads" else [])]:
        assert main(["plan", target]) == 2, target
        error = capsys.readouterr().err
        assert needle in error and error.count("\n") == 1 and str(folder) in error
