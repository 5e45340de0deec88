"""Seeds: files as people have them, messages for those that cannot be used, the split, and the built-in set."""
from __future__ import annotations

import csv
import io
import itertools
import json
import random
import zipfile

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

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
    ("a.csv", CSV.replace(",", "|")),
    ("a.csv", "sep=;\r\n" + CSV.replace(",", ";")),                    # told to Excel, which shows no such row
    ("a.csv", CSV.replace("question,answer", "question,answer,")),      # a third column that is empty and has no name
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


@pytest.mark.parametrize("header", [
    "Frage;Antwort", "question;Réponse", "Question;Re\u0301ponse", "PREGUNTA;Respuesta", "pergunta;resposta", "Domanda;Risposta",
    "vraag;antwoord", "fråga;svar", "Pytanie;Odpowiedź", "otázka;odpověď", "Вопрос;Ответ", "Soru;Cevap", "質問;回答", "问题;答案",
    "질문;답변", "سؤال;جواب"])
def test_columns_are_known_in_other_languages(tmp_path, header):
    """Whatever the case, and with accents composed (as Windows writes them) or not (as a Mac may)."""
    assert texts(load(tmp_path, "a.csv", f"id;{header}\n7;Warum?;Darum.\n")) == [("Warum?", "Darum.")]


def test_an_english_column_goes_before_its_translation(tmp_path):
    seed_set = load(tmp_path, "a.csv", "Frage,question,answer\nWarum?,Why?,So.\nWie?,How?,Thus.\n")
    assert texts(seed_set) == [("Why?", "So."), ("How?", "Thus.")]
    assert len(seed_set.warnings) == 1 and "from the column 'question', not from 'Frage'" in seed_set.warnings[0]


CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")).map(str.strip).filter(bool)


