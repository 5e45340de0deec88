"""Seeds: files as people have them, messages for those that cannot be used, the split, and the built-in set."""
from __future__ import annotations

import itertools
import json
import random

import pytest

from isara_jax.common import UserError, read_jsonl
from isara_jax.config import Data
from isara_jax.data import rouge
from isara_jax.data.seeds import Seed, built_in, components, from_pairs, load_seeds, split_holdout

KNOWN = {"author": "human", "source": "a book", "licence": "CC0-1.0"}
TWO = [("Why is the sky blue?", "Air scatters blue light."), ("What is ice?", "It is frozen water.")]


def load(folder, name, content, **fields):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load_seeds(Data(seeds=str(path), **{**KNOWN, **fields}))


def texts(seed_set):
    return [(p.question, p.answer) for p in seed_set.pairs]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


# ----------------------------------------------------------------------------------------------------------------------- formats
CSV = "question,answer\nWhy is the sky blue?,Air scatters blue light.\nWhat is ice?,It is frozen water.\n"
ROWS = [{"question": q, "answer": a} for q, a in TWO]


@pytest.mark.parametrize("name, content", [
    ("a.csv", CSV),
    ("a.csv", CSV.replace(",", ";")),
    ("a.tsv", CSV.replace(",", "\t")),
    ("a.csv", b"\xef\xbb\xbf" + CSV.encode()),
    ("a.csv", CSV.replace("\n", "\r\n")),
    ("a.csv", CSV.replace("\n", "\n\n")),
    ("a.txt", CSV.replace("question,answer", " Prompt ,RESPONSE")),
    ("a.csv", CSV.replace("question,answer", "instruction,completion")),
    ("a.csv", 'id;"question";answer\n1;"Why is the sky blue?";Air scatters blue light.\n2;What is ice?;It is frozen water.;;\n'),
    ("a.jsonl", lines(*ROWS)),
    ("a.jsonl", b"\xef\xbb\xbf" + lines(*ROWS).replace("\n", "\r\n\r\n").encode()),
    ("a.json", json.dumps(ROWS, indent=2)),
    ("a.json", json.dumps({"version": 1, "tags": ["x"], "data": ROWS})),
    ("a.json", lines(*ROWS)),      # JSON lines under another name
    ("a.csv", lines(*ROWS)),
    ("a.jsonl", json.dumps(ROWS)),
])
def test_formats_are_told_apart_by_content(tmp_path, name, content):
    seed_set = load(tmp_path, name, content)
    assert texts(seed_set) == TWO
    assert seed_set.warnings == ()
    assert seed_set.hash == load(tmp_path, "other.jsonl", lines(*ROWS)).hash


def test_quoted_newlines_delimiters_and_quotes(tmp_path):
    content = 'question,answer\n"What does ""a;b"" mean,\r\nand why?","One, two;\nthree."\nWhat is ice?,It is frozen water.\n'
    seed_set = load(tmp_path, "a.csv", content)
    assert texts(seed_set) == [('What does "a;b" mean,\nand why?', "One, two;\nthree."), TWO[1]]
    assert [p.row for p in seed_set.pairs] == [2, 3]


def test_rows_are_numbered_as_an_editor_shows_them(tmp_path):
    assert [p.row for p in load(tmp_path, "a.csv", CSV.replace("\n", "\n\n")).pairs] == [3, 5]
    assert [p.row for p in load(tmp_path, "a.jsonl", "\n" + lines(*ROWS)).pairs] == [2, 3]


def test_alpaca_input_follows_its_instruction(tmp_path):
    rows = [{"instruction": "Sort these notes.", "input": "G, B, E", "output": "B, E, G"},
            {"instruction": "Say hello.", "input": "", "output": "Hello."}]
    assert texts(load(tmp_path, "a.json", json.dumps(rows))) == [("Sort these notes.\nG, B, E", "B, E, G"), ("Say hello.", "Hello.")]
    assert texts(load(tmp_path, "b.jsonl", lines({"question": "Why?", "input": "x", "answer": "So."}))) == [("Why?", "So.")]


def test_columns_by_name(tmp_path):
    content = "Frage,Best Answer,answer\nWarum?,Darum.,x\n"
    assert texts(load(tmp_path, "a.csv", content, question="frage", answer="Best Answer")) == [("Warum?", "Darum.")]


def test_a_choice_between_columns_is_said(tmp_path):
    rows = [{"completion": "C.", "question": "Q?", "answer": "A."}, {"completion": "C.", "question": "R?", "answer": "B."}]
    seed_set = load(tmp_path, "a.jsonl", lines(*rows))
    assert texts(seed_set) == [("Q?", "A."), ("R?", "B.")]
    assert len(seed_set.warnings) == 1 and "from the column 'answer', not from 'completion'" in seed_set.warnings[0]


