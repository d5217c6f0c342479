"""How good captions are against several of people's: CIDEr-D, BLEU-1 to 4 and ROUGE-L, as pycocoevalcap computes them.

Captions are tokenized first (`ptb_tokenizer`); with `variant="vlmevalkit"` they are split at spaces as they stand, so
that case and punctuation count. CIDEr weighs n-grams by how few images' references have them: one image alone scores 0,
figures of a subset do not compare with those of the whole set, and papers print it times 100.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from polymodal.errors import ConfigError, DataError, unknown_name
from polymodal.metrics.ptb_tokenizer import tokenize, tokenize_caption

Captions = Sequence[str]
References = Sequence[Sequence[str]]
"""Of every image, its reference captions."""

_VARIANTS = ("official", "lmms_eval", "vlmevalkit")  # lmms-eval calls pycocoevalcap as it is
_SIGMA = 6.0  # of CIDEr-D's penalty on another length
_BETA = 1.2  # how much more recall counts than precision in ROUGE-L
_TINY, _SMALL = 1e-15, 1e-9  # what BLEU adds above and below, so that nothing is divided by zero


def cider(predictions: Captions, references: References, *, variant: str = "official") -> list[float]:
    """CIDEr-D of every image, from 0 to 10; the score of the corpus is their mean."""
    return _ciders(*_tokenized(predictions, references, variant))


def caption_scores(predictions: Captions, references: References, *, variant: str = "official") -> dict[str, float]:
    """CIDEr-D, BLEU-1 to BLEU-4 and ROUGE-L of a corpus."""
    said, gold = _tokenized(predictions, references, variant)
    scores = {"cider": sum(_ciders(said, gold)) / len(said), "rouge_l": sum(map(_rouge_l, said, gold)) / len(said)}
    return scores | {f"bleu_{n}": bleu for n, bleu in enumerate(_bleus(map(_bleu_counts, said, gold)), 1)}


def rouge_l(prediction: str, references: Sequence[str], *, variant: str = "official") -> float:
    """ROUGE-L of one caption: how long a subsequence it shares with its references."""
    prediction, *references = _words_of([prediction, *references], variant)
    return _rouge_l(prediction, references)


def bleu(prediction: str, references: Sequence[str], *, n: int = 4, variant: str = "official") -> float:
    """BLEU of one caption, up to n-grams of `n` words (1 to 4)."""
    if n not in (1, 2, 3, 4):
        raise ConfigError(f"bleu: n is {n!r}; it counts n-grams of 1, 2, 3 or 4 words")
    prediction, *references = _words_of([prediction, *references], variant)
    return _bleus([_bleu_counts(prediction, references)])[n - 1]


def _words_of(captions: Sequence[str], variant: str) -> list[str]:
    """Captions tokenized on their own."""
    if variant not in _VARIANTS:
        raise unknown_name("variant of a caption's score", variant, _VARIANTS)
    return list(captions) if variant == "vlmevalkit" else [tokenize_caption(caption) for caption in captions]


def _tokenized(predictions: Captions, references: References, variant: str) -> tuple[list[str], list[list[str]]]:
    """The captions of a corpus with a space between words, predictions and references each tokenized as one file."""
    if variant not in _VARIANTS:
        raise unknown_name("variant of a caption's score", variant, _VARIANTS)
    if not predictions or len(predictions) != len(references):
        raise DataError(f"{len(predictions)} captions but references of {len(references)} images")
    for number, accepted in enumerate(references):
        if isinstance(accepted, str) or not accepted:
            raise DataError(f"image {number}: the references are {accepted!r:.80}, not a list of at least one caption")
    if variant == "vlmevalkit":
        return list(predictions), [list(accepted) for accepted in references]
    gold = iter(tokenize([caption for accepted in references for caption in accepted]))
    return tokenize(predictions), [[next(gold) for _ in accepted] for accepted in references]


def _ngrams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for n in (1, 2, 3, 4) for i in range(len(words) - n + 1))


def _ciders(said: Sequence[str], gold: Sequence[Sequence[str]]) -> list[float]:
    counts = [[_ngrams(caption.split()) for caption in accepted] for accepted in gold]
    images_with = Counter(ngram for accepted in counts for ngram in set().union(*accepted))
    log_images = math.log(len(said))

    def weighed(ngrams: Counter[tuple[str, ...]]) -> tuple[dict[tuple[str, ...], float], list[float], int]:
        """An n-gram's weights, the length of their vector for every n, and the number of bigrams."""
        weights = {ngram: k * (log_images - math.log(max(1, images_with[ngram]))) for ngram, k in ngrams.items()}
        squares = [0.0] * 4
        for ngram, weight in weights.items():
            squares[len(ngram) - 1] += weight**2
        return weights, [math.sqrt(square) for square in squares], sum(k for ng, k in ngrams.items() if len(ng) == 2)

    scores = []
    for caption, accepted in zip(said, counts):
        own, own_norms, own_length = weighed(_ngrams(caption.split()))
        total = 0.0
        for weights, norms, length in map(weighed, accepted):
            shared = [0.0] * 4
            for ngram in own.keys() & weights.keys():
                shared[len(ngram) - 1] += min(own[ngram], weights[ngram]) * weights[ngram]
            cosines = sum(dot / (a * b) for dot, a, b in zip(shared, own_norms, norms) if a and b)
            total += cosines * math.exp(-((own_length - length) ** 2) / (2 * _SIGMA**2))
        scores.append(10 * total / 4 / len(accepted))
    return scores


def _bleu_counts(caption: str, accepted: Sequence[str]) -> list[int]:
    """Length, length of the reference nearest in length, then for n of 1 to 4 n-grams and those in a reference."""
    words = caption.split()
    gold = [reference.split() for reference in accepted]
    most: Counter[tuple[str, ...]] = Counter()
    for reference in gold:
        most |= _ngrams(reference)
    right = [0] * 4
    for ngram, count in (_ngrams(words) & most).items():
        right[len(ngram) - 1] += count
    nearest = min((abs(len(reference) - len(words)), len(reference)) for reference in gold)[1]
    tried = [max(0, len(words) - n) for n in range(4)]
    return [len(words), nearest, *tried, *right]


def _bleus(counts: Iterable[list[int]]) -> list[float]:
    """BLEU-1 to BLEU-4 from the counts of one image or many."""
    length, nearest, *rest = (sum(column) for column in zip(*counts))
    ratio = (length + _TINY) / (nearest + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    bleus, product = [], 1.0
    for n, (tried, right) in enumerate(zip(rest[:4], rest[4:]), 1):
        product *= (right + _TINY) / (tried + _SMALL)
        bleus.append(product ** (1 / n) * penalty)
    return bleus


def _rouge_l(caption: str, accepted: Sequence[str]) -> float:
    words = caption.split(" ")  # an empty caption is one empty word to the reference
    precision = recall = 0.0
    for reference in accepted:
        gold = reference.split(" ")
        shared = _common(words, gold)
        precision, recall = max(precision, shared / len(words)), max(recall, shared / len(gold))
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision) if precision else 0.0


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    lengths = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for place, against in enumerate(other, 1):
            before, lengths[place] = (
                lengths[place],
                before + 1 if word == against else max(lengths[place], lengths[place - 1]),
            )
    return lengths[-1]
