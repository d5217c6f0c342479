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
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}

ZH_COLOURS = {
    "red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色",
    "pink": "粉色", "brown": "棕色", "black": "黑色", "white": "白色", "gray": "灰色",
}  # fmt: skip
ZH_SHAPES = {
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "diamond": "菱形",
    "cross": "十字", "heart": "心形", "ring": "圆环",
}  # fmt: skip
ZH_NOUNS = {
    "dog": "狗", "cat": "猫", "bird": "鸟", "fish": "鱼", "horse": "马", "cow": "牛", "sheep": "羊", "pig": "猪",
    "rabbit": "兔子", "elephant": "大象", "lion": "狮子", "tiger": "老虎", "bear": "熊", "monkey": "猴子",
    "duck": "鸭子", "chicken": "鸡", "frog": "青蛙", "butterfly": "蝴蝶", "car": "汽车", "truck": "卡车", "bus": "公共汽车",
    "train": "火车", "airplane": "飞机", "boat": "船", "bicycle": "自行车", "apple": "苹果", "banana": "香蕉", "orange": "橙子",
    "strawberry": "草莓", "lemon": "柠檬", "bread": "面包", "cake": "蛋糕", "flower": "花", "tree": "树", "house": "房子",
    "book": "书", "key": "钥匙", "clock": "钟", "hat": "帽子", "shoe": "鞋", "chair": "椅子", "table": "桌子", "cup": "杯子",
    "guitar": "吉他", "ball": "球", "star": "星星", "moon": "月亮", "sun": "太阳", "hammer": "锤子", "umbrella": "雨伞",
}  # fmt: skip

OCR_WORDS = """
stop go open closed exit enter push pull up down left right yes no hot cold on off sale free new old big small fast slow
north south east west in out help hello bye thanks please wait walk run bus taxi train car bike road street park school
bank shop cafe bar hotel food menu tea coffee milk bread cake apple lemon orange soup salt sugar pizza fish rice egg
red blue green black white pink gold silver day night morning today monday friday sunday june july sun moon star sky
rain snow wind fire water earth tree rose lake river sea hill beach farm zoo cat dog cow horse bird lion tiger bear
book paper pen music song dance game play win lost love peace happy home house room door key king queen club city
welcome danger private staff lift toilet ticket office police market garden bakery library museum airport station
""".split()