def test_limit_takes_the_first_pairs_and_reads_no_further(tmp_path):
    assert texts(load(tmp_path, "a.jsonl", lines(*ROWS) + "{broken", limit=2)) == TWO


def test_provenance_from_the_row_then_the_config_then_unknown(tmp_path):
    content = lines({**ROWS[0], "author": "Ada", "License": "MIT"}, ROWS[1])
    first, second = load(tmp_path, "a.jsonl", content, author="human", source="", licence="").pairs
    assert (first.author, first.source, first.licence) == ("Ada", "unknown", "MIT")
    assert (second.author, second.source, second.licence) == ("human", "unknown", "unknown")
    warnings = load(tmp_path, "a.jsonl", content, author="human", source="", licence="").warnings
    assert len(warnings) == 2
    assert "the source of the seeds is unknown" in warnings[0] and "the licence of 1 of the seeds is unknown" in warnings[1]


def test_pairs_from_python():
    assert texts(from_pairs(TWO, Data(**KNOWN))) == texts(from_pairs(ROWS, Data(**KNOWN))) == TWO
    one = from_pairs([{"q": "Why?", "a": "So."}], Data(question="q", answer="a", **KNOWN))
    assert one.pairs == (Seed("Why?", "So.", "human", "a book", "CC0-1.0", 1),)
    with pytest.raises(UserError, match="2 problems.*\n  item 2: must be .question, answer.*'x'\n  item 3: the answer .* is empty"):
        from_pairs([TWO[0], "x", ("a", "")], Data())
    with pytest.raises(UserError, match="holds no pairs"):
        from_pairs([], Data())


# -------------------------------------------------------------------------------------------------------------------- what is said
def test_one_seed_and_repeated_questions_only_warn(tmp_path):
    assert "only one seed" in load(tmp_path, "a.jsonl", lines(ROWS[0])).warnings[0]
    warned = load(tmp_path, "a.jsonl", lines(*ROWS, {"question": "what is  ICE?", "answer": "Solid water."})).warnings
    assert len(warned) == 1 and "1 question(s) have different answers (lines 2 and 3)" in warned[0]


def test_ten_thousand_seeds_warn_and_work(tmp_path):
    rng = random.Random(0)
    vocabulary = [f"w{i}" for i in range(3000)]
    rows = [{"question": " ".join(rng.choices(vocabulary, k=8)) + "?", "answer": f"It is {i}."} for i in range(10_000)]
    seed_set = load(tmp_path, "a.jsonl", lines(*rows))
    assert len(seed_set.pairs) == 10_000 and "10,000 seeds" in seed_set.warnings[0]
    train, held_out = split_holdout(seed_set.pairs, 0.125)
    assert len(held_out) == 1250 and len(train) == 8750


