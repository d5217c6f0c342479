"""Captions as words: the Penn Treebank tokenizer that COCO's caption scores are defined over, without Java.

Follows Stanford's PTBTokenizer 3.4.1 as pycocoevalcap runs it (`-preserveLines -lowerCase`, then a list of punctuation
removed). The lexer tries every rule at every place; the longest match, what must follow it counted in, wins, and among
equals the first. Brackets stay, as `-lrb-`: the list names them in capitals and the text is lower-case by then.

A tokenized caption is a string with a space between tokens. A space inside one (the fraction "1 1/2") is U+00A0.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from itertools import groupby

_REMOVED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
_BRACKETS = {"(": "-LRB-", ")": "-RRB-", "[": "-LSB-", "]": "-RSB-", "{": "-LCB-", "}": "-RCB-"}
_MONEY = str.maketrans({"¢": "cents", "£": "#", "\x80": "$", "¤": "$", "₠": "$", "€": "$"})
_FRACTIONS = str.maketrans({"¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"})
_QUOTES = str.maketrans(dict.fromkeys("\x91‘‛‹", "`") | dict.fromkeys("\x92’›", "'"))
_QUOTES |= str.maketrans(dict.fromkeys("\x93“«", "``") | dict.fromkeys("\x94”»", "''"))

_TWO_WORDS = {"gonna", "gotta", "lemme", "gimme", "wanna", "cannot"}
_MONTHS_DAYS = "Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|Mon|Tue|Tues|Wed|Thu|Thurs|Fri"
_STATES = (
    "(?i:Ala|Ariz|Calif|Colo|Conn|Ct|Dak|Fla|Ga|Ind|Kans?|Ky|Md|Mich|Minn|Mo|Mont|Neb|Nev|Okla|Penn|Tenn|Va|Vt|Wisc?"
    "|Wyo)|A(?i:z|rk)|D(?i:el)|I(?i:ll)|L(?i:a)|M(?i:ass|iss)|O(?i:re)|P(?i:a)|T(?i:ex)|W(?i:ash)"
)
_COMPANIES = "Inc|Cos?|Corp|Pp?t(?-i:[ey])s?|Ltd|Plc|Rt|Bancorp|Bhd|Assn|Univ|Intl|Sys"
_OTHERS = r"tel|est|ext|sq|Jr|Sr|Bros|(?:Ed|Ph)\.D|Blvd|Rd|Esq|etc|al|seq|Bldg"
_BEFORE_NUMBERS = "ca|figs?|prop|nos?|art|bldg|pp|op"
_TITLES = (
    "Mrs?|Ms|Drs?|Profs?|Sens?|Reps?|Attys?|Lt|Col|Gen|Messrs|Govs?|Adm|Rev|Maj|Sgt|Cpl|Pvt|Capt|Ste?|Ave|Pres|Lieut"
    "|Hon|Brig|Co?mdr|Pfc|Spc|Supts?|Det|Mt|Ft|Adj|Adv|Asst|Assoc|Ens|Insp|Mlle|Mme|Msgr|Sfc|vs|Alex|Wm|Jos|Cie"
    r"|a\.k\.a|cf|TREAS|Ph|Invt|Elec|Natl|M(?-i:[ft])g|Dept"
)
_ABBREVIATION = re.compile(
    "|".join((_MONTHS_DAYS, _STATES, _COMPANIES, _OTHERS, _BEFORE_NUMBERS, _TITLES)), re.IGNORECASE
)
_STARTERS = (  # of a sentence: before one of them, a single letter with a period is a word at a sentence's end
    "A(?i:bout|ccording|dditionally|fter|n|s|t|)|B(?i:ut)|E(?i:arlier)|H(?i:er?|ere|owever)|I(?i:f|n|t)|L(?i:ast)"
    r"|M(?i:any|ore|r\.|s\.)|N(?i:ow)|O(?i:nce|ne|ther|ur)|S(?i:he|ince|o|ome|uch)"
    r"|T(?i:hat|heir|hen|here|hese|hey|his|he)|W(?i:e|hen|hile|hat)|Y(?i:et|ou)"
)

# Nearly every word of a caption: letters and nothing that another rule could want. A period or comma after it goes too.
_PLAIN = re.compile(r" *(?:([A-Za-z]+(?:-[A-Za-z]+)*)(?:,?(?=[ \n])|,?\Z)|([A-Za-z]{2,})\.(?=\n|\Z| [A-Za-z]))")


def tokenize(captions: Sequence[str]) -> list[str]:
    """Captions as words with a space between; one file to the reference, which looks from one line to the next."""
    # What the reference takes for a line's end would move its lines against the captions; here it is a space.
    text = "\n".join(re.sub("[\n\r\v\f\x85\u2028\u2029]", " ", caption) for caption in captions)
    lines: list[list[str]] = [[]]
    place = 0
    while place < len(text):
        plain = _PLAIN.match(text, place)
        if plain and not _is_special(plain):
            token, place = plain[plain.lastindex or 0], plain.end()
        elif text[place] == "\n":
            lines.append([])
            place += 1
            continue
        else:
            token, place = _next_token(text, place)
        if token and (token := token.lower()) not in _REMOVED:
            lines[-1].append(token)
    return [" ".join(line) for line in lines] if captions else []


def tokenize_caption(caption: str) -> str:
    """One caption as it is tokenized among others: a line follows, and begins as captions do."""
    return tokenize([caption, "A cat"])[0]


def _is_special(plain: re.Match[str]) -> bool:
    """Whether a plain word is two of them, or an abbreviation with its period."""
    word = plain[plain.lastindex or 0].lower()
    return word in _TWO_WORDS or (plain.lastindex == 2 and _ABBREVIATION.fullmatch(word) is not None)


def _next_token(text: str, place: int) -> tuple[str, int]:
    """The token at a place, empty where nothing is said, and where the next one begins."""
    longest, end, token = place, place + 1, ""  # what no rule knows, such as an emoji, is skipped
    for rule, written in _rules():
        match = rule.match(text, place)
        if match and match.end() > longest:
            group = match.lastindex or 0
            longest, end, token = match.end(), match.end(group), written(match[group])
    return token, end


def _soft(word: str) -> str:
    return word.replace("\xad", "") or "-"


def _solid(text: str) -> str:
    return text.replace(" ", "\xa0")


def _round_brackets(text: str) -> str:
    return _solid(text).replace("(", "-LRB-").replace(")", "-RRB-")


def _quotes(text: str) -> str:
    return re.sub("(?i)&apos;", "'", text).translate(_QUOTES)


def _ampersand(text: str) -> str:
    return re.sub("(?i)&amp;", "&", text)


def _nothing(text: str) -> str:
    return ""


def _characters(wanted: Callable[[str], bool]) -> str:
    """The inside of a character class: what is wanted of the basic plane, as ranges."""
    points = [point for point in range(0x10000) if wanted(chr(point))]
    runs = [[p for _, p in run] for _, run in groupby(enumerate(points), lambda pair: pair[1] - pair[0])]
    return "".join(f"\\u{run[0]:04x}-\\u{run[-1]:04x}" for run in runs)


@cache
def _rules() -> list[tuple[re.Pattern[str], Callable[[str], str]]]:
    """The lexer: what is matched, with the token as group 1 and then what must follow, and how the token is written."""
    # Classes of characters are case-sensitive in the reference, written words are not.
    let = _characters(lambda c: unicodedata.category(c)[0] == "L")
    marks = _characters(lambda c: unicodedata.category(c) in ("Mn", "Mc") and c < "\u0f00")
    d = _characters(lambda c: unicodedata.category(c) == "Nd" and c < "\uff00")
    letter = rf"(?:[{let}{marks}\xad\u02c2-\u02c5\u02d2-\u02df\u02e5-\u02ff]|&[aeiouAEIOU](?i:acute|grave|uml);)"
    either, space, gap = rf"(?:{letter}|[{d}])", "[ \t\xa0\u2000-\u200a\u3000]", "[ \t\n\xa0\u2000-\u200a\u3000]"
    word = rf"{letter}{either}*(?:[.!?]{letter}{either}*)*"
    apos, hook = "(?:['\x92’]|(?i:&apos;))", "(?:['\x92’`\x91‘‛]|(?i:&apos;))"
    number = rf"[-+]?(?:[{d}]*(?:[.:,\xad\u066b\u066c][{d}]+)+|[{d}]+)"
    fraction = rf"(?:[{d}]{{1,4}}[- \xa0])?[{d}]{{1,4}}(?:\\?/|⁄)[{d}]{{1,4}}"
    allied = r"(?i:(?:Canada|Sino|Korean|EU|Japan|non)-U\.S|U\.S\.-(?:U\.K|U\.S\.S\.R))"
    initials = rf"(?:{allied}|[A-Za-z](?:\.[A-Za-z])*)"
    hyphened = rf"[A-Za-z0-9][A-Za-z0-9.,\xad]*(?:-(?:(?:{allied}|[A-Za-z](?:\.[A-Za-z])+)\.|[A-Za-z0-9\xad]+))+"
    clitic = rf"{apos}(?:[msdMSD]|(?i:re|ve|ll))"
    elided = rf"(?:[dDoOlL]{hook}[{let}{d}])?[{let}{d}]+"
    thing = rf"{elided}(?:[-_\u058a\u2010\u2011]{elided})*"
    capitals = "[A-Z]+(?:(?:(?i:&amp;)|[+&])[A-Z]+)+"
    name = "[A-Za-z][A-Za-z0-9_:.-]*"
    attribute = rf" +{name}(?: *= *(?:'[^'\n]*'|\"[^\"\n]*\"))?"
    tag = rf"<(?:[!?][A-Za-z-][^>\n]*|{name}(?:{attribute})* */?|/{name}) *>"
    path = r"(?:/[^ \t\n\"<>|()]+[^ \t\n\"<>|.!?(){},-])?"
    extension = (
        "bat|bmp|c|class|cgi|cpp|dll|docx?|exe|gif|gz|h|html?|jar|java|jpe?g|mov|mp3|pdf|php|pl|png|ppt|ps|py|sql|tar"
        "|txt|wav|x|xml|zip"
    )
    rows: list[tuple[str, Callable[[str], str]]] = [
        # C++; can|not, 't|was, gon|na; tags; dashes and entities
        (r"((?i:c\+\+|[cf]\#))", str),
        (r"((?i:can))(?i:not)|('(?i:t))(?i:was|is)", str),
        (r"((?i:gon|wan))(?i:na)|((?i:got))(?i:ta)|((?i:lem|gim))(?i:me)", str),
        (f"({tag})", _solid),
        (r"((?i:&(?:MD|mdash|ndash);)|[\x96\x97–—―])", _nothing),
        (r"((?i:&amp;))", _ampersand),
        (r"((?i:&(?:HT|TL|UR|LR|QC|QL|QR|odq|cdq|\#[0-9]+);))", str),
        # words, with 's or n't split off; what keeps its apostrophe: O'Brien, ma'am, li'l, 'em, '90s, l'
        (rf"({word}){clitic}", _soft),
        (rf"([A-Za-z\xad]*[A-MO-Za-mo-z]\xad*)(?i:n){hook}(?i:t)", _soft),
        (f"({word})", _soft),
        (
            rf"([A-HJ-XZn]{hook}[{let}]{{2,}}|[{let}]+[aeiouyAEIOUY]{hook}[aeiouA-Z][{let}]*|(?i:cont'd\.?|'twas)"
            rf"|(?i:nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l|o{hook}o|(?:Dunkin|somethin|ol){apos})"
            rf"|{apos}(?i:em|[2-9]0s|till?|cause|n{apos}?)|[lLdDjJ]{apos})",
            str,
        ),
        (rf"((?i:y){apos})[{let}]", str),
        # addresses of pages and people, @names and #tags
        (r"((?i:https?)://[^ \t\n\"<>|(){}]+[^ \t\n\"<>|.!?(){},-])", str),
        (rf"((?i:www)\.(?:[^ \t\n\"<>|.!?(){{}},]+\.)+[a-zA-Z]{{2,4}}{path})", str),
        (rf"((?:[^ \t\n\"`'<>|.!?(){{}},-_$]+\.)+(?i:com|net|org|edu){path})", str),
        (
            r"((?:(?i:&lt;)|<)?[a-zA-Z0-9][^ \t\n\"<>|()\xa0{}]*@(?:[^ \t\n\"<>|(){}.\xa0]+\.)*[^ \t\n\"<>|(){}.\xa0]+"
            r"(?:(?i:&gt;)|>)?)",
            str,
        ),
        (rf"(@[a-zA-Z_][a-zA-Z_0-9]*|\#{letter}+)", str),
        # 's and n't on their own; dates, numbers, fractions; and/or; money
        (rf"({clitic}|(?i:n){hook}(?i:t))[^A-Za-z]", _quotes),
        (rf"([{d}]{{1,2}}[-/][{d}]{{1,2}}[-/][{d}]{{2,4}})", str),
        (f"({number})", _soft),
        (r"([\u207a\u207b\u208a\u208b]?(?:[\u2070¹²³\u2074-\u2079]+|[\u2080-\u2089]+))", str),
        (f"({fraction})", _solid),
        (r"([¼½¾\u2153-\u215e])", lambda text: text.translate(_FRACTIONS)),
        (rf"((?i:-(?:[RL][RCS]B)-|C\.D\.s|pro-|anti-|S(?:&amp;|&)(?:P-500|Ls)|Cap{apos}n|c{apos}est))", _ampersand),
        (r"([A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2})", str),
        (r"([A-Z]*\$|\#)", str),
        ("([¢£¤¥\x80₠€\u060b\u0e3f₤\uffe0\uffe1\uffe5\uffe6])", lambda text: text.translate(_MONEY)),
        # initials at the end of a sentence, abbreviations with their period, names of files
        (rf"([A-Za-z])\.{gap}+(?:{_STARTERS}|{tag}){gap}", str),
        (rf"({initials}\.){gap}+(?:{_STARTERS}|{tag}){gap}", str),
        (rf"((?i:{_BEFORE_NUMBERS})\.){gap}?[{d}]", str),
        (rf"((?i:pt[ey]|co)\.){space}(?i:ltd|lim)", str),
        (rf"((?:{_STATES}|(?i:{_MONTHS_DAYS}|{_COMPANIES}|{_OTHERS}))\.)(?:[\s\S]{{2}})?", str),
        (rf"((?:(?i:{_TITLES})|M(?i:iss)|{initials})\.)", str),
        (rf"({initials}|{apos}[0-9][0-9]){gap}", str),
        (rf"({either}+(?:\.{either}+)*\.(?i:{extension}))(?:{gap}|[.?!,])", str),
        (rf"({word}\.)[,;:、]", _soft),
        # telephones, quotes, faces, brackets, dashes, punctuation
        (
            r"((?:\([0-9]{2,3}\)[ \xa0]?|(?:\+\+?)?(?:[0-9]{2,4}[- \xa0])?[0-9]{2,4}[- \xa0])[0-9]{3,4}[- \xa0]?"
            r"[0-9]{3,5}|(?:(?:\+\+?)?[0-9]{2,4}\.)?[0-9]{2,4}\.[0-9]{3,4}\.[0-9]{3,5})",
            _round_brackets,
        ),
        (r"(\"|(?i:&quot;)|\x7f)", _nothing),
        (r"(<|(?i:&lt;))", lambda text: "<"),
        (r"(>|(?i:&gt;))", lambda text: ">"),
        (r"([<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]])[^A-Za-z0-9]", _round_brackets),
        (r"([-^x=~<>']_[-^x=~<>']|\([-^x=~<>'][_.]?[-^x=~<>']\)|\([\^x=~<>']-[\^x=~<>'`]\))", _round_brackets),
        (r"([\[\](){}])", _BRACKETS.__getitem__),
        (r"(-{1,4})", _nothing),
        (r"(-{5,}|@+|_+|\#+|\*+|(?:\\\*){1,3}|[?!]+|<<|>>)", str),
        (r"(\.{3,5}|(?:\.[ \xa0]){2,4}\.|…)", _nothing),
        (r"([.,;:、¡¿=/\u037e\u0589\u061f\u06d4\u0700-\u0702\u07fa\u3002])", str),
        # what hyphens, & and + hold together; quotes again; symbols; space
        (rf"({hyphened}\.)[,;:、]|({hyphened})", _soft),
        (rf"({thing}\.)[,;:、]|({thing})", str),
        (rf"({capitals}\.)[,;:、]|({capitals})", _ampersand),
        (r"(')[A-Za-z][^ \t\n\r\xa0]", _nothing),
        (rf"({clitic}|(?i:n){hook}(?i:t)|''|[`‘’‚‛“”\x91-\x94„‟‹›«»]{{1,2}}|{apos})", _quotes),
        (
            "([+%&~^|\\\\¦§¨©¬®¯°-º×÷\u0387\u05be\u05c0\u05c3\u05c6\u05f3\u05f4\u0600-\u0603\u0606-\u060a\u060c\u0614"
            "\u061b\u061e\u066a\u066d\u0703-\u070d\u07f6-\u07f8\u0964\u0965\u0e4f\u1fbd\u2016\u2017\u2020-\u2023"
            "\u2030-\u2038\u203b\u203e-\u2042\u2044\u207a-\u207f\u208a-\u208e\u2100-\u214f\u2190-\u2bff\u3012\u30fb"
            "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65])",
            str,
        ),
        (rf"({space}+|(?i:&nbsp;))", _nothing),
    ]
    return [(re.compile(rule), written) for rule, written in rows]
