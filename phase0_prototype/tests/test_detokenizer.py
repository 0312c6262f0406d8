"""Streamed text: nothing is shown that is later taken back, nothing is lost, and stop strings work across tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from phase0_prototype.detokenizer import Detokenizer, OutputText, StopChecker

TEXT = [
    "def binary_search(items, target):\n    low, high = 0, len(items)\n",
    "Grüße aus Köln, 東京 and naïve 🙂 🙂🙂",
    "the cat",
] * 3


class CountingTokenizer:
    """Counts how many tokens are decoded in all."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.decoded = tokenizer, 0

    def decode(self, ids, *, skip_special_tokens=True):
        self.decoded += len(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def byte_level() -> Tokenizer:
    """GPT-2 style: every byte is a token, so any id sequence is bytes, mostly invalid UTF-8."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def sentencepiece() -> Tokenizer:
    """Llama-2 style: words begin with ▁, unknown characters fall back to <0x..> bytes, the first space is dropped."""
    pieces = ["<s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁the", "▁cat", "▁a", "the", "s", "e", ".", "▁▁", "\n"]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True)])
    return tokenizer


BYTE_LEVEL, SENTENCEPIECE = byte_level(), sentencepiece()
BYTE_TOKENS = range(1, 257)
WORDS = [i for i in range(SENTENCEPIECE.get_vocab_size()) if i not in BYTE_TOKENS]


def chunked(draw, tokens):
    """Cut into non-empty chunks, as speculation delivers them."""
    chunks = []
    while tokens:
        size = draw(st.integers(1, 4))
        chunks.append(tokens[:size])
        tokens = tokens[size:]
    return chunks


@st.composite
def byte_level_chunks(draw):
    return chunked(draw, draw(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=150)))


@st.composite
def sentencepiece_chunks(draw):
    """Words, and whole characters spelled in byte tokens."""
    characters = st.text("é東🙂ü", min_size=1, max_size=8).map(lambda text: [1 + b for b in text.encode()])
    parts = draw(st.lists(st.one_of(st.sampled_from(WORDS).map(lambda i: [i]), characters), max_size=60))
    return chunked(draw, [token for part in parts for token in part])


def stream(detokenizer, chunks):
    pieces = [detokenizer.append(chunk) for chunk in chunks]
    return [*pieces, detokenizer.flush()]


@settings(max_examples=150, deadline=None)
@given(byte_level_chunks(), st.booleans())
def test_pieces_join_to_the_full_decode_for_any_bytes(chunks, skip):
    tokens = [token for chunk in chunks for token in chunk]
    pieces = stream(Detokenizer(BYTE_LEVEL, skip), chunks)
    assert "".join(pieces) == BYTE_LEVEL.decode(tokens, skip_special_tokens=skip)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from("ðŁĻĤæĿ±"), min_size=60, max_size=300))  # bytes F0 9F 99 82 E6 9D B1
def test_long_runs_of_broken_characters_are_shown_while_they_arrive_and_lose_nothing(characters):
    tokens = [BYTE_LEVEL.token_to_id(character) for character in characters]
    pieces = stream(Detokenizer(BYTE_LEVEL), [[token] for token in tokens])
    assert "".join(pieces) == BYTE_LEVEL.decode(tokens)
    assert len(pieces[-1]) <= 65


@pytest.mark.parametrize("length", range(100, 103))
def test_a_long_run_of_broken_characters_is_not_cut_within_one(length):
    tokens = [BYTE_LEVEL.token_to_id(character) for character in "ðŁĻ" * length][: 3 * length - length % 3]
    pieces = stream(Detokenizer(BYTE_LEVEL), [tokens[:62], tokens[62 : 64 + length % 3], tokens[64 + length % 3 :]])
    assert "".join(pieces) == BYTE_LEVEL.decode(tokens)


def test_a_first_token_that_is_only_the_dropped_space_still_counts():
    pieces = ["<s>", "▁", "▁cat"]
    tokens = [SENTENCEPIECE.token_to_id(piece) for piece in pieces]
    assert stream(Detokenizer(SENTENCEPIECE), [[token] for token in tokens]) == ["", "", " cat", ""]


@settings(max_examples=150, deadline=None)
@given(sentencepiece_chunks(), st.booleans())
def test_pieces_join_to_the_full_decode_with_sentencepiece_spaces_and_byte_fallback(chunks, skip):
    tokens = [token for chunk in chunks for token in chunk]
    pieces = stream(Detokenizer(SENTENCEPIECE, skip), chunks)
    assert "".join(pieces) == SENTENCEPIECE.decode(tokens, skip_special_tokens=skip)
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(sentencepiece_chunks(), st.integers(0, 40))
def test_output_continues_its_prompt(chunks, split):
    tokens = [token for chunk in chunks for token in chunk]
    prompt, output = tokens[:split], tokens[split:]
    if "\ufffd" in SENTENCEPIECE.decode(prompt):
        return  # the prompt ends within a character
    continued = "".join(stream(Detokenizer(SENTENCEPIECE, True, prompt), [[token] for token in output]))
    assert SENTENCEPIECE.decode(prompt) + continued == SENTENCEPIECE.decode(tokens)


def test_a_character_is_shown_when_its_last_byte_is_there():
    detokenizer = Detokenizer(SENTENCEPIECE)
    assert [detokenizer.append([1 + byte]) for byte in "東🙂".encode()] == ["", "", "東", "", "", "", "🙂"]


def test_a_plain_decode_of_each_token_would_be_wrong():
    tokens = BYTE_LEVEL.encode("東京").ids + BYTE_LEVEL.encode("🙂").ids[:1]
    assert "".join(BYTE_LEVEL.decode([token]) for token in tokens) != BYTE_LEVEL.decode(tokens)
    tokens = [SENTENCEPIECE.token_to_id("▁the"), SENTENCEPIECE.token_to_id("▁cat")]
    assert "".join(SENTENCEPIECE.decode([token]) for token in tokens) == "thecat"


def test_bytes_that_never_become_a_character_are_shown_when_the_text_ends():
    detokenizer = Detokenizer(BYTE_LEVEL)
    first_of_four = BYTE_LEVEL.token_to_id("ð")  # byte F0 in GPT-2's alphabet of bytes
    assert detokenizer.append([first_of_four]) == ""
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("token", ["e", "▁the", "<s>", "<0xFF>"])
def test_work_per_token_does_not_grow_with_the_text(token):
    tokenizer = CountingTokenizer(SENTENCEPIECE)
    detokenizer = Detokenizer(tokenizer)
    cost = []
    for _ in range(2):
        before = tokenizer.decoded
        for _ in range(1000):
            detokenizer.append([SENTENCEPIECE.token_to_id(token)])
        cost.append(tokenizer.decoded - before)
    assert cost[1] <= 1.1 * cost[0]
    assert cost[1] <= 100 * 1000


def test_a_transformers_tokenizer_fits(tmp_path):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=BYTE_LEVEL, eos_token="<|end|>")
    tokens = BYTE_LEVEL.encode("Grüße aus 東京").ids
    assert "".join(stream(Detokenizer(tokenizer), [[token] for token in tokens])) == "Grüße aus 東京"


def first_stop(text, stops):
    """Brute force: read character by character; (text before the stop, text with it, stop)."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], text[:end], longest
    return text, text, None


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab\n", max_size=6), max_size=12),
    st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=3),
    st.booleans(),
)
def test_streamed_text_ends_at_the_first_stop_string_however_it_is_cut(pieces, stops, include):
    before, with_stop, stop = first_stop("".join(pieces), stops)
    expected = with_stop if include else before
    checker, shown = StopChecker(stops, include), ""
    for piece in pieces:
        shown += checker.append(piece)
        assert expected.startswith(shown)  # nothing was shown that had to be taken back
    shown += checker.flush()
    assert (shown, checker.stopped_by) == (expected, stop)


