"""report.html from a run's files: whole, unfinished, damaged, large; and what is refused."""
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import page_runs
import pytest

from isara_jax import report
from isara_jax.common import UserError, write_jsonl


class Read(HTMLParser):
    """What a page says, what it would load, and the data inside it."""

    VOID = {"meta", "input", "br", "line", "rect", "circle", "polyline"}

    def __init__(self, path):
        super().__init__()
        self.said, self.loads, self.open, self.data = [], [], [], {}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.loads += [(name, value) for name, value in attributes if name in ("src", "href", "action") and not value.startswith("#")]
        self.open += [] if tag in self.VOID else [(tag, dict(attributes))]

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, text):
        tag, attributes = self.open[-1] if self.open else ("", {})
        if attributes.get("type") == "application/json":
            self.data = json.loads(text)
        elif tag not in ("style", "script"):
            self.said.append(text)

    @property
    def text(self):
        return " ".join(" ".join(self.said).split())


def page_of(root):
    return Read(report.write(root))


# ------------------------------------------------------------------------------------------------------------------ a whole run
def test_a_finished_run_tells_seeds_method_funnel_verdict_and_cost(tmp_path):
    said = page_of(page_runs.small(tmp_path / "mine")).text
    for part in ("smollm2-135m-instruct , aligned from 3 question-answer pairs", "finished stopped: stop.iterations=1 reached", "not fact-checked",
                 "author human · source our own · licence CC0-1.0", "the 5 nearest pairs are put into each prompt",
                 "4 requests an iteration; questions: temperature 0.7, top-p 0.95, at most 24 tokens",
                 "base the starting model not distinguishable with 2 rows +20.0 −10.0 to +50.0 0.500 60.0",
                 "2 rows cannot give a p under 0.5", "requests 4 100 %", "pairs kept 2 50 %", "question novelty 1 25 %",
                 "0 starting model – – 3 2.5000", "questions 2 starts 3.5 s 1.0 s 200 40",
                 "python -m isara_jax.train --config=configs/own.py", "retrieval.k 5", "jax 0.10.2"):
        assert part in said, part


def test_pairs_have_their_exemplars_neighbours_and_scores_by_position(tmp_path):
    pairs = page_of(page_runs.small(tmp_path)).data["pairs"]
    c, texts = pairs["columns"], pairs["texts"]
    asked = [texts[i] for i in c["question"]]
    assert asked == ["How do fish sleep?", "Why is the sea salty?", "Why is the sky so blue?", "What makes dough sticky?",
                     *(q for q, _ in page_runs.SEEDS)]
    assert [c["verdicts"][v] for v in c["verdict"]] == ["kept", "kept", "rejected", "rejected", "seed", "seed", "seed"]
    assert [c["reasons"][r] for r in c["reason"]][:4] == ["", "", "question/novelty", "answer/min_words"]
    assert c["asked"][1] == [5, 6] and c["answered"][1] == [5]
    assert pairs["sets"][c["checks"][2]] == ["question/parse", "question/truncated", "!question/novelty"]
    assert c["scores"][2] == [None, None, 0.9] and c["neighbours"][2] == [[2, 4]]
    assert c["neighbours"][1] == [[2, 0]]  # request 0 of the same iteration


def test_answers_before_and_after_and_on_held_out_rows(tmp_path):
    data = page_of(page_runs.small(tmp_path)).data
    assert data["samples"] == [{"fold": 0, "question": "Why does ice float?", "reference": "It is lighter than water.",
                                "answers": [[0, "No idea, no idea."], [1, "Cold air."]]}]
    (judged,) = data["judged"]
    assert judged["arms"] == ["base", "isara"]
    assert judged["rows"][0] == {"question": "Why is ice light?", "reference": "Its crystals are loose.",
                                 "answers": ["It is ice.", "Ice is light."]}


def test_nothing_is_loaded_and_only_the_pages_own_script_may_run(tmp_path):
    path = report.write(page_runs.small(tmp_path))
    assert Read(path).loads == []
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', path.read_text())[1]
    assert policy.startswith("default-src &#39;none&#39;;") and "unsafe" not in policy and "http" not in policy


def test_the_same_files_give_the_same_bytes(tmp_path):
    root = page_runs.small(tmp_path)
    assert report.write(root).read_bytes() == report.write(root).read_bytes()


