"""MMMU, MMBench, ScienceQA, A-OKVQA, MMStar: a question, options, and the letter of the right one.

Prompts as published for LLaVA-1.5 (arXiv:2310.03744). The forms of a benchmark's files are read into the same columns:
a question, a hint, an image or several, the answer, and the options, which stand in a list, in the text of a list, or
in columns A, B, ...
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from string import ascii_uppercase

from polymodal.errors import ConfigError, DataError
from polymodal.evaluation.files import Row, field, find_file, find_images, json_rows, literal, read_json, rows_in
from polymodal.evaluation.task import Example, Figures, Sample, Task, ask, by, json_file, mean, means_by
from polymodal.evaluation.tasks.vqa import HUB_SPLITS, SHORT
from polymodal.metrics.mmmu import accepted, mmmu_letter, parse_mmmu_choice
from polymodal.metrics.multiple_choice import FAILED, named_choice
from polymodal.utils.extras import extra
from polymodal.utils.files import make_folder
from polymodal.utils.progress import log

LETTER = "Answer with the option's letter from the given choices directly."
LETTER_ZH = "请直接回答选项字母。"


def listed(options: dict[str, str], form: str = "{}. {}", between: str = "\n") -> str:
    """Options under each other."""
    return between.join(form.format(*option) for option in options.items())


DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Psychology Sociology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
    "Materials Mechanical_Engineering",
}
_MMMU_SPLITS = {**HUB_SPLITS, "dev": "dev"}


def _read_mmmu(folder: Path, split: str) -> Iterator[Example]:
    """Parquet of the official dataset or a TSV; `answer_dict_SPLIT.json` has the answers, where it is there."""
    long = _MMMU_SPLITS[split]
    key = find_file(folder, f"answer_dict_{split}.json")
    answers = Row(read_json(key), f"{key}: the file") if key else {}
    parquet, names = f"{long}-*.parquet", ("DEV_VAL", split.upper(), long.upper())
    for row in rows_in(folder, f"*/{parquet}", parquet, *(f"MMMU_{name}.tsv" for name in names)):
        name = row.text("id", default="") or "_".join(row.text(key) for key in ("split", "category", "index"))
        if row.get("split", long) not in (long, split):
            continue
        given = Row(answers.get(name, {}), f"{key}: {name}").get("ground_truth", row.get("answer"))
        gold = given if isinstance(given, list) else [] if given in (None, "", "?") else accepted([str(given)])
        # Official runs of LLaVA see the first image alone and keep the markers as text. So here, with all images.
        images = [row[name] for name in (f"image_{n}" for n in range(1, 8)) if row.get(name)] or row.images()
        question = row.text("question")
        subject = "_".join(name.split("_")[1:-1])
        form = row.text("question_type", default="")
        options = row.options("options", least=form == "multiple-choice")
        right = tuple(map(str, gold))
        if form != "multiple-choice" and (form or not options):
            yield Example(name, ask(f"{question}\n\n{SHORT}", *images), right, subject, "mmmu_open")
            continue
        text = f"{question}\n\n{listed(options, '({}) {}')}\n\n\n{LETTER}"
        yield Example(name, ask(text, *images), right, subject, options={"options": options, "item": name})


@lru_cache(maxsize=20_000)
def _unread(answer: str, options: tuple[str, ...], variant: str) -> bool:
    return variant != "vlmevalkit" and parse_mmmu_choice(answer, options, variant=variant) is None


def _mmmu_figures(samples: Sequence[Sample]) -> Figures:
    """Micro accuracy, the domains', and how many letters were drawn."""
    domain = {subject: name for name, subjects in DOMAINS.items() for subject in subjects.split()}
    parts = by(samples, lambda s: domain.get(s.kind, "other"))
    drawn = sum(
        _unread(s.answer, tuple(s.options["options"].values()), s.options.get("variant", "official"))
        for s in samples
        if s.answer is not None and s.metric == "mmmu_multiple_choice"
    )
    shown = {name: mean(parts[name]) for name in (*DOMAINS, "other") if name in parts}
    return {"accuracy": mean(samples), **shown, "n_random_fallback": drawn}


def _mmmu_answers(samples: Sequence[Sample]) -> dict[str, str]:
    """EvalAI's form: a letter or a text for each question."""
    answers = {}
    for s in samples:
        said = s.answer
        if s.options and said is not None:
            said = mmmu_letter(said, s.options["options"], item=s.id)
        answers[s.id] = said or ""
    return answers


MMMU = Task(
    name="mmmu",
    about="college exam questions in 30 subjects; official LLaVA prompt (images first) and parser",
    metric="mmmu_multiple_choice",
    splits=tuple(_MMMU_SPLITS),
    read=_read_mmmu,
    hub="MMMU/MMMU",
    hub_files={split: [f"*/{long}-*", f"answer_dict_{split}.json"] for split, long in _MMMU_SPLITS.items()},
    max_new_tokens=128,
    aggregate=_mmmu_figures,
    submit=json_file("mmmu_{split}_evalai.json", _mmmu_answers),
)


