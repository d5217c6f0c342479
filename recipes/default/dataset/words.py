"""The words of the default data set: which nouns it knows, how they are spelt, what counts as the same answer.

The nouns live in `lexicon.txt` beside this file, one category a paragraph, with hypernyms and synonyms: the same
table decides captions ("an owl"), categories ("animal"), which yes/no questions are fair (an owl is a bird, so "is
there a bird?" is never answered with no) and which answers are accepted. A picture whose name holds no noun of the
table gets no questions, only its caption, and a drawing without one is left out: precision before recall.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

SHORT = "Answer the question using a single word or phrase."
SENTENCE = "Answer in a whole sentence."

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 35),
    "orange": (245, 135, 20),
    "yellow": (250, 220, 40),
    "green": (35, 150, 60),
    "blue": (35, 80, 200),
    "purple": (125, 45, 160),
    "pink": (245, 140, 185),
    "brown": (125, 75, 35),
    "black": (15, 15, 15),
    "white": (252, 252, 252),
    "gray": (135, 135, 135),
}
COLOUR_SYNONYMS = {"gray": ["grey"], "purple": ["violet"], "blue": ["dark blue", "light blue"], "green": ["dark green"]}
SHAPES = ["circle", "square", "triangle", "star", "diamond", "cross", "heart", "ring"]
SHAPE_SYNONYMS = {"circle": ["dot", "disk", "round"], "square": ["box"], "diamond": ["rhombus"], "ring": ["circle"]}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}

ZH_COLOURS = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
    "brown": "棕色",
    "black": "黑色",
    "white": "白色",
    "gray": "灰色",
}
ZH_NUMBERS = {1: "一", 2: "两", 3: "三", 4: "四", 5: "五", 6: "六"}
ZH_CATEGORIES = {
    "animal": "动物",
    "food": "食物",
    "plant": "植物",
    "vehicle": "交通工具",
    "tool": "工具",
    "clothing": "衣物",
    "instrument": "乐器",
    "building": "建筑",
    "furniture": "家具",
    "shape": "图形",
}
ZH_SHAPES = {
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星形",
    "diamond": "菱形",
    "cross": "十字",
    "heart": "心形",
    "ring": "圆环",
}
ZH_NOUNS = {
    "dog": "狗",
    "cat": "猫",
    "bird": "鸟",
    "fish": "鱼",
    "horse": "马",
    "cow": "牛",
    "sheep": "羊",
    "pig": "猪",
    "rabbit": "兔子",
    "elephant": "大象",
    "lion": "狮子",
    "tiger": "老虎",
    "bear": "熊",
    "monkey": "猴子",
    "duck": "鸭子",
    "chicken": "鸡",
    "frog": "青蛙",
    "butterfly": "蝴蝶",
    "car": "汽车",
    "truck": "卡车",
    "bus": "公共汽车",
    "train": "火车",
    "airplane": "飞机",
    "boat": "船",
    "bicycle": "自行车",
    "apple": "苹果",
    "banana": "香蕉",
    "orange": "橙子",
    "strawberry": "草莓",
    "lemon": "柠檬",
    "bread": "面包",
    "cake": "蛋糕",
    "flower": "花",
    "tree": "树",
    "house": "房子",
    "book": "书",
    "key": "钥匙",
    "clock": "钟",
    "hat": "帽子",
    "shoe": "鞋",
    "chair": "椅子",
    "table": "桌子",
    "cup": "杯子",
    "guitar": "吉他",
    "ball": "球",
    "star": "星星",
    "moon": "月亮",
    "sun": "太阳",
    "hammer": "锤子",
    "umbrella": "雨伞",
}


@functools.cache
def fixes(file: str = "fixes.txt") -> dict[str, dict[str, str]]:
    """Read `fixes.txt`, or another file of tables beside this one.

    Args:
        file: Its name.

    Returns:
        The tables `renames`, `captions`, `nouns`; `other things` and `written words` are the keys of theirs.
    """
    tables: dict[str, dict[str, str]] = {}
    for line in Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            table = tables.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            left, equals, right = line.partition(" = ")
            table.update({left: right} if equals else dict.fromkeys(left.split(), ""))
    return tables


@functools.cache
def zh_nouns() -> dict[str, str]:
    """The Chinese names of nouns in `zh_nouns.txt` (from the Unicode CLDR annotations, and by hand)."""
    return {**fixes("zh_nouns.txt")["nouns"], **ZH_NOUNS}


@dataclass(frozen=True)
class Noun:
    """One noun of the table, with everything the generator needs to say about it."""

    name: str
    category: str
    parent: str | None
    synonyms: tuple[str, ...]
    near: tuple[str, ...]  # wrong as answers, yet too close for a fair "no"
    article: str  # "" mass noun, "pair" scissors, "some" grapes, "the" Eiffel Tower, "a" everything else


@functools.cache
def lexicon() -> dict[str, Noun]:
    """Every noun: those of `lexicon.txt`, then those of `lexicon_more.txt` that joined later.

    Returns:
        Noun by its name, in the files' order.
    """
    first = first_lexicon()
    return first | {name: noun for name, noun in _read_lexicon("lexicon_more.txt").items() if name not in first}


@functools.cache
def first_lexicon() -> dict[str, Noun]:
    """The nouns of `lexicon.txt` alone, which the first sources are read with, so that they stay what they were."""
    return _read_lexicon("lexicon.txt")


def _read_lexicon(file: str) -> dict[str, Noun]:
    nouns: dict[str, Noun] = {}
    category = ""
    for line in Path(__file__).with_name(file).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            continue
        if line.startswith("["):
            category = line.strip("[] ")
            continue
        for entry in filter(None, (e.strip() for e in line.split(","))):
            article = {"~": "", "+": "pair", "*": "some", "^": "the"}.get(entry[0], "a")
            body, _, near = entry.lstrip("~+*^").partition("!")
            left, _, synonyms = body.partition("=")
            name, _, parent = left.partition("<")
            if name not in nouns:
                same, close = (tuple(filter(None, part.split("/"))) for part in (synonyms, near))
                nouns[name] = Noun(name, category, parent or None, same, close, article)
    return nouns


def article(word: str) -> str:
    """Choose "a" or "an", by sound as far as the first letters tell.

    Args:
        word: The word that follows.

    Returns:
        The article.
    """
    first = word.lower()
    if first.startswith(("uni", "eu", "one", "use", "uk", "us ", "ufo")):
        return "a"
    return "an" if first[:1] in "aeiou" or first.startswith(("hour", "honest")) else "a"


def plural(name: str) -> str:
    """The plural of a noun of the table ("knife" -> "knives").

    Args:
        name: Singular, possibly of several words.

    Returns:
        The plural; a plural or a pair is returned as it is.
    """
    noun = lexicon().get(name)
    if noun is not None and noun.article in ("pair", "some"):
        return name
    irregular = {
        "mouse": "mice",
        "goose": "geese",
        "sheep": "sheep",
        "fish": "fish",
        "deer": "deer",
        "ox": "oxen",
        "foot": "feet",
        "tooth": "teeth",
        "man": "men",
        "woman": "women",
        "child": "children",
        "leaf": "leaves",
        "knife": "knives",
        "loaf": "loaves",
        "wolf": "wolves",
        "elf": "elves",
        "die": "dice",
        "cactus": "cacti",
        "fireman": "firemen",
        "snowman": "snowmen",
        "bison": "bison",
        "shrimp": "shrimp",
        "squid": "squid",
        "scarf": "scarves",
        "calf": "calves",
        "policeman": "policemen",
        "trout": "trout",
        "aircraft": "aircraft",
        "bookshelf": "bookshelves",
        "photo": "photos",
        "piano": "pianos",
        "kangaroo": "kangaroos",
        "flamingo": "flamingos",
        "dodo": "dodos",
        "cello": "cellos",
        "rhino": "rhinos",
        "hippo": "hippos",
        "yo-yo": "yo-yos",
        "sombrero": "sombreros",
        "burrito": "burritos",
        "taco": "tacos",
        "radio": "radios",
        "banjo": "banjos",
        "avocado": "avocados",
        "dingo": "dingos",
        "goldfish": "goldfish",
        "pufferfish": "pufferfish",
        "businessman": "businessmen",
        "businesswoman": "businesswomen",
    }
    head, _, last = name.rpartition(" ")
    if last in irregular:
        word = irregular[last]
    elif re.search(r"[^aeiou]y$", last):
        word = last[:-1] + "ies"
    elif re.search(r"(s|x|z|ch|sh|[^aeiou]o)$", last):
        word = last + "es"
    else:
        word = last + "s"
    return f"{head} {word}".strip()


_NAMES = {
    name.lower(): name
    for name in (
        "Taj Mahal", "Eiffel Tower", "Leaning Tower of Pisa", "Statue of Liberty", "Christ the Redeemer", "Parthenon",
        "Great Wall of China", "Mount Rushmore", "Mount Fuji", "Colosseum", "Kaaba", "Milky Way", "Jupiter", "Saturn",
        "Mars", "Venus", "Mercury", "Uranus", "Neptune", "Rubik's cube", "German shepherd", "Japanese castle",
        "Japanese dolls", "Hindu temple", "Shinto shrine", "DVD", "CD player", "DNA", "USB stick", "GPS receiver",
    )
}  # fmt: skip


def proper(name: str) -> str:
    """Give the names in a noun their capitals ("christmas tree" -> "Christmas tree").

    Args:
        name: A noun of the table.

    Returns:
        The noun as it is written inside a sentence.
    """
    for small, large in (("christmas", "Christmas"), ("santa claus", "Santa Claus"), ("santa hat", "Santa hat")):
        name = name.replace(small, large)
    return _NAMES.get(name, name)


def phrase(name: str, adjective: str = "") -> str:
    """A noun with its article and perhaps an adjective: "an owl", "a pair of scissors", "some grapes", "bread".

    Args:
        name: A noun of the table (a word outside it is treated as countable).
        adjective: Put before the noun.

    Returns:
        The phrase, lower case, without a full stop.
    """
    noun = lexicon().get(name)
    words = f"{adjective} {proper(name)}".strip()
    kind = noun.article if noun else "a"
    if kind == "":
        return words
    if kind == "pair":
        return f"a pair of {words}"
    if kind in ("some", "the"):
        return f"{kind} {words}"
    return f"{article(words)} {words}"


def number_phrase(count: int, name: str, adjective: str = "") -> str:
    """Count things: "three cats", "two red circles"; one is `phrase`.

    Args:
        count: How many, 1 to 5.
        name: Singular noun.
        adjective: Put before the noun.

    Returns:
        The phrase, lower case.
    """
    if count == 1:
        return phrase(name, adjective)
    return " ".join(filter(None, (NUMBERS[count], adjective, proper(plural(name)))))


def ancestors(name: str) -> list[str]:
    """The nouns that name this thing more generally, nearest first (beagle -> dog).

    Args:
        name: A noun.

    Returns:
        The chain of parents, without the category.
    """
    chain: list[str] = []
    noun = lexicon().get(name)
    while noun is not None and noun.parent and noun.parent not in chain:
        chain.append(noun.parent)
        noun = lexicon().get(noun.parent)
    return chain


def related(first: str, second: str) -> bool:
    """Whether a picture of the first might rightly be called the second, or the other way round.

    Args:
        first: A noun.
        second: A noun.

    Returns:
        True when they share an accepted name, or one is listed as near the other.
    """

    def wide(name: str) -> set[str]:
        near = [close for one in (name, *ancestors(name)) if (noun := lexicon().get(one)) for close in noun.near]
        return {*accepted(name), *near}

    return bool(set(accepted(first)) & wide(second) or wide(first) & set(accepted(second)))


GROUPS = frozenset({"bird", "fruit", "vegetable", "toy", "rodent", "insect", "animal", "food", "tool", "vehicle"})
"""Parents that name a group of things: right for "is it a bird?", too little for "what is this?"."""


def names_of(name: str) -> list[str]:
    """Every name that is right for "What is this?" without falling back on a group.

    Args:
        name: A noun.

    Returns:
        As `accepted`, without the `GROUPS` unless the noun is one of them.
    """
    return [word for word in accepted(name) if word == name or not {word, _singular(word)} & (GROUPS - {name})]


def _singular(word: str) -> str:
    return next((group for group in GROUPS if plural(group) == word), word)


def accepted(name: str) -> list[str]:
    """Every word that a picture of the noun is rightly called, groups such as "bird" included.

    Args:
        name: A noun.

    Returns:
        The name, its plural, synonyms and parents with theirs; no duplicates, the name first.
    """
    answers: list[str] = []
    for one in [name, *ancestors(name)]:
        noun = lexicon().get(one)
        for word in (one, *(noun.synonyms if noun else SHAPE_SYNONYMS.get(one, []))):
            is_plural = word.endswith("s") and not word.endswith(("ss", "us", "is"))
            answers += [word] if is_plural else [word, plural(word)]
    return list(dict.fromkeys(answers))


@functools.cache
def _spellings(more: bool = False) -> dict[tuple[str, ...], str]:
    table: dict[tuple[str, ...], str] = {}
    nouns = lexicon() if more else first_lexicon()
    for name in nouns:
        for word in (name, plural(name)):
            table.setdefault(tuple(re.split(r"[ -]", word)), name)
    for spelt, name in fixes()["renames"].items():
        if name in nouns:
            table[tuple(spelt.split())] = name
    return table


def find_noun(words: list[str], *, last: bool = True, more: bool = False) -> tuple[str, int, int] | None:
    """The noun of the table among a name's words, the longest match at the end (or the start).

    Args:
        words: Lower-case words.
        last: Take the match that ends last (captions: the head comes last) or the one that starts first (file names).
        more: Know the nouns that joined later too.

    Returns:
        (noun, start, end) as word positions, or None.
    """
    table = _spellings(more)
    spans = [(start, end) for start in range(len(words)) for end in range(start + 1, min(start + 4, len(words)) + 1)]
    spans.sort(key=lambda s: (-s[1], s[0]) if last else (s[0], -s[1]))
    for start, end in spans:
        name = table.get(tuple(words[start:end]))
        if name is not None:
            return name, start, end
    return None


def sentence(text: str) -> str:
    """Upper-case the first letter and end with a full stop.

    Args:
        text: A phrase.

    Returns:
        The sentence.
    """
    text = text.strip()
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?")) else text + "."
