"""Turn a published model into a model folder of ours: safetensors, prompt and image rules in one place.

What this is for above all: folders of the original LLaVA repository, which leave out the prompt and the tower, are
often pickles, and may hold only a projector or a LoRA. Examples:
  polymodal convert llava-v1.5-7b my-llava --allow-pickle --dtype float16
  polymodal convert my-lora my-llava --base lmsys/vicuna-7b-v1.5 --allow-pickle
  polymodal convert llava-hf/llava-1.5-7b-hf my-llava
"""

import argparse
from pathlib import Path

from polymodal.cli import common
from polymodal.errors import CheckpointError, ConfigError
from polymodal.utils.files import check_writable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("source", metavar="FOLDER", help="a LLaVA-repository folder, a published folder, or a hub id")
    parser.add_argument("target", metavar="DST", type=Path, help="the model folder to write")
    parser.add_argument("--force", action="store_true", help="replace DST where it is there")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the weights (%(default)s)"
    )
    group = parser.add_argument_group("folders of the LLaVA repository")
    group.add_argument("--base", metavar="MODEL", help="the language model of a LoRA or projector: a folder or hub id")
    group.add_argument("--vision-tower", metavar="MODEL", help="the tower, in place of the one that the folder names")
    group.add_argument("--template", metavar="NAME", help="the chat template, such as vicuna (default: found out)")
    group.add_argument(
        "--allow-pickle", action="store_true", help="open pickles of this folder; only tensors are read from them"
    )


def run(args: argparse.Namespace) -> int:
    """Load, then write."""
    if args.target.exists() and not args.force:
        raise ConfigError(f"{args.target}: is there already; choose another folder, or replace it with --force")
    check_writable(args.target.parent, "DST in ", folder=True)
    from polymodal.checkpoints.locate import find_model
    from polymodal.checkpoints.model_folder import save_model
    from polymodal.interop.huggingface.load import load_hf
    from polymodal.interop.llava import load_llava_repo
    from polymodal.safety.model_folder import check_folder

    report = check_folder(find_model(args.source), allow_pickle=args.allow_pickle)
    given = {name: value for name in ("base", "vision_tower", "template") if (value := getattr(args, name))}
    if report.kind == "llava":
        loaded = load_llava_repo(report, dtype=args.dtype, **given)
    elif given or args.allow_pickle:
        flag = next(iter(given), "allow_pickle").replace("_", "-")
        raise ConfigError(f"--{flag} is for folders of the LLaVA repository, and {args.source} is none")
    elif report.kind == "huggingface":
        loaded = load_hf(report, dtype=args.dtype, source=args.source)
    else:
        raise CheckpointError(
            f"{args.source}: neither a folder of the LLaVA repository nor a published model that is composed here; "
            "`polymodal describe` says what it is"
        )
    save_model(args.target, loaded.model, loaded.config, loaded.tokenizer, history=loaded.history, replace=args.force)
    common.note(f"polymodal: {args.target} is written; look at it with `polymodal describe {args.target}`")
    return 0