def test_no_more_is_held_back_than_could_begin_a_stop_string():
    checker = StopChecker(["\n\ndef"])
    assert [checker.append(piece) for piece in ["x = 1", "\n", "y", "\n\nd", "e", "q"]] == [
        "x = 1", "", "\ny", "", "", "\n\ndeq",
    ]  # fmt: skip


def test_output_text_stops_across_tokens_and_keeps_the_stop_string_when_asked():
    tokens = BYTE_LEVEL.encode("the cat sat on the mat").ids
    for include, expected in [(False, "the cat sa"), (True, "the cat sat on")]:
        output = OutputText(Detokenizer(BYTE_LEVEL), ["t on"], include)
        streamed = "".join(output.append([token]) for token in tokens) + output.finish()
        assert streamed == output.text == expected
        assert output.stopped_by == "t on"


def test_stop_strings_do_not_count_before_min_tokens():
    tokens = BYTE_LEVEL.encode("a.b.c.").ids
    output = OutputText(Detokenizer(BYTE_LEVEL), ["."], min_tokens=3)
    output.append(tokens[:2])
    output.append(tokens[2:])
    assert output.text == "a.b"


def test_what_was_held_back_is_shown_at_the_end():
    output = OutputText(Detokenizer(BYTE_LEVEL), ["cat\n\n"])
    output.append(BYTE_LEVEL.encode("the cat").ids)
    assert output.finish() == "cat" and output.text == "the cat" and output.stopped_by is None


def test_what_the_end_reveals_can_still_hold_a_stop_string():
    output = OutputText(Detokenizer(BYTE_LEVEL), ["x\ufffd"])
    output.append([*BYTE_LEVEL.encode("ax").ids, BYTE_LEVEL.token_to_id("ð")])
    assert output.finish() == "" and output.text == "a" and output.stopped_by == "x\ufffd"
