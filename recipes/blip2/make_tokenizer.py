"""Learn the Q-Former's text tokenizer from the captions of data files: BERT's WordPiece, 8,000 pieces at most.

Where there is a folder of bert-base-uncased, its own tokenizer is the better one (see paper_stage1.yaml). The pipeline
beside this file runs it; by hand: python recipes/blip2/make_tokenizer.py FOLDER data/pairs/train.json
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(folder: Path, data: str | list[str], size: int = 8000) -> None:
    from polymodal.data.load import load_records
    from polymodal.modeling.dual_encoders.blip2_stage1_folder import train_wordpiece

    captions: list[str] = []
    for file in [data] if isinstance(data, str) else data:
        for record in load_records(Path(file)):
            captions += record.extra.get("captions") or [record.messages[-1].text]
    train_wordpiece(captions, size).save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit("usage: python make_tokenizer.py FOLDER DATA.json [DATA.json ...]")
    main(Path(sys.argv[1]), sys.argv[2:])
