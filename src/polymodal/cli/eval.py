"""Score a model: on benchmarks, on your own questions, or what it said before.

    polymodal eval default --tasks demo                                   the shipped benchmark, with its blind control
    polymodal eval runs/stage2/final --tasks gqa,mmmu_val --data-root D   benchmarks from their official files in D
    polymodal eval openai:gpt-4o --tasks docvqa --limit 200               any model that `load` opens
    polymodal eval default --data rows.json --metric anls                 your own questions, a JSON of conversations
    polymodal eval clip --tasks retrieval --data pairs.json               or zero-shot, linear-probe: two towers
    polymodal eval rescore OUT/gqa --variant lmms_eval                    score kept answers again, without the model
    polymodal eval diff OUT_A OUT_B                                       what changed between two runs, and is it real
    polymodal eval tasks                                                  the benchmarks there are

Every answer is kept, so that a run that was cut off goes on where it was. Results lie in --output: results.json,
report.html, and each task's samples.jsonl. Without --metric a record's `kind` chooses the metric; its `answers` lists
what is right.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polymodal.backends import load
from polymodal.checkpoints.locate import ENDPOINT
from polymodal.cli.common import add_loading_arguments, note, one_line, open_model, printable
from polymodal.errors import ConfigError
from polymodal.utils.files import check_writable, make_folder, write_text

if TYPE_CHECKING:
    from polymodal.backends.base import Backend
    from polymodal.evaluation.task import Task

EMBEDDING = {
    "retrieval": "which caption belongs to an image and which image to a caption, of --data",
    "zero-shot": "which class's prompts an image is nearest to, of --data",
    "linear-probe": "which class a linear probe and k-NN read from the image tower's vectors, of --data",
}
"""Tasks for models with an image tower and a text tower, which read `--data`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("model", help='"default", a model folder, a hub id, or openai:MODEL; or rescore, diff, tasks')
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="what rescore and diff read")
    parser.add_argument("--tasks", "--task", metavar="A,B", help="benchmarks, with a split as in mmmu_val")
    parser.add_argument("--data", type=Path, metavar="FILE", help="your own records, in any form that training reads")
    parser.add_argument("--image-root", type=Path, metavar="DIR", help="where the images of --data are")
    parser.add_argument("--metric", metavar="NAME", help="of --data: exact, contains, anls, vqa_accuracy, cider, ...")
    parser.add_argument("--variant", metavar="NAME", help="score as another harness does: lmms_eval, vlmevalkit")
    parser.add_argument("--data-root", type=Path, metavar="DIR", help="the folder that holds the benchmarks' files")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/eval/MODEL")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N of each kind")
    parser.add_argument("--batch-size", default="auto", metavar="N", help="default: auto")
    parser.add_argument("--concurrency", type=int, metavar="N", help="requests at the same time to an endpoint")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="the longest answer (default: the task's)")
    parser.add_argument(
        "--blind", action=argparse.BooleanOptionalAction, help="ask again about grey images (default: demo and --data)"
    )
    parser.add_argument("--judge", metavar="MODEL", help="mmbench: a model that reads answers without a letter")
    parser.add_argument("--judge-url", metavar="URL", help="its server, where it is not that of --base-url")
    parser.add_argument("--no-cache", action="store_true", help="ask everything, and keep no answers")
    parser.add_argument("--allow-missing", action="store_true", help="rescore: score a file that lacks some answers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write scores and every answer here too")
    add_loading_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print the table, and write the answers."""
    for flag, value in (
        ("--limit", args.limit), ("--concurrency", args.concurrency), ("--max-new-tokens", args.max_new_tokens)
    ):  # fmt: skip
        if value is not None and value < 1:
            raise ConfigError(f"{flag} {value}: at least 1")
    args.batch_size = _batch_size(args.batch_size)
    if args.json is not None:
        check_writable(args.json, "--json: ")
    if args.model in COMMANDS:
        if args.output is not None:
            raise ConfigError(f"--output is where a model's results go; {args.model} prints, and writes to --json")
        return COMMANDS[args.model](args)
    if args.paths:
        raise ConfigError(f"{args.paths[0]}: not understood; a model is followed by flags")
    names = list(dict.fromkeys(name.strip() for name in (args.tasks or "").split(",") if name.strip()))
    if any(name in EMBEDDING for name in names):
        return _embedding(args, names)
    return _answers(args, names)


def _batch_size(given: str) -> int | None:
    if given == "auto":
        return None
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"--batch-size {given}: auto, or a number from 1")
    return int(given)


def _answers(args: argparse.Namespace, names: list[str]) -> int:
    """Tasks whose questions a model answers."""
    from polymodal.evaluation import results
    from polymodal.evaluation.judge import judged
    from polymodal.evaluation.report import write_report
    from polymodal.evaluation.runner import Settings, check_needs, prepared, processes, run_task
    from polymodal.evaluation.task import for_server, lacks_variant
    from polymodal.evaluation.tasks import find_data, find_task, read_examples
    from polymodal.evaluation.tasks.questions import data_task

    tasks: list[tuple[Task, str, Path]] = []
    if args.data is not None:
        if names not in ([], ["questions"]):
            raise ConfigError(f"--data goes with one of {', '.join(EMBEDDING)}, or with no --tasks; not {names[0]}")
        tasks.append((data_task(args.data, args.image_root, args.metric or ""), "", args.data.parent))
    elif args.metric or args.image_root:
        raise ConfigError("--metric and --image-root go with --data")
    folder = _results_folder(args)
    for name in [] if args.data is not None else names:
        task, split = find_task(name)
        tasks.append((task, split, find_data(task, split, args.data_root)))
    if not tasks:
        raise ConfigError("nothing to score: give --tasks (see `polymodal eval tasks`) or --data")
    settings = Settings(
        batch_size=args.batch_size, limit=args.limit, max_new_tokens=args.max_new_tokens, cached=not args.no_cache
    )
    judge = _judge(args, [task for task, *_ in tasks])
    # The data first: a mistake there is found before a model is loaded.
    examples = [read_examples(task, split, path) for task, split, path in tasks]
    asked = [prepared(task, found, settings) for (task, *_), found in zip(tasks, examples)]
    lacking = {task.name: lacks_variant(own, args.variant) for (task, *_), own in zip(tasks, asked)}
    _say_lacking(lacking)
    wanted = [list(task.server_ids(path, split)) if task.server_ids else [] for task, split, path in tasks]
    model = open_model(args)
    for task, *_ in tasks:
        check_needs(model, task)
    if args.concurrency is not None:
        if model.concurrent is None:
            raise ConfigError(f"--concurrency is for endpoints; {args.model} is asked in batches (--batch-size)")
        model.concurrent = args.concurrency
    rank, _ = processes()
    document = results.begin_results(folder, model.name, model.fingerprint()) if rank == 0 else {}
    done = []
    for (task, split, _), own, every, ids in zip(tasks, asked, examples, wanted):
        blind = task.blind if args.blind is None else args.blind
        settings = replace(settings, blind=blind, variant=None if lacking[task.name] else args.variant)
        found = run_task(model, task, own, settings)
        if judge is not None:  # each process asks its share of it too
            found.samples = judged(judge, found.samples)
        if rank > 0:
            continue
        name = f"{task.name}_{split}" if split else task.name
        summary = results.summarise(task, split, found, settings, model, judge)
        results.add_task(folder, document, name, summary, found.samples)
        if task.submit is not None:
            sent = for_server(found.samples, every, ids)
            silent = sum(sample.answer is None for sample in sent)
            for file in task.submit(sent, split, folder / name):
                note(f"wrote {file}" + (f"; {silent:,} of {len(sent):,} have no answer in it" if silent else ""))
        done.append((name, found.samples, own))
    if rank > 0:
        return 0
    write_report(folder, document, done)
    print(printable(results.table([document["tasks"][name] for name, *_ in done])))
    note(f"wrote {folder / 'results.json'} and {folder / 'report.html'}")
    samples = [sample for _, found, _ in done for sample in found]
    if args.json is not None:
        _write_json(args.json, {**document, "items": [asdict(sample) for sample in samples]})
    if failed := [sample for sample in samples if sample.error is not None]:
        print(f"\n{len(failed)} of {len(samples)} items failed; first: {one_line(str(failed[0].error))}")
    return 1 if failed else 0


def _judge(args: argparse.Namespace, tasks: Sequence[Task]) -> Backend | None:
    """The model that --judge names."""
    from polymodal.evaluation.judge import JUDGED

    if args.judge is None:
        return None
    if all(task.metric != JUDGED for task in tasks):
        raise ConfigError(f"--judge {args.judge}: none of {', '.join(task.name for task in tasks)} is read by a judge")
    if not args.judge.startswith(ENDPOINT):
        return load(args.judge, args.device, quantize=args.quantize)
    return load(args.judge, base_url=args.judge_url or args.base_url, allow_http=args.allow_http)


def _say_lacking(lacking: Mapping[str, ConfigError | None]) -> None:
    """Name the tasks that have not the variant that was asked for; raise where none has it."""
    errors = {name: error for name, error in lacking.items() if error is not None}
    if errors and len(errors) == len(lacking):
        raise next(iter(errors.values()))
    for name, error in errors.items():
        note(f"{name}: {error}; it is scored by its own rule")


def _results_folder(args: argparse.Namespace) -> Path:
    """Where the results go, which nothing else may be in."""
    from polymodal.evaluation.results import check_folder

    folder: Path = args.output or Path("runs/eval") / _folder_name(args.model)
    check_folder(folder)
    return folder


def _write_json(path: Path, document: Any) -> None:
    from polymodal.evaluation.results import as_json

    make_folder(path.parent)
    write_text(path, as_json(document, indent=1) + "\n")


def _folder_name(model: str) -> str:
    """A model's name as the name of a folder."""
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in model.strip("/").removesuffix("/final"))
    return name.strip(".")[-100:] or "model"


