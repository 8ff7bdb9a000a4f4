"""What a model says to a prompt: greedy, one token after the other."""

from __future__ import annotations

from typing import Any

import torch

from . import build
from .answers import stop_the_clock
from .evaluate import evaluating
from .request import RunError
from .step import MicroBatch, Trainee

MOST_NEW_TOKENS = 64


def prompt_tokens(tokenizer: Any, prompt: str, sequence_length: int) -> list[int]:
    """The numbers of *prompt*, as a user's turn where the tokenizer has a chat template.

    Raises:
        RunError: it is empty, no text, refused by the template, or leaves no room for an answer in a sequence.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise RunError(f"a prompt to sample is no text in UTF-8: {prompt!r}") from None
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        stop_the_clock(tokenizer)
        try:
            text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise RunError(f"the chat template refuses the prompt to sample {prompt!r}: {reason}") from error
        tokens = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        tokens = list(tokenizer(prompt)["input_ids"])
    if not tokens:
        raise RunError("a prompt to sample is empty; give some words with --sample")
    if len(tokens) >= sequence_length:
        raise RunError(
            f"a prompt to sample has {len(tokens)} tokens and the plan's sequences {sequence_length}; "
            "give a shorter one with --sample"
        )
    return tokens


def answer(trainee: Trainee, tokenizer: Any, tokens: list[int], sequence_length: int, device: torch.device) -> str:
    """The most likely continuation of *tokens*, up to the end of the text or MOST_NEW_TOKENS.

    One sequence no longer than the plan's, without a cache and with the last position's logits alone: less memory than
    an evaluation takes. Scaled or capped logits have the same order as the head's own. Of several processes the first
    replica's compute and the others keep step, computing as well where they share the weights.
    """
    ranks = trainee.ranks
    found = list(tokens)
    with evaluating(trainee.model):
        for _ in range(min(MOST_NEW_TOKENS, sequence_length - len(tokens))):
            computes = ranks.rank < ranks.num_stages or trainee.in_step
            mine = _next(trainee, found, device) if computes else 0
            trainee.before_micro_batch()  # after what memory may not suffice for, and before the others wait for it
            chosen = ranks.led(mine) if ranks.num_stages == 1 else ranks.gathered(mine)[ranks.num_stages - 1]
            if chosen == tokenizer.eos_token_id:
                break
            found.append(chosen)
    text: str = tokenizer.decode(found[len(tokens) :], skip_special_tokens=True)
    return text


def _next(trainee: Trainee, tokens: list[int], device: torch.device) -> int:
    """The most likely token after *tokens*; any number where another stage tells it."""
    model: Any = trainee.model
    base = build.without_adapter(model)
    given = torch.tensor([tokens], device=device)

    def chosen(**taken: torch.Tensor) -> torch.Tensor:
        hidden = base.get_decoder()(**taken, use_cache=False).last_hidden_state
        head = base.get_output_embeddings()
        rows = hidden[0, -1:]
        if head.weight.is_floating_point():  # some decoders end in a product, which autocast leaves in 16 bits
            rows = rows.to(head.weight.dtype)
        best: torch.Tensor = head(rows).argmax()
        return best

    if trainee.pipe is None:
        return int(chosen(input_ids=given))
    batches = [MicroBatch(given, given, 0)]
    (made,) = trainee.pipe.forward(trainee, batches, lambda hidden: chosen(inputs_embeds=hidden))
    return int(made)
