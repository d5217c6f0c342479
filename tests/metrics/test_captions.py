"""CIDEr-D, BLEU and ROUGE-L as pycocoevalcap gives them, of the golden corpora and of the cases that surprise."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from polymodal.errors import ConfigError, DataError
from polymodal.metrics import CORPUS_METRICS, score
from polymodal.metrics.captions import bleu, caption_scores, cider, rouge_l

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "cider.json").read_text(encoding="utf-8"))
CORPORA: dict[str, list[dict[str, Any]]] = {}
for case in GOLDEN["cases"]:
    CORPORA.setdefault(case["corpus"], []).append(case)

SURF = ["A man riding a wave on top of a surfboard.", "A surfer rides a large wave."]
DOGS = ["Two dogs are playing with a frisbee.", "Dogs playing in a field."]


def corpus(name: str) -> tuple[list[str], list[list[str]]]:
    return [case["prediction"] for case in CORPORA[name]], [case["references"] for case in CORPORA[name]]


@pytest.mark.parametrize("name", CORPORA)
def test_golden_images(name: str) -> None:
    said, gold = corpus(name)
    cases = CORPORA[name]
    assert cider(said, gold) == pytest.approx([case["score"] for case in cases], abs=1e-6)
    plain = cider(said, gold, variant="vlmevalkit")
    assert plain == pytest.approx([case["score_no_ptb_tokenizer"] for case in cases], abs=1e-6)
    for prediction, references, case in zip(said, gold, cases):
        assert rouge_l(prediction, references) == pytest.approx(case["rouge_l"], abs=1e-6)
        bleus = [score("bleu", prediction, references, n=n) for n in (1, 2, 3, 4)]
        assert bleus == pytest.approx(case["bleu_per_image"], abs=1e-6)


@pytest.mark.parametrize("golden", GOLDEN["aggregates"], ids=lambda golden: golden["corpus"])
def test_golden_corpora(golden: dict[str, Any]) -> None:
    said, gold = corpus(golden["corpus"])
    scores = caption_scores(said, gold)
    expected = {"cider": golden["cider"], "rouge_l": golden["rouge_l"]}
    expected |= {f"bleu_{n}": value for n, value in enumerate(golden["bleu"], 1)}
    assert scores == pytest.approx(expected, abs=1e-6)
    plain = caption_scores(said, gold, variant="vlmevalkit")
    assert plain["cider"] == pytest.approx(golden["cider_no_ptb_tokenizer"], abs=1e-6)
    per_image = CORPUS_METRICS["cider"](said, gold)
    assert sum(per_image) / len(per_image) == pytest.approx(golden["cider"], abs=1e-6)


def test_one_image_has_no_cider() -> None:
    assert cider([SURF[0]], [SURF]) == [0.0]


def test_cider_of_an_image_depends_on_the_others() -> None:
    alone = cider([SURF[0], DOGS[0]], [SURF, DOGS])[0]
    assert cider([SURF[0], DOGS[0], "A man."], [SURF, DOGS, ["A man riding a horse."]])[0] != pytest.approx(alone)
    assert cider([SURF[0], DOGS[0]], [[SURF[0]], [DOGS[0]]]) == pytest.approx([10, 10])


def test_a_long_caption_scores_next_to_nothing() -> None:
    long = " ".join([SURF[0].rstrip(".")] * 4)
    short, drawn_out = (cider([caption, DOGS[0]], [SURF, DOGS])[0] for caption in (SURF[0], long))
    assert short > 4
    assert drawn_out < 1e-3


def test_case_and_punctuation_count_only_to_vlmevalkit() -> None:
    shouted = [SURF[0].upper(), DOGS[0].upper()]
    assert cider(shouted, [SURF, DOGS]) == cider([SURF[0], DOGS[0]], [SURF, DOGS])
    assert cider(shouted, [SURF, DOGS], variant="vlmevalkit")[1] == 0
    assert cider(shouted, [SURF, DOGS], variant="lmms_eval") == cider(shouted, [SURF, DOGS])
    assert rouge_l("A CAT", ["a cat."]) == 1
    assert rouge_l("A CAT", ["a cat."], variant="vlmevalkit") == 0


def test_brackets_and_exclamations_are_words_and_emoji_are_not() -> None:
    assert bleu("(cat)", ["-LRB- cat -RRB-"], n=1) == pytest.approx(1)
    assert bleu("cat !!!", ["cat"], n=1) == pytest.approx(0.5)
    assert bleu("cat 🙂 ...", ["cat"], n=1) == pytest.approx(1)


def test_nothing_said() -> None:
    assert cider(["", DOGS[0]], [SURF, DOGS])[0] == 0
    assert bleu("", SURF) == 0
    assert rouge_l("", SURF) == 0
    assert rouge_l("...", ["🙂"]) == 1  # two empty captions are the same caption to the reference
    assert not any(caption_scores(["", ""], [SURF, DOGS])[f"bleu_{n}"] for n in (1, 2, 3, 4))


def test_the_nearest_length_counts_and_the_shorter_of_two() -> None:
    # Four words, references of three and five: the one of three, so no penalty.
    assert bleu("a b c d", ["a b c", "a b c d e"], n=1) == pytest.approx(1)
    assert bleu("a b c d", ["a b c d e f g"], n=1) == pytest.approx(0.4723665527)  # exp(1 - 7/4)


def test_a_thousand_images_take_no_minute() -> None:
    words = " ".join(reference for case in GOLDEN["cases"] for reference in case["references"]).split()
    captions = [" ".join(words[place : place + 11]) for place in range(len(words) - 11)]
    said = [captions[i % len(captions)] for i in range(1000)]
    gold = [[captions[(7 * i + k) % len(captions)] for k in range(5)] for i in range(1000)]
    start = time.perf_counter()
    caption_scores(said, gold)
    assert time.perf_counter() - start < 20  # 0.6 s on one core


def test_what_cannot_be_scored() -> None:
    with pytest.raises(DataError, match="2 captions but references of 1 images"):
        cider(["a", "b"], [["a"]])
    with pytest.raises(DataError, match="0 captions"):
        caption_scores([], [])
    with pytest.raises(DataError, match="image 1: the references are 'a dog'"):
        cider(["a", "b"], [["a"], "a dog"])
    with pytest.raises(DataError, match=r"image 0: the references are \[\]"):
        caption_scores(["a"], [[]])
    with pytest.raises(ConfigError, match="did you mean 'vlmevalkit'"):
        cider(["a"], [["a"]], variant="vlm_eval_kit")
    with pytest.raises(ConfigError, match=r"whole corpus: CORPUS_METRICS\['cider'\]"):
        score("cider", "a", ["a"])
    with pytest.raises(ConfigError, match="n is 5"):
        bleu("a", ["a"], n=5)
