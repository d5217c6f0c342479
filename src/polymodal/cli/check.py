"""Say what is wrong with a recipe or pipeline: everything at once, before a weight is read.

`polymodal train` does the same first. Example: polymodal check recipes/default/stage1.yaml optim.learning_rate=1e-3
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a recipe or pipeline, such as stage1.yaml")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values that replace the recipe's")


def run(args: argparse.Namespace) -> int:
    """Look the file over."""
    if not looked_over(args.recipe, args.overrides):
        return 2
    print(f"{args.recipe}: nothing is wrong with it")
    return 0


def looked_over(recipe: Path, overrides: list[str]) -> bool:
    """Whether a file may be trained; says what is wrong with it."""
    from polymodal.cli.common import note, one_line, report
    from polymodal.errors import ConfigError
    from polymodal.modeling.language_model import quieten_transformers
    from polymodal.planning.check import check

    quieten_transformers()
    found = check(recipe, overrides)
    for remark in found.remarks:
        note(f"polymodal: {one_line(remark)}")
    for error in found.errors:
        report(ConfigError(error))
    return not found.errors
