"""What is said of someone's own pairs before a model is read: counts checked by eye, and rows named."""
from __future__ import annotations

import csv
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isara_jax.config import Data, Filters
from isara_jax.data import cells
from isara_jax.data.languages import hardly_english, language, script, scripts
from isara_jax.data.rouge import f_measure, tokens
from isara_jax.data.seeds import Seed, built_in, load_seeds
from isara_jax.data.survey import language_warnings, lines, said, survey, warnings

OWN = Path(__file__).parent.parent / "configs" / "data" / "own"
KNOWN = {"author": "language model", "source": "isara_jax authors", "licence": "Apache-2.0"}


def pairs(*rows):
    """Seeds in rows 2, 3, … of a file."""
    return [Seed(question, answer, *KNOWN.values(), row) for row, (question, answer) in enumerate(rows, 2)]


PLAIN = (("Why is the sky blue in the morning?", "Air scatters blue light more than it scatters red light."),
         ("What is the ice on a lake made of?", "It is frozen water, and it floats since it is lighter."),
         ("Where do the birds go in the winter?", "Some of them fly to the south and come back in the spring."))


def surveyed(*rows, **fields):
    return survey(pairs(*rows), Filters(**fields))


def warned(*rows, **fields):
    return "\n".join(warnings(surveyed(*rows, **fields)))


# ---------------------------------------------------------------------------------------------------------------------- counting
def test_lengths_and_the_row_of_the_longest():
    found = surveyed(("One two three?", "a b c d"), ("One two three four five?", "a"), ("One?", "a b"))
    assert (found.pairs, found.question.median, found.question.longest, found.question.row) == (3, 3, 5, 3)
    assert (found.answer.median, found.answer.longest, found.answer.row) == (2, 4, 2)
    assert (found.answer.median_characters, found.answer.most_characters, found.question.most_characters) == (3, 7, 24)
    assert lines(found)[0] == ("questions have 3 words in the median, 5 at most (row 3), and 14 characters in the median, 24 at most; "
                               "answers have 2 words in the median, 4 at most (row 2), and 3 characters in the median, 7 at most")


def test_duplicates_of_three_kinds():
    found = surveyed(("How do I clean the tank of it?", "With water."), ("how do I clean  the tank of it?", "With soap."),
                     ("How do I clean the tray of it?", "By hand."), ("What does it weigh?", "with  WATER."), ("Is it blue?", "Yes."))
    assert found.same_questions == ((2, 3),)
    assert found.near_questions == ((2, 3, 4),)
    assert found.same_answers == ((2, 5),)
    assert "1 group of near questions (ROUGE-L F > 0.6; rows 2, 3 and 4)" in "\n".join(lines(found))
    assert "1 answer belongs to several questions (rows 2 and 5)" in "\n".join(warnings(found))
    assert "no two questions are near" in "\n".join(lines(surveyed(*PLAIN)))


def test_one_question_with_several_answers_is_no_near_duplicate():
    found = surveyed(("What is ice?", "Water."), ("What is  ICE?", "Solid water."))
    assert found.same_questions == ((2, 3),) and found.near_questions == ()
    found = surveyed(("What is ice?", "Water."), ("What is ice?", "Water."))
    assert found.same_answers == ()


def test_rejected_rows_and_their_shares():
    rows = pairs(("Why?", "Because it is so and not otherwise."), ("Is it true that this is so?", "Yes."),
                 ("What is the answer to that one?", "What is the answer to that one? It is here."),
                 ("Who said again what was said?", "no no no no no no no no no"), ("Is it true that this is so?", "It is not."))
    found = survey(rows, Filters())
    assert found.rejections["question"] == {"parse": (), "truncated": (), "min_words": (2,), "ngram_loop": (), "exemplar_copy": (3, 6)}
    assert found.rejections["answer"] == {"parse": (), "truncated": (), "min_words": (3, 6), "echo": (4,), "ngram_loop": (5,),
                                          "exemplar_copy": ()}
    said_of = "\n".join(warnings(found))
    assert "the question filter min_words would reject 20% of your own seeds (row 2)" in said_of
    assert "the answer filter min_words would reject 40% of your own seeds (rows 3 and 6)" in said_of
    assert "filter parse" not in said_of
    assert "min_words 20% (row 2)" in "\n".join(lines(found))
    assert surveyed(("Why?", "So."), question=("is_question",), answer=("novelty",)).rejections == {
        "question": {"is_question": ()}, "answer": {}}


