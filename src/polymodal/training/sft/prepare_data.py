"""`polymodal data prep`: a recipe's data into memory maps, before training and without the language model's weights."""

from pathlib import Path

import numpy as np

from polymodal.config import ModelConfig
from polymodal.processing.processor import Processor
from polymodal.training.recipes.sft import Recipe
from polymodal.training.sft.dataset import Prepared, prepare
from polymodal.training.task import read_mix
from polymodal.utils.files import make_folder
from polymodal.utils.progress import progress


def prepare_recipe(recipe: Recipe) -> str:
    """Tokenise the data of a stage, and its held-out data, to where training looks for them."""
    processor = recipe_processor(recipe)
    output = Path(recipe.output_dir)
    make_folder(output)
    lines = []
    plans = (("training", recipe.data.mix, "skipped"), ("held-out", recipe.data.eval, "skipped_eval"))
    for label, sources, listing in plans:
        if sources:
            data = recipe.data.model_copy(update={"mix": sources})
            mix = read_mix(data, recipe.run.seed)
            file = output / f"{listing}.jsonl"
            lines += describe(label, prepare(mix, processor, data, progress, recipe.run.workers, file))
    lines.append(f"kept in {recipe.data.index or output / 'index'}")
    return "\n".join(lines)


def recipe_processor(recipe: Recipe) -> Processor:
    """The processor that training will use, without loading the language model's weights."""
    new = recipe.init.output or (recipe.init.model and recipe.init.model.output)
    if new or (recipe.lora is not None and recipe.lora.trainable_tokens):
        # New tokens change the tokenizer, and which rows they take is decided on the whole model.
        from polymodal.backends.local import processor_of
        from polymodal.training.optimizer import apply_policy
        from polymodal.training.sft.task import load_inputs

        start = load_inputs(recipe)
        apply_policy(start.model, recipe.train, recipe.lora, recipe.optim, start.tokenizer)
        return processor_of(start.model, start.tokenizer, start.config).with_template(recipe.data.template)
    if recipe.init.from_folder is not None:
        from polymodal.backends import load_processor
        from polymodal.config import new_image_rules, new_senses
        from polymodal.modeling.build import audio_window

        processor = load_processor(recipe.init.from_folder)
        config = new_image_rules(processor.config, recipe.init.image)
        processor = processor.with_config(new_senses(config, recipe.init.video, recipe.init.audio))
        if processor.window is None:
            processor.window = audio_window(processor.config, None)
        processor = processor.with_template(recipe.init.template)
    else:
        assert recipe.init.model is not None
        processor = _new_processor(recipe.init.model)
    return processor.with_template(recipe.data.template)


def _new_processor(config: ModelConfig) -> Processor:
    """The processor of a model that is composed from a configuration."""
    from polymodal.modeling.build import image_token_id_for
    from polymodal.modeling.language_model import load_tokenizer, positions_of, quieten_transformers
    from polymodal.modeling.meta_device import llm_settings, media_counts
    from polymodal.modeling.projectors.qformer_files import load_context_tokenizer

    quieten_transformers()
    tokenizer = load_tokenizer(config.llm)
    settings = llm_settings(config.llm, fetch=True)
    vocabulary = settings.get_text_config().vocab_size
    tokens, window = media_counts(config, fetch=True)
    image_token_id = image_token_id_for(config, tokenizer, vocabulary)
    context = load_context_tokenizer(config.projector)
    more = (bool(settings.is_encoder_decoder), context, positions_of(settings), window)
    return Processor(config, tokenizer, tokens, image_token_id, *more)


def describe(label: str, prepared: Prepared) -> list[str]:
    """What a prepared dataset holds, in lines."""
    lengths, targets = prepared.lengths, prepared.targets
    ninety_five = int(np.quantile(lengths, 0.95))
    lines = [
        f"{label}: {len(lengths):,} records, {int(lengths.sum()):,} tokens, {int(targets.sum()):,} of them trained "
        f"({targets.sum() / lengths.sum():.0%}); median {int(np.median(lengths))}, 95% up to {ninety_five}, "
        f"longest {int(lengths.max())}"
    ]
    return lines + [f"{label}: left out {count:,} {reason}" for reason, count in prepared.left_out.items()]
