"""The house in figures: its size, who documents what, and a drawing of its floors.

python tools/house.py stats         lines, files, share of imports, circles
python tools/house.py docstrings    full sections on what a user reaches, one short paragraph elsewhere
python tools/house.py floors        docs/floors.png, drawn from the imports themselves
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src"

# What a user reaches besides `polymodal.__all__`, configuration keys and base classes: the builders of the registries,
# and the functions that the pages under docs/ call.
REACHED = {
    "polymodal.backends.load_renderer",
    "polymodal.backends.prompt_writer.write_request",
    "polymodal.data.load.load_records",
    "polymodal.evaluation.task.Example",
    "polymodal.evaluation.task.Sample",
    "polymodal.evaluation.task.Task",
    "polymodal.interop.huggingface.export.export_hf",
    "polymodal.media.video.plan_frames",
    "polymodal.media.video.read_frames",
    "polymodal.media.video.sample_frames",
    "polymodal.media.audio.open_audio",
    "polymodal.media.video_writer.write_video",
    "polymodal.media.document.open_pages",
    "polymodal.metrics.score",
    "polymodal.modeling.dual_encoders.registry.build_pair_model",
    "polymodal.modeling.dual_encoders.registry.load_pair_model",
    "polymodal.modeling.encoders.audio.build_audio_encoder",
    "polymodal.modeling.encoders.vision.build_vision_encoder",
    "polymodal.modeling.projectors.build_projector",
    "polymodal.modeling.renderers.load_renderer",
    "polymodal.modeling.tokenizers.audio.load_audio_tokenizer",
    "polymodal.modeling.tokenizers.build_image_tokenizer",
    "polymodal.modeling.tokenizers.load_image_tokenizer",
    "polymodal.modeling.tokenizers.save_image_tokenizer",
    "polymodal.speech.asr.load_asr",
    "polymodal.speech.asr.transcribe",
    "polymodal.speech.base.wav_bytes",
    "polymodal.speech.dialogue.talk",
    "polymodal.speech.narrate.narrate",
    "polymodal.speech.tts.load_tts",
    "polymodal.speech.tts.speak",
    "polymodal.speech.vad.load_vad",
    "polymodal.training.recipes.load.load_any_recipe",
    "polymodal.training.recipes.load.load_recipe",
    "polymodal.training.train",
    "polymodal.verify.compare.verify_export",
}
# From the ground up. A room imports rooms of lower floors, and those before it on its own.
FLOORS: dict[str, tuple[str, ...]] = {
    "base": ("errors", "utils", "messages", "config", "media_plan", "video_plan"),
    "guards": ("safety",),
    "media in": ("media", "processing", "viewer"),
    "model": ("modeling",),
    "folders": ("checkpoints", "interop"),
    "answers": ("generation", "backends", "verify"),
    "data": ("metrics", "data"),
    "stages": ("training", "planning", "evaluation", "speech", "serving"),
    "door": ("__init__", "cli", "__main__"),
}

_MODELS = {"modeling", "checkpoints", "interop", "generation", "backends", "verify"}

# And what the floors alone would allow: a model is built without media, data are checked without a model, scores
# know no trainer.
NEVER: dict[str, set[str]] = {
    "modeling": {"media", "processing", "viewer"},
    "checkpoints": {"media", "processing", "viewer"},
    "metrics": {"media", "processing", "viewer"} | _MODELS,
    "data": {"viewer"} | _MODELS,
    "evaluation": {"training", "planning"},
    "speech": {"training", "planning", "evaluation"},
    "serving": {"training", "planning", "evaluation"},
}

LIMITS = {"lines": 58_000, "files": 314, "longest file": 450, "imports": 0.12, "circles": 0}

BASES = {"ABC", "Protocol", "Strict"}
SECTION = re.compile(r"^\s*(Args|Attributes|Returns|Yields|Raises|Example|Examples|Note|Notes):\s*$", re.MULTILINE)
LONGEST_PLAIN = 3

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(SRC.rglob("*.py")):
        found[".".join(path.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def imports_of(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports: at its top, inside functions and for types alike."""
    found = set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                found.add(f"{module}.{alias.name}" if f"{module}.{alias.name}" in known else module)
    return {other for other in found if other in known and other != name}