# -------------------------------------------------------------------------------------------------------------------------- cells
@pytest.mark.parametrize("text, holds", [
    ("Press <b>OK</b>.", True), ("One<br>two", True), ("One<BR />two", True), ('See <a href="x">here</a>.', True), ("5&nbsp;kg", True),
    ("R&amp;D", True), ("It&#39;s", True), ("&#x27;", True), ("<p class='x'>", True),
    ("if x < y and y > z", False), ("List<int> and <name>", False), ("AT&T; R&D", False), ("a <3 b", False), ("<email@x.org>", False)])
def test_markup(text, holds):
    assert cells.has_markup(text) is holds


@pytest.mark.parametrize("text, holds", [
    ("| a | b |\n|---|---|\n| 1 | 2 |", True), ("a | b\n--- | :---:\n1 | 2", True), ("a\n---\nb", False), ("x | y", False),
    ("either | or\n----------", False)])
def test_tables(text, holds):
    assert cells.has_table(text) is holds


@pytest.mark.parametrize("text, holds", [
    ("Call +49 30 1234567.", True), ("0800 123456", True), ("030/1234567", True), ("(555) 123-4567", True), ("555-123-4567", True),
    ("+1 (555) 123-4567", True), ("1-800-555-0199", True),
    ("on 01.02.2024", False), ("2024-05-06", False), ("0.123456789", False), ("ISBN 978-3-16-148410-0", False), ("10,000,000", False),
    ("007", False), ("1 2 3 4 5 6 7 8 9", False), ("0 1 2", False)])
def test_telephone_numbers(text, holds):
    assert cells.has_phone(text) is holds


def test_web_and_mail_addresses():
    assert [cells.has_web_address(t) for t in ("see https://x.org", "www.x.org", "HTTP://X", "x.org", "http:// is")] == [1, 1, 1, 0, 0]
    assert [cells.has_mail_address(t) for t in ("a.b+c@x-y.org", "to: <me@x.org>", "@home", "a @ b.c", "me@home")] == [1, 1, 0, 0, 0]


@pytest.mark.parametrize("text, holds", [
    ("n/a", True), ("N/A.", True), ("TODO", True), ("todo: ask the workshop", True), ("See above.", True),
    ("(see above, question 3)", True), ("siehe oben", True), ("s. o.", True), ("#REF!", True), ("####", True), ("…", True), ("-", True),
    ("???", True), ("Lorem ipsum dolor", True), ("No.", False), ("42", False), ("None", False), ("Todoist is an app.", False),
    ("See below for the steps: first, open the lid.", False), ("Na", False), ("✓", False), ("x", False)])
def test_placeholders(text, holds):
    assert cells.is_placeholder(text) is holds


def test_garbled_letters():
    assert all(map(cells.is_garbled, ("cafÃ©", "Itâ€™s", "5 Â°C", "KÃ¤se", "lost \ufffd")))
    assert not any(map(cells.is_garbled, ("café", "It’s", "5 °C", "Ã é uma letra", "naïve", "plain")))


@given(st.text(max_size=300))
def test_cells_never_raise(text):
    for look in (cells.has_markup, cells.has_table, cells.has_phone, cells.has_web_address, cells.has_mail_address, cells.is_garbled,
                 cells.is_placeholder):
        assert look(text) in (True, False)


def test_what_stands_in_cells_is_warned_of_with_rows():
    text = warned(*PLAIN, ("How do I open it?", "<p>Lift the lid.</p>"), ("Whom do I ask?", "Ask a@b.org or see www.b.org."),
                  ("Which colours are there?", "n/a"), ("What is a cafÃ©?", "A place to drink coffee in."), ("How many?", "| a |\n|---|"))
    assert "row 5: HTML tags or entities. They are learned and generated as they stand; nothing is stripped here." in text
    assert "web addresses in row 6; e-mail addresses in row 6: a model trained on such details invents others" in text
    assert "row 7: the question or the answer is a placeholder" in text
    assert "row 8: letters were decoded wrongly" in text
    assert "row 9: Markdown tables" in text


def test_questions_without_a_mark_are_counted():
    found = surveyed(("Tell me why.", "It is so."), ("Why?", "So."), ("何ですか？", "これです。"), ("Is it (really?)", "Yes."))
    assert found.unmarked == (2,)
    assert "1 of the 4 questions do not end with a question mark (row 2)" in lines(found)


