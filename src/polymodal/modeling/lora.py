"""Adapters on the language model: LoRA and its kin, trained vocabulary rows, a 4-bit base.

All through peft: LoRA (arXiv:2106.09685), rsLoRA (arXiv:2312.03732), DoRA (arXiv:2402.09353), trainable token rows.
QLoRA (arXiv:2305.14314) keeps the frozen base in 4-bit NormalFloat with double quantisation, where bitsandbytes is
installed. Differences from the reference: modules are named by their full path, so an adapter never strays into the
vision tower; the base is quantised after it was loaded, so the stored model stays a plain one, and its 4-bit copy is
never written. `checkpoints.model_folder` folds adapters in.
"""

import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import regex  # type: ignore[import-untyped,unused-ignore]
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from polymodal.config import LoraRecipe, VocabularyLayout
from polymodal.errors import CheckpointError, ConfigError, first_line
from polymodal.modeling.pretrained import building
from polymodal.modeling.vlm import MultimodalLM
from polymodal.utils.extras import extra
from polymodal.utils.modules import match_names
from polymodal.utils.safetensors_io import check_finite, compare_tensors

LORA_MARK = ".lora_"
"""What peft puts into the name of every LoRA parameter (DoRA's magnitudes too)."""
ROWS_MARK = ".token_adapter."
"""What peft puts into the name of trained vocabulary rows."""
MATCH_SECONDS = 2.0
"""How long a regular expression of an adapter may take for all modules together."""
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64
"""Bytes a weight takes in NF4: 4 bits, one 8-bit scale for 64 weights, one float32 for 256 scales."""


def is_adapter(name: str) -> bool:
    """Whether a parameter's full name is an adapter's."""
    return LORA_MARK in name or ROWS_MARK in name


def add_adapters(model: nn.Module, lora: LoraRecipe, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Put adapters on the language model's linear layers, or go on with the ones it has."""
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    llm = model.get_submodule("llm")
    present = {name: module for name, module in llm.named_modules() if isinstance(module, LoraLayer)}
    linears = [
        f"llm.{name}"
        for name, module in llm.named_modules()
        if name in present or (isinstance(module, nn.Linear) and not _inside(name, present))
    ]
    encoder_decoder = bool(getattr(getattr(llm, "config", None), "is_encoder_decoder", False))
    if encoder_decoder and lora.trainable_tokens:
        raise ConfigError(
            f"lora.trainable_tokens: {type(llm).__name__} is an encoder-decoder, whose decoder looks tokens up by "
            "itself; leave trainable_tokens out"
        )
    try:
        targets = [name.removeprefix("llm.") for name in match_names(lora.match, linears, "lora")]
    except ConfigError as error:
        if not encoder_decoder:
            raise
        raise ConfigError(
            f"lora.match {lora.match!r} names no layer of this encoder-decoder ({type(llm).__name__}); all its layers "
            f"are lora.match={_every_linear(llm, linears)!r}"
        ) from error
    vocabulary: VocabularyLayout | None = getattr(model, "vocabulary", None)
    named = [token for token in lora.trainable_tokens if vocabulary is None or token != "image"]
    codes = vocabulary.new_ids if vocabulary is not None and "image" in lora.trainable_tokens else []
    rows = token_rows(llm, [*named, *codes], tokenizer)
    if present:
        _check_same(present, targets, rows, lora, llm)
        return
    _check_targets(llm, targets, rows, lora)
    if lora.load_in_4bit:
        quantize_frozen(llm)
    config = LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]  # peft divides by it; fractions work
        lora_dropout=lora.lora_dropout,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        target_modules=targets,
        trainable_token_indices=dict.fromkeys(_vocabulary(llm), rows) if rows else None,
        bias="none",
        task_type="SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM",
    )
    with _without_advice():
        inject_adapter_in_model(config, llm)