# How the names in the picture packages spell a noun of the table; left the name's words, right the noun.
RENAMES = {
    "abeille": "bee", "anatra": "duck", "papera": "duck", "aquila": "eagle", "cavallo": "horse", "gatto": "cat",
    "gattina": "kitten", "cane": "dog", "topo": "mouse", "toro": "bull", "mucca": "cow", "vacca": "cow", "pecora": "sheep",
    "pecorella": "sheep", "coniglio": "rabbit", "elefante": "elephant", "leone": "lion", "tigre": "tiger", "orso": "bear",
    "rana": "frog", "farfalla": "butterfly", "coccinella": "ladybug", "formica": "ant", "formichina": "ant",
    "libellula": "dragonfly", "libellule": "dragonfly", "ragno": "spider", "ragnetto": "spider", "zanzara": "mosquito",
    "lumaca": "snail", "cigno": "swan", "gufo": "owl", "tacchino": "turkey", "struzzo": "ostrich", "pinguino": "penguin",
    "lucertola": "lizard", "dino": "dinosaur", "dinosauro": "dinosaur", "cammello": "camel", "scimmia": "monkey",
    "gallo": "rooster", "passero": "bird", "uccello": "bird", "colombo": "dove", "canguro": "kangaroo", "antilope": "antelope",
    "casa": "house", "sedia": "chair", "poltrona": "armchair", "tavolo": "table", "bicicletta": "bicycle",
    "trattore": "tractor", "ombrello": "umbrella", "chitarra": "guitar", "orologio": "clock", "lampada": "lamp",
    "torta": "cake", "gateau": "cake", "pera": "pear", "mela": "apple", "pesca": "peach", "zucca": "pumpkin",
    "fiore": "flower", "albero": "tree", "rosa": "rose", "foglia": "leaf", "libro": "book", "lucchetto": "padlock",
    "telefono": "telephone", "televisore": "television", "microscopio": "microscope", "siringa": "syringe",
    "palmtree": "palm tree", "sportcar": "sports car", "motorcyle": "motorcycle", "aircraft": "airplane", "plane": "airplane",
    "bike": "bicycle", "rhinoceros": "rhino", "dromedary camel": "dromedary", "bactrian camel": "camel", "kitty": "kitten",
    "fire engine": "fire truck", "racing car": "race car", "automobile": "car", "delivery truck": "truck",
    "articulated lorry": "truck", "lorry": "truck", "honeybee": "bee", "lady beetle": "ladybug", "bunny": "rabbit",
    "ear of maize": "corn", "aubergine": "eggplant", "cheese wedge": "cheese", "slice of pizza": "pizza", "red apple": "apple",
    "soft ice cream": "ice cream", "wrapped present": "gift", "father christmas": "santa claus", "game die": "die",
    "hot pepper": "chile pepper", "bell pepper": "pepper", "electric light bulb": "light bulb", "headphone": "headphones",
    "eyeglasses": "glasses", "dark sunglasses": "sunglasses", "necktie": "tie", "womans hat": "hat", "mans shoe": "shoe",
    "athletic shoe": "shoe", "womans sandal": "sandal", "womans boots": "boots", "thong sandal": "sandal", "kiwi": "kiwifruit",
    "studio microphone": "microphone", "house building": "house", "european castle": "castle", "personal computer": "laptop",
    "desktop computer": "computer", "three button mouse": "computer mouse", "carpentry saw": "saw", "baguette bread": "bread",
    "leafy green": "lettuce", "blueberry": "blueberries", "glass of milk": "milk", "beer mug": "beer", "musical keyboard": "piano",
    "black scissors": "scissors", "sauropod": "dinosaur", "t rex": "dinosaur", "soccer": "soccer ball", "couch and lamp": "couch",
    "spiral shell": "shell", "billed cap": "cap", "coat": "jacket", "electric torch": "flashlight", "old key": "key",
    "hocho": "knife", "dagger knife": "dagger", "closed book": "book", "mantelpiece clock": "clock", "high heeled shoe":
    "high-heeled shoe", "t shirt": "t-shirt", "yo yo": "yo-yo", "jack o lantern": "jack-o'-lantern", "motor bike": "motorcycle",
    "spouting whale": "whale", "baby chick": "chick", "hatching chick": "chick", "front facing baby chick": "chick",
    "tropical fish": "fish", "water buffalo": "buffalo", "gem stone": "diamond", "house with garden": "house", "shortcake": "cake",
    "deciduous tree": "tree", "oncoming taxi": "taxi", "oncoming bus": "bus", "oncoming police car": "police car",
    "oncoming automobile": "car", "high speed train": "train", "steam locomotive": "locomotive", "small airplane": "airplane",
    "passenger ship": "ship", "motor scooter": "scooter", "military medal": "medal", "sports medal": "medal", "extraterrestrial alien":
    "alien", "ringed planet": "planet", "trophy cup": "trophy", "heavy black heart": "heart", "white cloud": "cloud", "teddybear":
    "teddy bear", "lightbulb": "light bulb", "beachball": "beach ball", "motor boat": "boat", "custard": "pudding", "steak": "steak",
    "mandarine": "mandarin orange", "wildboar": "boar", "tux": "penguin", "pengwin": "penguin", "crawfish": "crayfish",
    "camicia": "shirt", "borsa": "bag", "bottiglia": "bottle", "cappello": "hat", "barattolo": "jar", "teiera": "teapot",
    "tazza": "cup", "valigie": "suitcase", "cello": "cello", "flowerandpot": "potted plant", "baloon": "balloon",
    "ladybird": "ladybug", "cayenne pepper": "chile pepper", "habanero pepper": "chile pepper", "onelette": "omelette",
    "christmas tree": "christmas tree", "tree whit fruits": "tree", "magnifing glass": "magnifying glass",
    "home": "house", "camper": "van", "laserprinter": "printer", "cellular phone": "mobile phone", "cell phone": "mobile phone", "handphone":
    "mobile phone", "ambulanza": "ambulance", "crown": "crown", "tophat": "top hat", "anchor": "anchor",
}  # fmt: skip

