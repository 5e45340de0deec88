"""The model people hold: logits, score and generate, on the tiny random model and (for parity) on the real one."""
import numpy as np
import pytest

import isara_jax
from isara_jax.common import UserError
from isara_jax.decode.requests import Request
from isara_jax.lm import describe, load


@pytest.fixture(scope="module")
def lm():
    return load("tiny-random", dtype="float32")


def test_logits_have_one_row_a_token_and_do_not_depend_on_the_company(lm):
    rows = [[5, 6, 7], list(range(70)), [9]]
    together = lm.logits(rows)
    assert [x.shape for x in together] == [(3, lm.cfg.vocab_size), (70, lm.cfg.vocab_size), (1, lm.cfg.vocab_size)]
    for row, values in zip(rows, together):
        assert values.dtype == np.float32
        np.testing.assert_allclose(lm.logits([row])[0], values, rtol=0, atol=1e-5)


def test_score_is_the_sum_of_log_probabilities_of_the_continuation(lm):
    prompt, continuation = [5, 6, 7], [8, 9]
    logits = lm.logits([prompt + continuation])[0].astype(np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = log_p[2, 8] + log_p[3, 9]
    long = list(range(100))
    scores = lm.score([prompt, long], [continuation, [1]])
    assert scores[0] == pytest.approx(expected, abs=1e-4)
    logits = lm.logits([long + [1]])[0].astype(np.float64)
    assert scores[1] == pytest.approx(logits[99, 1] - np.log(np.exp(logits[99]).sum()), abs=1e-4)


def test_score_of_strings_splits_at_the_pair_boundary(lm):
    ids = lm.tokenizer.encode_pair("Q: a\nA:", " b")
    assert lm.score(["Q: a\nA:"], [" b"])[0] == pytest.approx(lm.score([ids[0]], [ids[1]])[0], abs=1e-6)
    assert lm.score(["Q: a\nA: "], ["b"])[0] == pytest.approx(lm.score(["Q: a\nA:"], [" b"])[0], abs=1e-6)


def test_greedy_text_is_the_argmax_of_the_full_forward(lm):
    prompt = lm.tokenizer.encode("hello there")
    (sample,) = lm.generate([prompt], max_new_tokens=8, ignore_eos=True)[0]
    row = list(prompt)
    for token in sample.ids:
        assert token == int(lm.logits([row])[0][-1].argmax())
        row.append(token)
    assert sample.finish == "length" and len(sample.ids) == 8


def test_a_call_repeated_gives_the_same_and_equal_prompts_differ(lm):
    ask = lambda: lm.generate(["same", "other", "same"], max_new_tokens=12, temperature=1.0, n=2, seed=7, ignore_eos=True)
    first, again = ask(), ask()
    assert first == again
    texts = [tuple(s.ids) for samples in (first[0], first[2]) for s in samples]
    assert len(set(texts)) == 4
    other_seed = lm.generate(["same"], max_new_tokens=12, temperature=1.0, seed=8, ignore_eos=True)[0][0]
    assert other_seed.ids != first[0][0].ids


def test_a_prompt_alone_draws_what_it_draws_in_company(lm):
    company = lm.generate(["a longer neighbour " * 9, "mine", "x"], max_new_tokens=10, temperature=0.8, top_p=0.9, seed=3)
    alone = lm.generate(["mine"], max_new_tokens=10, temperature=0.8, top_p=0.9, seed=3)
    assert company[1] == alone[0]


def test_log_probabilities_are_those_of_the_model(lm):
    """Of whatever was drawn, with any filter: the score of the text under the model itself."""
    ids = lm.tokenizer.encode("a question")
    (sample,) = lm.generate([ids], max_new_tokens=9, temperature=1.3, top_k=40, top_p=0.9, repetition_penalty=1.2, seed=2, ignore_eos=True,
                            log_p=True)[0]
    assert len(sample.log_p) == 9 and lm.score([ids], [sample.ids]) == pytest.approx([sum(sample.log_p)], abs=1e-3)
    assert lm.generate([ids], max_new_tokens=9)[0][0].log_p is None


def test_samples_of_one_prompt_share_its_prefill(lm):
    counted = []
    requests = [Request(tuple(range(1, 42)), i, 3, 1.0, 1.0) for i in range(6)]
    lm.run(requests, seed=0, on_end=counted.append)
    assert (counted[0].prompt_tokens, counted[0].prefilled, counted[0].shared) == (6 * 40, 40, 5 * 40)


def test_damaged_weights_are_named(lm):
    broken = lm.with_params({**lm.params, "norm": {"scale": lm.params["norm"]["scale"] * float("nan")}})
    with pytest.raises(UserError, match="the model's logits are no numbers .* for every one of 2 prompts"):
        broken.generate(["a", "b"], max_new_tokens=2)


def test_stop_strings_are_cut_from_the_text(lm):
    (free,) = lm.generate(["abc"], max_new_tokens=20, temperature=1.0, seed=1, ignore_eos=True)[0]
    stop = free.text[4:6]
    (cut,) = lm.generate(["abc"], max_new_tokens=20, temperature=1.0, seed=1, ignore_eos=True, stop=[stop])[0]
    assert cut.finish == "stop" and cut.text == free.text[:free.text.index(stop)]


@pytest.mark.parametrize("call, message", [
    (lambda lm: lm.generate(["x"], temperature=0.5), "give seed=NUMBER"),
    (lambda lm: lm.generate("x"), "list of prompts"),
    (lambda lm: lm.generate(["x", ""]), "prompt 1 is empty"),
    (lambda lm: lm.generate(["x"], n=0), "n=0 is out of range: at least 1"),
    (lambda lm: lm.generate(["x"], stop=[""]), r"stop=\[''\] is out of range: strings that are not empty"),
    (lambda lm: lm.generate(["x"], max_new_tokens=3, min_new_tokens=4), "min_new_tokens=4 is out of range: from 0 to max_new_tokens=3"),
    (lambda lm: lm.generate(["x"], stop_ids=[256 * 256]), "stop id 65536 is not in the vocabulary"),
    (lambda lm: lm.run([Request((), 0, 4, 0.0, 1.0)], seed=0), "request 0: the prompt is empty"),
    (lambda lm: lm.generate(["x" * 600]), "context|takes"),
    (lambda lm: lm.logits([[1], []]), "row 1 has 0 tokens"),
    (lambda lm: lm.logits([[1, 9999]]), "token id 9999"),
    (lambda lm: lm.score(["a"], []), "1 prompts and 0 continuations"),
    (lambda lm: lm.score([[1, 2]], [[]]), "continuation has no tokens"),
])
def test_bad_calls_say_what_is_wrong(lm, call, message):
    with pytest.raises(UserError, match=message):
        call(lm)


def test_slots_that_memory_cannot_hold_are_refused_with_the_number_that_fits(lm):
    with pytest.raises(UserError, match=r"1000000000 slots for 1 prompts need .*with_engine\(slots=\d+\)"):
        lm.with_engine(slots=10**9).generate([[1, 2]], max_new_tokens=3)


def test_a_context_longer_than_the_models_is_refused():
    with pytest.raises(UserError, match="longer than the 512 tokens"):
        describe("tiny-random", context=4096)
    assert describe("tiny-random", context=64).context == 64


def test_public_names_load_lazily():
    assert isara_jax.load is load
    with pytest.raises(AttributeError, match="it offers load"):
        isara_jax.nothing


def test_greedy_text_of_smollm2_equals_torch_up_to_a_near_tie(smollm2_gguf):
    """64 greedy tokens of the real model; where torch's top-2 margin is under 1e-3 either token is right."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    lm = load(str(smollm2_gguf), dtype="float32")
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32).eval()
    prompts = ["Q: Why do cats purr?\nA:", "The three largest oceans of the world are"]
    rows = [lm.tokenizer.encode(p) for p in prompts]
    for row, (sample,) in zip(rows, lm.generate(rows, max_new_tokens=64, ignore_eos=True)):
        with torch.no_grad():
            logits = reference(torch.tensor([row + sample.ids])).logits[0, len(row) - 1:-1]
        np.testing.assert_allclose(lm.logits([row + sample.ids])[0][len(row) - 1:-1], logits.numpy(), rtol=0, atol=1e-3)
        for t, token in enumerate(sample.ids):
            best, second = logits[t].topk(2).values.tolist()
            if best - second < 1e-3:
                break
            assert token == int(logits[t].argmax()), f"token {t} differs at a margin of {best - second:.4f}"
        else:
            t = 64
        assert t > 8, "the comparison ended too early to say anything"