def fuse_adapters(llm: nn.Module) -> None:
    """Let plain adapters scale and add their part in one product; peft makes a pass over the output for each."""
    from peft.tuners.lora import Linear

    layer: Any
    for layer in llm.modules():
        if type(layer) is Linear and type(layer.base_layer) is nn.Linear and not layer.lora_variant:
            names = layer.active_adapters
            plain = len(names) == 1 and isinstance(layer.lora_dropout[names[0]], nn.Identity)
            if plain and layer.lora_B[names[0]].bias is None:
                layer.forward = MethodType(_fused, layer)


def _fused(layer: Any, x: Tensor) -> Tensor:
    """The forward of peft's `Linear` with one adapter and no dropout; the base's output is added to in place."""
    if layer.merged or layer.disable_adapters:
        plain: Tensor = type(layer).forward(layer, x)
        return plain
    (name,) = layer.active_adapters
    rows, first, second = x.reshape(-1, x.shape[-1]), layer.lora_A[name], layer.lora_B[name].weight
    out: Tensor = layer.base_layer(rows)
    inner = first(rows if torch.is_autocast_enabled(x.device.type) else rows.to(first.weight.dtype))
    out.addmm_(inner.to(out.dtype), second.t().to(out.dtype), alpha=layer.scaling[name])
    return out.unflatten(0, x.shape[:-1])


def _check_targets(llm: nn.Module, targets: Sequence[str], rows: Sequence[int], lora: LoraRecipe) -> None:
    """Refuse layers that the asked kind of adapter cannot be put on."""
    head: Any = llm.get_output_embeddings()  # type: ignore[operator]  # a language model
    for name in targets:
        layer: Any = llm.get_submodule(name)
        if rows and layer is head:
            raise ConfigError(
                f"lora.match {lora.match!r} names the output head {name!r}, whose rows lora.trainable_tokens trains; "
                "match the layers without the head, or leave trainable_tokens out"
            )
        if lora.use_dora and not bool(layer.weight.norm(dim=-1).all()):
            raise ConfigError(
                f"lora.use_dora: a row of llm.{name} is zero, and DoRA divides by its length; leave the layer out of "
                "lora.match, or use_dora"
            )


@contextmanager
def _without_advice() -> Iterator[None]:
    """While active, peft does not warn of adapters on tied layers, which `untie` takes care of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True` and a tied layer")
        yield


def token_rows(llm: nn.Module, tokens: Sequence[str | int], tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Find the vocabulary rows that are to be trained, and make room for tokens that the tokenizer lacks."""
    # A token that the tokenizer lacks takes a spare row: most language models have more rows than tokens (Qwen2.5 has
    # 271 spare ones). The table itself is never enlarged, since the placeholders of media lie right behind it.
    if not tokens:
        return []
    count = llm.get_input_embeddings().weight.shape[0]  # type: ignore[operator,union-attr]  # a causal LM
    named = [token for token in tokens if isinstance(token, str)]
    if named and tokenizer is None:
        raise ConfigError("lora.trainable_tokens: tokens by name need a tokenizer; give ids")
    new = [token for token in named if tokenizer is not None and token not in tokenizer.get_vocab()]
    if new and tokenizer is not None:
        spare = count - len(tokenizer)
        if len(new) > spare:
            raise ConfigError(
                f"lora.trainable_tokens: {len(new)} tokens are new, such as {new[0]!r}, and the language model has "
                f"{max(0, spare)} spare rows ({count} rows, {len(tokenizer)} tokens); take a model with room, or "
                "tokens that it has"
            )
        tokenizer.add_special_tokens({"additional_special_tokens": new}, replace_extra_special_tokens=False)
    ids = [tokenizer.get_vocab()[t] if isinstance(t, str) and tokenizer is not None else int(t) for t in tokens]
    wrong = [i for i in ids if not 0 <= i < count]
    if wrong:
        raise ConfigError(f"lora.trainable_tokens: id {wrong[0]} is not in the vocabulary of {count} rows")
    return sorted(set(ids))


