"""Say what a model folder holds: its parts and their sizes, special tokens, chat template, image rules, history.

Reads configurations and the headers of the weights only; loads and runs nothing. Examples:
  polymodal describe default
  polymodal describe ./my-model --json
  polymodal describe llava-hf/llava-1.5-7b-hf
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from polymodal.cli.common import (
    BINARY,
    BOLD,
    DECIMAL,
    DIM,
    RESET,
    aligned,
    colour_wanted,
    one_line,
    print_json,
    printable,
    scaled,
)
from polymodal.errors import ConfigError, PolymodalError
from polymodal.media_plan import Size

if TYPE_CHECKING:
    from polymodal.interop.describe import Description, Part

SHOWN_LINES = 6
"""Lines of the chat template on the page."""
SHOWN_KEYS = ("steps", "samples", "trained_tokens", "loss")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("model", metavar="FOLDER", help="a model folder, ours or Hugging Face's, a hub id, or default")
    parser.add_argument("--template", action="store_true", help="print the whole chat template and nothing else")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Describe and print."""
    from polymodal.interop.describe import describe

    found = describe(args.model)
    if args.template:
        if found.template is None:
            raise ConfigError(f"{args.model}: there is no chat template")
        print(printable(found.template["text"]))
        return 0
    tokens = _visual_tokens(found)
    if args.json:
        print_json({**found.plain(), "visual_tokens": tokens})
    else:
        print(_page(found, tokens, colour=colour_wanted("auto", sys.stdout)))
    return 0


def _page(found: Description, tokens: list[dict[str, Any]], *, colour: bool) -> str:
    """Lay a description out for a terminal."""
    bold, dim, reset = (BOLD, DIM, RESET) if colour else ("", "", "")
    lines = [f"{bold}{one_line(found.name)}{reset}  {one_line(found.kind)}", f"{dim}{one_line(found.folder)}{reset}"]
    lines += ["", *_tree(found, bold, dim, reset), ""]
    lines.append(aligned([(name, one_line(text)) for name, text in _facts(found, tokens)], dim, reset))
    if found.template is not None:
        text = found.template["text"].splitlines()
        more = f", the first {SHOWN_LINES} (--template prints all)" if len(text) > SHOWN_LINES else ""
        count = f"{len(text)} line{'s' * (len(text) != 1)}"
        said = f"from {one_line(found.template['source'])}, sha256 {found.template['sha256'][:16]}..., {count}{more}"
        lines += ["", f"{dim}chat template{reset}  {said}"]
        lines += [f"  {printable(line)[:110]}{'...' if len(line) > 110 else ''}" for line in text[:SHOWN_LINES]]
    return "\n".join(lines)


