"""Begin a model of your own: recipes for both stages and their pipeline, written into a folder, ready to be changed.

Image rules, chat template and widths are read from the parts; rates are those that LLaVA-1.5 published. Example:
  polymodal init my_vlm --vision openai/clip-vit-base-patch32 --llm HuggingFaceTB/SmolLM2-135M-Instruct \
    --data rows.json --image-root pictures
"""

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.errors import ConfigError

if TYPE_CHECKING:
    from polymodal.config import ModelConfig

STEPS = 100
"""Steps that an epoch of few rows should have at least; more rows have steps of the published size."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="a new folder")
    add("--vision", required=True, action="append", metavar="NAME",
        help="a vision tower: a folder, a hub id, or efficientnet_lite0; again for one beside it")  # fmt: skip
    add("--llm", required=True, metavar="NAME", help="a language model: a folder, a hub id, or smollm2")
    add("--data", required=True, metavar="FILE", help="conversations in any form that `polymodal data check` reads")
    add("--captions", metavar="FILE", help="other data for the first stage (those of --data)")
    add("--image-root", metavar="FOLDER", help="the folder that image paths start from (that of the data)")
    add("--projector", default="mlp2x_gelu", metavar="TYPE", help="linear, mlp2x_gelu, qformer, ... (%(default)s)")
    add("--resolution", choices=("fixed", "slices", "anyres", "native"), default="fixed",
        help="one tile, several, or the image's own shape (fixed)")  # fmt: skip
    add("--template", metavar="NAME", help="a chat template (the tokenizer's own, or else vicuna)")
    add("--tune", choices=("lora", "full"), default="lora", help="how the language model learns in stage 2 (lora)")


def run(args: argparse.Namespace) -> int:
    """Write the files and say what comes next."""
    from polymodal.backends.compose import configure
    from polymodal.data.load import iter_rows
    from polymodal.modeling.language_model import quieten_transformers
    from polymodal.modeling.meta_device import llm_settings, tokens_per_tile
    from polymodal.processing.chat_template.presets import template_source
    from polymodal.training.recipes.keys import schema
    from polymodal.utils.files import atomic_folder, home_path, whole_path, write_text

    quieten_transformers()
    if args.folder.exists():
        raise ConfigError(f"{args.folder}: is there already; name a new folder")
    root = None if args.image_root is None else whole_path(args.image_root)
    if root is not None and not Path(root).is_dir():
        raise ConfigError(f"--image-root {args.image_root}: no such folder")
    config, tokenizer = configure(
        [whole_path(name) for name in args.vision],
        args.projector,
        whole_path(args.llm),
        resolution=args.resolution,
        template=args.template,
    )
    template_source(tokenizer, config.template.chat_template)
    llm_settings(config.llm)
    tokens_per_tile(config)
    files = {"stage1": args.captions or args.data, "stage2": args.data}
    rows = {stage: sum(1 for _ in iter_rows(home_path(file), None if root is None else Path(root)))
            for stage, file in files.items()}  # fmt: skip
    sources = {stage: {"path": whole_path(file), **({} if root is None else {"image_root": root})}
               for stage, file in files.items()}  # fmt: skip
    texts = _texts(args, config, sources, rows)
    with atomic_folder(args.folder) as work:
        for name, text in texts.items():
            write_text(work / name, text)
        write_text(work / "schema.json", json.dumps(schema(), ensure_ascii=False) + "\n")
    print(
        f"{args.folder}: stage1.yaml, stage2.yaml and pipeline.yaml for {rows['stage1']:,} and {rows['stage2']:,} rows"
    )
    print("next:")
    print(f"  polymodal check {args.folder}/pipeline.yaml")
    print(f"  polymodal train {args.folder}/pipeline.yaml")
    print(f"  polymodal chat --model {args.folder}/run/export")
    return 0


def _texts(
    args: argparse.Namespace, config: "ModelConfig", sources: dict[str, Any], rows: dict[str, int]
) -> dict[str, str]:
    """The three files."""
    from polymodal.training.quick import STAGES

    name, run = args.folder.name, args.folder / "run"
    model = config.model_dump(mode="json", exclude_defaults=True)
    align, tune = STAGES["align"], STAGES["lora" if args.tune == "lora" else "tune"]
    newline = []
    if config.image is not None and config.image.mm_patch_merge_type == "spatial_unpad":
        newline = [{"match": "image_newline", "train": True}]
    batch1, batch2 = _batch(rows["stage1"], 256), _batch(rows["stage2"], 128)
    stage1 = {
        "name": f"{name}-stage1", "init": {"model": model},
        "data": {"template": "plain", "on_error": "skip", "mix": [sources["stage1"]]},
        "train": [*align["train"], *newline], "optim": align["optim"], "batch": batch1[0],
        "run": {"epochs": batch1[1]}, "output_dir": str(run / "stage1"),
    }  # fmt: skip
    stage2 = {
        "name": f"{name}-stage2", "init": {"from": str(run / "stage1" / "final")}, "data": {"mix": [sources["stage2"]]},
        "train": [*tune["train"], *newline], **({"lora": tune["lora"]} if "lora" in tune else {}),
        "optim": tune["optim"], "batch": batch2[0], "run": {"epochs": batch2[1]}, "output_dir": str(run / "stage2"),
    }  # fmt: skip
    pipeline = {
        "name": name, "output_dir": str(run),
        "stages": {**{stage: {"recipe": f"{stage}.yaml"} for stage in sources}, "export": {"export": "stage2"}},
    }  # fmt: skip
    every = "`polymodal config` prints every key, `polymodal check` what is wrong with this file"
    of_stage1 = {
        "init": "the parts; image rules are those of the tower",
        "data": "the plain template is image and caption; rows with more than one answer are left out and counted",
        "optim": "LLaVA-1.5's rate for a projector alone (arXiv:2310.03744)",
        "batch": "256 was published, for 558,000 captions; fewer rows make smaller steps",
    }
    of_stage2 = {
        "init": "the model that stage 1 leaves",
        "optim": "LLaVA-1.5's: 2e-5, and 2e-4 for adapters (arXiv:2310.03744)",
        "batch": "128 was published, for 665,000 conversations; fewer rows make smaller steps",
    }
    title1 = f"{name}, stage 1: alignment. Only the projector is trained, on captions."
    title2 = f"{name}, stage 2: instruction tuning of projector and language model."
    title3 = f"{name}: both stages, then one folder that needs nothing else."
    return {
        "stage1.yaml": _yaml(stage1, title1, every, of_stage1),
        "stage2.yaml": _yaml(stage2, title2, every, of_stage2),
        "pipeline.yaml": _yaml(pipeline, title3, f"polymodal train {args.folder}/pipeline.yaml", {}),
    }


def _batch(rows: int, published: int) -> tuple[dict[str, Any], float]:
    """Samples of a step, and epochs."""
    size = max(4, min(published, rows // STEPS))
    epochs = min(10, max(1, math.ceil(STEPS / 2 * size / max(1, rows))))
    return {"global_size": size, "packing": "pack"}, epochs


def _yaml(plain: dict[str, Any], title: str, more: str, remarks: dict[str, str]) -> str:
    """Plain data as YAML with a remark above a section."""
    import yaml

    lines = ["# yaml-language-server: $schema=schema.json", f"# {title}", f"# {more}"]
    for key, value in plain.items():
        lines += [f"# {remarks[key]}"] if key in remarks else []
        style = None if isinstance(value, dict | list) else False
        lines.append(
            yaml.safe_dump(
                {key: value}, sort_keys=False, allow_unicode=True, width=110, default_flow_style=style
            ).rstrip()
        )
    return "\n".join(lines) + "\n"