def test_a_persons_review_is_told_with_comment_and_edit(tmp_path):
    root = page_runs.small(tmp_path)
    first, second = (json.loads(line) for line in (root / "iterations/01/kept.jsonl").read_text().splitlines())
    write_jsonl(root / "iterations/01/review.jsonl", [
        {"id": first["id"], "decision": "edit", "question": "How do fish rest?", "answer": "They float.", "new_id": "0123456789abcdef",
         "was": {"question": first["question"], "answer": first["answer"]}, "comment": "clearer"},
        {"id": second["id"], "decision": "reject", "question": second["question"], "answer": second["answer"], "new_id": None, "was": None,
         "comment": "wrong"}])
    pairs = page_of(root).data["pairs"]
    c, texts = pairs["columns"], pairs["texts"]
    assert texts[c["question"][0]] == "How do fish rest?" and c["verdicts"][c["verdict"][0]] == "kept"
    assert [texts[i] for i in c["review"][0][1:]] == ["clearer", first["question"], first["answer"]]
    assert c["reasons"][c["reason"][1]] == "review/human" and texts[c["review"][1][1]] == "wrong"


def test_folds_have_a_joint_verdict_and_the_pairs_of_all(tmp_path):
    page_runs.start(tmp_path, changes={"data": {"folds": 2}, "eval": {"benchmark": ""}})
    (tmp_path / "pool/000-seeds.jsonl").unlink()
    for fold in (1, 2):
        page_runs.small(tmp_path / f"folds/{fold}", question=f"What is fold {fold}?")
    page_runs.judge(tmp_path)
    report.write(tmp_path / "folds/1")
    page = page_of(tmp_path)
    assert ("href", "folds/1/report.html") in page.loads and "Fold 2 (no page yet" in page.text
    assert "not distinguishable with 2 rows" in page.text and "every pair once, in 2 folds" in page.text
    columns = page.data["pairs"]["columns"]
    assert columns["fold"] == [1] * 7 + [2] * 7
    assert columns["neighbours"][7 + 2] == [[2, 7 + 4]]  # a fold's own seed, not the same one of another


# ------------------------------------------------------------------------------------------------------- unfinished and damaged
def test_a_run_that_has_just_begun_says_what_is_missing(tmp_path):
    page_runs.start(tmp_path)
    (tmp_path / "iterations/01").mkdir(parents=True)
    (tmp_path / "iterations/01/questions.done").write_text("{}")
    said = page_of(tmp_path).text
    assert "not finished" in said and "iteration 1 is unfinished; finished so far: questions." in said
    assert "0 of at most 2 iteration(s) are finished" in said and "There is no verdict yet" in said


def test_a_run_that_is_still_evaluating_is_not_finished(tmp_path):
    root = page_runs.small(tmp_path)
    (root / "evaluation/dev/results.json").unlink()
    said = page_of(root).text
    assert "not finished" in said and "There is no verdict yet: the evaluation has not finished." in said


def test_a_run_that_is_not_judged_is_finished_without_a_verdict(tmp_path):
    root = page_runs.small(tmp_path, {"eval": {"benchmark": ""}})
    (root / "evaluation/dev/results.json").unlink()
    said = page_of(root).text
    assert "not finished" not in said and "the run was given nothing to judge on" in said


def test_a_run_that_waits_for_a_person_says_so(tmp_path):
    page_runs.start(tmp_path)
    (tmp_path / "review.csv").write_text("id\n")
    assert "waits for a person: read review.csv" in page_of(tmp_path).text


def test_lines_that_cannot_be_read_are_counted_and_the_others_shown(tmp_path):
    root = page_runs.small(tmp_path)
    path = root / "iterations/01/kept.jsonl"
    path.write_text('{"id": "half\n[1, 2]\n' + path.read_text() + '{"id": "being written')
    page = page_of(root)
    assert "iterations/01/kept.jsonl has 2 line(s) that cannot be read (1, 2); they are left out." in page.text
    assert len(page.data["pairs"]["columns"]["id"]) == 7


def files_of_a_run():
    return ["config.json", "versions.json", "metrics.jsonl", "pool/000-seeds.jsonl", "iterations/01/DONE", "iterations/01/kept.jsonl",
            "iterations/01/questions.jsonl", "iterations/01/rejected.jsonl", "iterations/01/loss.jsonl", "iterations/01/samples.jsonl",
            "evaluation/dev/results.json", "evaluation/dev/items.jsonl", "blind/answers.csv", "blind/results.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"null\n", b'"text"\n', b"\xff\xfe\x00\n", b'{"identity": {}, "format": 1}\n',
                                     b'{"id": 1, "kind": "cost", "stage": [], "arms": 3, "kept": {}, "config": [1]}\n'],
                         ids=["empty", "half", "null", "text", "bytes", "bare", "other"])
