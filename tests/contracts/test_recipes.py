"""Every recipe file is read, and every stage really takes a step, on tiny random parts of the recipe's own classes.

The default recipes, those of BLIP-2 and the tiny pipelines are run whole elsewhere (tests/e2e/test_train_default.py,
tests/training/test_pipeline.py, tests/training/pairs/); a new folder of recipes is covered here without being named.
Recipes that learn from pairs are read here; their steps are those of tests/training/pairs/ and tests/representation/.
"""

from __future__ import annotations

import json
import random
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from polymodal.checkpoints.model_folder import load_model
from polymodal.cli import build_parser
from polymodal.config import QFormerConfig
from polymodal.modeling.dual_encoders.config import Blip2ModelConfig
from polymodal.modeling.meta_device import PUBLISHED_SHAPES
from polymodal.training import Recipe, load_any_recipe, load_recipe, train
from polymodal.training.recipes.contrastive import PairRecipe
from polymodal.training.recipes.pipeline import TrainStage, is_pipeline, load_pipeline

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
FILES = sorted(RECIPES.rglob("*.yaml"))
RUN_ELSEWHERE = {"draw", "default", "tiny", "blip2"}
SINGLE = [path for path in FILES if not is_pipeline(path)]
STAGES = [path for path in SINGLE if isinstance(load_any_recipe(path), Recipe)]
FOLDERS = sorted({path.parent.name for path in STAGES} - RUN_ELSEWHERE)


def test_there_are_recipes() -> None:
    assert {"llava15", "llava_next", "siglip_qwen25"} <= set(FOLDERS) and len(STAGES) >= 11


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_it_is_read_and_says_how_it_is_run(path: Path) -> None:
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"recipes/{path.parent.name}/" in line and "train" in line for line in header)
    if is_pipeline(path):
        assert any(isinstance(stage, TrainStage) for stage in load_pipeline(path).stages.values())
        return
    recipe = load_any_recipe(path)
    assert recipe.train and recipe.output_dir.startswith("runs/")
    if recipe.init.from_folder is not None and path in STAGES and path.parent.name not in RUN_ELSEWHERE:
        made = {f"{load_recipe(other).output_dir}/final" for other in STAGES if other.parent == path.parent}
        assert recipe.init.from_folder in made


def commands() -> list[list[str]]:
    """Every `polymodal ...` and `torchrun ... polymodal.cli ...` line of the recipes' headers and docs/scaling.md."""
    texts = [*(path.read_text().replace("\n# ", "\n") for path in FILES), (ROOT / "docs" / "scaling.md").read_text()]
    found = []
    for text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("srun ")
            if line.startswith("torchrun "):
                line = f"polymodal {line.partition(' -m polymodal.cli ')[2]}"
            if line.startswith(("polymodal plan ", "polymodal train ")):
                found.append(shlex.split(line, comments=True)[1:])
    return found


def test_the_commands_of_headers_and_docs_are_understood() -> None:
    parser = build_parser()
    seen = set()
    for words in commands():
        args = parser.parse_args(words)
        file = ROOT / str(getattr(args, "recipe", None) or args.target)
        assert file.is_file(), words
        overrides = [override for override in args.overrides if "=" in override]
        load_pipeline(file, overrides) if is_pipeline(file) else load_any_recipe(file, overrides)
        seen.add(file)
    assert {path for path in FILES if path.parent.name not in ("default", "tiny")} <= seen


@pytest.mark.parametrize(
    ("name", "values"),
    [
        # LLaVA scripts/v1_5/{pretrain,finetune,finetune_lora}.sh; LLaVA-NeXT scripts/train/direct_finetune_clip.sh
        ("llava15/stage1", {"lr": 1e-3, "global": 256, "clip": 1.0, "length": 2048, "projector": 1e-3}),
        ("llava15/stage2", {"lr": 2e-5, "global": 128, "clip": 1.0, "length": 2048, "projector": 2e-5}),
        ("llava15/stage2_lora", {"lr": 2e-5, "global": 128, "r": 128, "alpha": 256, "dropout": 0.05, "lora": 2e-4}),
        ("llava_next/stage2", {"lr": 1e-5, "global": 128, "tower": 2e-6, "projector": 1e-5}),
    ],
)
def test_published_hyper_parameters(name: str, values: dict[str, float]) -> None:
    recipe = load_recipe(RECIPES / f"{name}.yaml")
    rates = {rule.match: rule.learning_rate or recipe.optim.learning_rate for rule in recipe.train}
    lora = recipe.lora
    found = {
        "lr": recipe.optim.learning_rate,
        "global": recipe.batch.global_size,
        "clip": recipe.optim.clip,
        "length": recipe.data.max_length,
        "projector": rates.get("projector.*"),
        "tower": rates.get("vision_encoder.*"),
    }
    if lora is not None:
        found |= {"r": lora.lora_r, "alpha": lora.lora_alpha, "dropout": lora.lora_dropout, "lora": lora.learning_rate}
    assert {key: found[key] for key in values} == values
    assert (recipe.optim.schedule, recipe.optim.warmup, recipe.optim.weight_decay) == ("cosine", 0.03, 0.0)
    assert recipe.run.epochs == 1 and recipe.optim.betas == (0.9, 0.999)


