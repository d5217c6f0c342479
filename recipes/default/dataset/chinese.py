"""Questions and answers in Chinese about natural scenes, for things of which the Chinese name is known."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from pathlib import Path

from recipes.default.dataset import asking, grounds, questions, words
from recipes.default.dataset.questions import QA, World
from recipes.default.dataset.studio import Spot, View, related
from recipes.default.dataset.where import relation

Names = Mapping[str, str]  # noun of the lexicon -> Chinese

# The measure word of a thing is found by noun (`measures.txt`), else by the end of its Chinese name within some
# categories, else by the nouns above it, else by category, else the general one.
_BY_ENDING = {
    "animal": dict.fromkeys("鱼蛇", "条") | dict.fromkeys("牛猪", "头"),
    "plant": dict.fromkeys("花", "朵") | dict.fromkeys("树", "棵"),
    "vehicle": dict.fromkeys("船艇舰", "艘") | dict.fromkeys("车", "辆") | {"机": "架"},
    "tool": dict.fromkeys("刀剑锯锤锁匙斧铲勺叉刷钳帚槌枪", "把") | dict.fromkeys("笔", "支"),
    "clothing": dict.fromkeys("帽盔", "顶")
    | dict.fromkeys("裤裙巾", "条")
    | dict.fromkeys("衣衫", "件")
    | {"鞋": "只"},
    "instrument": dict.fromkeys("琴号", "把") | dict.fromkeys("笛管", "支") | {"鼓": "面"},
    "furniture": dict.fromkeys("椅", "把") | dict.fromkeys("桌床", "张") | {"灯": "盏"},
    "electronics": dict.fromkeys("机脑", "台") | {"灯": "盏"},
    "building": dict.fromkeys("塔桥屋楼碑", "座"),
    "kitchen": dict.fromkeys("壶刀勺", "把"),
}
_BY_CATEGORY = {"animal": "只", "vehicle": "辆", "building": "座"}
_SIDES = {"left": "左边", "right": "右边", "top": "上面", "bottom": "下面"}
_CELLS = {
    "top left corner": "左上角",
    "top": "上面",
    "top right corner": "右上角",
    "left": "左边",
    "middle": "中间",
    "right": "右边",
    "bottom left corner": "左下角",
    "bottom": "下面",
    "bottom right corner": "右下角",
}
_NUMBERS = {1: "一", 2: "两", 3: "三", 4: "四", 5: "五", 6: "六"}
_TURNED = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


@functools.cache
def _measures() -> dict[str, str]:
    lines = Path(__file__).with_name("measures.txt").read_text(encoding="utf-8").splitlines()
    split = [line.split(" = ") for line in lines if not line.startswith("#")]
    return {noun: unit for unit, nouns in split for noun in nouns.split(", ")}


def name_of(spot: Spot, names: Names) -> str | None:
    """The Chinese noun."""
    if spot.source.origin == "shapes":
        return words.ZH_SHAPES[spot.noun]
    return getattr(spot.source, "zh_noun", None) or names.get(spot.noun)


def measure(spot: Spot, name: str) -> str:
    """Its measure word."""
    if spot.source.origin == "shapes":
        return "个"
    nouns = (spot.noun, *words.ancestors(spot.noun))
    category = spot.source.category or ""
    by_ending = _BY_ENDING.get(category, {}).get(name[-1])
    known = _measures()
    by_noun = next((known[noun] for noun in nouns if noun in known), None)
    return known.get(spot.noun) or by_ending or by_noun or _BY_CATEGORY.get(category, "个")


def phrase(spot: Spot, names: Names, count: int = 1) -> str | None:
    """As in "两只红色的猫"; None where the noun has no Chinese name."""
    name = name_of(spot, names)
    if name is None:
        return None
    colour = f"{words.ZH_COLOURS[spot.colour]}的" if spot.painted and spot.colour else ""
    return f"{_NUMBERS[count]}{measure(spot, name)}{colour}{name}"


def listed(view: View, names: Names) -> str | None:
    """All that a scene shows; None where a name is missing."""
    parts = [phrase(s, names, n) for s, n in asking.groups(view)]
    if not parts or None in parts:
        return None
    *most, last = [p for p in parts if p]
    return "、".join(most) + "和" + last if most else last


def _qa(question: str, long: str, *accepted: str) -> QA:
    return QA("zh", question, long if long.endswith("。") else long + "。", accepted[0], accepted)


def _name(rng: random.Random, view: View, world: World, names: Names) -> QA | None:
    if len(asking.groups(view)) != 1:
        return None
    spot, count = asking.groups(view)[0]
    name, said = name_of(spot, names), phrase(spot, names, count)
    if name is None or said is None:
        return None
    return _qa(rng.choice(["这是什么？", "图中是什么？", "图片里有什么？", "你看到了什么？"]), said, name, said)


def _caption(rng: random.Random, view: View, world: World, names: Names) -> QA | None:
    said = listed(view, names)
    if said is None:
        return None
    if view.cell:
        said = f"{said}在{_CELLS[view.cell]}"
    elif view.picture.back.name and rng.random() < 0.5:
        said = f"{words.ZH_COLOURS[view.picture.back.name]}背景上的{said}"
    return _qa(
        rng.choice(["描述这张图片。", "请描述一下图片。", "这张图片里有什么？", "写一个简短的说明。"]), said, said
    )


def _exists(rng: random.Random, view: View, world: World, names: Names) -> QA | None:
    here = [s for s in view.spots if name_of(s, names)]
    if not here or not all(s.noun for s in view.spots):
        return None
    yes = rng.random() < 0.5
    if yes:
        asked = name_of(rng.choice(here), names)
    else:
        present = {name_of(s, names) for s in view.spots}
        shown = [n for n in world.nouns if n in names and names[n] not in present]
        for _ in range(30):
            noun = rng.choice(shown) if shown else ""
            hidden = grounds.outdoors(view.picture.back) and noun in grounds.OUTDOORS
            if noun and not hidden and not any(related(noun, s.noun) for s in view.spots):
                break
        else:
            return None
        asked = names[noun]
    question = rng.choice(["图中有{}吗？", "图片里有{}吗？", "你看到{}了吗？"]).format(asked)
    if question.startswith("你"):
        return _qa(question, "看到了。" if yes else "没有看到。", "看到了" if yes else "没有看到")
    return _qa(question, "有。" if yes else "没有。", "有" if yes else "没有")


def _count(rng: random.Random, view: View, world: World, names: Names) -> QA | None:
    if view.layout == "several":
        if len(view.spots) == 1:
            return None
        count = len(view.spots)
        return _qa(
            rng.choice(["图中有几样东西？", "图片里有几种东西？"]), f"{_NUMBERS[count]}样", _NUMBERS[count], str(count)
        )
    found = [(s, n) for s, n in asking.groups(view) if s.noun == view.kind]
    if len(found) != 1 or (name := name_of(found[0][0], names)) is None:
        return None
    spot, count = found[0]
    unit = measure(spot, name)
    number = f"{_NUMBERS[count]}{unit}"
    question = rng.choice(["图中有几{}{}？", "图片里有几{}{}？", "有几{}{}？"]).format(unit, name)
    return _qa(question, number, number, _NUMBERS[count], str(count))


def _color(rng: random.Random, view: View, world: World, names: Names) -> QA | None:
    kinds = [s for s, _ in asking.groups(view)]
    nouns = [s.noun for s in kinds]
    options = [(name, s.colour) for s in kinds if s.colour and nouns.count(s.noun) == 1 and (name := name_of(s, names))]
    if view.picture.back.name and (not options or rng.random() < 0.2):
        options = [("背景", view.picture.back.name)]
    if not options:
        return None
    name, colour = rng.choice(options)
    said = words.ZH_COLOURS[colour]
    question = rng.choice(["{}是什么颜色的？", "{}是什么颜色？"]).format(name)
    return _qa(question, said if rng.random() < 0.5 else f"{name}是{said}的", said, said[:-1], f"{name}是{said}的")


def _position(rng: random.Random, view: View, world: World, names: Names) -> QA | None:
    spots = view.spots
    if not spots or len({s.noun for s in spots}) != len(spots) or not all(name_of(s, names) for s in spots):
        return None
    if len(spots) == 1:
        if view.cell is None:
            return None
        place, name = _CELLS[view.cell], name_of(spots[0], names)
        return _qa(f"{name}在哪里？", rng.choice([place, f"在{place}", f"{name}在{place}"]), place, f"在{place}")
    pairs = [(a, b) for a in spots for b in spots if a is not b and relation(a, b)]
    if not pairs:
        return None
    target, other = rng.choice(pairs)
    side = relation(target, other) or ""
    what, beside = name_of(target, names), name_of(other, names)
    if len(spots) == 2 and rng.random() < 0.5:
        return _qa(f"{beside}的{_SIDES[side]}是什么？", phrase(target, names) or "", what or "")
    first, second = rng.sample([_SIDES[side], _SIDES[_TURNED[side]]], 2)
    said = _SIDES[side]
    return _qa(f"{what}在{beside}的{first}还是{second}？", said, said, f"在{said}")


def _category(rng: random.Random, view: View, world: World, names: Names) -> QA | None:
    if len(view.spots) != 1:
        return None
    source = view.spots[0].source
    if source.category == "animal" and rng.random() < 0.5:
        return None
    if source.category not in words.ZH_CATEGORIES or questions.category_phrase(source) is None:
        return None
    return questions._zh_category(rng, source.category)


def _ocr(rng: random.Random, view: View, world: World, names: Names) -> QA | None:
    sheet = view.sheet
    if sheet is None:
        return None
    text = " ".join(sheet.lines)
    asked = ["图中写着什么？", "上面写着什么？", "图片里的文字是什么？"]
    if sheet.paper:
        asked.append("牌子上写着什么？")
    if " " not in text:
        asked.append("写的是什么数字？" if text.isdigit() else "写的是什么单词？")
    return _qa(rng.choice(asked), f"写着“{text}”", text, text.lower(), f"写着“{text}”")


def _odd(rng: random.Random, view: View, world: World, names: Names) -> QA | None:
    qa = asking.ask_odd(rng, view, world)
    spot = min(asking.groups(view), key=lambda g: g[1])[0] if qa else None
    if spot is None or (name := name_of(spot, names)) is None:
        return None
    return _qa(rng.choice(["哪一个和别的不一样？", "哪一个与众不同？"]), name, name, phrase(spot, names) or name)


def _unsure(rng: random.Random, view: View, world: World, names: Names) -> QA | None:
    if view.layout != "unsure":
        return None
    return _qa(
        rng.choice(["这是什么？", "图中是什么？"]), rng.choice(["我不确定。", "我不确定。", "我看不清楚。"]), "我不确定"
    )


_ASK: dict[str, list[Callable[[random.Random, View, World, Names], QA | None]]] = {
    "single": [_name, _name, _caption, _exists, _color, _category],
    "several": [_caption, _exists, _color, _position, _count],
    "counted": [_count, _count, _exists, _color, _caption],
    "placed": [_position, _position, _exists, _color, _caption],
    "odd": [_odd, _exists],
    "text": [_ocr],
    "unsure": [_unsure],
}


def ask(rng: random.Random, view: View, world: World, names: Names) -> QA | None:
    """A question in Chinese that suits the scene, or None."""
    makers = list(_ASK[view.layout])
    rng.shuffle(makers)
    return next((qa for make in makers if (qa := make(rng, view, world, names)) is not None), None)


def ask_compare(rng: random.Random, first: View, second: View, names: Names) -> QA | None:
    """Which of two images shows it, or whether both show the same."""
    a, b = first.spots[0], second.spots[0]
    one, two = name_of(a, names), name_of(b, names)
    if one is None or two is None or (a.noun != b.noun and related(a.noun, b.noun)):
        return None
    if a.noun == b.noun or rng.random() < 0.3:
        same = a.noun == b.noun
        return _qa("两张图里的东西一样吗？", "一样。" if same else "不一样。", "一样" if same else "不一样")
    name, place = rng.choice([(one, "第一张"), (two, "第二张")])
    order = "第一张还是第二张" if rng.random() < 0.5 else "第二张还是第一张"
    return _qa(f"哪张图里有{name}，{order}？", place, place, f"{place}图", place[1:])
