"""A training step in plain PyTorch, in the form that `sfplan simulate` and `sfplan measure` take.

sfplan simulate examples/transformer_step.py:make_step --gpu t4
"""

from __future__ import annotations

from collections.abc import Callable

import torch

VOCABULARY, WIDTH, BATCH, LENGTH = 8000, 512, 8, 256


def make_step(device: str) -> Callable[[], None]:
    """Build model, data and optimizer on *device* and return a function that runs one training step."""
    layer = torch.nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True)
    model = torch.nn.Sequential(
        torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.TransformerEncoder(layer, 4), torch.nn.Linear(WIDTH, VOCABULARY)
    ).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), device=device)

    def step() -> None:
        loss = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
