"""Run a training recipe, or a pipeline of stages: one YAML is one complete run.

Overrides are `section.key=value`. Example: polymodal train recipes/default/stage1.yaml optim.learning_rate=1e-3
Overrides follow the recipe, flags come before it or after them. A run that was interrupted goes on where it was when
the same command is given again. Several processes:
torchrun --nproc-per-node 8 -m polymodal.cli train RECIPE run.engine=fsdp2
"""

import argparse
import os
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a recipe, such as recipes/default/stage1.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the recipe's")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest complete checkpoint in output_dir (the default, unless the recipe says never)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="go on from a checkpoint although the recipe or the data changed; of a pipeline, do again a finished "
        "stage whose settings changed, and all after it",
    )
    parser.add_argument("--dry-run", action="store_true", help="check it as `polymodal check`, print it resolved, stop")


def run(args: argparse.Namespace) -> int:
    """Check and resolve the recipe, then print or run it."""
    from polymodal.cli.check import looked_over
    from polymodal.training import train
    from polymodal.training.recipes.load import dump_recipe, load_any_recipe
    from polymodal.training.recipes.pipeline import dump_pipeline, is_pipeline, load_pipeline

    if os.environ.get("RANK", "0") == "0" and not looked_over(args.recipe, args.overrides):
        return 2
    if is_pipeline(args.recipe):
        pipeline = load_pipeline(args.recipe, args.overrides)
        if args.dry_run:
            print(dump_pipeline(pipeline))
            return 0
        from polymodal.training.pipeline import run_pipeline

        done = run_pipeline(pipeline, force=args.force)
    else:
        recipe = load_any_recipe(args.recipe, [*args.overrides, *(["run.resume=auto"] if args.resume else [])])
        if args.dry_run:
            print(dump_recipe(recipe), end="")
            return 0
        done = train(recipe, force=args.force)
    from polymodal.training.process_group import leave_world

    leave_world()
    if os.environ.get("RANK", "0") == "0":
        print(done)
    return 0