# Stamps whose own sentence says no plain name, or says it wrongly.
CAPTION_FIXES = {
    "sports/cartoon/football_helmet_front": "A football helmet.", "sports/cartoon/football_helmet_side": "A football helmet.",
    "animals/mammals/bovines/mountaingoat": "A mountain goat.",
    "animals/fish/bluegroper": "A blue groper.", "animals/fish/lionfish": "A lionfish.", "animals/fish/lobster": "A spiny lobster.",
    "animals/insects/hoverfly": "A hoverfly.", "food/vegetables/broccoli": "Broccoli.", "food/vegetables/corn": "Yellow corn.",
    "food/vegetables/tomato": "A red tomato.", "food/vegetables/pumpkin_small": "A small pumpkin.", "food/spices/ginger":
    "A ginger root.", "food/vegetables/pattypan_squash": "A pattypan squash.", "food/fruit/orange_seville": "A Seville orange.",
    "food/fruit/apple_granny_smith": "A Granny Smith apple.", "food/fruit/apple_fuji": "A Fuji apple.",
    "food/fruit/apple_sierra_beauty": "A Sierra Beauty apple.", "food/pizza": "A slice of pizza.", "household/toilet": "A toilet.",
    "household/wheelie_bin": "A wheelie bin.", "medical/stethoscope": "A stethoscope.", "plants/mushrooms/cep-2": "Two ceps.",
    "plants/flowers/adeenia": "A desert rose.", "plants/flowers/anthoorium": "An anthurium.", "plants/trees/holly_leaves":
    "Holly leaves.", "plants/trees/rambutan": "A tree.", "seasonal/christmas/Candy_cane_photo_1": "A candy cane.",
    "seasonal/christmas/Candy_cane_photo_2": "A candy cane.", "seasonal/christmas/Mince_Pie": "A mince pie.",
    "seasonal/christmas/Roast_turkey": "A roast turkey.", "seasonal/christmas/Christmas_pudding": "A Christmas pudding.",
    "seasonal/christmas/hard_candy": "Hard candy.", "seasonal/christmas/German_Christmas_toy": "A wooden toy.",
    "seasonal/hanukkah/menorah": "A menorah.", "space/planets/0_sun": "The sun.", "space/planets/3_earth": "The Earth.",
    "space/planets/5_jupiter": "The planet Jupiter.", "space/planets/6_saturn": "The planet Saturn.", "space/planets/4_mars":
    "The planet Mars.", "space/planets/1_mercury": "The planet Mercury.", "space/planets/2_venus": "The planet Venus.",
    "space/planets/7_uranus": "The planet Uranus.", "space/planets/8_neptune": "The planet Neptune.", "space/planets/9_pluto": "Pluto.",
    "town/roadsigns/stop": "A stop sign.", "town/roadsigns/stoplight_01_red": "A red traffic light.", "town/uk_post_box":
    "A red post box.", "town/roadsigns/stoplight_02_yellow": "A yellow traffic light.", "town/roadsigns/stoplight_03_green":
    "A green traffic light.", "people/toys/grannysmith": "A rag doll.", "symbols/chess/b_1_king": "A black chess king.",
    "symbols/chess/b_2_queen": "A black chess queen.", "symbols/chess/b_3_bishop": "A black chess bishop.",
    "symbols/chess/b_4_knight": "A black chess knight.", "symbols/chess/b_5_rook": "A black chess rook.",
    "symbols/chess/b_6_pawn": "A black chess pawn.", "symbols/chess/w_1_king": "A white chess king.", "symbols/chess/w_2_queen":
    "A white chess queen.", "symbols/chess/w_3_bishop": "A white chess bishop.", "symbols/chess/w_4_knight":
    "A white chess knight.", "symbols/chess/w_5_rook": "A white chess rook.", "symbols/chess/w_6_pawn": "A white chess pawn.",
    "vehicles/flight/cartoon/eddieCopter": "A helicopter.", "vehicles/flight/planes/cartoon/plane": "An airplane.",
    "vehicles/farming/cartoon/tux_tractor": "A penguin in a tractor.", "vehicles/construction/dumper": "A dumper.",
    "vehicles/7spoke256": "A wheel.", "vehicles/locomotive/cartoon/boxcar": "A boxcar.", "vehicles/locomotive/cartoon/caboose":
    "A caboose.", "naturalforces/fire": "A fire.", "military/vehicles/bradley": "A tank.", "military/vehicles/infantry-stryker":
    "A military vehicle.", "animals/insects/Brown_slug": "A brown slug.", "animals/mammals/hippopotamus": "A hippopotamus.",
    "animals/mammals/bovines/gnu-baby": "A baby gnu.", "animals/mammals/bovines/gnu-baby-stand": "A baby gnu.", "animals/birds/albino_peahen":
    "A white peahen.", "clothes/hats/tophat": "A top hat.", "space/apollo_lander": "A lunar lander.", "space/voyager2": "A space probe.",
    "household/dishes/cartoon/pasta_pot": "A large pot.", "household/Lightbulb": "A light bulb.", "food/vegetables/garlics":
    "A string of garlic.", "household/dishes/glass": "A glass of water.", "vehicles/wheel_tractor": "A tractor wheel.",
    "animals/mammals/bears/toys/edward_bear": "A teddy bear.", "space/spacewalk": "An astronaut.", "vehicles/auto/beetle":
    "A Beetle car.", "military/vehicles/f22_raptor": "A fighter jet.", "plants/flowers/chemparathi": "A hibiscus.",
    "plants/flowers/bolsom": "A balsam flower.", "plants/flowers/appooppanthady": "A milkweed.", "seasonal/newyears/confetti": "Confetti.",
    "space/moon/moon_crescent": "A crescent moon.", "space/moon/moon_3qt": "The moon.", "vehicles/ship/cartoon/bathyscape": "A submarine.",
}  # fmt: skip
NOUN_FIXES: dict[str, str | None] = {
    "sports/cartoon/football_helmet_front": "helmet", "sports/cartoon/football_helmet_side": "helmet",
    "household/home_compost_bin": "wheelie bin", "seasonal/halloween/grave-c": "gravestone", "seasonal/halloween/grave-e": "gravestone",
    "seasonal/halloween/grave-g": "gravestone", "seasonal/halloween/grave-f": "gravestone",
    "animals/mammals/bovines/mountaingoat": "goat",
    "plants/trees/tree336": "tree", "plants/lettuce_bolted": "lettuce", "plants/eggplant": "eggplant",
    "vehicles/farming/cartoon/tux_tractor": "tractor", "space/voyager2": "satellite", "military/vehicles/infantry-stryker": "tank",
    "plants/flowers/adeenia": "flower", "plants/flowers/anthoorium": "flower", "plants/flowers/appooppanthady": "flower",
    "space/planets/9_pluto": "planet", "seasonal/christmas/bow": "bow", "animals/insects/xanthia": "moth",
    "vehicles/locomotive/cartoon/tanker": "train", "vehicles/locomotive/cartoon/tender": "train",
    "vehicles/locomotive/cartoon/trainSign": None, "food/spices/ginger": "ginger", "plants/flowers/plastic/chuvanna_plastic_poo": "flower",
    "seasonal/christmas/xmas_tp_bulb": None, "seasonal/christmas/lamp": "light bulb", "seasonal/easter/bunny-egg": "rabbit",
    "town/houses/cartoon/city": "castle", "sports/rugby_goal_posts": None, "seasonal/easter/chick-in-egg": "chick",
    "household/dishes/utensils/pepper_grinder": "pepper grinder", "food/pizza": "pizza", "household/dishes/glass": "glass",
    "town/monuments/cartoon/sword_in_the_stone": "sword", "plants/trees/holly_leaves": "holly",
    "space/planets/5_jupiter": "planet", "space/planets/6_saturn": "planet", "space/planets/4_mars": "planet",
    "space/planets/1_mercury": "planet", "space/planets/2_venus": "planet", "space/planets/7_uranus": "planet",
    "space/planets/8_neptune": "planet", "plants/flowers/bolsom": "flower", "vehicles/auto/beetle": "beetle car",
    "vehicles/wheel_tractor": "wheel", "food/vegetables/garlics": "garlic", "plants/flowers/pigface": "flower",
    "town/houses/cartoon/tower_flag_red": "tower", "town/houses/cartoon/hunter": "house", "vehicles/ship/walnutBoat": "boat",
}  # fmt: skip