def _embedding(args: argparse.Namespace, names: list[str]) -> int:
    """Tasks for models with two towers."""
    from polymodal.data.load import load_records
    from polymodal.evaluation import results
    from polymodal.evaluation.embedder import load_embedder
    from polymodal.evaluation.report import write_report
    from polymodal.evaluation.runner import Run, Settings, processes
    from polymodal.evaluation.tasks import retrieval, zero_shot
    from polymodal.generation.params import GenerationParams
    from polymodal.utils.devices import best_device
    from polymodal.utils.progress import Meter

    if len(names) > 1 or args.data is None:
        raise ConfigError(f"--tasks {names[0]} stands alone and needs --data")
    if args.quantize is not None:
        raise ConfigError("--quantize: these models have no language model to quantise; leave it out")
    if processes()[0] > 0:
        return 0  # the first does it all
    folder = _results_folder(args)
    pairs = retrieval.pairs_of(load_records(args.data), args.limit) if names[0] == "retrieval" else None
    tasks = zero_shot.load_tasks(args.data, args.limit) if pairs is None else []
    embedder = load_embedder(args.model, args.device or best_device())
    document = results.begin_results(folder, embedder.name, embedder.fingerprint())
    meter, size = Meter("embedding", 0), args.batch_size or 32
    shown: dict[str, Any] = {"model": args.model, "task": names[0], "data": str(args.data)}
    if pairs is not None:
        found = retrieval.retrieval(embedder, pairs, batch_size=size, progress=meter.advance)
        task, samples, text = retrieval.RETRIEVAL, retrieval.samples_of(found, pairs), retrieval.table(found)
        shown |= {key: value for key, value in asdict(found).items() if key != "ranks"}
    elif names[0] == "linear-probe":
        samples = zero_shot.probe_samples(embedder, tasks, batch_size=size, progress=meter.advance)
        task, text = zero_shot.PROBE, ""
    else:
        rows = zero_shot.zero_shot_scores(embedder, tasks, batch_size=size, progress=meter.advance)
        task, samples, text = zero_shot.ZERO_SHOT, zero_shot.samples_of(rows, tasks), zero_shot.table(rows)
        shown["tasks"] = [{key: value for key, value in asdict(row).items() if key != "ranks"} for row in rows]
    meter.close()
    settings, run = Settings(limit=args.limit), Run(samples, GenerationParams(), size, None, len(samples))
    summary = {**results.summarise(task, "", run, settings, embedder), "decoding": None}
    results.add_task(folder, document, task.name, summary, samples)
    write_report(folder, document, [(task.name, samples, ())])
    print(printable(text or results.table([summary])))
    note(f"wrote {folder / 'results.json'} and {folder / 'report.html'}")
    if args.json is not None:
        _write_json(args.json, shown if text else {**shown, **summary})
    return 0