# ---------------------------------------------------------------------------------------------------------------------- languages
@pytest.mark.parametrize("text, name", [
    ("What is the capital of France? It is Paris.", "English"), ("Was ist die Hauptstadt von Frankreich? Es ist Paris.", "German"),
    ("Quelle est la capitale de la France ? C'est Paris.", "French"), ("¿Cuál es la capital de Francia? Es París.", "Spanish"),
    ("Qual é a capital da França? Não é Lyon, mas Paris.", "Portuguese"),
    ("Qual è la capitale della Francia? È Parigi, una città.", "Italian"),
    ("Wat is de hoofdstad van Frankrijk? Het is Parijs.", "Dutch"), ("Jaka jest stolica Francji? To nie jest Lyon.", "Polish"),
    ("Vad är huvudstaden i Frankrike? Det är Paris.", "Swedish"), ("Hvad er hovedstaden i Frankrig? Det er Paris.", "Danish or Norwegian"),
    ("Fransa'nın başkenti nedir? Paris, ve çok güzel bir şehir.", "Turkish"), ("フランスの首都はどこですか？", "Japanese"),
    ("法国的首都是哪里？是巴黎。", "Chinese"), ("프랑스의 수도는 어디입니까?", "Korean"), ("Какая столица Франции?", "Cyrillic script"),
    ("ما هي عاصمة فرنسا؟", "Arabic script"), ("Ποια είναι η πρωτεύουσα;", "Greek"),
    ("ok", ""), ("M2-0417", ""), ("", ""), ("x + y = z", ""), ("pizza margherita", "")])
def test_language_of_a_text(text, name):
    assert language(text) == name


def test_scripts():
    assert [script(c) for c in "aßЖ漢かカ한ｱＡ5!µ𝐀"] == ["Latin", "Latin", "Cyrillic", "Han", "Kana", "Kana", "Hangul", "Kana", "Latin",
                                                           "", "", "", ""]
    assert scripts(["abc", "д 1"]) == {"Latin": 0.75, "Cyrillic": 0.25}
    assert scripts(["1 2"]) == {}


SWAHILI = "Maktaba hufunguliwa kila siku asubuhi isipokuwa Jumapili wakati wafanyakazi wanapopumzika nyumbani kwao pamoja familia zao. "


def test_a_language_that_the_table_lacks_is_at_least_not_english():
    found = surveyed(*((f"Maktaba namba {i} hufunguliwa lini?", SWAHILI * 2) for i in range(10)))
    assert found.language == "not English"
    assert not hardly_english(["Blue, green, red."]) and not hardly_english(["The lid is on the left of the tank. "] * 30)
    [warning] = language_warnings(found, "smollm2-135m-instruct", "other")
    assert warning.startswith("the seeds are not English, but the model smollm2-135m-instruct is: ")


def test_english_benchmarks_are_not_taken_for_another_language(test_data):
    rows = load_seeds(Data(seeds=str(test_data / "truthfulqa" / "TruthfulQA.csv"), answer="Best Answer", **KNOWN)).pairs
    found = survey(rows, Filters())
    assert list(found.languages) == ["English"] and len(found.languages["English"]) > 0.98 * len(rows)


GERMAN = tuple((f"Wo ist der Schalter für {x}?", f"Der Schalter für {x} ist an der Wand, und er ist nicht zu übersehen.")
               for x in ("das Licht", "die Heizung", "den Ofen", "das Tor", "die Pumpe"))


def test_mixed_languages_are_said_with_rows():
    found = surveyed(*PLAIN, *GERMAN)
    assert found.languages == {"German": (5, 6, 7, 8, 9), "English": (2, 3, 4)} and found.language == "several languages"
    assert "mixed languages: German (rows 5, 6, 7, 8 and 9); English (rows 2, 3 and 4). " in "\n".join(warnings(found))
    found = surveyed(*PLAIN * 4, GERMAN[0])
    assert found.language == "English"
    assert "mixed languages: German (row 14) beside English. " in "\n".join(warnings(found))
    assert language_warnings(found, "smollm2-135m-instruct", "minilm-l6") == []


def test_a_question_in_another_language_than_its_answer():
    found = surveyed(*PLAIN, (GERMAN[0][0] + " Und wie ist es mit der Lampe?", PLAIN[0][1] + " It is not that of the lamp."))
    assert found.crossed == (5,)
    assert "row 5: the question is in another language than its answer" in "\n".join(warnings(found))


def test_the_embedded_models_are_named_where_seeds_are_not_english():
    found = surveyed(*GERMAN)
    [both] = language_warnings(found, "smollm2-135m-instruct", "minilm-l6")
    assert both == ("the seeds are not English (German), but the model smollm2-135m-instruct and the encoder minilm-l6 are: answers will "
                    "be poor and often English, and neighbours will be chosen badly. Name ones made for that language by hub id or folder: "
                    "--config.model.name=… and --config.retrieval.encoder=…")
    [one] = language_warnings(found, "some/german-model", "minilm-l6")
    assert "the encoder minilm-l6 is: neighbours" in one and "--config.model.name" not in one
    assert language_warnings(found, "some/german-model", "some/encoder") == []
    assert language_warnings(surveyed(*PLAIN), "smollm2-135m-instruct", "minilm-l6") == []
    [mixed] = language_warnings(surveyed(*PLAIN, *GERMAN), "smollm2-135m-instruct", "minilm-l6")
    assert mixed.startswith("5 of the 8 seeds are not English (German), but ")


