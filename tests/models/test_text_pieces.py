"""Pieces of a stream, joined, are the text; no piece ends within a character."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")

from transformers import PreTrainedTokenizerFast

from serving_kit.models.text_pieces import TextPieces
from tests.support_models import tokenizer


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, so that most characters have several."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    own = tokenizers.Tokenizer(tokenizers.models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    own.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=own)


def pieces(words: PreTrainedTokenizerFast, prompt: list[int], new: list[int]) -> list[str]:
    ids, stream = list(prompt), TextPieces(words, len(prompt))
    found = []
    for token in new:
        ids.append(token)
        found.append(stream.next(ids))
    return [*found, stream.next(ids, last=True)]


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="aé日😀 \n", max_size=12))
def test_joined_pieces_are_the_text(text: str) -> None:
    words = bytes_tokenizer()
    prompt, new = words("say: ")["input_ids"], words(text)["input_ids"]
    found = pieces(words, prompt, new)
    assert "".join(found) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(found)


def test_words_keep_their_spaces() -> None:
    words = tokenizer()
    ids = words("the river runs past an old stone house", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(words, ids[:3], ids[3:])) == "past an old stone house"


def test_unfinished_character_at_the_end() -> None:
    """It is given out as it is: no more follows."""
    words = bytes_tokenizer()
    *found, last = pieces(words, words("a")["input_ids"], words("😀")["input_ids"][:2])
    assert "".join(found) == ""
    assert last.startswith("\N{REPLACEMENT CHARACTER}")