def quantize_frozen(llm: nn.Module) -> None:
    """Put the language model's linear layers into 4-bit NormalFloat, the head aside, as QLoRA does."""
    bnb = extra("bitsandbytes", "lora.load_in_4bit needs", "polymodal[qlora]")
    compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    for name in four_bit_modules(llm):
        old = llm.get_submodule(name)
        assert isinstance(old, nn.Linear)
        new = bnb.nn.Linear4bit(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            compute_dtype=compute,
            compress_statistics=True,
            quant_type="nf4",
        )
        new.load_state_dict(old.state_dict())
        parent, _, leaf = name.rpartition(".")
        # bitsandbytes quantises at the first move to a device.
        setattr(llm.get_submodule(parent), leaf, new.requires_grad_(False).to(old.weight.device))


def four_bit_modules(llm: nn.Module) -> list[str]:
    """Names of the linear layers that QLoRA quantises: all but the output head."""
    head: Any = llm.get_output_embeddings()  # type: ignore[operator]  # a causal LM
    return [name for name, module in llm.named_modules() if type(module) is nn.Linear and module is not head]


def _check_same(
    present: dict[str, Any], targets: Sequence[str], rows: Sequence[int], lora: LoraRecipe, llm: nn.Module
) -> None:
    """Refuse to go on with an adapter of another shape than the recipe's."""
    ranks = {rank for module in present.values() for rank in module.r.values()}
    if sorted(targets) != sorted(present) or ranks != {lora.lora_r}:
        raise ConfigError(
            f"the model already has an adapter (rank {sorted(ranks)}, {len(present)} modules) that differs from "
            f"the recipe's (rank {lora.lora_r}, {len(targets)} modules): merge it first, or ask for the same"
        )
    if lora.load_in_4bit:
        raise ConfigError("lora.load_in_4bit: the model already has an adapter; merge it first")
    had: Any = next(iter(llm.peft_config.values()), None) if hasattr(llm, "peft_config") else None  # type: ignore[operator,union-attr]
    if had is None:
        return
    had_rows: list[int] = next(iter((had.trainable_token_indices or {}).values()), [])
    if had.use_dora != lora.use_dora or sorted(had_rows) != list(rows):
        raise ConfigError(
            "the model already has an adapter with another use_dora or other trainable_tokens: merge it first, or ask "
            "for the same"
        )


def _every_linear(llm: nn.Module, linears: Sequence[str]) -> str:
    """A glob over every linear layer but the output head."""
    head: Any = llm.get_output_embeddings()  # type: ignore[operator]  # a language model
    heads = {f"llm.{name}" for name, module in llm.named_modules() if module is head}
    return f"llm.*.{{{','.join(sorted({name.rpartition('.')[2] for name in linears if name not in heads}))}}}"


def _vocabulary(llm: nn.Module) -> list[str]:
    """Names of the input embeddings, and of the head where it has weights of its own."""
    tables: list[Any] = [llm.get_input_embeddings(), llm.get_output_embeddings()]  # type: ignore[operator]
    if tables[1] is None or tables[1].weight is tables[0].weight:
        del tables[1]
    return [next(name for name, module in llm.named_modules() if module is table) for table in tables]


def _inside(name: str, owners: Iterable[str]) -> bool:
    return any(name.startswith(f"{owner}.") for owner in owners)


def is_peft(module: Any) -> bool:
    """Whether a peft adapter was injected into a module."""
    return hasattr(module, "peft_config")


def merge_adapter(model: MultimodalLM, merged: bool = True) -> None:
    """Add a LoRA adapter to the weights it adapts, or take it out again; decoding is faster with it inside."""
    if not is_peft(model.llm):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    if merged:
        untie(model.llm)
    for module in model.llm.modules():
        if isinstance(module, BaseTunerLayer) and module.merged != merged:
            module.merge() if merged else module.unmerge()


def untie(llm: Any) -> None:
    """Give an adapted layer weights of its own where another shares them, so that a merge changes it alone."""
    from peft.tuners.lora import LoraLayer

    users = Counter(id(weight) for module in llm.modules() for weight in module._parameters.values())
    for layer in [module.get_base_layer() for module in llm.modules() if isinstance(module, LoraLayer)]:
        for name, weight in list(layer.named_parameters(recurse=False)):
            if users[id(weight)] > 1:
                setattr(layer, name, nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad))
                # T5 takes this setting for another, whether its logits are scaled; transformers reads both tables.
                if not llm.config.is_encoder_decoder:
                    llm.config.tie_word_embeddings = False


