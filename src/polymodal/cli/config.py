"""Print every key of a recipe: its type, its default, and what it is for.

A section is named by its path, after the kind of file where that is not a stage of a language model. Examples:
  polymodal config
  polymodal config optim
  polymodal config init.model.image
  polymodal config pairs.batch
  polymodal config --schema > recipe.schema.json
"""

import argparse
import json
import shutil
import textwrap

from polymodal.errors import unknown_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("section", nargs="?", metavar="SECTION", help="only this part, such as optim or data.mix")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--schema", action="store_true", help="print the JSON Schema of recipe files, for editors")
    form.add_argument("--markdown", action="store_true", help="print the page docs/configuration.md")
    form.add_argument("--json", action="store_true", help="print the keys as JSON")


def run(args: argparse.Namespace) -> int:
    """Print the keys."""
    from polymodal.training.recipes import keys as reference

    if args.schema:
        print(json.dumps(reference.schema(), indent=2, ensure_ascii=False))
        return 0
    if args.markdown:
        print(reference.page(), end="")
        return 0
    given = args.section or ""
    first, _, rest = given.partition(".")
    kind, wanted = (first, rest) if first in reference.FILES and first != "tokenizer" else ("stage", given)
    if first == "tokenizer":  # a kind of file, whose own section has the same name
        kind, wanted = "tokenizer", rest or ""
    found = list(reference.keys(kind))
    chosen = [key for key in found if not wanted or f"{key.path}.".startswith(f"{wanted}.")]
    if not chosen:
        raise unknown_name("section", given, [*reference.FILES, *(key.path for key in found)])
    if args.json:
        print(json.dumps([vars(key) for key in chosen], indent=2, ensure_ascii=False))
        return 0
    width = max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    for key in chosen:
        default = "none unless given" if key.section and key.default == "null" else f"default: {key.default}"
        print(f"{key.path}: {key.type} ({default.removeprefix('default: ') if 'required' in default else default})")
        for line in textwrap.wrap(key.sentence, width - 4):
            print(f"    {line}")
    return 0
