"""Run a training recipe: one YAML is one complete run.

Overrides are `section.key=value`. Example: polymodal train recipes/default/stage1.yaml optim.learning_rate=1e-3
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a recipe, such as recipes/default/stage1.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the recipe's")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")


def run(args: argparse.Namespace) -> int:
    """Resolve the recipe, then print or run it."""
    from polymodal.training import train
    from polymodal.training.recipe import dump_recipe, load_recipe

    recipe = load_recipe(args.recipe, args.overrides)
    if args.dry_run:
        print(dump_recipe(recipe), end="")
        return 0
    print(train(recipe))
    return 0
