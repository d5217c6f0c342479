"""How an answer's ids are chosen from logits, one after the other, also where it has to follow a schema or a grammar.

llguidance says after each id which may come next.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from transformers import (
    MinPLogitsWarper,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TopKLogitsWarper,
    TopPLogitsWarper,
)  # fmt: skip

from polymodal.errors import ConfigError
from polymodal.generation.params import GenerationParams
from polymodal.modeling.vlm import MultimodalLM
from polymodal.utils.extras import extra

LARGEST = 64 * 1024
"""Characters of a schema or grammar."""
_AS_JSON_DUMPS = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""No white space that a model could go on writing for ever."""


@dataclass(frozen=True)
class Chance:
    """An id that was chosen, how likely the model found it before any setting, and the likeliest ids there."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the ids of one answer: remembers what it chose, has its own random state, and follows its grammar."""

    def __init__(self, params: GenerationParams, device: torch.device, matcher: "Matcher | None" = None) -> None:
        self.params, self.matcher = params, matcher
        self.generator = new_generator(params, device)
        self.made: list[int] = []
        self.chances: list[Chance] = []  # Of each of them, where that is asked for

    def __call__(self, logits: torch.Tensor) -> int:
        """Choose the next id."""  # [V]
        allowed = logits if self.matcher is None else self.matcher.mask(logits)
        made = torch.tensor([self.made if self.params.penalises else []], dtype=torch.int64, device=logits.device)
        token = int(sample_next(allowed[None], self.params, made, self.generator))
        if self.params.logprobs is not None:
            self.chances.append(_chance(logits, token, self.params.logprobs))
        self.made.append(token)
        if self.matcher is not None:
            self.matcher.take(token)
        return token


