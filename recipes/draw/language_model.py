"""A small language model that has read nothing yet, for a model that draws: a random Llama, its tokenizer learnt.

python -m recipes.draw.language_model --data data/draw/train.json --output data/draw/language_model

The tokenizer is byte-level BPE, learnt from the conversations of the data, so any text can be typed. The weights follow
from the seed. `recipes/draw/drawer.yaml` gives the model codes and teaches it to draw.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from polymodal.errors import ConfigError, PolymodalError
from polymodal.utils.files import atomic_folder

SPECIALS = ("<|begin|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{{ '<|begin|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def texts(data: Path) -> Iterator[str]:
    """What is said in rows of LLaVA's form."""
    from polymodal.data.load import load_records

    for record in load_records(data):
        yield from (message.text for message in record.messages if message.text.strip())


def write_language_model(
    data: Path,
    output: Path,
    *,
    words: int = 2048,
    hidden_size: int = 256,
    layers: int = 6,
    positions: int = 1024,
    seed: int = 0,
    force: bool = False,
) -> str:
    """Write the folder of a random Llama; a line of what it is."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if hidden_size % 64:
        raise ConfigError(f"hidden size {hidden_size}: give a multiple of 64, the size of an attention head")
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator(texts(data), vocab_size=words, special_tokens=[*SPECIALS], show_progress=False)
    begin, end = SPECIALS[0], SPECIALS[-1]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=learnt._tokenizer,
        bos_token=begin,
        eos_token=end,
        pad_token=end,
        additional_special_tokens=[*SPECIALS[1:3]],
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=hidden_size // 64,
            num_key_value_heads=hidden_size // 64,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with atomic_folder(output, replace=force) as work:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
    return f"{output}: {model.num_parameters() / 1e6:.1f}M parameters, {len(tokenizer):,} words (seed {seed})"


def main(argv: Sequence[str] | None = None) -> int:
    """Write what the command line asks for; 2 and one line where that cannot be."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.draw.language_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, metavar="FILE", help="rows of LLaVA's form")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--words", type=int, default=2048, metavar="N", help="tokens of text; default: %(default)s")
    parser.add_argument("--hidden-size", type=int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=6, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="replace a folder that is there")
    args = vars(parser.parse_args(argv))
    try:
        print(write_language_model(args.pop("data"), args.pop("output"), **args))
    except PolymodalError as error:
        print(f"language_model: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
