"""Of a conversation exactly the answers are learned, with the tokens that end their turns."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shallowflow.runtime.conversations import Conversation, Message, Role
from shallowflow.runtime.data_files import DataError
from shallowflow.runtime.lengths import document_lengths
from shallowflow.runtime.local_tokenizer import local_tokenizer
from shallowflow.runtime.tokens import tokens_of
from shallowflow.runtime.weights import find_weights, load_tokenizer

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
END = "<|im_end|>"
KNOWN = st.characters(min_codepoint=1, max_codepoint=0x2FFF, exclude_characters="<>|\x04\x06\x13\x14\x16\x1d")
"""Characters whose bytes are all in SmolLM2's vocabulary, but for those of its template's marks."""
WORDS = st.text(KNOWN, max_size=30).map(lambda text: text if text.strip() else f"{text}a")
WRITES_BOS = "{{ bos_token }}"
TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
CALLS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1].strip() }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + CALLS
)
TAGGED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}" + CALLS
)


@pytest.fixture(scope="module", name="tokenizer")
def _tokenizer() -> Any:
    return load_tokenizer(find_weights(SMOLLM2))


def templated(tokenizer: Any, template: str | None) -> Any:
    """The same tokenizer with another chat template."""
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def turns(*pairs: tuple[Role, str]) -> Conversation:
    """A conversation in which every answer is learned."""
    return Conversation(tuple(Message(role, text, role == "assistant") for role, text in pairs), "chat.jsonl line 7")


def learned_texts(document: Conversation, tokenizer: Any) -> list[str]:
    """The runs of learned tokens, as text."""
    pairs = zip(*tokens_of(document, tokenizer), strict=True)
    runs = itertools.groupby(pairs, key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for wanted, run in runs if wanted]


def as_dicts(document: Conversation) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in document.messages]


@settings(max_examples=60)
@given(texts=st.lists(WORDS, min_size=2, max_size=7), system=st.booleans())
def test_answers_alone_are_learned(tokenizer: Any, texts: list[str], system: bool) -> None:
    """In SmolLM2's template tokens are the template's own, and learned are each answer and the end of its turn."""
    roles: list[Role] = ["user", "assistant"]
    first: list[tuple[Role, str]] = [("system", "Be brief.")] if system else []
    document = turns(*first, *((roles[i % 2], text) for i, text in enumerate(texts)))

    assert tokens_of(document, tokenizer)[0] == tokenizer.apply_chat_template(as_dicts(document))["input_ids"]
    found = learned_texts(document, tokenizer)
    answers = texts[1::2]
    assert len(found) == len(answers)
    for run, answer in zip(found, answers, strict=True):
        assert run.endswith(answer + END)
        assert not run.removesuffix(answer + END).strip()  # a token that begins with the template's own line break


def test_an_injected_system_prompt_is_read_not_learned(tokenizer: Any) -> None:
    """What the template itself puts before the first turn stands there once, and is not learned."""
    document = turns(("user", "hi"), ("assistant", "hello"), ("user", "hi"), ("assistant", "hi"))

    assert tokenizer.decode(tokens_of(document, tokenizer)[0]).count("<|im_start|>system") == 1
    assert learned_texts(document, tokenizer) == [f"hello{END}", f"hi{END}"]


def test_an_answer_that_is_not_learned_is_read(tokenizer: Any) -> None:
    """Only answers that are marked as learned are."""
    messages = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d", True))

    assert learned_texts(Conversation(messages), tokenizer) == [f"d{END}"]


def test_a_template_that_trims_is_followed(tokenizer: Any) -> None:
    """White space that the template takes off an answer is not missed; headers are not learned without a call."""
    document = turns(("user", "hi "), ("assistant", " yes "), ("user", "ho"), ("assistant", "no\n"))

    assert learned_texts(document, templated(tokenizer, TURNS)) == [f"yes{END}", f"no{END}"]


def test_reasoning_cut_off_earlier_turns_is_followed(tokenizer: Any) -> None:
    """Where the template keeps reasoning in the last answer only, that is what is learned."""
    last = "<think>sum</think>4"
    document = turns(("user", "1+1"), ("assistant", "<think>add</think>2"), ("user", "2+2"), ("assistant", last))

    assert learned_texts(document, templated(tokenizer, REASONING)) == [f"2{END}", last + END]


def test_a_template_s_own_mask_agrees(tokenizer: Any) -> None:
    """Where the template marks what is generated, the same tokens are learned."""
    tagged = templated(tokenizer, TAGGED)
    document = turns(("user", "one"), ("assistant", "two three"), ("user", "four"), ("assistant", "five"))

    marked = tagged.apply_chat_template(as_dicts(document), return_assistant_tokens_mask=True)
    assert tokens_of(document, tagged) == (marked["input_ids"], list(map(bool, marked["assistant_masks"])))


def test_the_template_s_first_token_is_not_doubled(tokenizer: Any) -> None:
    """A template that writes the first token gets no other."""
    tokens, _ = tokens_of(turns(("user", "a"), ("assistant", "b")), templated(tokenizer, WRITES_BOS + TURNS))

    assert tokens[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokens).startswith("<|im_start|><|im_start|>user")


def test_without_a_template_headings_stand_in(tokenizer: Any) -> None:
    """Messages stand below headings, each answer ended by the end-of-text token, and the same parts are learned."""
    plain = templated(tokenizer, None)
    document = turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))

    written = plain.decode(tokens_of(document, plain)[0])
    turn = "### Instruction\n{}\n\n### Response\n{}" + END
    assert written == turn.format("a", "b") + "\n\n" + turn.format("c", "d")
    assert learned_texts(document, plain) == [f"b{END}", f"d{END}"]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ raise_exception('no system role') }}", "refuses this conversation: no system role"),
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "leaves out message 1"),
        ("{% for m in messages %}{{ m.content | reverse }}{{ m.content }}{% endfor %}", "rewrites message 3"),
        ("{{ nothing.at.all }}", "refuses this conversation"),
    ],
)
def test_a_template_that_hides_answers_is_refused(tokenizer: Any, template: str, told: str) -> None:
    """One line, with the row: nothing is learned by guess."""
    document = turns(("system", "be brief"), ("user", "one"), ("assistant", "two"))

    with pytest.raises(DataError, match=told) as caught:
        tokens_of(document, templated(tokenizer, template))
    assert str(caught.value).startswith("chat.jsonl line 7: ") and "\n" not in str(caught.value)


def test_lengths_are_those_of_training(tokenizer: Any) -> None:
    """The tokenizer that was kept counts what the loaded one makes, and windows as training cuts them."""
    from shallowflow.runtime.batches import windows

    document = turns(("user", "word " * 70), ("assistant", "yes " * 40), ("user", "x"), ("assistant", "no"))
    local_tokenizer(SMOLLM2, SMOLLM2)
    kept = local_tokenizer(SMOLLM2, SMOLLM2)

    assert kept is not None
    assert tokens_of(document, kept) == tokens_of(document, tokenizer)
    found = document_lengths([document], kept)
    made = windows([document], tokenizer, 32)
    assert (found.num_sequences(32), found.num_learned) == (len(made), sum(w.num_targets for w in made))
