"""Video-MME and MVBench: options about a video. Prompts are the benchmarks' own; how many frames is the model's say."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from polymodal.errors import DataError
from polymodal.evaluation.files import Row, file_in, find_file, json_rows, literal, rows_in
from polymodal.evaluation.task import Example, Figures, Sample, Task, by, mean, means_by
from polymodal.evaluation.tasks.multiple_choice import listed
from polymodal.messages import Video, system, user
from polymodal.metrics.multiple_choice import parse_videomme

_SELECT = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)


def _videomme_official(path: Path) -> Iterator[Row]:
    """The template for answers, which lists questions by video."""
    for video in json_rows(path, each="video"):
        for question in video.value(list, "questions"):
            yield Row({**video, **Row(question, f"{video.where}: a question")}, video.where)


def _read_videomme(folder: Path, _split: str) -> Iterator[Example]:
    official = "output_test_template.json", _videomme_official
    tables = "videomme/test-*.parquet", "test-*.parquet", "Video-MME.tsv"
    for number, row in enumerate(rows_in(folder, official, *tables)):
        options = "\n".join(row.options("options", "candidates").values())
        # VLMEvalKit's table has no ids; it lists the three questions of each video in order.
        name = row.text("question_id", default="") or f"{number // 3 + 1:03d}-{number % 3 + 1}"
        file = f"{row.text('videoID', 'video', 'video_id')}.mp4"
        yield Example(
            id=name,
            messages=(
                user(
                    Video(file_in(folder, f"data/{file}", f"video/{file}", f"videos/{file}")),
                    f"{_SELECT}\n{row.text('question')}\n{options}\nThe best answer is:",
                ),
            ),
            references=(row.text("answer"),),
            kind=row.text("duration"),
            extra={"video": name.rpartition("-")[0], "task_type": row.text("task_type", default="")},
        )


def _videomme_figures(samples: Sequence[Sample]) -> Figures:
    """The official accuracy, which leaves out answers without a letter, ours over all questions, and both by length."""
    read = [
        s
        for s in samples
        if s.answer is not None and parse_videomme(s.answer, variant=s.options.get("variant", "official"))
    ]
    figures = {"accuracy of answers read": mean(read), "accuracy of all": mean(samples)}
    for kind, own in by(samples, lambda s: s.kind).items():
        figures[f"{kind}, of answers read"] = mean([s for s in read if s.kind == kind])
        figures[f"{kind}, of all"] = mean(own)
    return {**figures, "n_unread": len(samples) - len(read)}


VIDEOMME = Task(
    name="videomme",
    about="questions about short, medium and long videos, without subtitles; official prompt and script",
    metric="videomme_extract",
    splits=("test",),
    read=_read_videomme,
    hub="lmms-eval/Video-MME",
    hub_files={"test": ["*.parquet"]},  # not the videos, which are hundreds of gigabytes
    aggregate=_videomme_figures,
    group="video",
    needs=("video",),
)

MVBENCH_KINDS = (
    "action_sequence", "action_prediction", "action_antonym", "fine_grained_action", "unexpected_action",
    "object_existence", "object_interaction", "object_shuffle", "moving_direction", "action_localization",
    "scene_transition", "action_count", "moving_count", "moving_attribute", "state_change", "fine_grained_pose",
    "character_order", "egocentric_navigation", "episodic_reasoning", "counterfactual_inference",
)  # fmt: skip
_WATCH = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question.\n"
)


def _mvbench_rows(folder: Path) -> Iterator[Row]:
    """Of the official JSON files, one a task; else of the table that VLMEvalKit makes of them."""
    files = {kind: find_file(folder, f"{kind}.json") for kind in MVBENCH_KINDS}
    if not any(files.values()):
        yield from rows_in(folder, "MVBench.tsv")
    for kind, path in files.items():
        for row in json_rows(path, each="question") if path else ():
            row["task_type"] = kind
            yield row


def _read_mvbench(folder: Path, _split: str) -> Iterator[Example]:
    clips = {path.name: path for path in sorted((folder / "video").rglob("*"))}
    asked: dict[str, int] = {}
    for row in _mvbench_rows(folder):
        kind = row.text("task_type").lower().replace(" ", "_").replace("-", "_")
        number = asked[kind] = asked.get(kind, -1) + 1
        options = row.options("candidates")
        right = [f"({letter}) {text}" for letter, text in options.items() if text == row.text("answer")]
        if not right:
            raise DataError(f"{row.where}: the answer {row['answer']!r:.60} is none of the candidates")
        name = row.text("video")
        file = clips.get(Path(name).name) or file_in(folder / "video", name)
        text = f"Question: {row.text('question')}\nOptions:\n{listed(options, '({}) {}')}"
        bounds = {key: literal(row[key], row.where) for key in ("start", "end") if row.text(key, default="")}
        piece = {key: float(value) for key, value in bounds.items() if isinstance(value, int | float)}
        video = Video(file, start=piece.get("start"), end=piece.get("end"))
        yield Example(
            # The official script begins the answer itself, with the last words here.
            *(f"{kind}/{number}", (system(_WATCH), user(video, f"{text}\nOnly give the best option.\nBest option:("))),
            *(tuple(right[:1]), kind),
            extra={"video": name, **bounds},
        )


def _mvbench_figures(samples: Sequence[Sample]) -> Figures:
    """The mean over tasks, the tasks, and how many answers are empty, which the official rule takes for right."""
    tasks = means_by("kind")(samples)
    empty = sum(s.answer is not None and not s.answer.strip(" .") for s in samples)
    return {"mean_of_tasks": sum(tasks.values()) / len(tasks), **tasks, "n_empty": empty}


MVBENCH = Task(
    name="mvbench",
    about="20 tasks that one frame does not solve; official prompt and rule",
    metric="mvbench",
    splits=("test",),
    read=_read_mvbench,
    hub="OpenGVLab/MVBench",
    hub_files={"test": ["json/*"]},
    aggregate=_mvbench_figures,
    needs=("video",),
)

TASKS = (VIDEOMME, MVBENCH)
