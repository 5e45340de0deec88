"""How alike texts are: by hand, and self-BLEU against nltk's."""
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isara_jax.data.rouge import tokens
from isara_jax.evals import diversity


def test_distinct_n_counts_different_n_grams_of_the_whole_set():
    assert diversity.distinct_n(["a b a", "A b!"], 1) == 2 / 5
    assert diversity.distinct_n(["a b a", "a b"], 2) == 2 / 3  # ab ba ab; none crosses from one text to the next
    assert diversity.distinct_n(["a", ""], 2) == 0.0 and diversity.distinct_n([], 1) == 0.0
    assert diversity.distinct_n(["冷冷"], 1) == 1 / 2


def test_same_opening_is_the_largest_share_of_texts_with_three_equal_first_words():
    texts = ["It is not so.", "it is NOT that", "It is cold today", "", "..."]
    assert diversity.same_opening(texts) == 2 / 5
    assert diversity.same_opening(["Yes.", "Yes", "Yes, it is"]) == 2 / 3  # shorter texts are their own opening
    assert diversity.same_opening(["", ""]) == 0.0 and diversity.same_opening([]) == 0.0


def test_self_bleu_from_nothing_in_common_to_all_alike():
    assert diversity.self_bleu(["a b c d", "e f g h"]) == 0.0
    assert diversity.self_bleu(["a b c d e", "a b c d e"]) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="1 text"):
        diversity.self_bleu(["a"])


def test_self_bleu_by_hand():
    # bigrams of "a b c" against "a b d": words 2/3, bigrams 1/2; equal lengths, and the same the other way round
    assert diversity.self_bleu(["a b c", "a b d"], n=2) == pytest.approx((2 / 3 * 1 / 2) ** 0.5)


def test_self_bleu_looks_at_the_first_200_texts():
    alike = ["a b c d e"] * 200
    assert diversity.self_bleu([*alike, "x", "y"]) == pytest.approx(1.0)


@settings(deadline=None)
@given(st.lists(st.text("abc ", max_size=16), min_size=2, max_size=7), st.integers(1, 4))
def test_self_bleu_equals_nltk_with_smoothing_method_1(texts, n):
    bleu = pytest.importorskip("nltk.translate.bleu_score")
    words, smooth = [tokens(t) for t in texts], bleu.SmoothingFunction().method1
    each = [bleu.sentence_bleu(words[:i] + words[i + 1:], w, weights=[1 / n] * n, smoothing_function=smooth) if w else 0.0
            for i, w in enumerate(words)]
    assert diversity.self_bleu(texts, n) == pytest.approx(sum(each) / len(each), abs=1e-12)
