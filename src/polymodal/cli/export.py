"""Write a model in a form that other programs open, and prove that it is the same model.

  polymodal export MODEL DST                      a stock class of transformers, which vLLM loads too
  polymodal export MODEL DST --verify             the same, compared with the model on prompts and images
  polymodal export MODEL DST --format gguf        two files for llama.cpp: the language model, and the rest (mmproj)
  polymodal export MODEL DST --format folder      one folder of ours that needs nothing else

LoRA adapters are added to the weights; --keep-adapter writes them beside the weights instead. What a stock class cannot
express is refused with the reasons. --verify writes DST/parity.json and ends with status 1 where the two differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.cli import common
from polymodal.errors import ConfigError, PolymodalError
from polymodal.utils.files import check_writable, home_path

if TYPE_CHECKING:
    import torch

    from polymodal.checkpoints.model_folder import Loaded
    from polymodal.verify.side_by_side import Parity, Probe

DTYPES = ("float32", "bfloat16", "float16", "q8_0")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("model", metavar="MODEL", help='"default", a model folder, or a hub id')
    parser.add_argument("dst", metavar="DST", help="the folder to write")
    parser.add_argument("--format", choices=tuple(FORMATS), default="hf", help="default: %(default)s")
    adapter = parser.add_mutually_exclusive_group()
    adapter.add_argument("--merge-lora", action="store_true", help="add LoRA adapters to the weights (default)")
    adapter.add_argument("--keep-adapter", action="store_true", help="write LoRA adapters beside the weights")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights on disk (default: as in memory; q8_0: gguf)")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, metavar="GB", help="largest file (default: 5)")
    parser.add_argument("--verify", action="store_true", help="compare what was written with the model")
    parser.add_argument(
        "--image", "--picture", action="append", default=[], metavar="FILE", help="with --verify: ask about it too"
    )
    parser.add_argument("--questions", metavar="FILE", help="with --verify: ask the questions of this data file too")
    parser.add_argument(
        "--limit", type=int, default=20, metavar="N", help="of --questions: this many, from all over the file (20)"
    )
    common.add_part_arguments(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace DST where it is there")


def run(args: argparse.Namespace) -> int:
    """Open the model, write it, compare it where asked; 1 where the comparison fails."""
    dst = home_path(args.dst)
    if (args.image or args.questions) and not args.verify:
        raise ConfigError("--image and --questions are for --verify")
    if args.limit < 1:
        raise ConfigError(f"--limit {args.limit}: must be at least 1")
    if not args.max_shard_gb > 0:
        raise ConfigError(f"--max-shard-gb {args.max_shard_gb}: must be more than 0")
    missing = next((path for path in args.image if not Path(path).is_file()), None)
    if missing is not None:
        raise ConfigError(f"--image {missing}: no such file")
    if dst.exists() and not args.overwrite:
        raise PolymodalError(f"{dst}: is there already; choose another folder or add --overwrite")
    check_writable(dst.parent, "DST in ", folder=True)
    if args.dtype == "q8_0" and args.format != "gguf":
        raise ConfigError("--dtype q8_0 is for --format gguf")
    return FORMATS[args.format](args, dst, _asked(args))


def _hf(args: argparse.Namespace, dst: Path, more: list[Probe]) -> int:
    from polymodal.interop.huggingface.export import export_hf
    from polymodal.safety.model_folder import check_folder
    from polymodal.verify.compare import verify_export

    loaded, options = _open(args)
    done = export_hf(
        loaded,
        dst,
        merge_lora=not args.keep_adapter,
        dtype=_dtype(args.dtype),
        max_shard_bytes=int(args.max_shard_gb * 1e9),
        **options,
    )
    _tell(done.remarks)
    print(f"{dst}: {done.family}, {done.weight_bytes / 1e6:,.1f} MB of weights, <image> is token {done.image_token_id}")
    if not args.verify:
        return 0
    source = options["licences"]
    published = source if check_folder(source).kind == "huggingface" else None
    return _outcome(verify_export(loaded, dst, more=more, published=published))


def _gguf(args: argparse.Namespace, dst: Path, more: list[Probe]) -> int:
    from polymodal.interop.gguf.export import export_gguf
    from polymodal.verify.llamacpp import verify_gguf

    if args.keep_adapter:
        raise ConfigError("--keep-adapter: GGUF holds no adapter beside the weights; leave it out, and it is added")
    loaded, options = _open(args)
    done = export_gguf(loaded, dst, kind=args.dtype, **options)
    _tell(done.remarks)
    print(f"{dst}: {done.model.name} and {done.mmproj.name}, {done.weight_bytes / 1e6:,.1f} MB of weights")
    return _outcome(verify_gguf(loaded, dst, more=more)) if args.verify else 0


def _asked(args: argparse.Namespace) -> list[Probe]:
    """What the user wants asked besides the usual conversations."""
    from polymodal.data.load import load_records
    from polymodal.verify.side_by_side import Probe, image_probes

    probes = image_probes([Path(path) for path in args.image])
    if args.questions is not None:
        records = load_records(Path(args.questions))
        step = max(1, len(records) // args.limit)
        for record in records[::step][: args.limit]:
            messages = record.messages[:-1] if record.messages[-1].role == "assistant" else record.messages
            probes.append(Probe(record.id, tuple(messages)))
    return probes


def _tell(remarks: Iterable[str]) -> None:
    for remark in remarks:
        common.note(f"polymodal: {remark}")


def _outcome(parity: Parity) -> int:
    if parity.not_run:
        _tell([f"not installed, so not compared: {', '.join(parity.not_run)}"])
    print(common.printable(parity.line))
    return 0 if parity.passed else 1


def _polymodal(args: argparse.Namespace, dst: Path, _more: list[Probe]) -> int:
    from polymodal.checkpoints.model_folder import write_whole

    if args.keep_adapter:
        raise ConfigError("--keep-adapter: a folder of ours keeps its adapter already; copy the folder")
    if args.verify:
        raise ConfigError("--verify compares with other programs; a folder of ours is checked whenever it is opened")
    loaded, _ = _open(args)
    write_whole(loaded, dst, dtype=_dtype(args.dtype), replace=args.overwrite)
    print(f"{dst}: a whole model of polymodal")
    return 0


FORMATS = {"hf": _hf, "gguf": _gguf, "folder": _polymodal, "polymodal": _polymodal}
"""Each format and what writes it."""


def _open(args: argparse.Namespace) -> tuple[Loaded, dict[str, Any]]:
    """Load a model of ours or a published one; and the options that all formats share."""
    from polymodal.checkpoints.locate import find_model
    from polymodal.interop.open import open_model

    loaded = open_model(args.model, parts=common.parts(args))
    return loaded, {"licences": find_model(args.model), "replace": args.overwrite}


def _dtype(name: str | None) -> torch.dtype | None:
    import torch

    return None if name is None else getattr(torch, name)