@dataclass(frozen=True)
class Noun:
    """One noun of the table, with everything the generator needs to say about it."""

    name: str
    category: str
    parent: str | None
    synonyms: tuple[str, ...]
    article: str  # "" mass noun, "pair" scissors, "some" grapes, "a" everything else


@functools.cache
def lexicon() -> dict[str, Noun]:
    """Read `lexicon.txt`.

    Returns:
        Noun by its name, in the file's order.
    """
    nouns: dict[str, Noun] = {}
    category = ""
    text = (Path(__file__).with_name("lexicon.txt")).read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        if line.startswith("["):
            category = line.strip("[] ")
            continue
        for entry in filter(None, (e.strip() for e in line.split(","))):
            article = {"~": "", "+": "pair", "*": "some"}.get(entry[0], "a")
            body = entry.lstrip("~+*")
            left, _, synonyms = body.partition("=")
            name, _, parent = left.partition("<")
            if name not in nouns:
                nouns[name] = Noun(name, category, parent or None, tuple(filter(None, synonyms.split("/"))), article)
    return nouns


def article(word: str) -> str:
    """"a" or "an", by sound as far as the first letters tell.

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
        "mouse": "mice", "goose": "geese", "sheep": "sheep", "fish": "fish", "deer": "deer", "ox": "oxen", "foot": "feet",
        "tooth": "teeth", "man": "men", "woman": "women", "child": "children", "leaf": "leaves", "knife": "knives",
        "loaf": "loaves", "wolf": "wolves", "elf": "elves", "die": "dice", "cactus": "cacti", "fireman": "firemen",
        "snowman": "snowmen", "bison": "bison", "shrimp": "shrimp", "squid": "squid", "scarf": "scarves", "calf": "calves",
        "policeman": "policemen", "trout": "trout", "aircraft": "aircraft", "bookshelf": "bookshelves",
        "photo": "photos", "piano": "pianos", "kangaroo": "kangaroos", "flamingo": "flamingos", "dodo": "dodos", "cello": "cellos",
        "rhino": "rhinos", "yo-yo": "yo-yos", "sombrero": "sombreros", "burrito": "burritos", "taco": "tacos",
        "radio": "radios", "banjo": "banjos", "avocado": "avocados", "dingo": "dingos",
    }  # fmt: skip
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


def phrase(name: str, adjective: str = "") -> str:
    """A noun with its article and perhaps an adjective: "an owl", "a pair of scissors", "some grapes", "bread".

    Args:
        name: A noun of the table (a word outside it is treated as countable).
        adjective: Put before the noun.

    Returns:
        The phrase, lower case, without a full stop.
    """
    noun = lexicon().get(name)
    words = f"{adjective} {name}".strip()
    kind = noun.article if noun else "a"
    if kind == "":
        return words
    if kind == "pair":
        return f"a pair of {words}"
    if kind == "some":
        return f"some {words}"
    return f"{article(words)} {words}"


def number_phrase(count: int, name: str, adjective: str = "") -> str:
    """ "three cats", "two red circles"; one is `phrase`.

    Args:
        count: How many, 1 to 5.
        name: Singular noun.
        adjective: Put before the noun.

    Returns:
        The phrase, lower case.
    """
    if count == 1:
        return phrase(name, adjective)
    return " ".join(filter(None, (NUMBERS[count], adjective, plural(name))))


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
        True when one accepts the other, or they share an accepted name.
    """
    return bool(set(accepted(first)) & set(accepted(second)))