def test_published_hyper_parameters_of_blip2() -> None:
    """Li et al. 2023, arXiv:2301.12597, section 3.4, and LAVIS lavis/projects/blip2/train/pretrain_stage{1,2}.yaml."""
    first, second = (load_any_recipe(RECIPES / "blip2" / f"paper_stage{number}.yaml") for number in (1, 2))
    assert isinstance(first, PairRecipe) and isinstance(second, Recipe)
    for recipe, steps, pairs, lowest in ((first, 250_000, 1680, 1e-5), (second, 80_000, 1920, 5e-5)):
        optim = recipe.optim
        assert (optim.learning_rate, optim.betas, optim.weight_decay, optim.schedule) == (
            1e-4,
            (0.9, 0.98),
            0.05,
            "cosine",
        )
        assert recipe.run.max_steps == steps and round(optim.warmup * steps) == 2000
        assert optim.min_lr_ratio * optim.learning_rate == pytest.approx(lowest)
        assert recipe.batch.global_size == pairs
    start, then = first.init.model, second.init.model
    assert isinstance(start, Blip2ModelConfig) and then is not None and then.projector.qformer is not None
    assert start.bert is not None and start.qformer == QFormerConfig() and start.projection_dim == 256
    assert then.projector.qformer == start.qformer and then.image == start.image
    assert then.vision is not None and then.vision.model_dump(exclude={"fused"}) == start.vision.model_dump()
    assert (start.qformer.num_query_tokens, first.text.max_length) == (32, 32)
    assert (first.augment.type, first.augment.scale) == ("crop_flip", (0.5, 1.0))
    assert then.template.chat_template == "plain" and [rule.match for rule in second.train] == ["projector.*"]


def test_the_small_stages_of_blip2_fit_each_other() -> None:
    first, second = (load_any_recipe(RECIPES / "blip2" / f"stage{number}.yaml") for number in (1, 2))
    assert isinstance(first, PairRecipe) and isinstance(second, Recipe)
    start, then = first.init.model, second.init.model
    assert isinstance(start, Blip2ModelConfig) and then is not None and then.projector.qformer is not None
    fresh_only = {"initializer_range"}
    assert start.qformer.model_dump(exclude=fresh_only) == then.projector.qformer.model_dump(exclude=fresh_only)
    assert then.vision is not None and then.vision.model_dump(exclude={"fused"}) == start.vision.model_dump()
    assert (start.image, start.norm) == (then.image, then.projector.norm)
    assert then.projector.pretrained == f"{first.output_dir}/final"


def write_parts(folder: Path, tower: str, llm: str) -> None:
    """Tiny random parts of the same classes: as many tower layers, patches and positions, few channels."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    shape = {**PUBLISHED_SHAPES[tower], "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    tower_class = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}
    model_class = getattr(transformers, tower_class[shape.pop("model_type")])
    model_class(model_class.config_class(**shape)).save_pretrained(folder / "vision")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.save_pretrained(folder / "llm")
    small = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.AutoConfig.for_model(**{**PUBLISHED_SHAPES[llm], **small, **heads})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "llm")


def write_data(folder: Path) -> Path:
    """Four rows as LLaVA writes them: images of several shapes, and one without; captions.json lacks that one."""
    from PIL import Image

    chance = random.Random(0)
    rows: list[dict[str, Any]] = []
    for number, size in enumerate([(60, 40), (40, 90), (50, 50)]):
        Image.new("RGB", size, tuple(chance.randrange(256) for _ in range(3))).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"Image {number}."}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "captions.json").write_text(json.dumps(rows))
    turns = [{"from": "human", "value": "Hello!"}, {"from": "gpt", "value": "Hello, what shall we look at?"}]
    rows.append({"id": "text", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


@pytest.mark.parametrize("name", FOLDERS)
def test_every_stage_takes_a_step(name: str, tmp_path: Path) -> None:
    data = write_data(tmp_path)
    stages = [path for path in STAGES if path.parent.name == name]
    first = next(path for path in stages if load_recipe(path).init.model is not None)
    plain = yaml.safe_load(first.read_text())["init"]["model"]
    write_parts(tmp_path, plain["vision"]["vision_tower"], plain["llm"]["model_name_or_path"])
    common = [
        f"data.mix=[{{path: {data}}}]",
        "batch.global_size=4",
        "batch.micro_size=2",
        "run.max_steps=1",
        "run.log_every=1",
        "run.precision=fp32",
        "run.engine=auto",
        "run.epochs=9",
    ]
    parts = [
        f"init.model.vision.vision_tower={tmp_path / 'vision'}",
        f"init.model.llm.model_name_or_path={tmp_path / 'llm'}",
        "init.model.llm.dtype=float32",
    ]
    captions = f"data.mix=[{{path: {tmp_path / 'captions.json'}}}]"  # the plain template takes images only
    train(load_recipe(first, [*common, captions, *parts, f"output_dir={tmp_path / 'first'}"]))
    for path in stages:
        if path == first:
            continue
        out = tmp_path / path.stem
        final = train(load_recipe(path, [*common, f"init.from={tmp_path / 'first' / 'final'}", f"output_dir={out}"]))
        loaded = load_model(final)
        recipe = load_recipe(path)
        assert [entry["stage"] for entry in loaded.history] == [load_recipe(first).name, recipe.name]
        if recipe.init.image is not None:
            assert loaded.config.image == recipe.init.image
            assert (loaded.model.image_newline is not None) == (
                recipe.init.image.mm_patch_merge_type == "spatial_unpad"
            )
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert lines[0]["loss"] > 0 and lines[0]["grad_norm"] > 0