@given(st.lists(st.tuples(CELL, CELL), min_size=1, max_size=5, unique_by=lambda pair: pair[0].casefold()),
       st.sampled_from(",;\t|"), st.sampled_from(["\n", "\r\n"]), st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
def test_what_a_csv_writer_wrote_is_read_back(tmp_path_factory, rows, delimiter, end, quoting):
    assume(quoting == csv.QUOTE_ALL or not any("\r" in cell for row in rows for cell in row))  # which this writer leaves unquoted
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows([("question", "answer"), *rows])
    seed_set = load(tmp_path_factory.getbasetemp(), "written.csv", file.getvalue())
    lines_as_read = lambda text: text.replace("\r\n", "\n").replace("\r", "\n")
    assert texts(seed_set) == [(lines_as_read(q), lines_as_read(a)) for q, a in rows]
    assert [p.row for p in seed_set.pairs] == list(range(2, len(rows) + 2))


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
    [warning] = load(tmp_path, "a.jsonl", lines(*ROWS), author="", source="", licence="").warnings
    assert "the author, source and licence of the seeds are unknown, and every generated pair inherits that; say them with " in warning
    assert "--config.data.author=… --config.data.source=… --config.data.licence=… or columns 'author', 'source' and 'licence'" in warning


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


def test_a_thousand_seeds_warn(tmp_path):
    rows = [{"question": f"What is number {i}?", "answer": f"It is {i}."} for i in range(1000)]
    assert load(tmp_path, "a.jsonl", lines(*rows[:999])).warnings == ()
    assert "1,000 seeds; this works, but the method is meant for fewer" in load(tmp_path, "a.jsonl", lines(*rows)).warnings[0]


def archive(**files):
    """The bytes of a zip archive; a double underscore in a name stands for a slash, a single one for a point."""
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as f:
        for name, content in files.items():
            f.writestr(name.replace("__", "/").replace("_", "."), content)
    return data.getvalue()


OLD_OFFICE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 500
SPREADSHEET = "application/vnd.oasis.opendocument.spreadsheet"
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
    "wrong columns": ("a.csv", "thema,inhalt\na,b\n",
                      r"no column for questions .question, prompt.* or for answers .*which the first row must name: 'thema', 'inhalt'"),
    "long names": ("a.csv", "Time,What is your question to us?,And what would be the right answer?\n1,a,b\n",
                   "--config.data.question='What is your question to us.' --config.data.answer='And what"),
    "no header": ("a.csv", "Why is the sky blue?,Air scatters it.\nWhat is ice?,Water.\n",
                  "the first row seems to be a pair .'Why is the sky blue.'.*Put a row above it"),
    "title above": ("a.csv", "Our FAQ,\n,\nquestion,answer\nWhy?,So.\n", "names of the columns seem to stand in row 3. Remove the rows"),
    "title in one cell": ("a.csv", "Our FAQ\nFrage;Antwort\nWarum?;Darum.\n",
                          "names of the columns .'Frage;Antwort'. stand below the first row"),
    "title and no names": ("a.csv", "Our FAQ\nWhy?,So.\nHow?,Thus.\n", "only one column, 'Our FAQ', .*name both in the first row"),
    "one column": ("a.csv", "question\nWhy?\nHow?\n", "only one column, 'question', .*Put the answers into a second column"),
    "unknown delimiter": ("a.csv", "question^answer\nWhy?^So.\n", r"only one column, 'question\^answer', .*seem to be divided by '\^'"),
    "rows quoted whole": ("a.csv", '"question,answer"\n"Why?,So."\n', "each row is quoted as a whole, so ',' divides nothing"),
    "empty cells": ("a.csv", ",\n,\n", "a.csv holds only empty cells"),
    "merged cells": ("a.csv", "question,answer\nWhy?,So.\n,And so.\n",
                     "a.csv, row 3: the question .* is empty, though there is an answer .of merged cells only the first keeps its text"),
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
    "UTF-16": ("a.csv", CSV.encode("utf-16"), "seems to be UTF-16 .Excel's 'Unicode Text'.*iconv -f UTF-16"),
    "NUL": ("a.csv", CSV.encode("utf-16-le"), "line 1: holds NUL bytes"),
    "workbook": ("a.xlsx", archive(xl__workbook_xml="x"),
                 "is an Excel workbook. Open it in Excel and save it as 'CSV UTF-8' .File > Save As"),
    "workbook as CSV": ("a.csv", archive(xl__workbook_xml="x"), "a.csv is an Excel workbook. .*'CSV UTF-8'"),
    "workbook cut short": ("a.xlsx", archive(xl__workbook_xml="x")[:30], "is a zip archive, .*save it as 'CSV UTF-8'"),
    "old workbook": ("a.xls", OLD_OFFICE, "is an old Excel workbook. .*'CSV UTF-8'"),
    "locked workbook": ("a.xlsx", OLD_OFFICE + "EncryptedPackage".encode("utf-16-le"), "is an Excel workbook with a password"),
    "LibreOffice": ("a.ods", archive(mimetype=SPREADSHEET, content_xml="x"), "is a LibreOffice spreadsheet. .*'Text CSV'"),
    "Numbers": ("a.numbers", archive(Index__Document_iwa="x"), "is a Numbers document. .*Export To > CSV"),
    "Word": ("a.csv", archive(word__document_xml="x"), "is a Word document. Copy its questions and answers into two columns"),
    "old Word": ("a.doc", OLD_OFFICE + "WordDocument".encode("utf-16-le"), "is an old Word document"),
    "another archive": ("a.zip", archive(a_csv=CSV), "is a zip archive, .*or unzip it"),
    "PDF": ("a.pdf", b"%PDF-1.7\n", "is a PDF. Copy"),
    "RTF": ("a.rtf", b"{\\rtf1\\ansi Why?}", "is a text document .RTF"),
    "web page": ("a.xls", "<html><body><table><tr><td>question</td></tr></table></body></html>", "is a web page or XML.*'CSV UTF-8'"),
    "parquet": ("a.parquet", b"PAR1....", "is a Parquet file"),
}


ASKED = {"asked column": {"question": "ab"}, "one column for both": {"question": "text", "answer": "TEXT"}}


@pytest.mark.parametrize("case", PROBLEMS)
def test_problems_are_named_with_file_row_and_next_step(tmp_path, case):
    name, content, message = PROBLEMS[case]
    with pytest.raises(UserError, match=f"(?s){message}") as e:
        load(tmp_path, name, content, **ASKED.get(case, {}))
    assert str(tmp_path / name) in str(e.value)


BEGINNINGS = (b"", b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"\x1f\x8b\x08", b"\xef\xbb\xbf", b"\xff\xfe", b"<", b"{", b"[", b"sep=", b'"',
              b"question,answer\n")


@given(st.sampled_from(BEGINNINGS), st.binary(max_size=60))
def test_any_bytes_are_read_or_refused_with_a_message(tmp_path_factory, beginning, rest):
    try:
        assert load(tmp_path_factory.getbasetemp(), "any.csv", beginning + rest).pairs
    except UserError as e:
        assert "any.csv" in str(e)


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