def _rescore(args: argparse.Namespace) -> int:
    """Score kept answers, or a file of answers to a benchmark."""
    from polymodal.evaluation import results
    from polymodal.evaluation.compare import read_predictions, rescore
    from polymodal.evaluation.judge import judged
    from polymodal.evaluation.runner import Run, Settings
    from polymodal.evaluation.task import ERROR_RATES, lacks_variant, mean_score
    from polymodal.evaluation.tasks import find_data, find_task, read_examples, task_of
    from polymodal.generation.params import GenerationParams

    if not args.paths:
        raise ConfigError("rescore needs a samples.jsonl or its folder, or a file of answers with --tasks")
    documents = []
    lacking: dict[str, ConfigError | None] = {}
    for path in args.paths if args.tasks else results.sample_folders(args.paths):
        if args.tasks:
            task, split = find_task(args.tasks.strip())
            examples = read_examples(task, split, find_data(task, split, args.data_root))
            samples = read_predictions(path, examples, task.metric, args.allow_missing)
        else:
            samples = results.read_samples(path)
            task, split = task_of(path, samples)
        samples = rescore(samples, args.metric)
        lacking[str(path)] = lacks_variant(samples, args.variant)
        settings = Settings(variant=None if lacking[str(path)] else args.variant)
        samples = rescore(samples, None, settings.variant)
        if args.metric:  # figures of the benchmark's own are of its own scores
            task = replace(task, metric=args.metric, aggregate=mean_score, details=None)
            task = replace(task, lower_is_better=args.metric in ERROR_RATES)
        judge = _judge(args, [task])
        found = Run(samples if judge is None else judged(judge, samples), GenerationParams(), 1, None, 0)
        documents.append(results.summarise(task, split, found, settings, judge=judge))
    _say_lacking(lacking)
    print(printable(results.table(documents)))
    if args.json is not None:
        _write_json(args.json, {"tasks": documents})
    return 0


def _diff(args: argparse.Namespace) -> int:
    """Two runs beside each other."""
    from polymodal.evaluation.compare import compare, difference_table

    if len(args.paths) != 2:
        raise ConfigError("diff needs two results folders, or two samples.jsonl")
    differences = compare(*args.paths)
    print(printable(difference_table(differences)))
    if args.json is not None:
        _write_json(args.json, {"tasks": [asdict(difference) for difference in differences]})
    for difference in differences:
        for one, two in difference.flipped[: args.limit or 10]:
            said = " -> ".join(f"{sample.answer!r:.80} ({sample.score:.2f})" for sample in (one, two))
            print(printable(f"  {one.id}: {said}; right: {one.references[0]!r:.80}"))
    return 0


def _tasks(_args: argparse.Namespace) -> int:
    """The benchmarks there are."""
    from polymodal.cli.common import aligned
    from polymodal.evaluation.tasks import TASKS

    rows = [(task.name, f"{task.about} [{', '.join(task.splits)}]") for task in TASKS.values()]
    print(aligned([*rows, *EMBEDDING.items()]))
    return 0


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {"rescore": _rescore, "diff": _diff, "tasks": _tasks}
