"""Training runs, watched while they grow: a list, a run's lines behind a cursor, and its images.

No path of a request reaches the file system: names are looked up among what lies below the runs' folder, without links.
"""

import asyncio
import os
import re
from pathlib import Path
from typing import Any

from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from polymodal.serving.errors import RequestError

LOG, EVALS = "log.jsonl", "eval.jsonl"
FOLDERS = ("eval", "reconstructions")
"""Where training puts images of held-out data."""
TYPES = {".jpg": "image/jpeg", ".png": "image/png"}
DEEPEST = 4
"""Folders above a run, below the runs' folder."""
MOST_RUNS = 500
PIECE = 2**20
"""Bytes of a log that are read at once."""
MAX_IMAGE = 8 * 2**20
KEPT = (
    "step", "samples", "epoch", "loss", "loss_by_kind", "terms", "metrics", "learning_rate", "grad_norm",
    "tokens_per_s", "samples_per_s", "elapsed_s", "data", "answers", "recall", "psnr", "ssim",
)  # fmt: skip
"""Keys of a line that are shown; what a line says of each source can be long."""


def find_runs(root: Path) -> dict[str, Path]:
    """The folders with a log, by their path below the runs' folder, the latest first."""
    found: dict[str, Path] = {}
    for folder, inner, files in os.walk(root):  # which follows no links
        path = Path(folder)
        if LOG in files and _is_file(path / LOG):
            found[path.relative_to(root).as_posix()] = path
        if LOG in files or len(path.relative_to(root).parts) >= DEEPEST or len(found) >= MOST_RUNS:
            inner.clear()
    return dict(sorted(found.items(), key=lambda run: -_changed(run[1])))


def summary(name: str, folder: Path) -> dict[str, Any]:
    """A run in the list, with its last line."""
    last, _ = read_rows(folder / LOG, max(0, (folder / LOG).stat().st_size - PIECE))
    line = last[-1] if last else {}
    kept = {key: line.get(key) for key in ("step", "epoch", "loss")}
    return {"id": name, "object": "run", "changed": int(_changed(folder)), **kept}


def read_rows(path: Path, start: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines of a log from a byte on, at most `PIECE` bytes of them, and where the next begins."""
    with path.open("rb") as handle:
        handle.seek(start)
        data = handle.read(PIECE)
    end = data.rfind(b"\n") + 1 or (len(data) if len(data) == PIECE else 0)  # a line without an end is passed over
    rows = []
    for line in data[:end].splitlines():
        try:
            row = from_json(line, allow_inf_nan=False)
        except ValueError:  # the rest of a line
            continue
        if isinstance(row, dict):
            rows.append({key: row[key] for key in KEPT if key in row})
    return rows, start + end


def since(path: Path, cursor: str) -> dict[str, Any]:
    """What a log has behind a cursor; from its beginning where it was written anew, as a resumed run does."""
    if not _is_file(path):
        return {"rows": [], "cursor": "", "anew": False, "more": False}
    found, state = re.fullmatch(r"(\d{1,20})-(\d{1,15})", cursor), path.stat()
    start = int(found[2]) if found is not None and int(found[1]) == state.st_ino else state.st_size + 1
    anew = start > state.st_size
    rows, end = read_rows(path, 0 if anew else start)
    more = state.st_size > (0 if anew else start) + PIECE
    return {"rows": rows, "cursor": f"{state.st_ino}-{end}", "anew": anew, "more": more}


def images_of(folder: Path) -> dict[str, Path]:
    """The images of held-out data, by their names within a run's folder."""
    inner = [folder / name for name in FOLDERS if (folder / name).is_dir() and not (folder / name).is_symlink()]
    files = (path for each in inner for path in sorted(each.iterdir()) if path.suffix in TYPES and _is_file(path))
    return {path.relative_to(folder).as_posix(): path for path in files}


def _is_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _changed(folder: Path) -> float:
    try:
        return (folder / LOG).stat().st_mtime
    except OSError:
        return 0.0


def _run(request: Request) -> tuple[str, Path]:
    root, name = request.app.state.runs, request.path_params["name"]
    folder = find_runs(root).get(name) if root is not None else None
    if folder is None:
        raise RequestError("there is no such run", "name", 404, "run_not_found")
    return name, folder


async def list_runs(request: Request) -> Response:
    """The runs below the runs' folder; none where there is no such folder."""
    root = request.app.state.runs

    def read() -> list[dict[str, Any]]:
        return [summary(name, folder) for name, folder in find_runs(root).items()] if root is not None else []

    return JSONResponse({"object": "list", "data": await asyncio.to_thread(read)})


async def one_run(request: Request) -> Response:
    """A run's lines behind the cursors that the last answer gave, and the names of its images; or one of these."""
    query = request.query_params

    def read() -> Response:
        name, folder = _run(request)
        images = images_of(folder)
        if (image := query.get("image")) is not None:
            path = images.get(image)
            if path is None or path.stat().st_size > MAX_IMAGE:
                raise RequestError("image: there is no such image", "image", 404, "image_not_found")
            return Response(path.read_bytes(), media_type=TYPES[path.suffix])
        logs = {key: since(folder / file, query.get(key, "")) for key, file in LOGS.items()}
        return JSONResponse({"id": name, "object": "run", **logs, "images": list(images)})

    return await asyncio.to_thread(read)


LOGS = {"log": LOG, "evals": EVALS}
ROUTES = [Route("/v1/runs", list_runs), Route("/v1/runs/{name:path}", one_run)]