GOOD = lines(*ROWS)
PROBLEMS = {
    "empty": ("a.csv", " \n", "a.csv is empty"),
    "only a header": ("a.csv", "question,answer\n", "a.csv holds no pairs below its header"),
    "empty list": ("a.json", "[]", "a.json holds no pairs. Add"),
    "broken line": ("a.jsonl", GOOD * 1 + "{oops\n", r"a.jsonl, line 3: not valid JSON \(.*column 2\): '{oops'. Mend or remove it"),
    "only broken lines": ("a.jsonl", "hello\n", "a.jsonl, line 1: not valid JSON"),
    "broken JSON": ("a.json", '[\n{"question": "a", "answer": "b"},\n{"question": \n]', "a.json, line 4: not valid JSON"),
    "JSON cut short": ("a.json", json.dumps(ROWS, indent=2)[:-40], r"a.json, line \d+: not valid JSON"),
    "no objects": ("a.json", '[["Why?", "So."]]', "a.json, item 1: must be an object with named fields, but is a list"),
    "no list": ("a.json", "3", "a.json holds a number"),
    "several lists": ("a.json", json.dumps({"train": ROWS, "test": ROWS}), "several lists: train, test"),
    "wrong columns": ("a.csv", "frage,antwort\na,b\n", 
                      r"no column for questions .question, prompt.* or for answers .*which the first row must name: 'frage', 'antwort'"),
    "asked column": ("a.csv", "a b,answer\nx,y\n", r"no column for questions \(ab\).*--config.data.question='a b'"),
    "one column for both": ("a.csv", "text,x\ny,z\n", "'text' cannot hold both"),
    "near column": ("a.jsonl", lines({"questions": "a", "answer": "b"}), "--config.data.question=questions"),
    "empty answer": ("a.csv", "question,answer\nWhy?, \nHow?\n", r"2 problems.*\n  row 2: the answer .* is empty\n  row 3: .* empty"),
    "missing answer": ("a.jsonl", GOOD + lines({"question": "x"}), r"line 3: the answer \(column 'answer'\) is missing"),
    "null": ("a.jsonl", GOOD + lines({"question": None, "answer": "x"}), "line 3: the question .* is empty"),
    "number": ("a.jsonl", GOOD + lines({"question": "x", "answer": 42}), r"line 3: the answer .* must be text, but is a number \(42\)"),
    "half a character": ("a.jsonl", '{"question": "a\\ud800", "answer": "b"}', "half of a surrogate pair"),
    "too long": ("a.jsonl", GOOD + lines({"question": "x" * 10_000, "answer": "y" * 10_000}), "line 3: the pair has 20,000 characters"),
    "duplicate": ("a.jsonl", GOOD + lines({"question": "What  is ICE?", "answer": "it is frozen water."}),
                  "line 3: the same question and answer as line 2"),
    "too many fields": ("a.csv", "question,answer\nWhy?,So, it is.\n", "row 2: has 3 fields, but the header has 2"),
    "open quote": ("a.csv", 'question,answer\nWhy?,So.\n"How?,x\ny,z\n', "row 3: a quote is not closed .* begins in line 3"),
    "column twice": ("a.csv", "question,answer,answer\na,b,c\n", "the column 'answer' is there twice"),
    "cp1252": ("a.csv", "question,answer\nWhy?,So.\nCaf\xe9?,Oui.\n".encode("cp1252"),
               r"a.csv, line 3: byte 0xe9 \(it would be 'é'.*iconv -f CP1252 -t UTF-8 a.csv"),
    "neither UTF-8 nor cp1252": ("a.csv", b"question,answer\n\x81,\xff\n", "line 2: byte 0x81 is not UTF-8. Save"),
    "UTF-16": ("a.csv", CSV.encode("utf-16"), "iconv -f UTF-16"),
    "NUL": ("a.csv", CSV.encode("utf-16-le"), "line 1: holds NUL bytes"),
    "workbook": ("a.xlsx", b"PK\x03\x04....", "save it as 'CSV UTF-8'"),
    "parquet": ("a.parquet", b"PAR1....", "is a Parquet file"),
}


ASKED = {"asked column": {"question": "ab"}, "one column for both": {"question": "text", "answer": "TEXT"}}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_are_named_with_file_row_and_next_step(tmp_path, case):
    name, content, message = PROBLEMS[case]
    with pytest.raises(UserError, match=f"(?s){message}") as e:
        load(tmp_path, name, content, **ASKED.get(case, {}))
    assert str(tmp_path / name) in str(e.value)


def test_ten_problems_are_shown_and_the_rest_counted(tmp_path):
    with pytest.raises(UserError) as e:
        load(tmp_path, "a.jsonl", GOOD + lines(*({"question": f"q{i}", "answer": ""} for i in range(13))))
    message = str(e.value).split("\n")
    assert len(message) == 12 and "13 problems" in message[0] and "line 12" in message[10] and message[11].strip() == "… and 3 more"


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "seeds.csv").write_text(CSV)
    for path, message in ((tmp_path / "seed.csv", f"Did you mean {tmp_path / 'seeds.csv'}"), (tmp_path / "x.jsonl", "holds seeds.csv"),
                          (tmp_path / "no" / "x.csv", f"there is no folder {tmp_path / 'no'}"), (tmp_path, "is a folder.*holds seeds.csv"),
                          (tmp_path / "seeds.csv" / "x.csv", "there is no folder")):
        with pytest.raises(UserError, match=message):
            load_seeds(Data(seeds=str(path)))
    with pytest.raises(UserError, match="Did you mean 'misconceptions'.*Built-in sets: misconceptions"):
        load_seeds(Data(seeds="misconception"))
    with pytest.raises(UserError, match="config.data.seeds is empty"):
        load_seeds(Data(seeds=""))


# --------------------------------------------------------------------------------------------------------------------- splitting
def pairs(*questions):
    return [Seed(q, f"Answer {i}.", *KNOWN.values(), i) for i, q in enumerate(questions)]


DISTINCT = pairs(*(f"x{i} y{i} z{i}?" for i in range(27)))  # no two share a word


def test_chains_of_near_questions_are_one_component():
    labels = components(["a b c d e", "a b c d f", "a b c g f", "v w x y z", "A, b c d e?", "???", "!!!", "???"])
    assert labels[0] == labels[1] == labels[2] == labels[4] and labels[5] == labels[7]
    assert len({labels[0], labels[3], labels[5], labels[6]}) == 4
    assert len(set(components(["a b c d e", "a b c x y"]))) == 2  # F = 0.6 is not above 0.6
    assert len(components([])) == 0