def import_graph() -> dict[str, set[str]]:
    """Module -> the modules it imports."""
    known = modules()
    return {name: imports_of(name, path, known) for name, path in known.items()}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or around (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in graph[name]:
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            cut = stack.index(name)
            group = stack[cut:]
            del stack[cut:]
            if len(group) > 1:
                found.append(sorted(group))

    sys.setrecursionlimit(10_000)
    for name in graph:
        if name not in order:
            visit(name)
    return found


def room_of(name: str) -> str:
    """The room that a module belongs to: "media" for polymodal.media.image, "__init__" for the package itself."""
    return [*name.split("."), "__init__"][1]


def may_import(room: str, other: str) -> bool:
    """Whether an arrow from one room to another points down."""
    order = {name: (floor, place) for floor, rooms in enumerate(FLOORS.values()) for place, name in enumerate(rooms)}
    return room == other or (order[other] < order[room] and other not in NEVER.get(room, ()))


def room_graph() -> dict[str, set[str]]:
    """Room -> the rooms it imports."""
    rooms: dict[str, set[str]] = defaultdict(set)
    for name, others in import_graph().items():
        rooms[room_of(name)] |= {room_of(other) for other in others} - {room_of(name)}
    return dict(rooms)


def _rows(node: ast.AST) -> set[int]:
    """The line numbers that a statement stands on."""
    return set(range(node.lineno, node.end_lineno + 1))  # type: ignore[attr-defined]


def _is_text(node: ast.AST) -> bool:
    """Whether a statement is a string alone: a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def statistics() -> dict[str, float]:
    """The figures that `LIMITS` bounds, and the share of docstrings; imports are taken over all other lines of code."""
    total = imported = documented = code = longest = 0
    for path in modules().values():
        text = path.read_text(encoding="utf-8")
        nodes = list(ast.walk(ast.parse(text)))
        imports = {row for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for row in _rows(node)}
        docs = {row for node in nodes if _is_text(node) for row in _rows(node)}
        rows = text.splitlines()
        total, longest = total + len(rows), max(longest, len(rows))
        imported, documented = imported + len(imports), documented + len(docs)
        code += sum(
            bool(row.strip()) and not row.strip().startswith("#") and number not in imports | docs
            for number, row in enumerate(rows, 1)
        )
    return {
        "lines": total,
        "files": len(modules()),
        "longest file": longest,
        "imports": imported / code,
        "docstrings": documented / total,
        "circles": len(circles(import_graph())),
    }


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition, ast.ClassDef | None]]:
    """Every class and function with its dotted name and the class it stands in; those inside functions are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            name = f"{prefix}{node.name}"
            yield name, node, tree if isinstance(tree, ast.ClassDef) else None
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{name}.")
        elif isinstance(node, ast.If | ast.Try):
            yield from definitions(node, prefix)


def public_names() -> set[str]:
    """The full names of what `polymodal.__all__` reaches, followed to where each is defined."""
    sys.path.insert(0, str(SRC))
    import polymodal

    found = set()
    for name in polymodal.__all__:
        value = getattr(polymodal, name)
        found.add(f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', name)}")
    return found | REACHED


def is_base(node: ast.ClassDef, strict: set[str]) -> bool:
    """Whether a class is a base class, or a configuration."""
    names = {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
    return bool(names & (BASES | strict))


def strict_classes() -> set[str]:
    """The names of all configuration classes: `Strict` and what is built on it."""
    bases = defaultdict(set)
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                bases[node.name] |= {ast.unparse(base) for base in node.bases}
    found = {"Strict"}
    while True:
        more = {name for name, parents in bases.items() if parents & found} | found
        if more == found:
            return found
        found = more


def is_public(full: str, node: Definition, owner: ast.ClassDef | None, public: set[str], strict: set[str]) -> bool:
    """Whether a definition owes its reader full sections."""
    if node.name.startswith("_"):
        return False
    if isinstance(node, ast.ClassDef):
        return full in public or is_base(node, strict)
    if owner is None:
        return full in public
    # A configuration's methods are validators and derived values; its fields are what a user reaches.
    if any(name in strict for name in (owner.name, *(ast.unparse(base) for base in owner.bases))):
        return False
    return full.rpartition(".")[0] in public or is_base(owner, set())


def parameters_of(node: ast.FunctionDef | ast.AsyncFunctionDef, method: bool) -> list[str]:
    """The parameters a caller fills in."""
    spec = node.args
    names = [argument.arg for argument in (*spec.posonlyargs, *spec.args)]
    static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
    names = names[1:] if method and not static else names
    extra = [f"*{spec.vararg.arg}"] if spec.vararg else []
    extra += [argument.arg for argument in spec.kwonlyargs] + ([f"**{spec.kwarg.arg}"] if spec.kwarg else [])
    return names + extra


def faults_of(node: Definition, owner: ast.ClassDef | None, public: bool, strict: set[str]) -> Iterator[str]:
    """What is wrong with a definition's docstring."""
    text = ast.get_docstring(node) or ""
    if not public:
        if SECTION.search(text):
            yield "sections on what no user reaches: one sentence, shapes as `# [B, T, D]` beside the argument"
        elif "\n\n" in text or text.count("\n") >= LONGEST_PLAIN:
            yield "a long docstring on what no user reaches: one sentence, and the reasons as comments"
        return
    if not text:
        yield "no docstring"
    elif isinstance(node, ast.ClassDef):
        if is_base(node, strict):
            fields = [
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and not item.target.id.startswith("_")
            ]
            missing = [name for name in fields if not re.search(rf"^\s+{name}\b.*:", text, re.MULTILINE)]
            if missing:
                yield f"Attributes lacks {', '.join(missing)}"
    else:
        names = parameters_of(node, owner is not None)
        missing = [name for name in names if not re.search(rf"^\s+{re.escape(name)}:", text, re.MULTILINE)]
        if missing:
            yield f"Args lacks {', '.join(missing)}"
        gives = node.returns is not None and ast.unparse(node.returns) not in ("None", "NoReturn")
        is_property = any("property" in ast.unparse(decorator) for decorator in node.decorator_list)
        if gives and names and not is_property and not re.search(r"^\s*(Returns|Yields):", text, re.MULTILINE):
            yield "no Returns"


def check_docstrings() -> list[str]:
    """Every breach of the rule on docstrings, as `file:line name: what`."""
    public, strict, found = public_names(), strict_classes(), []
    for module, path in modules().items():
        for name, node, owner in definitions(ast.parse(path.read_text(encoding="utf-8"))):
            wanted = is_public(f"{module}.{name}", node, owner, public, strict)
            for fault in faults_of(node, owner, wanted, strict):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}: {fault}")
    return found


def short_graph() -> dict[str, set[str]]:
    """The rooms' graph without the arrows that others imply: a -> c goes where a -> b -> c stays."""
    graph = room_graph()

    def reached(room: str) -> set[str]:
        return {far for other in graph.get(room, ()) for far in {other} | reached(other)}

    return {
        room: {other for other in others if not any(other in reached(between) for between in others - {other})}
        for room, others in graph.items()
    }


def draw_floors(target: Path) -> None:
    """Draw the rooms on their floors, each with its files and lines, and who imports whom."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, path in modules().items():
        size[room_of(name)][0] += 1
        size[room_of(name)][1] += len(path.read_text(encoding="utf-8").splitlines())
    figure, axes = pyplot.subplots(figsize=(13, 9.5), dpi=100)
    place: dict[str, tuple[float, float]] = {}
    for floor, (title, rooms) in enumerate(FLOORS.items()):
        axes.axhspan(floor - 0.42, floor + 0.42, color="#f3f4f6" if floor % 2 else "#e5e7eb", zorder=0)
        axes.text(-1.9, floor, title, ha="left", va="center", fontsize=11, color="#374151")
        here = [room for room in rooms if room in size]
        # Every second floor stands a little to the side, so that arrows over two floors pass between the rooms.
        shift = 0.45 if floor % 2 else -0.45
        place |= {room: ((number + 0.5) * 10 / len(here) + shift, floor) for number, room in enumerate(here)}
    for room, others in short_graph().items():
        for other in others:
            (x, y), (to_x, to_y) = place[room], place[other]
            level = y == to_y
            bend = "arc3,rad=-0.25" if level and abs(x - to_x) > 3.4 else "arc3"
            arrow = {"arrowstyle": "-|>", "color": "#2563eb", "alpha": 0.75, "linewidth": 1.1, "connectionstyle": bend}
            start, end = ((x - 0.8, y), (to_x + 0.8, y)) if level else ((x, y - 0.24), (to_x, to_y + 0.24))
            axes.annotate("", xy=end, xytext=start, arrowprops=arrow, zorder=1)
    names = {"__init__": "polymodal", "__main__": "python -m polymodal"}
    for room, (x, y) in place.items():
        files, lines = size[room]
        label = f"{names.get(room, room)}\n{files} file{'s' * (files != 1)}, {lines:,} lines"
        box = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": "#1f2937", "linewidth": 0.9}
        axes.text(x, y, label, ha="center", va="center", fontsize=8.5, bbox=box, zorder=3)
    axes.set(xlim=(-2.0, 10.8), ylim=(-0.5, len(FLOORS) - 0.5))
    axes.axis("off")
    axes.set_title(
        "What imports what: arrows point down or to the left; those that others imply are left out", fontsize=11
    )
    figure.savefig(target, bbox_inches="tight")
    pyplot.close(figure)


def main(arguments: list[str]) -> int:
    """Run one of the three; status 1 where a limit is broken."""
    action = arguments[0] if arguments else "stats"
    if action == "docstrings":
        found = check_docstrings()
        print("\n".join(found) or "docstrings: as agreed")
        return bool(found)
    if action == "floors":
        draw_floors(ROOT / "docs" / "floors.png")
        return 0
    figures = statistics()
    for name, value in figures.items():
        form = ".1%" if isinstance(value, float) else ","
        print(f"{name:14} {value:>8{form}}" + (f"   at most {LIMITS[name]:{form}}" if name in LIMITS else ""))
    return any(figures[name] > limit for name, limit in LIMITS.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
