"""ICL-kNN outside of a run: its prompts and answers are those of the evaluated arm, and what it says of pairs and cost is so."""
import dataclasses
import json

import jax
import pytest

import isara_jax
from isara_jax import cli, icl
from isara_jax.common import UserError, read_jsonl
from isara_jax.config import from_dict
from isara_jax.console import Console
from isara_jax.data import benchmarks, prompts, seeds
from isara_jax.data.prompts import Template
from isara_jax.retrieval.store import VectorStore
from isara_jax.session import open_session
from isara_jax.workdir import Workdir

TOPICS = ("kettle", "ladder", "violin", "anchor", "pillow", "rocket", "garden", "mirror", "basket", "candle", "bridge", "hammer")
PAIRS = [(f"What {topic[::-1]} is {topic} {topic[1:]}?", f"A {topic} is for {topic[::-1]}.") for topic in TOPICS]
ASKED = ["Who owns a kettle?", "Is the garden large?", "Why rockets?"]
TINY = {"encoder": "tiny-random-encoder"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def lm():
    """The tiny random model with larger weights, which does not say the same to everything."""
    small = isara_jax.load("tiny-random", "float32")
    return small.with_params(jax.tree.map(lambda x: x * 6 if x.ndim > 1 else x, small.params))


@pytest.fixture(scope="module")
def run(tmp_path_factory, lm):
    """A run in a form of its own, judged against its starting model behind the nearest seeds."""
    folder = tmp_path_factory.mktemp("icl")
    rows = write(folder / "rows.jsonl", [{"question": f"{t[::-1]} {t[1:]} near {t[:3]} {t[2:]}{t}?", "answer": f"No {t}."} for t in TOPICS])
    config = cli.load("configs/tiny.py")
    config.prompt.update(question_marker="Ask:", order="id", budget=170)
    config.eval.update(benchmark=str(rows), rows=6, validation_rows=2, answer_rows=6, answer_tokens=40, arms=("icl_knn", "isara"))
    config.retrieval.k, config.stop.iterations, config.generate.requests = 3, 1, 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("isara_jax.kept.cache_folder", lambda: folder / "cache")
        isara_jax.align(lm, write(folder / "mine.jsonl", [{"question": q, "answer": a} for q, a in PAIRS]), from_dict(config), folder / "run")
    return folder / "run"


def session_of(run, lm):
    """The run's session, made as training makes it."""
    workdir = Workdir(run)
    config = from_dict(workdir.stored()["config"])
    return open_session(lm.blueprint, seeds.load_seeds(config.data), None, config, workdir, Console(None), lm.dtype, lm.mesh)


# ------------------------------------------------------------------------------------------------------------- the arm that is judged
def test_prompts_are_those_of_the_evaluated_arm(run, lm):
    session = session_of(run, lm)
    form = session.icl_form(session.train_seeds, VectorStore(None, session.embedder), "knn")
    expected = form.prompts(lm.tokenizer, ASKED)
    asked = isara_jax.icl_knn(lm, run)
    assert asked.prompts(ASKED) == expected and asked.form.hash == form.hash and asked.answer_tokens == session.limits.answer
    assert all(bytes(p).startswith(b"Ask: ") and len(p) <= 170 and bytes(p).count(b"Ask: ") == 3 for p in expected)


def test_greedy_answers_are_those_that_were_evaluated(run, lm):
    (file,) = (run / "evaluation" / "dev").glob("icl_knn.knn-3-*.jsonl")
    kept = {row["id"]: (row["answer"], row["finish"]) for row in read_jsonl(file)}
    items = [item for item in benchmarks.open_benchmark(str(run.parent / "rows.jsonl"), "").pool if item.id in kept]
    made = isara_jax.icl_knn(lm, str(run)).answer([item.question for item in items], max_new_tokens=40)
    assert [(a.text, a.finish) for a in made] == [kept[item.id] for item in items]
    assert len(kept) == len({text for text, _ in kept.values()}) == 6


def test_pairs_that_were_held_out_are_not_shown(run, lm):
    held_out = {row["question"] for row in read_jsonl(run / "held_out.jsonl")}
    asked = isara_jax.icl_knn(lm, run, 64, budget=0)
    shown = {pair.question for prompt in asked.ask(list(held_out)) for pair in prompt.pairs}
    assert len(held_out) == 4 and shown and not shown & held_out


# ---------------------------------------------------------------------------------------------------------------- what is said of it
def test_exemplars_and_tokens_are_those_of_the_prompt(lm):
    asked = isara_jax.icl_knn(lm, PAIRS, 3, **TINY)
    for question, prompt, answer in zip(ASKED, asked.ask(ASKED), asked.answer(ASKED, max_new_tokens=4), strict=True):
        blocks = "".join(f"Q: {p.question}\nA: {p.answer}\n\n" for p in reversed(prompt.pairs))  # nearest last
        assert prompts.show(prompt.segments) == f"{blocks}Q: {question}\nA:" and len(prompt.pairs) == 3
        assert answer.exemplars == tuple(p.id for p in prompt.pairs) and answer.new_tokens <= 4
        assert answer.prompt_tokens == len(f"{blocks}Q: {question}\nA:") and answer.bare_tokens == len(f"Q: {question}\nA:")


def test_the_nearest_pair_comes_first_and_the_farthest_is_left_out_where_room_is_short(lm):
    asked = isara_jax.icl_knn(lm, PAIRS, 5, **TINY)
    (whole,) = asked.ask([PAIRS[4][0]])
    assert whole.pairs[0].question == PAIRS[4][0] and len(whole.pairs) == 5
    (budgeted,) = isara_jax.icl_knn(lm, PAIRS, 5, budget=len(whole.tokens) - 1, **TINY).ask([PAIRS[4][0]])
    (short,) = asked.ask([PAIRS[4][0]], max_new_tokens=lm.context - len(whole.tokens) + 1)
    assert budgeted.pairs == short.pairs == whole.pairs[:4] and short.bare_tokens == whole.bare_tokens


def test_draws_have_addresses(lm):
    asked = isara_jax.icl_knn(lm, PAIRS, 2, **TINY)
    draw = lambda questions, seed=1: [a.text for a in asked.answer(questions, max_new_tokens=12, temperature=1.0, seed=seed)]
    a, b, again = draw(["Why?", "How?", "Why?"])
    assert len({a, b, again}) == 3 and draw(["How?", "Why?", "Why?"]) == [b, a, again] and draw(["Why?"], seed=2) != [a]


# ------------------------------------------------------------------------------------------------------------------------- pools
def test_a_pool_may_be_a_file_pairs_or_records(run, lm, tmp_path):
    file = write(tmp_path / "mine.jsonl", [{"question": q, "answer": a} for q, a in PAIRS])
    records = icl.read_pool(file)[0]
    ways = [file, str(file), PAIRS, [{"prompt": q, "response": a} for q, a in PAIRS], records, reversed(records)]
    made = [isara_jax.icl_knn(lm, way, 3, **TINY).prompts(ASKED) for way in ways]
    assert all(one == made[0] for one in made)
    assert len(icl.read_pool(run)[0]) == 8 and icl.read_pool(run)[1].generate.answer.max_new_tokens == isara_jax.icl_knn(lm, run).answer_tokens


def test_without_a_run_the_longest_answer_of_the_pool_sets_the_limit(lm):
    asked = isara_jax.icl_knn(lm, [("Why?", "x" * 30), ("How?", "y")], 1, **TINY)  # 30 letters, a blank and an end: 32, and a quarter more
    assert asked.answer_tokens == 40 and asked.form.room == lm.context - 40


def test_a_form_without_pairs_is_served_in_the_same_way(run, lm):
    session = session_of(run, lm)
    asked = icl.InContext(lm, session.form, session.limits.answer)
    (prompt,), (answer,) = asked.ask(["Why?"]), asked.answer(["Why?"], max_new_tokens=3)
    assert prompt.segments == session.template.training_segments("Why?") and prompt.pairs == ()
    assert answer.exemplars == () and answer.prompt_tokens == answer.bare_tokens == len("Ask: Why?\nA:")


# ------------------------------------------------------------------------------------------------------------------- conversation
@dataclasses.dataclass(frozen=True)
class Turn:
    id: str
    question: str
    answer: str


TURNS = [Turn("t1", "First?", "One."), Turn("t2", "Second?", "Two.")]


@pytest.mark.parametrize("order, shown", [("nearest_last", "cba"), ("nearest_first", "abc"), ("id", "bac")])
def test_earlier_turns_stand_between_the_pairs_and_the_question_oldest_first(lm, order, shown):
    pool = [Turn({"a": "2", "b": "1", "c": "3"}[name], f"{name * 9}?", f"{name}.") for name in "abc"]
    config = from_dict({"retrieval": {"encoder": "tiny-random-encoder", "k": 3}, "prompt": {"order": order}})
    asked = icl.in_context(lm, pool, config)
    object.__setattr__(asked.form, "exemplars", lambda questions, k: [pool] * len(questions))  # a is nearest, c farthest
    prompt, held = asked.converse("Third?", TURNS)
    blocks = "".join(f"Q: {name * 9}?\nA: {name}.\n\n" for name in shown)
    assert prompts.show(prompt.segments) == f"{blocks}Q: First?\nA: One.\n\nQ: Second?\nA: Two.\n\nQ: Third?\nA:" and held == 2
    assert bytes(prompt.tokens).decode() == prompts.show(prompt.segments) and prompt.bare_tokens == len(prompt.tokens) - len(blocks)
    assert asked.converse("Third?", [])[0] == asked.ask(["Third?"])[0]


def test_history_is_the_prompt_of_a_pair_before_the_question(lm):
    asked = icl.InContext(lm, icl.forms.bare(Template("plain"), 400), 10)
    straight = Template("plain", order="nearest_first")
    assert asked.converse("Third?", TURNS)[0].segments == straight.answer_segments(TURNS, "Third?")


def test_the_oldest_turns_are_dropped_where_the_context_is_short(lm):
    whole = "Q: First?\nA: One.\n\nQ: Second?\nA: Two.\n\nQ: Third?\nA:"
    shown = lambda room: [bytes(p.tokens).decode() if isinstance(p, icl.Prompt) else p
                          for p in icl.InContext(lm, icl.forms.bare(Template("plain"), room), 10).converse("Third?", TURNS)]
    assert shown(len(whole)) == [whole, 2]
    assert shown(len(whole) - 1) == [whole[len("Q: First?\nA: One.\n\n"):], 1]
    assert shown(len("Q: Third?\nA:")) == ["Q: Third?\nA:", 0]
    with pytest.raises(UserError, match="its prompt has 12 tokens, and of this model's context 11 are left"):
        shown(11)


# --------------------------------------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize("k", [0, -1, 65])
def test_a_number_of_pairs_out_of_range_is_refused(lm, k):
    with pytest.raises(UserError, match=f"k={k} is out of range: 1 to 64 pairs"):
        isara_jax.icl_knn(lm, PAIRS, k, **TINY)


def test_pools_that_hold_nothing_are_refused(lm, tmp_path):
    with pytest.raises(UserError, match="the pool is empty"):
        isara_jax.icl_knn(lm, [], 1, **TINY)
    with pytest.raises(UserError, match="empty is not the workdir of a run"):
        (tmp_path / "empty").mkdir()
        isara_jax.icl_knn(lm, tmp_path / "empty", 1)
    with pytest.raises(UserError, match="nowhere.csv does not exist"):
        isara_jax.icl_knn(lm, tmp_path / "nowhere.csv", 1)


def test_folders_of_runs_that_cannot_be_served_are_refused(lm, run, tmp_path):
    unbegun = tmp_path / "unbegun"
    unbegun.mkdir()
    (unbegun / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(UserError, match="unbegun holds no pool"):
        isara_jax.icl_knn(lm, unbegun)
    (unbegun / "pool").mkdir()
    (unbegun / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not a run's config.json"):
        isara_jax.icl_knn(lm, unbegun)
    (tmp_path / "crossed" / "folds" / "1").mkdir(parents=True)
    (tmp_path / "crossed" / "config.json").write_bytes((run / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"crossed/folds/1, or train one on every pair: the same command with --refit_all makes .*crossed/all\."):
        isara_jax.icl_knn(lm, tmp_path / "crossed")
    (tmp_path / "crossed" / "all").mkdir()
    with pytest.raises(UserError, match="crossed/all, trained on every pair, or .*crossed/folds/1"):
        isara_jax.icl_knn(lm, tmp_path / "crossed")


def test_questions_that_cannot_be_asked_are_refused(lm):
    asked = isara_jax.icl_knn(lm, PAIRS, 2, **TINY)
    for questions, said in ((["Why?", " "], "question 1 is empty"), (["Why?", 3], "question 1 is a int"), ("Why?", "a list, not one string"),
                            (["Why?", "x" * 600], "question 1: its prompt has 606 tokens")):
        with pytest.raises(UserError, match=said):
            asked.answer(questions, max_new_tokens=4)
    for limit in (0, lm.context):
        with pytest.raises(UserError, match=f"max_new_tokens={limit} is out of range: 1 to 511"):
            asked.answer(["Why?"], max_new_tokens=limit)
    with pytest.raises(UserError, match="ships no chat template"):
        isara_jax.icl_knn(lm, PAIRS, 2, form="chat", **TINY)
    with pytest.raises(UserError, match="'chatty' is not one of plain, chat"):
        isara_jax.icl_knn(lm, PAIRS, 2, form="chatty", **TINY)
