"""Write the reference topics that come with Python as training data: two JSONL files, some topics held out.

python examples/python_topics.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

HELD_OUT_EVERY = 10
"""Every so many topics, in alphabetical order, one is held out."""
HELD_OUT_CHARACTERS = 12_000
"""Enough of the held-out topics for a perplexity within seconds on two cores."""


def main(folder: Path) -> None:
    """Write ``train.jsonl`` and ``heldout.jsonl`` into *folder*."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(topics)
    held_out = names[::HELD_OUT_EVERY]
    train = [{"text": topics[name]} for name in names if name not in held_out]
    kept, left = [], HELD_OUT_CHARACTERS
    for name in held_out:
        if left > 0:
            kept.append({"text": topics[name][: min(left, 3000)]})
            left -= len(kept[-1]["text"])
    for name, rows in (("train", train), ("heldout", kept)):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} topics, {sum(len(row['text']) for row in rows):,} characters")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/demo"))