def accepted(name: str) -> list[str]:
    """Every answer that is right for "What is this?" on a picture of the noun.

    Args:
        name: A noun.

    Returns:
        The name, its plural, synonyms and parents with theirs; no duplicates, the name first.
    """
    answers: list[str] = []
    for one in [name, *ancestors(name)]:
        noun = lexicon().get(one)
        for word in (one, *(noun.synonyms if noun else SHAPE_SYNONYMS.get(one, []))):
            answers += [word, plural(word)]
    return list(dict.fromkeys(answers))


@functools.cache
def _spellings() -> dict[tuple[str, ...], str]:
    table: dict[tuple[str, ...], str] = {}
    for name in lexicon():
        for word in (name, plural(name)):
            table.setdefault(tuple(re.split(r"[ -]", word)), name)
    for spelt, name in RENAMES.items():
        if name in lexicon():
            table[tuple(spelt.split())] = name
    return table


def find_noun(words: list[str], *, last: bool = True) -> tuple[str, int, int] | None:
    """The noun of the table among a name's words, the longest match at the end (or the start).

    Args:
        words: Lower-case words.
        last: Take the match that ends last (captions: the head comes last) or the one that starts first (file names).

    Returns:
        (noun, start, end) as word positions, or None.
    """
    table = _spellings()
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