# --------------------------------------------------------------------------------------------------------------------- how many
def test_three_pairs_work_and_are_told_what_that_means():
    text = warned(*PLAIN)
    assert "3 pairs: this works, but nothing is held out (that takes 8)" in text
    assert "without --config.data.test=FILE nothing is judged" in text
    assert "15 pairs: this works, but what is held out is too little" in warned(*PLAIN * 5)
    assert "this works" not in warned(*PLAIN * 7)


def test_long_answers_are_said_with_what_they_cost():
    text = warned(*PLAIN, ("Why is it so long?", " ".join(f"word{i}" for i in range(812))), ("And this?", "well " * 299))
    assert "1 answer of 300 words or more (row 5; the longest has 812): generating such answers is slow" in text and "k falls" in text


def test_five_thousand_pairs():
    rng = random.Random(0)
    words = [f"w{i}" for i in range(3000)]
    rows = [(" ".join(rng.choices(words, k=8)) + "?", " ".join(rng.choices(words, k=60))) for _ in range(4998)]
    found = surveyed(*rows, ("How do I clean the tank of it?", "With water."), ("How do I clean the lid of it?", "With soap."))
    assert found.pairs == 5000 and found.near_questions == ((5000, 5001),)


def test_scripts_are_said_where_there_are_several():
    text = "\n".join(lines(surveyed(("Что это такое?", "Это Python."), ("И это?", "Тоже."))))
    assert "language: Cyrillic script" in text and "scripts: Cyrillic 79%, Latin 21% of the letters" in text
    assert "scripts" not in "\n".join(lines(surveyed(*PLAIN)))


def test_rows_are_named_up_to_five():
    assert [said(rows) for rows in ((3,), (3, 5), (3, 5, 9), (1, 2, 3, 4, 5), (1, 2, 3, 4, 5, 6, 7))] == [
        "row 3", "rows 3 and 5", "rows 3, 5 and 9", "rows 1, 2, 3, 4 and 5", "rows 1, 2, 3, 4, 5 and 2 more"]


ANY = st.text(st.characters(exclude_categories=[]), max_size=40)


@settings(deadline=None)
@given(st.lists(st.tuples(ANY, ANY), max_size=6))
def test_a_survey_of_any_text_is_made_and_quotes_none(rows):
    found = surveyed(*rows)
    text = "\n".join(lines(found) + warnings(found) + language_warnings(found, "smollm2-135m-instruct", "minilm-l6"))
    marked = survey(pairs(*((f"zqxj{q}", f"zqxj{a}") for q, a in rows)), Filters())
    assert "zqxj" not in "\n".join(lines(marked) + warnings(marked)) and text.encode("utf-8", "strict")
    assert sum(map(len, found.languages.values())) <= found.pairs == len(rows)


def test_a_survey_loads_neither_jax_nor_flax():
    code = "import sys, isara_jax.data.survey; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---------------------------------------------------------------------------------------------------------------- our own sheets
SHEETS = {"faq_en.csv": (50, "English", 60, 150), "faq_de.csv": (45, "German", 15, 60)}


@pytest.mark.parametrize("name", SHEETS)
def test_our_own_sheets_are_what_they_say(name):
    number, spoken, fewest, most = SHEETS[name]
    seed_set = load_seeds(Data(seeds=str(OWN / name), **KNOWN))
    assert seed_set.warnings == () and len(seed_set.pairs) == number
    assert {(p.author, p.source, p.licence) for p in seed_set.pairs} == {tuple(KNOWN.values())}
    found = survey(seed_set.pairs, Filters())
    assert found.languages == {spoken: tuple(range(2, number + 2))} and warnings(found) == []
    assert all(fewest <= len(p.answer.split()) <= most for p in seed_set.pairs)
    questions = [tokens(p.question) for p in seed_set.pairs]
    assert max(f_measure(a, b) for i, a in enumerate(questions) for b in questions[:i]) <= 0.5


def test_our_own_sheets_are_as_people_save_them():
    german, english = (OWN / "faq_de.csv").read_bytes(), (OWN / "faq_en.csv").read_bytes()
    assert german.startswith("\ufeffFrage;Antwort\r\n".encode()) and german.count(b"\r\n") == 46
    rows = list(csv.DictReader(english.decode().splitlines(keepends=True)))
    assert len(rows) == 50 and any("\n" in r["answer"] for r in rows) and any('"' in r["answer"] for r in rows)
    assert set(built_in()) & {"faq_en", "faq_de"} == set()
