"""Captions as the Penn Treebank tokenizer of pycocoevalcap gives them."""

import json
from pathlib import Path

import pytest

from polymodal.metrics.ptb_tokenizer import tokenize, tokenize_caption

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = json.loads((GOLDEN / "ptb_tokenizer.json").read_text(encoding="utf-8"))["cases"]
CAPTIONS = json.loads((GOLDEN / "cider.json").read_text(encoding="utf-8"))["cases"]


def test_golden_as_one_file() -> None:
    given = tokenize([case["prediction"] for case in CASES])
    assert given == [case["tokenized"] for case in CASES]


@pytest.mark.parametrize("case", CASES[:-1], ids=lambda case: case["prediction"])
def test_golden_one_by_one(case: dict[str, str]) -> None:
    # All but the last: at the end of its file the reference parts "'ve" from its apostrophe, and nowhere else.
    assert tokenize_caption(case["prediction"]) == case["tokenized"]


def test_golden_captions() -> None:
    for case in CAPTIONS:
        assert tokenize_caption(case["prediction"]) == case["tokenized_prediction"]
        assert tokenize(case["references"]) == case["tokenized_references"]


# What the lexer's rules say, beyond the golden cases.
RULES = {
    # words
    "DON'T don’t ain't CANNOT Gonna lemme": "do n't do n't ai n't can not gon na lem me",
    "She'll I'd've y'all ma'am O'Brien's": "she 'll i 'd 've y' all ma'am o'brien 's",
    "rock'n'roll 'n' goin' ol' dogs' 'em 'til": "rock 'n' roll 'n' goin ol' dogs 'em 'til",
    "'twas the '90s, '08 and 1960s": "'t was the '90s '08 and 1960s",
    "a soft\xadhyphen, \xad": "a softhyphen",
    "caf&eacute; 中文 naïve": "caf&eacute; 中文 naïve",
    # hyphens, slashes and dashes
    "black-and-white x-ray non-U.S. pro- a--b ---- -----": "black-and-white x-ray non-u.s. pro- a b -----",
    "and/or 24/7 w/o / red/white/blue a‑b a_b": "and/or 24/7 w/o / red/white/blue a‑b a_b",
    # abbreviations
    "Mr. Smith of St. Ives vs. Co. B, Inc.": "mr. smith of st. ives vs. co. b inc.",
    "ill. Ill. miss. Miss. MFG. Mfg.": "ill ill. miss miss. mfg mfg.",
    "on No. 5, fig. 2, page no. five": "on no. 5 fig. 2 page no five",
    "Plan A. The man. Plan B. boy. The U.S. The U.S.": "plan a the man plan b. boy the u.s. the u.s.",
    "C++ and C# and f#": "c++ and c# and f#",
    # numbers and money
    "$5.00, US$ 5, £3 €7 5¢ #1 50%": "$ 5.00 us$ 5 # 3 $ 7 5 cents # 1 50 %",
    "1 1/2 cups, 2½, ⅓, -5 +3 .5 1,2": "1\xa01/2 cups 2 1/2 1/3 -5 +3 .5 1,2",
    "12/25/2010 at 10:30pm (555) 123-4567": "12/25/2010 at 10:30 pm -lrb-555-rrb-\xa0123-4567",
    "x² 6'2\" 2x4 3-D": "x ² 6 2 2x4 3-d",
    # punctuation
    "what?! wow!!! no! ... . . . … end.": "what ?! wow !!! no end",
    "“hi” ‘hi’ \"hi\" 'hi' ``hi'' “” «a»": "hi hi hi hi hi ``'' a",
    "( ) [ ] { } -LRB- <b> </b> < >": "-lrb- -rrb- -lsb- -rsb- -lcb- -rcb- -lrb- <b> </b> < >",
    "* ** @ @@ _ + = | \\ ~ ^ & &amp; R&B R&amp;B": "* ** @ @@ _ + = | \\ ~ ^ & & r&b r&b",
    "&lt; &gt; &quot; &nbsp; &mdash; &#39;": "< > &#39;",
    "<a href=\"x y\">z</a>": "<a\xa0href=\"x\xa0y\"> z </a>",
    "、 。 ！ ¿que? ©®™ → •": "、 。 ！ ¿ que © ® ™ → •",
    # the net
    "www.foo.com/bar, foo.org. Foo.jpg, a@b.com": "www.foo.com/bar foo.org foo.jpg a@b.com",
    "see https://x.y/z?q=1. @me #sun": "see https://x.y/z?q=1 @me #sun",
    # faces and emoji
    "fun :) :-( ;D ^_^ 8) 🙂👍🏽 x": "fun :-rrb- :--lrb- ;d ^_^ 8 -rrb- x",
    "❤️ ☺ ✨": "❤ ☺ ✨",
}  # fmt: skip


@pytest.mark.parametrize("caption", RULES)
def test_rules(caption: str) -> None:
    assert tokenize_caption(caption) == RULES[caption]


def test_the_line_that_follows_decides() -> None:
    assert tokenize(["Plan A.", "The man"]) == ["plan a", "the man"]
    assert tokenize(["Plan A.", "dogs"]) == ["plan a.", "dogs"]
    assert tokenize(["they've", "they've"]) == ["they 've", "they ve"]


def test_a_caption_stays_one_line() -> None:
    assert tokenize(["a\nb\r\nc\u2028d", "", " ", "<a b='", "it's"]) == ["a b c d", "", "", "< a b =", "it 's"]
    assert tokenize([]) == []


def test_long_text_without_a_space() -> None:
    assert tokenize(["a." * 5000]) == ["a." * 5000]
    assert tokenize(["🙂" * 5000]) == [""]
