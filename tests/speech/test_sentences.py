"""Sentences out of a stream: abbreviations, numbers, quotes, lists, other scripts, any way of cutting the stream."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymodal.speech.sentences import LONGEST, SentenceSplitter

CASES = {
    "plain": ["It is a cat.", "It sleeps.", "Does it dream?", "Yes!", "Often."],
    "titles": ["Dr. Smith met Mr. and Mrs. Jones on St. James Street.", "They talked."],
    "latin": ["Use fruit, e.g. apples, i.e. what grows on trees, etc. as you like.", "Then stop."],
    "etc at the end": ["He sells tools, nails, etc.", "She buys them."],
    "company": ["It was made by Acme Inc. and Foo Ltd. in May.", "It works."],
    "initials": ["J. R. R. Tolkien wrote it.", "George W. Bush did not."],
    "country": ["The U.S. Army came.", "He lives in the U.S.", "He likes it."],
    "hours": ["It opens at 9 a.m. and closes at 5 p.m.", "Come early."],
    "decimals": ["Pi is 3.14159, and a third is .333 or so.", "It costs $3.50.", "Version 2.0 is out."],
    "thousands": ["There are 1,000,000 of them.", "In 1999.", "Then none."],
    "numbers": ["See Fig. 3 and No. 5 on pp. 7 to 9.", "No.", "I do not see it."],
    "names with dots": ["Open a.jpg on example.com/index.html now.", "Done."],
    "ellipsis": ["Well... maybe not.", "I wonder...", "Who knows?"],
    "one-character ellipsis": ["Well… maybe.", "I wonder…", "Who knows?"],
    "marks": ["What?!", "No way!!", "It is true."],
    "quotes": ['He said "Stop."', "She did.", '"Really?" she asked.', "“Yes.”", "(It was late.)", "They left."],
    "chinese": ["这是一只猫。", "它在睡觉！", "你喜欢吗？", "他说：“好的。”", "我同意。"],
    "chinese numbers": ["圆周率是3.14。", "完。"],
    "japanese": ["これは猫です。", "かわいいですね！", "はい。"],
    "mixed": ["我用的是 GPT v4.1 模型。", "It works.", "很好。"],
    "hindi": ["यह एक बिल्ली है।", "वह सो रही है।"],
    "arabic": ["هل هذه قطة؟", "نعم."],
    "german": ["Das kostet z.B. 3,50 Euro bzw. weniger.", "Schön!"],
    "french": ["Qu'est-ce que c'est ?", "C'est un chat."],
    "no mark": ["A cat"],
}


def split(text: str, cuts: list[int] | None = None, longest: int = LONGEST) -> list[str]:
    """Push a text in pieces, one character each where no cuts are given."""
    splitter, found = SentenceSplitter(longest), []
    places = [0, *(cuts if cuts is not None else range(1, len(text))), len(text)]
    for start, end in pairwise(places):
        found += splitter.push(text[start:end])
    return found + splitter.finish()


@pytest.mark.parametrize("name", CASES)
def test_a_text_is_cut_into_its_sentences(name: str) -> None:
    gap = "" if name in ("chinese", "japanese", "chinese numbers") else " "
    text = gap.join(CASES[name])
    assert split(text, []) == CASES[name]
    assert split(text) == CASES[name]
    for seed in range(10):
        cuts = sorted(random.Random(seed).choices(range(len(text) + 1), k=5))
        assert split(text, cuts) == CASES[name]


def test_lines() -> None:
    text = "Here are\nthree things:\n- a cat\n- a dog\n1. First of all\n2. Second\n\nA heading\n\nThe end\nof it."
    wanted = ["Here are three things:", "- a cat", "- a dog", "1. First of all", "2. Second", "A heading"]
    assert split(text) == split(text, []) == [*wanted, "The end of it."]
    assert split("One.\r\n\r\nTwo. \t \u3000Three.\n \n") == ["One.", "Two.", "Three."]
    assert split("") == split(" \n\n\t ") == []


def test_a_sentence_comes_as_soon_as_it_is_certain() -> None:
    splitter = SentenceSplitter()
    assert splitter.push("A cat. It") == ["A cat."]
    assert splitter.push(" sleeps") == []
    assert splitter.push("。") == [] and splitter.push("好") == ["It sleeps。"]  # a quote could have followed
    assert splitter.finish() == ["好"] and splitter.finish() == []


def test_a_long_sentence_is_cut_at_a_comma_else_between_words_else_anywhere() -> None:
    words = "word " * 40 + "end"
    found = split(words, longest=50)
    assert " ".join(found) == words and max(map(len, found)) <= 50 and len(found) > 3
    assert split("a" * 120, longest=50) == ["a" * 50, "a" * 50, "a" * 20]
    with_comma = "one two three four five six seven, eight nine ten eleven"
    assert split(with_comma, longest=50) == ["one two three four five six seven,", "eight nine ten eleven"]
    assert split("The sum is 1,000,000 and some more of it, and then no end of it", longest=45)[0].endswith("it,")
    runs = "!" * 500 + " " * 500 + "ok." + "\n" * 500
    assert split(runs, [])[-1] == split(runs)[-1] == "ok."


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [*"aB1 .!?\n\"'”)(…。？，-:", "Mr.", "U.S.", "etc.", "e.g.", "No.", "The ", " It", "\n\n", "3.5"]
        ),
        max_size=60,
    ).map("".join),
    st.randoms(use_true_random=False),
)
def test_the_cuts_of_the_stream_change_nothing(text: str, chance: random.Random) -> None:
    whole = split(text, [], longest=30)
    assert split(text, longest=30) == whole
    assert split(text, sorted(chance.choices(range(len(text) + 1), k=4)), longest=30) == whole
    assert "".join("".join(whole).split()) == "".join(text.split())  # nothing lost