def sample_next(
    logits: torch.Tensor, params: GenerationParams, made: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """Choose the next id of each row."""
    # logits [B, V], made [B, n] -> [B]
    logits = logits.float()
    if params.logit_bias:
        known = [(token, bias) for token, bias in params.logit_bias.items() if token < logits.shape[1]]
        ids, more = zip(*known, strict=True) if known else ((), ())
        logits = logits.index_add(1, _tensor(ids, logits.device), torch.tensor([more] * len(logits)).to(logits))
    if params.penalises and made.shape[1]:
        logits = _penalised(logits, params, made)
    if params.temperature == 0.0:
        return logits.argmax(dim=-1)
    # From the largest down, so that a temperature near 0 gives zeros and not infinity.
    logits = (logits - logits.max(dim=-1, keepdim=True).values) / max(params.temperature, 1e-30)
    ids_made = cast(torch.LongTensor, made)
    if params.top_k:
        logits = TopKLogitsWarper(params.top_k)(ids_made, logits)
    if params.top_p < 1.0:
        logits = TopPLogitsWarper(params.top_p)(ids_made, logits)
    if params.min_p:
        logits = MinPLogitsWarper(params.min_p)(ids_made, logits)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


def _penalised(logits: torch.Tensor, params: GenerationParams, made: torch.Tensor) -> torch.Tensor:
    if params.repetition_penalty != 1.0:
        seen = logits.gather(1, made)
        seen = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
        logits = logits.scatter(1, made, seen)
    for row, ids in enumerate(made.tolist() if params.presence_penalty or params.frequency_penalty else ()):
        counts = Counter(ids)
        less = [-params.presence_penalty - params.frequency_penalty * count for count in counts.values()]
        place = (torch.tensor(row), _tensor([*counts], logits.device))
        logits = logits.index_put(place, torch.tensor(less).to(logits), accumulate=True)
    return logits


def _tensor(ids: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=device)


def _chance(logits: torch.Tensor, token: int, likeliest: int) -> Chance:
    """What is told of an id chosen from logits [V]."""
    chances = logits.float().log_softmax(dim=-1)
    top = chances.topk(min(likeliest, len(chances)))
    return Chance(token, float(chances[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


def new_generator(params: GenerationParams, device: torch.device) -> torch.Generator | None:
    """Make the random state of one answer."""
    return None if params.temperature == 0.0 else seeded_generator(params, device)


def seeded_generator(params: GenerationParams, device: torch.device) -> torch.Generator:
    """A random state with the answer's seed, or a new one."""
    generator = torch.Generator(device=device)
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def unspoken(model: MultimodalLM) -> list[int]:
    """Ids inside the tokenizer that are no text: the placeholder, and what begins and ends media."""
    return [model.image_token_id, *(model.vocabulary.specials.values() if model.vocabulary is not None else ())]


def forbid(logits: torch.Tensor, unspoken: Sequence[int], vocab_size: int | None) -> torch.Tensor:
    """Put ids that must not be made at -inf: those that are no text, and head rows past the tokenizer."""
    # logits [B, V]
    logits = logits.clone()
    logits[:, [token for token in unspoken if token < logits.shape[-1]]] = -torch.inf
    if vocab_size is not None:
        logits[:, vocab_size:] = -torch.inf
    return logits


class Grammars:
    """The grammars that a model's answers were asked to follow; what was read once is kept."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> None:
        llguidance = extra("llguidance.hf", "answers that follow a schema or a grammar need", "polymodal[serve]")
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ConfigError("answers of this model can follow no schema or grammar: its tokenizer is none of Rust")
        self._tokenizer = llguidance.from_tokenizer(tokenizer, eos_token=[*stop_ids])
        self._read = lru_cache(16)(self._compile)

    def matcher(self, params: GenerationParams) -> "Matcher":
        """Begin an answer that follows its schema or grammar; one that cannot be followed is a `ConfigError`."""
        schema = params.response_schema
        return Matcher(self._read(schema is not None, json.dumps(schema) if params.grammar is None else params.grammar))

    def _compile(self, is_schema: bool, text: str) -> Any:
        from llguidance import LLMatcher, LLParserLimits

        name = "response_schema" if is_schema else "grammar"
        if len(text) > LARGEST:
            raise ConfigError(f"{name}: takes {len(text):,} characters, at most {LARGEST:,} are read; make it smaller")
        # Its own limits hold for what is compiled: steps of the lexer, states, items of a row.
        try:
            made = (
                LLMatcher.grammar_from_json_schema(text, overrides=_AS_JSON_DUMPS)  # type: ignore[arg-type]
                if is_schema
                else LLMatcher.grammar_from_lark(text)
            )
            matcher = LLMatcher(self._tokenizer, made, log_level=0, limits=LLParserLimits(max_grammar_size=200_000))
            if not matcher.is_error():
                matcher.compute_bitmask()  # a schema that nothing meets shows here
        except ValueError as error:
            raise ConfigError(f"{name}: cannot be followed ({_line(str(error))})") from None
        if matcher.is_error():
            raise ConfigError(f"{name}: cannot be followed ({_line(matcher.get_error())})")
        return matcher


class Matcher:
    """Where one answer is in its grammar."""

    def __init__(self, compiled: Any) -> None:
        self._at = compiled.deep_copy()

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Put ids that may not come next at -inf."""  # [V] -> [V]
        bits = np.unpackbits(np.frombuffer(self._at.compute_bitmask(), np.uint8), bitorder="little")
        self._check()
        allowed = torch.zeros(len(logits), dtype=torch.bool)
        known = min(len(logits), len(bits))
        allowed[:known] = torch.from_numpy(bits[:known].astype(bool))
        return logits.masked_fill(~allowed.to(logits.device), -torch.inf)

    def take(self, token: int) -> None:
        """Go on by an id."""
        self._at.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._at.is_error():
            raise ConfigError(f"the answer's schema or grammar is too hard to follow ({_line(self._at.get_error())})")


def _line(text: str) -> str:
    return text.strip().split("\n")[0][:200]