def _facts(found: Description, tokens: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """What there is to say of a model besides its parts and its template, in rows."""
    special, contract = [], ""
    for role, token in found.special_tokens.items():
        place = "" if token["id"] is None else f" ({token['id']})"
        special.append(f"{role.removesuffix('_token')} {token['text']!r}{place}")
    if found.contract is not None:
        holds = "holds" if found.contract["broken"] is None else f"BROKEN: {found.contract['broken']}"
        contract = f"{holds} (sha256 {str(found.contract['sha256'])[:16]}...)"
    rows = [
        ("context", "" if found.context is None else f"{found.context:,} positions"),
        ("vocabulary", "" if found.vocabulary is None else f"{found.vocabulary:,} tokens"),
        ("special", ", ".join(special)),
        *_image_rows(found.images),
    ]
    for entry in tokens:
        height, width = entry["image"]
        tiles = f"{entry['tiles']} tile{'s' * (entry['tiles'] != 1)}"
        rows.append((f"  {width}x{height}", f"{entry['tokens']:,} tokens in {tiles}"))
    rows += _sense_rows(found)
    for number, entry in enumerate(found.history, 1):
        rows.append(("history" if number == 1 else "", f"{number}. {_stage(entry)}"))
    rows += [("contract", contract), ("licence", found.licence or "not said")]
    rows += [("note", note) for note in found.notes]
    return [(name, text) for name, text in rows if text]


def _tree(found: Description, bold: str, dim: str, reset: str) -> list[str]:
    """The parts with their sizes, in columns."""
    rows: list[tuple[int, Part]] = []
    for part in found.parts:
        rows += [(0, part), *((1, child) for child in part.children)]
    if not rows:
        return ["no weights here"]
    width = max(2 * level + len(one_line(part.name)) for level, part in rows)
    lines = [f"{dim}{'part'.ljust(width)}  parameters        size{reset}"]
    for level, part in rows:
        name = ("  " * level + one_line(part.name)).ljust(width)
        origin = f"from {part.source}" if part.source and part.source != part.kind else ""
        words = "; ".join(filter(None, (" ".join(part.dtypes), part.kind, origin)))
        style = dim if level else bold
        lines.append(f"{style}{name}{reset}  {_sizes(part.parameters, part.num_bytes)}  {one_line(words)}".rstrip())
    return [*lines, f"{bold}{'all'.ljust(width)}{reset}  {_sizes(found.parameters, found.num_bytes)}"]


def _sizes(parameters: int | None, num_bytes: int | None) -> str:
    count = "not known" if parameters is None else scaled(parameters, DECIMAL)
    return f"{count:>10}  {'' if num_bytes is None else scaled(num_bytes, BINARY):>10}"


def _image_rows(rules: dict[str, Any]) -> list[tuple[str, str]]:
    """The image rules in two lines; none without rules."""
    if not rules or "not ours" in rules:
        return [("images", rules.get("not ours", ""))]
    height, width = rules["tile_size"]
    words = [f"{rules['image_aspect_ratio']} to {width}x{height}"]
    if rules["image_aspect_ratio"] == "native":
        most = rules.get("native_max_pixels")
        words = [f"in their own shape, up to {f'{most:,}' if most else f'four times {width}x{height}'} pixels"]
    if "resize_short_side" in rules:
        words.append(f"short side {rules['resize_short_side']} first")
    if rules.get("image_grid_pinpoints"):
        words.append(f"{len(rules['image_grid_pinpoints'])} canvases, {rules['mm_patch_merge_type']}")
    if "max_tiles" in rules:
        words.append(f"up to {rules['max_tiles']} tiles{' and a thumbnail' * bool(rules.get('thumbnail'))}")
    words.append(rules["resample"])
    mean, std = (", ".join(f"{number:.4g}" for number in rules[key]) for key in ("image_mean", "image_std"))
    return [("images", ", ".join(words)), ("", f"mean {mean}; deviation {std}")]


def _sense_rows(found: Description) -> list[tuple[str, str]]:
    """How videos and sounds are taken, a line each; empty where they are not."""
    seen, heard, videos, sounds = found.videos, found.sounds, "", ""
    if seen:
        videos = f"{seen['num_frames']} frames" if seen["fps"] is None else f"{seen['fps']:g} frames a second"
        videos += f", {seen['max_frames']} at most, {(seen['temporal'] or {'type': 'side by side'})['type']}"
    if heard:
        videos += " and sound" * bool(seen and seen["audio"])
        sounds = f"{heard['stack']} frames of the encoder a token, {heard['max_seconds']:g} s at most"
    return [("videos", videos), ("sounds", sounds)]


def _visual_tokens(found: Description) -> list[dict[str, Any]]:
    """How many positions images of some sizes take; empty where that cannot be found out from configurations."""
    if not found.images or "not ours" in found.images:
        return []
    from polymodal.interop.describe import EXAMPLES, visual_tokens
    from polymodal.modeling.language_model import quieten_transformers
    from polymodal.modeling.meta_device import tokens_per_tile
    from polymodal.planning.sample import plan_media
    from polymodal.planning.starting_point import model_config

    sizes = tuple(Size(height, width) for height, width in EXAMPLES)
    quieten_transformers()
    try:
        if found.contract is None:
            counts = visual_tokens(found.report, sizes)
        else:
            config = model_config(found.folder)
            media = plan_media(sizes, (), (), (), config, tokens_per_tile(config), None)
            counts = [(plan.num_tokens, plan.num_tiles) for _, plan in media.images]
    except PolymodalError:
        return []
    return [
        {"image": [size.height, size.width], "tokens": tokens, "tiles": tiles}
        for size, (tokens, tiles) in zip(sizes, counts, strict=False)
    ]


def _stage(entry: dict[str, Any]) -> str:
    """One stage of the history in a line."""
    name = str(entry.get("stage") or entry.get("name") or "stage")
    facts = []
    if entry.get("source"):
        facts.append(f"from {entry['source']}")
    if entry.get("trained"):
        facts.append("trained " + ", ".join(map(str, entry["trained"])))
    for key in SHOWN_KEYS:
        value = entry.get(key)
        if isinstance(value, int | float):
            facts.append(f"{key.replace('_', ' ')} {value:,}" if isinstance(value, int) else f"{key} {value:.4g}")
    return f"{name}: {'; '.join(facts)}" if facts else name
