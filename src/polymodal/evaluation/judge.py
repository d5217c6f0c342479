"""A model that reads answers in which MMBench's heuristics find no letter, as in VLMEvalKit, but never by chance."""

from collections.abc import Sequence
from dataclasses import replace

from polymodal.backends.base import Backend
from polymodal.errors import first_line
from polymodal.evaluation.runner import Settings, run_task
from polymodal.evaluation.task import Example, Sample, Task, ask
from polymodal.metrics.multiple_choice import FAILED, is_right, parse_mmbench
from polymodal.utils.progress import log

JUDGED = "mmbench_extract"
"""The metric that takes a judge's letter."""
TRIES = ("", "Reply with a single capital letter.", "Reply with one character: a letter of the options, or Z.")
"""What is added each time: a judge that decodes greedily would say the same again."""

JUDGE = Task("judge", "what an answer means", "exact", ("",), lambda _folder, _split: (), max_new_tokens=32, needs=())


def judged(judge: Backend, samples: Sequence[Sample]) -> list[Sample]:
    """Let a judge read what the heuristics cannot; what it cannot read either is wrong."""
    letters = {
        number: FAILED
        for number, s in enumerate(samples)
        if s.metric == JUDGED
        and s.references
        and s.answer
        and parse_mmbench(s.answer, s.options["options"], variant=s.options.get("variant", "official")) is None
    }
    for hint in TRIES:
        asked = [
            Example(str(number), ask(_prompt(samples[number], hint))) for number in letters if letters[number] == FAILED
        ]
        if not asked:
            break
        try:
            said = run_task(judge, JUDGE, asked, Settings()).samples
        except Exception as error:  # whatever happens to the judge, the answers are there and are scored
            log(f"the judge gave up: {first_line(error)}")
            break
        for each in said:
            options = samples[int(each.id)].options["options"]
            letters[int(each.id)] = parse_mmbench(each.answer or "", options) or FAILED
    return [_with(s, letters.get(number)) if s.metric == JUDGED else s for number, s in enumerate(samples)]


def _with(sample: Sample, letter: str | None) -> Sample:
    """A sample with the letter of its answer, which holds for no other answer, such as that of the blind control."""
    judged = {} if letter is None else {sample.answer: letter}
    score = sample.score if letter is None else is_right(letter, sample.references)
    return replace(sample, options={**sample.options, "judged": judged}, score=score)


def _prompt(sample: Sample, hint: str) -> str:
    """VLMEvalKit's instruction and examples in substance, in words of ours."""
    options = "\n".join(f"{letter}. {text}" for letter, text in sample.options["options"].items())
    return (
        "Somebody answered a multiple-choice question in free words. Find the option that means the same as the answer "
        "and reply with its letter alone. Where the answer means none of the options, reply Z.\n\n"
        "Question: What is on the table?\nOptions:\nA. a red cup\nB. a dog\nAnswer: A small mug.\nLetter: A\n\n"
        "Question: What is on the table?\nOptions:\nA. a red cup\nB. a dog\nAnswer: Some flowers.\nLetter: Z\n\n"
        f"Question: {sample.extra.get('question', '')}\nOptions:\n{options}\nAnswer: {sample.answer}\n"
        + f"{hint}\n" * bool(hint)
        + "Letter:"
    )