@pytest.mark.parametrize("name", files_of_a_run())
def test_no_damage_ends_in_a_traceback(tmp_path, name, content):
    root = page_runs.small(tmp_path)
    (root / "blind").mkdir()
    (root / name).write_bytes(content)
    try:
        assert "not fact-checked" in page_of(root).text
    except UserError as e:
        assert name == "config.json" and "config.json" in str(e)


def mangled(value, n):
    """`value` with its n-th inner value replaced by something of another kind; None where it has no such."""
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(value)
    if n >= len(places):
        return None
    node, key = places[n]
    node[key] = [] if isinstance(node[key], (str, int, float, type(None))) else "?"
    return value


@pytest.mark.parametrize("name", ["evaluation/dev/results.json", "iterations/01/DONE", "config.json"])
def test_no_value_of_another_kind_ends_in_a_traceback(tmp_path, name):
    root = page_runs.small(tmp_path)
    whole, n = json.loads((root / name).read_text()), 0
    while made := mangled(json.loads(json.dumps(whole)), n):
        (root / name).write_text(json.dumps(made))
        try:
            assert "not fact-checked" in report.write(root).read_text()
        except UserError as e:
            assert "config.json" in str(e)
        n += 7 if name == "config.json" else 1
    assert n > 5


def test_without_a_readable_config_texts_are_hidden(tmp_path):
    root = page_runs.small(tmp_path)
    assert page_of(root).data["sensitive"] is False
    (root / "config.json").write_text("{")
    page = page_of(root)
    assert page.data["sensitive"] is True and "unknown how the run was made" in page.text


def test_a_sensitive_run_has_no_text_outside_the_data(tmp_path):
    root = page_runs.small(tmp_path, {"sensitive": True}, question="How do zebras quarrel?", answer="With violet hooves.")
    page = page_of(root)
    assert page.data["sensitive"] is True
    assert not [w for w in ("zebras", "violet", "Why is the sky blue", "ice float", "crystals") if w in page.text]


@pytest.mark.parametrize("make, says", [
    (lambda p: None, "is not there"), (lambda p: p.write_text("x"), "is a file"), (lambda p: p.mkdir(), "is empty"),
    (lambda p: (p / "sub").mkdir(parents=True), "is no run's folder"),
    (lambda p: (p.mkdir(), (p / "config.json").write_text('{"model_type": "llama"}')), "of another program"),
    (lambda p: (p.mkdir(), (p / "config.json").write_text("{")), "damaged and nothing else of a run"),
    (lambda p: (p.mkdir(), (p / "config.json").write_text('{"identity": {}, "format": 9}')), "has format 9"),
    (lambda p: page_runs.start(p / "first"), "It holds the run(s) first"),
], ids=["absent", "file", "empty", "foreign", "model", "broken", "format", "parent"])
def test_what_is_no_run_is_refused_in_one_message_and_nothing_is_written(tmp_path, make, says, capsys):
    make(tmp_path / "it")
    assert report.main([f"--workdir={tmp_path / 'it'}"]) == 2
    said = capsys.readouterr().err
    assert says in said and said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "it" / "report.html").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_plain_file_is_not_waited_for(tmp_path):
    root = page_runs.small(tmp_path)
    (root / "metrics.jsonl").unlink()
    os.mkfifo(root / "metrics.jsonl")
    assert "has not come to its end" in page_of(root).text


# ------------------------------------------------------------------------------------------------------------------------- size
def test_five_thousand_pairs_stay_under_five_megabytes(tmp_path):
    path = report.write(page_runs.large(tmp_path, 5000))
    columns = Read(path).data["pairs"]["columns"]
    assert len(columns["id"]) == 64 + 7500 and path.stat().st_size < 5e6
    assert all(len(shots) == 5 for shots in columns["asked"][:1000])


def test_long_answers_are_cut_and_the_page_says_so(tmp_path):
    path = report.write(page_runs.large(tmp_path, 1500, words=800))
    assert path.stat().st_size < 5e6
    assert "text(s) are cut after" in Read(path).text


def test_angle_brackets_count_with_their_escapes(tmp_path):
    page_runs.start(tmp_path, [(f"Why {i}?", "<" * 2500) for i in range(500)])
    assert report.write(tmp_path).stat().st_size < 5e6


# ---------------------------------------------------------------------------------------------------------------------- command
def test_the_command_imports_no_jax_and_says_where_the_page_is(tmp_path):
    root = page_runs.small(tmp_path / "mine")
    code = f"import sys\nfrom isara_jax import report\nstatus = report.main(['--workdir={root}'])\n" \
           "assert not {'jax', 'flax', 'optax', 'ml_collections'} & set(sys.modules)\nsys.exit(status)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stderr
    assert str(root / "report.html") in done.stdout and "not fact-checked" in done.stdout