def attach_adapter(model: MultimodalLM, settings: Any, tensors: dict[str, Tensor], where: str | Path) -> None:
    """Put a LoRA adapter beside the language model's weights."""
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    check_finite(tensors, where)
    settings.inference_mode = True
    _check_ranks(settings, tensors, where)
    names = [name for name, _ in model.llm.named_modules()]
    for setting in ("target_modules", "exclude_modules"):
        if isinstance(pattern := getattr(settings, setting, None), str) and pattern != "all-linear":
            setattr(settings, setting, match_in_time(pattern, names, f"{where}: {setting}"))
    with building(where), _without_advice():
        inject_adapter_in_model(settings, model.llm)
        model.llm.peft_config = {"default": settings}
        result = set_peft_model_state_dict(model.llm, tensors)
    # A tied head shares the rows of the input embeddings; parameters are listed once.
    own = {name for name, _ in model.llm.named_parameters()}
    missing = {k: () for k in result.missing_keys if k in own and ("lora_" in k or "trainable_tokens_delta" in k)}
    compare_tensors(missing, dict.fromkeys(result.unexpected_keys, ()), where)


def match_in_time(pattern: str, names: Sequence[str], where: str) -> list[str]:
    """The names that a stranger's regular expression matches whole; one that takes long is refused."""
    end = time.monotonic() + MATCH_SECONDS
    try:
        compiled = regex.compile(pattern)
        found = [name for name in names if compiled.fullmatch(name, timeout=max(1e-3, end - time.monotonic()))]
    except (regex.error, TimeoutError, RecursionError, OverflowError) as error:
        reason = "takes too long to match" if isinstance(error, TimeoutError) else f"is none ({first_line(error)})"
        raise CheckpointError(f"{where}: the regular expression {pattern[:80]!r} {reason}") from None
    return found


def _check_ranks(settings: Any, tensors: dict[str, Tensor], where: str | Path) -> None:
    """Hold what an adapter's settings say against its tensors, before memory is taken by them."""
    ranks = {t.shape[0] for name, t in tensors.items() if name.partition(".lora_")[2].startswith(("A.", "embedding_A"))}
    named: list[Any] = [settings.r, *(settings.rank_pattern or {}).values()]
    if any(not isinstance(r, int) or not 0 < r <= max(ranks, default=0) for r in named):
        raise CheckpointError(f"{where}: adapter_config.json says r {named}, the tensors have {sorted(ranks)}")
    alphas: list[Any] = [settings.lora_alpha, *(settings.alpha_pattern or {}).values()]
    if wrong := [a for a in alphas if not isinstance(a, int | float) or not math.isfinite(a) or a == 0]:
        raise CheckpointError(f"{where}: adapter_config.json says lora_alpha {wrong[0]!r}, which is no scale")
    layers = [settings.layers_pattern] if isinstance(settings.layers_pattern, str) else settings.layers_pattern or ()
    patterns = [*(settings.rank_pattern or {}), *(settings.alpha_pattern or {}), *layers]
    # peft matches these itself; without a repeat of a group, and with few of characters, that comes to an end.
    if slow := [p for p in patterns if re.search(r"\)\s*[*+{]", p) or len(re.findall(r"[*+{]", p)) > 3]:
        raise CheckpointError(f"{where}: the regular expression {slow[0][:80]!r} may take too long to match")


def fold_in(llm: nn.Module) -> None:
    """Add the adapters to the weights they adapt and take them away, leaving a plain model."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import TrainableTokensWrapper

    untie(llm)
    kinds = (BaseTunerLayer, TrainableTokensWrapper)
    while found := next((pair for pair in llm.named_modules() if isinstance(pair[1], kinds)), None):
        name, module = found
        parent, _, leaf = name.rpartition(".")
        if isinstance(module, TrainableTokensWrapper):
            module = module.token_adapter
        if not module.merged:
            module.merge()
        setattr(llm.get_submodule(parent), leaf, module.get_base_layer())
    if is_peft(llm):
        del llm.peft_config
