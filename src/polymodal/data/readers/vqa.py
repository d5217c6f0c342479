"""VQAv2, GQA, TextVQA and DocVQA: the official files, one record for each question.

- VQAv2: `v2_OpenEnded_mscoco_*_questions.json` with `v2_mscoco_*_annotations.json` beside it; the answer is
  `multiple_choice_answer`, which is the most frequent of the ten (Goyal et al. 2017, arXiv:1612.00837).
- GQA: `train_balanced_questions.json`, an object of questions by id; the answer is `answer` (Hudson and Manning 2019,
  arXiv:1902.09506).
- TextVQA: `TextVQA_0.5.1_train.json`; the most frequent of the ten answers. With the Rosetta OCR file as
  `annotations`, the question is followed by LLaVA's line of reference tokens (Singh et al. 2019, arXiv:1904.08920).
- DocVQA and InfographicVQA: `train_v1.0.json`; the first of the answers, which are spellings of one (Mathew et al.
  2021, arXiv:2007.00398).

Each question is followed by LLaVA's "Answer the question using a single word or phrase." unless `prompt` says
otherwise. A question without an annotation is a broken row, not a lost one. Annotations without a question are left
alone, so that a part of the questions can be used with the whole file of annotations.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from polymodal.data.readers.base import Layout, Options, RawRow, best_answer, broken, object_of, question_of, text_of
from polymodal.data.readers.json_files import elements, events, members
from polymodal.errors import DataError
from polymodal.media.ocr import reference_tokens


def read_vqav2(path: Path, options: Options) -> Iterator[RawRow]:
    """Read VQAv2."""
    assert options.annotations is not None  # the table of formats says so
    answers = _vqav2_answers(options.annotations)
    subtype, layout, number = _vqav2_subtype(path), Layout(options.root), -1
    for number, question in enumerate(map(object_of, elements(path, "questions"))):
        where = f"{path}: question {number}"
        name, image, text = question.get("question_id"), question.get("image_id"), text_of(question.get("question"))
        if not isinstance(name, int | str) or not isinstance(image, int) or not text:
            yield broken(where, "needs `question_id`, `image_id` and `question`")
            continue
        if name not in answers:
            problem = f"question_id {name} has no annotation in {options.annotations}, or comes twice"
            yield broken(where, problem)
            continue
        answer, of_image, kind = answers.pop(name)
        if not answer:
            yield broken(where, f"question_id {name}: the answer is missing or empty")
        elif of_image != image:
            problem = f"question_id {name} is about image {image}, its annotation about {of_image}"
            yield broken(where, problem)
        else:
            file = f"COCO_{subtype}_{image:012d}.jpg"
            source = layout.choose(file, f"{subtype}/{file}")
            data = question_of([source], text, answer, options, id=str(name), answer_type=kind)
            yield RawRow(where, data, kind="vqa")
    if number < 0:
        raise DataError(f"{path}: no `questions`; give v2_OpenEnded_mscoco_*_questions.json")


def _vqav2_answers(path: Path) -> dict[Any, tuple[str, Any, str]]:
    """Answer, image and type of answer, by question."""
    answers: dict[Any, tuple[str, Any, str]] = {}
    for index, entry in enumerate(elements(path, "annotations")):
        if not isinstance(entry, dict):
            continue
        name = entry.get("question_id")
        if not isinstance(name, int | str):
            raise DataError(f"{path}: annotation {index}: needs `question_id`")
        if name in answers:
            raise DataError(f"{path}: annotation {index}: question_id {name} comes twice")
        answer = text_of(entry.get("multiple_choice_answer")) or best_answer(entry.get("answers"))
        answers[name] = (answer, entry.get("image_id"), text_of(entry.get("answer_type")))
    if not answers:
        raise DataError(f"{path}: no `annotations`; give v2_mscoco_*_annotations.json")
    return answers


def _vqav2_subtype(path: Path) -> str:
    """The split that is part of the images' names; questions of test-dev2015 are about images of test2015."""
    for prefix, event, value in events(path):
        if prefix == "data_subtype" and event == "string":
            return str(value).replace("-dev", "")
    raise DataError(f"{path}: no `data_subtype`; give v2_OpenEnded_mscoco_*_questions.json")


def read_gqa(path: Path, options: Options) -> Iterator[RawRow]:
    """Read GQA; its questions and answers are one file."""
    layout, number = Layout(options.root), -1
    for number, (name, value) in enumerate(members(path)):
        if isinstance(value, list):
            number = -1
            break
        where, question = f"{path}: question {name!r}", object_of(value)
        image, text, answer = (text_of(question.get(key)) for key in ("imageId", "question", "answer"))
        if not image or not text or not answer:
            yield broken(where, "needs `imageId`, `question` and `answer`")
            continue
        source = layout.choose(f"{image}.jpg", f"images/{image}.jpg")
        data = question_of([source], text, answer, options, id=name)
        yield RawRow(where, data, kind="vqa")
    if number < 0:
        raise DataError(f"{path}: expected an object of questions by id; give GQA's *_questions.json")


def read_textvqa(path: Path, options: Options) -> Iterator[RawRow]:
    """Read TextVQA."""
    tokens = None if options.annotations is None else _ocr_tokens(options.annotations)
    layout = Layout(options.root)
    for number, where, question in _data_list(path, "TextVQA_0.5.1_*.json"):
        image, text = text_of(question.get("image_id")), text_of(question.get("question"))
        answer = best_answer(question.get("answers"))
        if not image or not text or not answer:
            yield broken(where, "needs `image_id`, `question` and `answers`")
            continue
        if tokens is not None:
            if image not in tokens:
                yield broken(where, f"image_id {image} is not in {options.annotations}")
                continue
            text += reference_tokens(tokens[image])
        source = layout.choose(f"{image}.jpg", f"train_images/{image}.jpg", f"test_images/{image}.jpg")
        data = question_of([source], text, answer, options, id=str(question.get("question_id", number)))
        yield RawRow(where, data, kind="ocr")


def _ocr_tokens(path: Path) -> dict[str, list[str]]:
    tokens = {}
    for _, where, entry in _data_list(path, "TextVQA_Rosetta_OCR_*.json"):
        words = entry.get("ocr_tokens")
        if not isinstance(words, list):
            raise DataError(f"{where}: no list `ocr_tokens`; give TextVQA_Rosetta_OCR_*.json")
        tokens[text_of(entry.get("image_id"))] = [str(word) for word in words]
    return tokens


def read_docvqa(path: Path, options: Options) -> Iterator[RawRow]:
    """Read DocVQA or InfographicVQA."""
    layout = Layout(options.root)
    for number, where, question in _data_list(path, "train_v1.0.json"):
        image = text_of(question.get("image")) or text_of(question.get("image_local_name"))
        text, answer = text_of(question.get("question")), best_answer(question.get("answers"))
        if not image or not text or not answer:
            yield broken(where, "needs `image`, `question` and `answers`")
            continue
        base = image.rpartition("/")[2]
        source = layout.choose(image, base, f"spdocvqa_images/{base}", f"documents/{base}")
        data = question_of([source], text, answer, options, id=str(question.get("questionId", number)))
        yield RawRow(where, data, kind="ocr")


def _data_list(path: Path, expected: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The objects of the list `data`."""
    index = -1
    for index, value in enumerate(elements(path, "data")):
        yield index, f"{path}: data[{index}]", object_of(value)
    if index < 0:
        raise DataError(f"{path}: no list `data`; give {expected}")