def _read_mmbench(folder: Path, split: str) -> Iterator[Example]:
    language, part, *version = split.split("_")
    tables = [f"MMBench_{'_'.join((part, language, *version)).upper()}.tsv"]
    if not version:
        older = f"mmbench_{part}_2*.tsv" if language == "en" else f"mmbench_{part}_{language}_2*.tsv"
        tables += [older, f"{language}/{part}-*.parquet"]
    for row in rows_in(folder, *tables):
        index, question, hint = row.id("index"), row.text("question"), row.text("hint", default="")
        options = row.options()
        text = f"{hint}\n" * bool(hint) + f"{question}\n{listed(options)}\n{LETTER if language == 'en' else LETTER_ZH}"
        answer = row.text("answer", default="")
        yield Example(
            *(index, ask(text, *row.images()), (answer,) * bool(answer), row.text("category", default="")),
            options={"options": options},
            extra={"group": row.text("g_index", default=str(int(index) % 1_000_000)), "question": question},
        )


def _mmbench_figures(samples: Sequence[Sample]) -> Figures:
    """Questions of which every pass is right, passes, and the former by category."""
    groups = by(samples, lambda s: s.extra["group"]).values()
    right = {id(own): min(sample.score or 0.0 for sample in own) for own in groups}
    kinds: dict[str, list[float]] = {}
    for own in groups:
        kinds.setdefault(own[0].kind, []).append(right[id(own)])
    judged = [sample.options["judged"] for sample in samples if "judged" in sample.options]
    failed = sum(FAILED in letters.values() for letters in judged)
    how = "" if judged else ", exact matching"
    return {
        f"circular{how}": sum(right.values()) / max(1, len(right)),
        f"vanilla{how}": mean(samples),
        **{kind or "no category": sum(own) / len(own) for kind, own in kinds.items()},
        **({"n_judged": sum(map(len, judged)), "n_judge_failed": failed} if judged else {}),
    }


def _submit_mmbench(samples: Sequence[Sample], split: str, folder: Path) -> list[Path]:
    """The server's table, with every pass as it was answered; a judged one would get the vanilla score."""
    try:
        extra("openpyxl", "mmbench: the table for the server needs", "polymodal[eval]")
    except ConfigError as error:
        log(str(error))
        return []
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE, WriteOnlyCell

    book = Workbook(write_only=True)
    sheet = book.create_sheet()

    def cell(text: str) -> WriteOnlyCell:
        made = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", text)[:32_767])
        made.data_type = "s"  # also where an answer begins with "=", which would be a formula
        return made

    letters = sorted({"A", "B", "C", "D"}.union(*(s.options.get("options", ()) for s in samples)))
    sheet.append(["index", "question", *letters, "answer", "prediction"])
    for s in samples:
        options = (s.options.get("options", {}).get(letter, "") for letter in letters)
        texts = (s.extra.get("question", ""), *options, "".join(s.references), s.answer or "")
        sheet.append([int(s.id), *(cell(text) if text else None for text in texts)])
    make_folder(folder)
    path = folder / f"mmbench_{split}.xlsx"
    book.save(path)
    return [path]


MMBENCH = Task(
    name="mmbench",
    about="questions in every circular order of their options; LLaVA's prompt, VLMEvalKit's heuristics (see --judge)",
    metric="mmbench_extract",
    splits=tuple(f"{lang}_{part}{v}" for v in ("", "_v11") for lang in ("en", "cn") for part in ("dev", "test")),
    read=_read_mmbench,
    hub="lmms-lab-encoder/MMBench",
    hub_files={f"{lang}_{part}": [f"{lang}/{part}-*"] for lang in ("en", "cn") for part in ("dev", "test")},
    aggregate=_mmbench_figures,
    group="group",
    submit=_submit_mmbench,
)


def _scienceqa_official(folder: Path, split: str, path: Path) -> list[Row]:
    """In the order of pid_splits.json, where that is there."""
    problems, order = Row(read_json(path), f"{path}: the file"), find_file(folder, "pid_splits.json")
    pids = field(read_json(order, split), split, str(order), list) if order else problems
    rows = [Row(problems.get(pid), f"{path}: problem {pid}") for pid in pids]
    for pid, row in zip(pids, rows):
        row.update(pid=pid, image=row.get("image") and f"{split}/{pid}/{row['image']}")
    rows = [row for row in rows if row.get("split", split) == split]
    find_images(folder, [row for row in rows if row["image"]])
    return rows


def _read_scienceqa(folder: Path, split: str) -> Iterator[Example]:
    long = HUB_SPLITS.get(split, split)
    official = "problems.json", partial(_scienceqa_official, folder, split)
    tables = f"ScienceQA-FULL/{long}-*.parquet", f"{long}-*.parquet", f"ScienceQA_{split.upper()}.tsv"
    for number, row in enumerate(rows_in(folder, official, *tables)):
        options = row.options("choices")
        choices = listed(options, "({}) {}", " ")
        context = row.text("hint", default="").strip() or "N/A"
        text = f"Context: {context}\nQuestion: {row.text('question')}\nOptions: {choices}".replace("  ", " ").strip()
        answer = row.text("answer")
        letter = ascii_uppercase[int(answer) : int(answer) + 1] if answer.isdecimal() else answer
        if letter not in options:
            raise DataError(f"{row.where}: `answer` is {answer!r:.60}, but there are {len(options)} choices")
        name, subject = row.text("pid", "index", default=str(number)), row.text("subject", default="")
        yield Example(
            *(name, ask(f"{text}\n{LETTER}", *row.images()), (letter,), subject),
            options={"n_choices": len(options)},
            extra={"image": bool(row.images())},
        )


