"""Warm start of a temporal encoder: say the words that videos differ in, before the language model is asked.

What a temporal encoder adds is seen through a frozen projector and a frozen language model, a pass of which is needed
for every step. The words of a description ("left", "bigger", "then") can be had without: the tokens that come out of
the projector are compared with the embeddings of the words that occur, and their mean is taught to say those of the
video's description. Names are left to the projector, which knows them from single frames: only words that are said of
many videos, and not of most of them, are taught.

As `training.sft.audio_warm_start`, whose table of words this is; here without an order, since nothing is read off.
"""

from collections import Counter

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from polymodal.data.readers.conversations import Record
from polymodal.errors import ConfigError
from polymodal.media_plan import VideoPlan
from polymodal.metrics.text import words_of
from polymodal.modeling.projectors.mlp import LinearProjector, MLPProjector
from polymodal.modeling.vlm import MultimodalLM
from polymodal.training.recipes.sft import VideoWarmStartConfig
from polymodal.training.sft.audio_warm_start import HELD_OUT, Spelling, descend
from polymodal.training.sft.dataset import SFTDataset
from polymodal.training.sft.warm_start import draw_tokens
from polymodal.utils.progress import log

KIND = "caption"
"""The kind of the turns whose words are taught."""
OFTEN = (1 / 60, 1 / 2)
"""Of how many videos a word is said at least, and at most."""


def video_warm_start(
    model: MultimodalLM,
    tokenizer: PreTrainedTokenizerBase,
    dataset: SFTDataset,
    config: VideoWarmStartConfig,
    seed: int,
    bf16: bool = False,
) -> None:
    """Train the temporal encoder to say the words of the videos' descriptions."""
    encoder, projector, store = model.temporal_encoder, model.projector, dataset.store
    if store is None or not isinstance(encoder, nn.Module) or not list(encoder.parameters()):
        raise ConfigError(
            "video_warm_start needs a temporal encoder with weights, and cached features: set run.feature_cache"
        )
    assert isinstance(projector, nn.Module)
    videos, said = described(dataset)
    plans = (plan for sample in dataset.prepared.samples for plan in sample.plans)
    per_frame = next((plan.tokens for plan in plans if isinstance(plan, VideoPlan)), None)
    counts = Counter(word for words in said for word in words)
    taught = {word for word, n in counts.items() if OFTEN[0] * len(said) <= n <= OFTEN[1] * len(said)}
    said = [words & taught for words in said]
    if not taught:
        raise ConfigError(
            f"video_warm_start: no turn of kind {KIND!r} says what happens in a video alone in its record"
        )
    spelled = {word: tokenizer.encode(f" {word}", add_special_tokens=False) for word in sorted(taught)}
    vocabulary = sorted({token for ids in spelled.values() for token in ids})
    column = {token: place for place, token in enumerate(vocabulary, start=1)}  # 0 says nothing new
    wanted = torch.zeros(len(said), len(vocabulary) + 1)
    for row, words in zip(wanted, said, strict=True):
        row[[column[token] for word in words for token in spelled[word]]] = 1
    places: dict[int, list[int]] = {}  # videos of equally many frames, those that say something
    for place, (_, times) in enumerate(videos):
        if said[place] and place % HELD_OUT:
            places.setdefault(len(times), []).append(place)
    lengths = torch.tensor([float(len(some)) for some in places.values()])
    held = [place for place in range(0, len(videos), HELD_OUT) if said[place]]
    log(f"video warm start: {len(videos)} videos, {len(taught)} words; {len(held)} videos are held out")

    generator = torch.Generator().manual_seed(seed)
    device = next(projector.parameters()).device
    spelling = Spelling(model.llm.get_input_embeddings().weight.detach().float(), vocabulary).to(device)
    frozen = not any(p.requires_grad for p in encoder.parameters())
    if frozen:  # one that the stage leaves alone learns whole, and here
        encoder.requires_grad_(True)
    parameters = [p for p in encoder.parameters() if p.requires_grad] + list(spelling.parameters())

    def say(some: list[int]) -> tuple[Tensor, Tensor]:  # log-probabilities [B, C], tokens [B, t, D]
        frames = store.gather([videos[place][0] for place in some])
        assert frames is not None
        times = torch.tensor([videos[place][1] for place in some], device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            features = encoder(frames.float().unflatten(0, times.shape).to(device), times)  # [B, T, P, E]
            if isinstance(projector, MLPProjector | LinearProjector):  # each token by itself: draw before the work
                tokens = projector(draw_tokens(features.flatten(1, 2), config.tokens, generator)).float()
            else:
                tokens = model.project(features.flatten(0, 1), tokens=per_frame).float()
                tokens = tokens.unflatten(0, features.shape[:2]).flatten(1, 2)
        scores = spelling(tokens).log_softmax(dim=-1).logsumexp(dim=1)
        return scores[:, 1:].log_softmax(dim=-1), tokens

    def loss() -> Tensor:
        group = list(places.values())[int(torch.multinomial(lengths, 1, generator=generator))]
        some = [group[i] for i in torch.randint(len(group), (config.batch_size,), generator=generator).tolist()]
        scores, tokens = say(some)
        targets = wanted[some][:, 1:].to(device)
        unsaid = -(scores * targets / targets.sum(dim=1, keepdim=True)).sum(dim=1).mean()
        return unsaid + spelling.off_length(tokens)

    descend(parameters, config, "video warm start", loss)
    if frozen:
        encoder.requires_grad_(False)
    found = total = 0.0
    with torch.no_grad():
        for place in held:
            targets = wanted[place][1:]
            best = say([place])[0][0].cpu().topk(int(targets.sum())).indices
            found, total = found + float(targets[best].sum()), total + len(best)
    log(f"video warm start: {found / max(total, 1):.1%} of the words of held-out videos are said")


def described(dataset: SFTDataset) -> tuple[list[tuple[str, tuple[float, ...]]], list[set[str]]]:
    """The videos that stand alone in a record that describes them: key and times, and the words said of each."""
    assert dataset.store is not None
    videos, said = [], []
    for index in dataset.kept():
        sample, record = dataset.prepared.samples[index], dataset.prepared.records[index]
        if len(sample.plans) != 1 or not isinstance(plan := sample.plans[0], VideoPlan) or not plan.times:
            continue
        if (key := sample.media_keys[0]) in dataset.store.where and (words := _words(record)):
            videos.append((key, plan.times))
            said.append(words)
    return videos, said


def _words(record: Record) -> set[str]:
    answers = [message.text for message in record.messages if message.role == "assistant"]
    kinds = record.extra.get("kinds") or [record.kind] * len(answers)
    return {word for kind, text in zip(kinds, answers, strict=False) if kind == KIND for word in words_of(text)}
