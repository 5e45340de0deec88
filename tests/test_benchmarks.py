"""Benchmarks: their files as they are published, the rows they become, and one message for a file that cannot be used."""
from __future__ import annotations

import csv
import gzip
import io
import json

import pytest

from isara_jax.common import UserError
from isara_jax.config import Data
from isara_jax.data import tables
from isara_jax.data.benchmarks import Choices, Item, choices, open_benchmark
from isara_jax.data.readers import alpaca, beavertails, plain, self_instruct, truthfulqa
from isara_jax.data.seeds import load_seeds, normalise
from isara_jax.data.sources import SOURCES, open_tables
from isara_jax.data.tables import read_table

WORDS = ("amber", "basalt", "cedar", "delta", "ember", "fjord", "garnet", "heron", "indigo", "juniper", "krill", "lichen")


def write(path, rows):
    """Rows as the file that its name says: .csv, .json, .jsonl or .jsonl.gz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, dict.fromkeys(c for row in rows for c in row))
        writer.writeheader()
        writer.writerows(rows)
        text = out.getvalue()
    else:
        text = json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def everyone(benchmark):
    return {i.id: i for i in (*benchmark.pool, *benchmark.validation, *benchmark.test)}


# ------------------------------------------------------------------------------------------------------------------------- items
def test_choices_keep_their_order_and_lose_what_is_said_twice():
    made = choices([" Blue. ", "blue."], ["Red.", "Green.", "RED."])
    assert made == Choices(("Blue.", "Red.", "Green."), (True, False, False))


@pytest.mark.parametrize("texts, labels, problem", [
    (("a", "b"), (True,), "2 answers and 1 labels"),
    (("a", " "), (True, False), "empty answer"),
    (("a", "b"), (False, False), "no true answer"),
    (("a", "b"), (True, True), "no false answer"),
    (("A  b", "c", "a B"), (True, False, False), "same answer on both sides, as answers 1 and 3"),
])
def test_choices_that_cannot_be_scored_are_refused(texts, labels, problem):
    with pytest.raises(ValueError, match=problem):
        Choices(texts, labels)


def test_a_row_is_known_by_its_content_and_its_prompt():
    a, b = Item(question="Why?", answer="So.", file="x", row=1), Item(question="why? ", answer="So.", file="y", row=2)
    assert a.id == Item(question="Why?", answer="So.").id and len(a.id) == 16
    assert a.id != b.id and a.group == b.group
    assert len({Item(question="Why?", kind=kind).id for kind in ("", "unsafe", "harmless")}) == 3


# -------------------------------------------------------------------------------------------------------------------- TruthfulQA
CSV_ROW = {"Type": "Adversarial", "Category": "Colour", "Question": "What colour is the sky? ", "Best Answer": "It is blue",
           "Correct Answers": "It is blue; Blue.; It is blue.", "Incorrect Answers": "It is red; Green", "Source": "us"}
SKY = Choices(("It is blue.", "Blue.", "It is red.", "Green."), (True, True, False, False))
SKY1 = Choices(("It is blue.", "It is red.", "Green."), (True, False, False))
MC_ROW = {"question": "What colour is the sky?", "mc1_targets": {"It is blue.": 1, "It is red.": 0},
          "mc2_targets": {"It is red.": 0, "Blue.": 1, "It is blue.": 1}}


def read(tmp_path, **files):
    return truthfulqa({key: read_table(write(tmp_path / name, rows)) for key, (name, rows) in files.items()})


def test_truthfulqa_csv_gives_references_and_choices(tmp_path):
    rows = read(tmp_path, generation=("TruthfulQA.csv", [CSV_ROW]))
    assert rows.items == [Item(
        question="What colour is the sky?", answer="It is blue.", right=("It is blue.", "Blue."), wrong=("It is red.", "Green."), mc1=SKY1,
        mc2=SKY, file="TruthfulQA.csv", row=2, author="human", source="TruthfulQA", licence="Apache-2.0")]
    assert rows.note == "TruthfulQA v1, 1 questions, Apache-2.0"


def test_truthfulqa_mc_task_gives_choices_and_references(tmp_path):
    item, = read(tmp_path, mc=("mc_task.json", [MC_ROW])).items
    assert item.mc1 == Choices(("It is blue.", "It is red."), (True, False))
    assert item.mc2 == Choices(("Blue.", "It is blue.", "It is red."), (True, True, False))
    assert (item.answer, item.right, item.wrong) == ("It is blue.", ("It is blue.", "Blue."), ("It is red.",))


def test_choices_come_from_mc_task_and_references_from_the_csv(tmp_path):
    item, = read(tmp_path, mc=("mc_task.json", [MC_ROW]), generation=("TruthfulQA.csv", [CSV_ROW])).items
    assert item.mc1.texts == ("It is blue.", "It is red.") and item.wrong == ("It is red.", "Green.")
    assert item.file == "TruthfulQA.csv"


def test_the_2025_file_is_recognised(tmp_path):
    rows = read(tmp_path, generation=("TruthfulQA.csv", [CSV_ROW | {"Best Incorrect Answer": "It is red"}]))
    assert rows.note.startswith("TruthfulQA 2025") and rows.items[0].mc1 == SKY1


def test_the_published_doubt_about_unknown_is_settled_as_in_mc_task(tmp_path):
    row = CSV_ROW | {"Correct Answers": "It is blue; Unknown", "Incorrect Answers": "unknown; Green"}
    rows = read(tmp_path, generation=("TruthfulQA.csv", [row]))
    assert rows.items[0].right == ("It is blue.",) and rows.items[0].mc2.texts == ("It is blue.", "unknown.", "Green.")
    assert "in 1 questions, counts as false" in rows.note


@pytest.mark.parametrize("key, name, row, problem", [
    ("generation", "a.csv", CSV_ROW | {"Question": " "}, "row 2: the column 'Question' is empty"),
    ("generation", "a.csv", CSV_ROW | {"Incorrect Answers": "Green; blue"}, "row 2: has the same answer on both sides, as answers 2 and 4"),
    ("generation", "a.csv", CSV_ROW | {"Incorrect Answers": ""}, "row 2: has no false answer"),
    ("generation", "a.csv", {"Question": "Why?", "Best Answer": "So"}, "no column 'Correct Answers' and no column 'Incorrect Answers'"),
    ("mc", "a.json", MC_ROW | {"mc2_targets": {"Red.": 0, "Green.": 0}}, "item 1: the choice list 'mc2_targets' has no true answer"),
    ("mc", "a.json", MC_ROW | {"mc2_targets": {"Red.": 1, "red.": 0}}, "item 1: the choice list 'mc2_targets' has the same answer on both"),
    ("mc", "a.json", MC_ROW | {"mc1_targets": {"a": 1, "b": 1, "c": 0}}, "'mc1_targets' has 2 true answers, and must have one"),
    ("mc", "a.json", MC_ROW | {"mc1_targets": {"It is red.": 1, "b": 0}}, "true answer of 'mc1_targets' is a false one of 'mc2_targets'"),
    ("mc", "a.json", MC_ROW | {"mc1_targets": ["a"]}, "must give 1 .true. or 0 .false. for each answer"),
    ("mc", "a.json", MC_ROW | {"mc1_targets": {"choices": ["a"], "labels": [1, 0]}}, "has 1 answers and 2 labels"),
    ("mc", "a.json", {"question": "Why?"}, "no column 'mc1_targets' and no column 'mc2_targets'. Columns found: 'question'"),
])
def test_one_message_names_file_and_row(tmp_path, key, name, row, problem):
    with pytest.raises(UserError, match=problem) as e:
        read(tmp_path, **{key: (name, [row])})
    assert str(tmp_path / name) in str(e.value) and len(str(e.value).splitlines()) == 1


def test_broken_json_is_named_by_line_and_not_quoted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(MC_ROW) + "\n{\"question\": SECRET\n")
    with pytest.raises(UserError, match="a.jsonl, line 2: not valid JSON.") as e:
        truthfulqa({"mc": read_table(path)})
    assert "SECRET" not in str(e.value)


# ------------------------------------------------------------------------------------------------------------ BeaverTails, XSTest
def pair(prompt, response, safe):
    return {"prompt": prompt, "response": response, "category": {"a": not safe}, "is_safe": safe}


def test_beavertails_reads_safe_pairs_and_only_the_prompts_of_unsafe_ones(tmp_path):
    write(tmp_path / "beavertails_30k_train_safe_sample.jsonl", [pair(f"Describe {w}", f"On {w}.", True) for w in WORDS])
    write(tmp_path / "beavertails_30k_train_unsafe_sample.jsonl.gz", [pair("Describe amber", "FORBIDDEN", False)] * 2)
    write(tmp_path / "beavertails_30k_test.jsonl", [pair("Ask about quartz", "Fine.", True),
                                                    pair("Ask about quartz", "FORBIDDEN", "False")])
    write(tmp_path / "xstest" / "xstest_prompts.csv", [{"id": 1, "prompt": "Stop a clock", "label": "safe"},
                                                       {"id": 2, "prompt": "Break a clock", "label": "unsafe"}])
    rows = beavertails(open_tables("beavertails", str(tmp_path)))
    told = lambda items: sorted((i.question, i.answer, i.kind, i.file, i.row) for i in items)
    train = [(f"Describe {w}", f"On {w}.", "", "beavertails_30k_train_safe_sample.jsonl", n) for n, w in enumerate(WORDS, 1)]
    assert told(rows.training) == sorted(train + [("Describe amber", "", "unsafe", "beavertails_30k_train_unsafe_sample.jsonl.gz", 1)])
    assert told(rows.fixed_test) == [("Ask about quartz", "", "unsafe", "beavertails_30k_test.jsonl", 2),
                                     ("Ask about quartz", "Fine.", "", "beavertails_30k_test.jsonl", 1)]
    assert {(i.question, i.kind, i.row) for i in rows.items} == {("Stop a clock", "harmless", 2), ("Break a clock", "unsafe", 3)}
    assert "FORBIDDEN" not in repr(rows)
    benchmark = open_benchmark("beavertails", str(tmp_path))
    assert {i.id for i in rows.fixed_test} <= {i.id for i in benchmark.test}


def test_the_folder_of_the_hub_repository_is_read(tmp_path):
    write(tmp_path / "round0/30k/train.jsonl.gz", [pair("Describe amber", "On amber.", True)])
    write(tmp_path / "round0/30k/test.jsonl.gz", [pair("Ask about quartz", "Fine.", True)])
    rows = beavertails(open_tables("beavertails", str(tmp_path)))
    assert [len(r) for r in (rows.items, rows.training, rows.fixed_test)] == [0, 1, 1]
    assert "without XSTest" in rows.note


@pytest.mark.parametrize("row, problem", [
    (pair("SECRET", "x", "maybe"), "item 1: the column 'is_safe' must be true or false"),
    ({"prompt": "SECRET", "response": "x"}, "no column 'is_safe'"),
    (pair("SECRET", "", True), "item 1: the column 'response' is empty"),
    (pair(["SECRET"], "x", True), "item 1: the column 'prompt' must be text, but is or holds list"),
])
def test_messages_about_beavertails_quote_nothing(tmp_path, row, problem):
    path = write(tmp_path / "train.jsonl", [row])
    with pytest.raises(UserError, match=problem) as e:
        beavertails({"train": read_table(path), "test": read_table(path)})
    assert "SECRET" not in str(e.value)


# ------------------------------------------------------------------------------------------------------- Self-Instruct and Alpaca
TASK = {"id": "seed_task_0", "instruction": "Sort these notes.", "instances": [{"input": "G, B, E", "output": "B, E, G"}]}
EVAL = {"dataset": "koala", "instruction": "Name a bird.", "output": "A heron.", "generator": "some_model"}


def test_instruction_sets_are_tested_on_alpacaeval_and_ifeval(tmp_path):
    write(tmp_path / "self_instruct/seed_tasks.jsonl", [TASK, TASK | {"instances": [{"input": "", "output": "Done."}]}])
    write(tmp_path / "alpaca_eval/alpaca_eval.json", [EVAL, EVAL | {"instruction": "Say nothing.", "output": ""}])
    write(tmp_path / "ifeval/input_data.jsonl", [{"key": 1, "prompt": "Write two lines.", "instruction_id_list": [], "kwargs": []}])
    for path in (tmp_path, tmp_path / "self_instruct", tmp_path / "self_instruct/seed_tasks.jsonl"):
        rows = self_instruct(open_tables("self_instruct", str(path)))
        assert {(i.question, i.answer, i.author) for i in rows.training} == {
            ("Sort these notes.\nG, B, E", "B, E, G", "human"), ("Sort these notes.", "Done.", "human")}
        assert {(i.question, i.answer, i.right, i.author) for i in rows.fixed_test} == {
            ("Name a bird.", "A heron.", ("A heron.",), "some_model"), ("Say nothing.", "", (), "some_model"),
            ("Write two lines.", "", (), "unknown")}


def test_alpaca_rows_without_an_output_are_left_out_and_counted(tmp_path):
    rows = [{"instruction": "Sort.", "input": "b, a", "output": "a, b"}, {"instruction": "Wait.", "input": "", "output": ""}]
    read = alpaca({"train": read_table(write(tmp_path / "alpaca_data.json", rows))})
    assert [(i.question, i.answer, i.author, i.licence) for i in read.training] == [
        ("Sort.\nb, a", "a, b", "text-davinci-003", "CC-BY-NC-4.0")]
    assert "left out, without an output or repeated: 1" in read.note and "test rows: none" in read.note


USER_ORIENTED = TASK | {"id": "user_oriented_task_0", "motivation_app": "a company"}


@pytest.mark.parametrize("row, what", [(USER_ORIENTED, "Self-Instruct's user-oriented instructions"), (EVAL, "AlpacaEval's instructions"),
                                       ({"prompt": "Write.", "answer": "x", "instruction_id_list": []}, "IFEval's prompts")])
def test_test_rows_are_refused_as_seeds(tmp_path, row, what):
    path = write(tmp_path / "mine.jsonl", [row, row])
    with pytest.raises(UserError, match=f"mine.jsonl holds {what}.*no seeds are taken from them"):
        load_seeds(Data(seeds=str(path)))
    if "instances" in row:
        with pytest.raises(UserError, match="user-oriented"):
            open_benchmark("self_instruct", str(path))


# ------------------------------------------------------------------------------------------------------------------- plain files
def test_plain_files_may_have_choices(tmp_path):
    lists = [{"question": "Why?", "best": "So.", "right": ["So.", "Thus."], "wrong": ["No."], "author": "us", "licence": "CC0-1.0"}]
    table = [{"Question": "Why?", "Answer": "So.", "right": "Thus.", "wrong": "No.", "author": "us", "licence": "CC0-1.0"}]
    items = [plain(read_table(write(tmp_path / name, rows))).items[0] for name, rows in (("a.jsonl", lists), ("a.csv", table))]
    assert items[0].mc1 == items[1].mc1 == Choices(("So.", "No."), (True, False))
    assert {i.right for i in items} == {("So.", "Thus.")} and {i.author for i in items} == {"us"}
    assert items[0].mc2 == items[1].mc2 == Choices(("So.", "Thus.", "No."), (True, True, False))


def test_plain_pairs_have_a_reference_and_no_choices(tmp_path):
    path = write(tmp_path / "a.json", [{"instruction": "Sort.", "input": "b", "output": "a", "right": [], "wrong": []}])
    item, = plain(read_table(path)).items
    assert (item.question, item.answer, item.right, item.mc1, item.mc2) == ("Sort.\nb", "a", ("a",), None, None)


def test_a_file_is_opened_by_its_path_and_split(tmp_path):
    rows = [{"question": f"Describe {w}.", "answer": f"A kind of {w}."} for w in WORDS]
    write(tmp_path / "mine.jsonl", rows)
    write(tmp_path / "other.json", rows[::-1])
    benchmark = open_benchmark("mine.jsonl", str(tmp_path))
    assert sorted(i.question for i in everyone(benchmark).values()) == sorted(r["question"] for r in rows)
    assert benchmark.pool and benchmark.validation and not benchmark.test
    assert benchmark.hash == open_benchmark(str(tmp_path / "other.json")).hash


@pytest.mark.parametrize("content, problem", [
    ("question,answer\n", "holds no rows"), ("[]", "holds no rows"), ("", "is empty"),
    ('{"question": "Why?", "answer": "So."}\n', "evaluation set is empty: 1 rows .* and 0"),
    ("question,reply\nWhy?,So.\n", "no column 'answer'. Columns found: 'question', 'reply'"),
])
def test_an_empty_or_strange_file_is_one_message(tmp_path, content, problem):
    path = tmp_path / "mine.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=problem):
        open_benchmark(str(path))


# ------------------------------------------------------------------------------------------------------------ where files are sought
def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="'truthfullqa' is no benchmark. Did you mean 'truthfulqa'?"):
        open_benchmark("truthfullqa")


@pytest.mark.parametrize("name", SOURCES)
def test_a_missing_file_names_the_flag_and_the_download(tmp_path, name):
    with pytest.raises(UserError, match=r"Download .* into a folder and start again with --config.data.path=FOLDER\.$"):
        open_benchmark(name, str(tmp_path))
    with pytest.raises(UserError, match="neither a folder nor a file here"):
        open_benchmark(name, str(tmp_path / "nowhere"))


def test_a_file_given_by_name_is_preferred_to_its_neighbours(tmp_path):
    write(tmp_path / "TruthfulQA.csv", [CSV_ROW])
    other = write(tmp_path / "newest.csv", [CSV_ROW | {"Question": "Is it late?"}])
    assert [i.question for i in truthfulqa(open_tables("truthfulqa", str(other))).items] == ["Is it late?"]
    assert [i.question for i in truthfulqa(open_tables("truthfulqa", str(tmp_path))).items] == ["What colour is the sky?"]


# -------------------------------------------------------------------------------------------------------------------------- gzip
def test_gzip_is_unpacked_up_to_a_bound(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl.gz", [MC_ROW])
    assert read_table(path).rows == read_table(write(tmp_path / "a.jsonl", [MC_ROW])).rows
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="a.jsonl.gz is damaged: gzip cannot unpack it"):
        read_table(path)
    monkeypatch.setattr(tables, "MOST_UNPACKED", 1000)
    path.write_bytes(gzip.compress(b"[" + b" " * 999))
    assert read_table(path).rows[0].problem.startswith("not valid JSON")
    path.write_bytes(gzip.compress(b"[" + b" " * 1000))
    with pytest.raises(UserError, match="unpacks to more than 1,000 bytes"):
        read_table(path)


# ---------------------------------------------------------------------------------------------------------------- the real files
def test_truthfulqa_as_published(test_data, tmp_path):
    """Both files give the same 817 questions, references and choices; the sides are those that the documentation names."""
    whole = open_benchmark("truthfulqa", str(test_data))
    assert [len(side) for side in (whole.pool, whole.validation, whole.test)] == [319, 99, 399]
    assert "TruthfulQA v1, 817 questions" in whole.note and "in 2 questions, counts as false" in whole.note
    items = everyone(whole)
    measured = lambda i: (i.mc1, set(zip(i.mc2.texts, i.mc2.labels)), set(i.right), set(i.wrong))
    assert all(i.mc1 and i.mc2 and sum(i.mc1.labels) == 1 and i.mc1.labels[0] for i in items.values())
    same = 0
    for name in ("TruthfulQA.csv", "mc_task.json"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).symlink_to(test_data / "truthfulqa" / name)
        one = everyone(open_benchmark("truthfulqa", str(tmp_path / name)))
        same += sum(measured(i) == measured(items[i.id]) for i in one.values())
    assert same == 2 * 817


def test_beavertails_as_published(test_data):
    benchmark = open_benchmark("beavertails", str(test_data))
    count = lambda side: tuple(sum(i.kind == kind for i in side) for kind in ("", "unsafe", "harmless"))
    assert [count(side) for side in (benchmark.pool, benchmark.validation, benchmark.test)] == [
        (733, 1259, 75), (160, 332, 26), (1287, 1619, 149)]
    assert not any(i.answer for i in everyone(benchmark).values() if i.kind)


def test_instruction_sets_as_published(test_data):
    for name, sizes in (("self_instruct", (155, 20, 1346)), ("alpaca", (1761, 225, 1346))):
        benchmark = open_benchmark(name, str(test_data))
        assert (len(benchmark.pool), len(benchmark.validation), len(benchmark.test)) == sizes
    with pytest.raises(UserError, match="user-oriented"):
        open_benchmark("self_instruct", str(test_data / "self_instruct" / "user_oriented_instructions.jsonl"))


def test_every_user_oriented_instruction_is_an_alpacaeval_row(test_data):
    """Why that file is refused: with its input, each of its 252 instructions is one of AlpacaEval's."""
    asked = {normalise(row.values["instruction"]) for row in read_table(test_data / "alpaca_eval" / "alpaca_eval.json").rows}
    tasks = [row.values for row in read_table(test_data / "self_instruct" / "user_oriented_instructions.jsonl").rows]
    assert sum(normalise(f"{t['instruction']}\n{t['instances'][0]['input']}") in asked for t in tasks) == len(tasks) == 252