def _scienceqa_figures(samples: Sequence[Sample]) -> Figures:
    """Questions with an image, which LLaVA reports; all; by subject."""
    seen = [sample for sample in samples if sample.extra["image"]]
    return {**({"IMG": mean(seen)} if seen else {}), "all": mean(samples), **means_by("kind")(samples)}


SCIENCEQA = Task(
    name="scienceqa",
    about="school questions, half of them with an image; LLaVA's CQM-A prompt and script",
    metric="scienceqa",
    splits=("test", "val", "train"),
    read=_read_scienceqa,
    hub="lmms-lab-encoder/ScienceQA",
    hub_files={split: [f"ScienceQA-FULL/{split}*"] for split in ("test", "val", "train")},
    aggregate=_scienceqa_figures,
)


def _aokvqa_official(folder: Path, split: str, path: Path) -> Sequence[Row]:
    rows = json_rows(path, each="question")
    for row in rows:
        row["image"] = f"{split}2017/{row.value(int, 'image_id'):012d}.jpg"
    return find_images(folder, rows)


def _read_aokvqa(folder: Path, split: str) -> Iterator[Example]:
    """Each question twice: with its choices, and for a direct answer."""
    long = HUB_SPLITS.get(split, split)
    official = f"aokvqa_v1p0_{split}.json", partial(_aokvqa_official, folder, split)
    tables = f"{long}-*.parquet", f"A-OKVQA_{split.upper()}.tsv", "A-OKVQA.tsv", "a-okvqa.tsv"
    for row in rows_in(folder, official, *tables):
        name, question = row.text("question_id", "index"), row.text("question")
        options, images = row.options("choices"), row.images()
        right = row.text("answer", default="")
        if row.get("correct_choice_idx") is not None:
            place = row.value(int, "correct_choice_idx")
            right = ascii_uppercase[place : place + 1] or str(place)
        if right and right not in options:
            raise DataError(f"{row.where}: the right answer is {right!r:.60}, but there are {len(options)} choices")
        text = f"{question}\n{listed(options)}\n{LETTER}"
        yield Example(
            *(f"{name}/multiple_choice", ask(text, *images), (options[right],) if right else ()),
            *("multiple_choice", "aokvqa_choice", {"choices": list(options.values())}),
        )
        # Figures leave out questions whose direct answer is marked as difficult; the server's file has them all.
        answers = literal(row.get("direct_answers") or None, row.where)
        hard = str(row.get("difficult_direct_answer")) == "True"
        if answers is not None or "choices" in row:
            given = () if hard or not answers else tuple(answers)
            yield Example(f"{name}/direct_answer", ask(f"{question}\n{SHORT}", *images), given, "direct_answer")


def _aokvqa_answers(samples: Sequence[Sample]) -> dict[str, dict[str, str]]:
    answers: dict[str, dict[str, str]] = {}
    for s in samples:
        name, _, kind = s.id.rpartition("/")
        said = s.answer or ""
        answers.setdefault(name, {})[kind] = named_choice(said, s.options["choices"]) if said and s.options else said
    return answers


AOKVQA = Task(
    name="aokvqa",
    about="questions that need knowledge, with choices and without; LLaVA's prompts, the official scores",
    metric="aokvqa",
    splits=("val", "test", "train"),
    read=_read_aokvqa,
    hub="HuggingFaceM4/A-OKVQA",
    hub_files={split: [f"data/{split}*"] for split in ("val", "test", "train")},
    aggregate=means_by("kind"),
    submit=json_file("predictions_{split}.json", _aokvqa_answers),
)


def _read_mmstar(folder: Path, _split: str) -> Iterator[Example]:
    for row in rows_in(folder, "mmstar.parquet", "val-*.parquet", "MMStar.tsv"):
        question = row.text("question").strip()
        if "A" in row and "\nOptions:" not in question:
            question += f"\nOptions: {listed(row.options(), '{}: {}', ', ')}"
        category, detail = row.text("category", default=""), row.text("l2_category", "l2-category", default="")
        messages = ask(f"{question}\n{LETTER}", *row.images())
        yield Example(row.text("index"), messages, (row.text("answer"),), category, extra={"l2": detail})


MMSTAR = Task(
    name="mmstar",
    about="questions that need the image; LLaVA's suffix, the official first-letter rule",
    metric="mmstar",
    splits=("val",),
    read=_read_mmstar,
    hub="Lin-Chen/MMStar",
    hub_files={"val": ["*.parquet"]},
    aggregate=lambda samples: {"accuracy": mean(samples), **means_by("kind")(samples)},
)

TASKS = (MMMU, MMBENCH, SCIENCEQA, AOKVQA, MMSTAR)
