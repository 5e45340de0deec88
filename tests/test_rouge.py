"""ROUGE-L against rouge-score, tokens of many scripts, the nearest of many."""
import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from rouge_score.rouge_scorer import RougeScorer

from isara_jax.data.rouge import NoveltyIndex, f_measure, f_of_lengths, tokens

TEXT = st.text(alphabet="abc dE1-?é日本ไทय\u093f\u200c\u00ad", max_size=30)
WORDS = st.lists(st.sampled_from("abcdef"), max_size=25)


class Ours:
    """Our tokens as rouge-score wants its tokenizer."""

    def tokenize(self, text):
        return tokens(text)


SCORER = RougeScorer(["rougeL"], tokenizer=Ours())
PLAIN = RougeScorer(["rougeL"])


@pytest.mark.parametrize("text, expected", [
    ("Don't panic, it's 42!", ["don", "t", "panic", "it", "s", "42"]),
    ("snake_case a-b", ["snake", "case", "a", "b"]),
    ("Straße ﬁne Ａ①", ["strasse", "fine", "a1"]),
    ("caf\u00e9 CAFE\u0301", ["café", "café"]),
    ("日本語のテスト2回", ["日", "本", "語", "の", "テ", "ス", "ト", "2", "回"]),
    ("ﾃｽﾄ", ["テ", "ス", "ト"]),
    ("ไทย", ["ไ", "ท", "ย"]),
    ("น้ำ", ["น้ํ", "า"]),                      # NFKC takes the last vowel apart; tone and vowel marks stay with the letter
    ("हिन्दी में", ["हिन्दी", "में"]),
    ("Привет, ΟΔΟΣ", ["привет", "οδοσ"]),
    ("한국어 문장", ["한국어", "문장"]),
    ("soft\u00adhyphen zero\u200bwidth", ["softhyphen", "zero", "width"]),
    ("\u0301 … ?!", []),
    ("", []),
])
def test_tokens(text, expected):
    assert tokens(text) == expected


@given(TEXT)
def test_tokens_of_tokens_are_themselves(text):
    assert tokens(" ".join(tokens(text))) == tokens(text)


@given(TEXT, TEXT)
@settings(max_examples=200, deadline=None)
def test_f_is_that_of_rouge_score_with_our_tokens(a, b):
    assert f_measure(tokens(a), tokens(b)) == SCORER.score(a, b)["rougeL"].fmeasure


@given(st.text(alphabet=st.characters(max_codepoint=127), max_size=40), st.text(alphabet=st.characters(max_codepoint=127), max_size=40))
@settings(max_examples=200, deadline=None)
def test_f_is_that_of_plain_rouge_score_on_ascii(a, b):
    assert f_measure(tokens(a), tokens(b)) == PLAIN.score(a, b)["rougeL"].fmeasure


def test_every_tie_at_seven_tenths_up_to_59_tokens_is_decided_as_rouge_score_decides_it():
    ties, above = 0, 0
    for m in range(1, 60):
        for n in range(1, 60):
            common = 7 * (m + n) // 20
            if common * 20 != 7 * (m + n) or not 0 < common <= min(m, n):
                continue
            a = ["same"] * common + ["a"] * (m - common)
            b = ["same"] * common + ["b"] * (n - common)
            expected = PLAIN.score(" ".join(b), " ".join(a))["rougeL"].fmeasure
            index = NoveltyIndex()
            index.add("b", b)
            assert f_measure(a, b) == index.nearest(a)[0] == float(f_of_lengths(common, m, n)) == expected
            ties, above = ties + 1, above + (expected > 0.7)
    assert ties == 83 and 0 < above < ties  # rounding sends ties to both sides, so the arithmetic matters


@given(st.lists(WORDS, max_size=8), WORDS)
@settings(deadline=None)
def test_nearest_is_the_first_of_the_largest(accepted, words):
    index = NoveltyIndex()
    for i, other in enumerate(accepted):
        index.add(str(i), other)
    scores = [f_measure(words, other) for other in accepted]
    best = max(scores, default=0.0)
    assert index.nearest(words) == (best, str(scores.index(best)) if best > 0 else None)
    assert len(index) == len(accepted)


def test_tokens_that_nobody_has_match_nothing():
    index = NoveltyIndex()
    index.add("x", ["what", "is", "x"])
    assert index.nearest(["new", "words"]) == (0.0, None)
    assert index.nearest(["what", "new", "new", "x"]) == (f_measure(["what", "is", "x"], ["what", "y", "z", "x"]), "x")


def test_more_tokens_than_there_are_code_points_below_the_surrogates():
    index = NoveltyIndex()
    words = [f"w{i}" for i in range(60_000)]
    for i in range(0, 60_000, 100):
        index.add(str(i), words[i:i + 100])
    assert index.nearest(words[59_900:]) == (1.0, "59900")
    assert index.nearest(words[55_300:55_400]) == (1.0, "55300")