def test_components_agree_with_a_plain_search():
    rng = random.Random(1)
    questions = [" ".join(rng.choices("abcdefgh", k=rng.randint(1, 7))) for _ in range(300)]
    words = [rouge.tokens(q) for q in questions]
    labels = list(range(300))
    for i, j in itertools.combinations(range(300), 2):
        if rouge.f_measure(words[i], words[j]) > 0.6 and labels[i] != labels[j]:
            labels = [labels[j] if label == labels[i] else label for label in labels]
    found = components(questions).tolist()
    assert len(set(zip(labels, found))) == len(set(labels)) == len(set(found))  # the same partition


@pytest.mark.parametrize("n, share, held", [
    (7, 0.125, 0), (8, 0.125, 4), (16, 0.125, 4), (27, 0.125, 4), (27, 0.25, 7), (27, 0.5, 13), (27, 0.0, 0)])
def test_an_eighth_and_at_least_four_are_held_out(n, share, held):
    train, held_out = split_holdout(DISTINCT[:n], share)
    assert len(held_out) == held and len(train) == n - held
    assert sorted(train + held_out, key=lambda p: p.row) == DISTINCT[:n]
    assert train == sorted(train, key=lambda p: p.row) and held_out == sorted(held_out, key=lambda p: p.row)


def test_the_split_does_not_depend_on_the_order_of_the_rows():
    shuffled = random.Random(2).sample(DISTINCT, len(DISTINCT))
    assert set(split_holdout(shuffled, 0.25)[1]) == set(split_holdout(DISTINCT, 0.25)[1])


def test_near_duplicates_stay_on_one_side():
    near = [f"What is the colour of a {x} in winter?" for x in ("fox", "bear", "hare", "wolf", "deer", "mink")]
    family = pairs(*near, *(p.question for p in DISTINCT[:12]))
    for share in (0.1, 0.2, 0.3, 0.4, 0.5):
        train, held_out = split_holdout(family, share)
        assert len({p in held_out for p in family[:6]}) == 1 and 4 <= len(held_out) <= 9
    assert split_holdout(family[:6] + pairs("Other?", "Another one here?"), 0.125)[1] == []  # one large component and too little beside it


# -------------------------------------------------------------------------------------------------------------------- built-in set
@pytest.fixture(scope="module")
def misconceptions():
    return load_seeds(Data())


def test_the_built_in_set_is_complete(misconceptions):
    assert misconceptions.path == "misconceptions" and misconceptions.warnings == () and len(misconceptions.pairs) == 64
    assert {(p.author, p.source, p.licence) for p in misconceptions.pairs} == {("language model", "isara_jax authors", "Apache-2.0")}
    assert all(list(row) == ["question", "answer", "author", "source", "licence"] for row in read_jsonl(built_in()["misconceptions"]))
    assert len(load_seeds(Data(limit=16)).pairs) == 16


def test_the_built_in_set_is_varied(misconceptions):
    for p in misconceptions.pairs:
        assert 6 <= len(p.question.split()) <= 16 and 12 <= len(p.answer.split()) <= 35 and p.question.endswith("?"), p
    words = [rouge.tokens(p.question) for p in misconceptions.pairs]
    assert max(rouge.f_measure(a, b) for a, b in itertools.combinations(words, 2)) < 0.5
    for group in (misconceptions.pairs[:16], misconceptions.pairs):
        for openings in ([p.question.split()[0] for p in group], [p.answer.split()[0] for p in group]):
            assert max(map(openings.count, openings)) <= 0.2 * len(group)
    assert not any(p.answer.split()[0] in ("No,", "No.", "Yes,", "Yes.") for p in misconceptions.pairs)


def test_the_built_in_set_is_not_truthfulqa(misconceptions, test_data):
    rows = load_seeds(Data(seeds=str(test_data / "truthfulqa" / "TruthfulQA.csv"), answer="Best Answer", **KNOWN)).pairs
    assert len(rows) == 817
    grams = lambda text: {tuple(w[i:i + 6]) for w in [rouge.tokens(text)] for i in range(len(w) - 5)}
    theirs = set().union(*(grams(p.question) | grams(p.answer) for p in rows))
    questions = [rouge.tokens(p.question) for p in rows]
    for p in misconceptions.pairs:
        assert not (grams(p.question) | grams(p.answer)) & theirs, p
        assert max(rouge.f_measure(rouge.tokens(p.question), q) for q in questions) < 0.6, p
