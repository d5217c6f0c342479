"""Warm start of an audio projector: spell what is said in the language model's word embeddings, before it is asked.

A projector that is trained through a frozen language model alone takes very long to find out that sounds are words.
Where the text of a recording is known (`transcript` in its row), that can be had without a pass through the language
model: each token of sound is compared with the embeddings of the words that occur, and CTC (Graves et al. 2006) teaches
the row of them to spell the transcript, with a vector of its own for "nothing new". What comes out lies among the
embeddings that the language model reads text in.

This is the alignment of a speech recognizer, against a fixed table of text instead of a trained output layer.
"""

from collections.abc import Callable
from difflib import SequenceMatcher

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from polymodal.errors import ConfigError
from polymodal.metrics.text import words_of
from polymodal.modeling.projectors.mlp import Standardize
from polymodal.modeling.vlm import MultimodalLM
from polymodal.training.recipes.sft import AudioWarmStartConfig, SceneWarmStartConfig, VideoWarmStartConfig
from polymodal.training.sft.dataset import SFTDataset
from polymodal.utils.progress import log, progress

SAMPLE_SOUNDS = 1000
"""Sounds from which mean and deviation are measured."""
HELD_OUT = 20
"""One transcript of so many is not trained on, to say how well the others were learnt."""


def audio_warm_start(
    model: MultimodalLM,
    tokenizer: PreTrainedTokenizerBase,
    dataset: SFTDataset,
    config: AudioWarmStartConfig,
    seed: int,
) -> None:
    """Train the audio projector to spell transcripts in word embeddings."""
    projector, store = model.audio_projector, dataset.sounds
    if projector is None or store is None:
        raise ConfigError("audio_warm_start needs an audio encoder and its cached features: set run.feature_cache")
    assert isinstance(projector, nn.Module)
    said = transcripts(dataset)
    if not said:
        raise ConfigError('audio_warm_start: no record says under "transcript" what is said in its sound')
    generator = torch.Generator().manual_seed(seed)
    device = next(projector.parameters()).device
    keys, texts = sorted(said), [said[key] for key in sorted(said)]
    ids = [tokenizer.encode(f" {text}", add_special_tokens=False) for text in texts]
    vocabulary = sorted({token for row in ids for token in row})
    column = {token: place for place, token in enumerate(vocabulary, start=1)}  # 0 says nothing new
    targets = [torch.tensor([column[token] for token in row]) for row in ids]
    apart = sorted(set(texts))[::HELD_OUT]
    held = [place for place, text in enumerate(texts) if text in apart]
    train = torch.tensor([place for place, text in enumerate(texts) if text not in apart] or held)

    table = model.llm.get_input_embeddings().weight.detach().float()
    spelling = Spelling(table, vocabulary).to(device)
    if isinstance(norm := getattr(projector, "norm", None), Standardize):
        some = torch.randperm(len(keys), generator=generator)[:SAMPLE_SOUNDS].tolist()
        sample = store.gather([keys[place] for place in some])
        assert sample is not None
        norm.measure(sample.float())
    log(f"audio warm start: {len(keys)} recordings, {len(vocabulary)} tokens; {len(held)} recordings are held out")

    parameters = [p for p in projector.parameters() if p.requires_grad] + list(spelling.parameters())

    def spell(places: list[int]) -> tuple[Tensor, Tensor, Tensor]:  # log-probabilities [T, N, C], lengths [N], tokens
        sounds = [store.gather([keys[place]]) for place in places]
        rows = [sound[:, 0].float() for sound in sounds if sound is not None]
        tokens = projector(torch.cat(rows)[None].to(device))[0]
        lengths = torch.tensor([len(row) for row in rows])
        padded = nn.utils.rnn.pad_sequence(list(spelling(tokens).split(lengths.tolist())))
        return padded.log_softmax(dim=-1), lengths, tokens

    def loss() -> Tensor:
        places = train[torch.randint(len(train), (config.batch_size,), generator=generator)].tolist()
        scores, lengths, tokens = spell(places)
        wanted = [targets[place] for place in places]
        counts = torch.tensor([len(row) for row in wanted])
        spelled = F.ctc_loss(scores, torch.cat(wanted).to(device), lengths, counts, zero_infinity=True)
        return spelled + spelling.off_length(tokens)

    descend(parameters, config, "audio warm start", loss)
    found = total = 0
    with torch.no_grad():
        for start in range(0, len(held), config.batch_size):
            places = held[start : start + config.batch_size]
            scores, lengths, _ = spell(places)
            for row, length, place in zip(scores.argmax(dim=-1).T.tolist(), lengths.tolist(), places, strict=True):
                match = SequenceMatcher(None, collapse(row[:length]), wanted := targets[place].tolist(), autojunk=False)
                found += sum(block.size for block in match.get_matching_blocks())
                total += len(wanted)
    log(f"audio warm start: {found / max(total, 1):.1%} of the tokens of held-out texts are spelled")


def descend(
    parameters: list[nn.Parameter],
    config: AudioWarmStartConfig | VideoWarmStartConfig | SceneWarmStartConfig,
    title: str,
    loss: Callable[[], Tensor],  # Of a new batch
    rising: float = 0.1,  # Share of the steps in which the rate rises
) -> None:
    """Take a warm start's steps, each with the gradient's length bounded."""
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, config.steps, pct_start=max(rising, 2 / config.steps)
    )
    for _ in progress(range(config.steps), title, config.steps):
        optimizer.zero_grad()
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


def transcripts(dataset: SFTDataset) -> dict[str, str]:
    """What is said in each recording whose row tells, in a text or in one for each of its sounds: key, and words."""
    found: dict[str, str] = {}
    assert dataset.sounds is not None
    for index in dataset.kept():
        sample = dataset.prepared.samples[index]
        heard = [key for key, sound in zip(sample.media_keys, sample.heard, strict=True) if sound]
        told = dataset.prepared.records[index].extra.get("transcript", ())
        texts = [told] if isinstance(told, str) else list(told)
        if len(texts) == len(heard):
            words = {key: " ".join(words_of(str(text))) for key, text in zip(heard, texts, strict=True)}
            found |= {key: said for key, said in words.items() if said and key in dataset.sounds.where}
    return found


class Spelling(nn.Module):
    """How near a token of sound lies to each word, and to the vector that says nothing new."""

    def __init__(self, table: Tensor, vocabulary: list[int]) -> None:  # table [V, D]
        super().__init__()
        self.middle = nn.Buffer(table.mean(dim=0))
        self.words = nn.Buffer(F.normalize(table[vocabulary] - self.middle, dim=-1))
        self.length = float(table.norm(dim=1).mean())
        self.nothing = nn.Parameter(torch.randn(table.shape[1]) / table.shape[1] ** 0.5)
        self.scale = nn.Parameter(torch.tensor(3.0))

    def off_length(self, tokens: Tensor) -> Tensor:  # [..., D] -> scalar
        """A small penalty for tokens that are longer or shorter than an embedding."""
        return 0.1 * (tokens.norm(dim=-1) / self.length - 1).pow(2).mean()

    def forward(self, tokens: Tensor) -> Tensor:  # [A, D] -> [A, 1 + words]
        """Score tokens."""
        directions = F.normalize(tokens - self.middle, dim=-1)
        table = torch.cat((F.normalize(self.nothing, dim=0)[None], self.words))
        return self.scale.exp() * directions @ table.T


def collapse(columns: list[int]) -> list[int]:
    """What a row of best columns spells: repetitions once, then without the nothings."""
    return [column for place, column in enumerate(columns) if column and column != (columns[place - 1] if place else 0)]
