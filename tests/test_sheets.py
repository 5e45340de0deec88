"""Sheets for people: safe to open, and read back whatever a spreadsheet program does to them."""
from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given, settings, strategies as st

from isara_jax.common import UserError
from isara_jax.data import sheets

COLUMNS = ("id", "text", "comment")
TEXTS = ["Wash it at 30 °C; do not bleach.", "=1+1", 'She said "no", twice.', "Line one\nline two", "'tis so", "", "Füße, œuf, naïve",
         "日本語の文", "007"]


def sheet(folder, texts=TEXTS):
    path = folder / "a.csv"
    sheets.write_sheet(path, COLUMNS, [(f"id{i}", text, "") for i, text in enumerate(texts)])
    return path


def records(path):
    return list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")))


def saved(path, rows, *, delimiter=",", encoding="utf-8-sig", quoting=csv.QUOTE_MINIMAL, end="\r\n"):
    """What a spreadsheet program makes of the cells of a sheet."""
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows(rows)
    path.write_bytes(out.getvalue().encode(encoding, "replace"))


def column(table, name="text"):
    return [row.values[name] for row in table.rows]


# ----------------------------------------------------------------------------------------------------------------------- the file
def test_a_sheet_is_utf8_with_a_mark_quoted_and_ended_as_spreadsheets_do(tmp_path):
    path = tmp_path / "a.csv"
    sheets.write_sheet(path, ("id", "iteration"), [("é", 3)])
    assert path.read_bytes() == b'\xef\xbb\xbf"id","iteration"\r\n"\xc3\xa9","3"\r\n'


def test_what_was_written_is_read(tmp_path):
    assert column(sheets.read_sheet(sheet(tmp_path), COLUMNS)) == TEXTS


def test_a_text_no_cell_holds_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(UserError, match=r"a.csv, row 3: the text has more characters than the 32,767"):
        sheet(tmp_path, ["short", "x" * 40_000])
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------- injection
@pytest.mark.parametrize("text", [
    "=cmd|' /C calc'!A0", "+1", "-1+2", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "  \u00a0+1", '"=1', "“=1", "' =1", "＝1", "＋1", "－1",
    "＠x", "\ufeff=1", "\u200b=1", "\x00=1", "\x1b=1",
    "=HYPERLINK(\"http://x\")", "- item"])
def test_no_cell_begins_a_formula(text):
    cell = sheets.guarded(text)
    assert cell.startswith("'") and sheets.same(sheets.restored(cell), text)


@pytest.mark.parametrize("text, cell", [
    ("safe;=cmd|' /C calc'!A0;x", "safe;'=cmd|' /C calc'!A0;x"),
    ("one\n=1+1", "one\n'=1+1"),
    ("one\r\n  @SUM(A1)", "one\r\n  '@SUM(A1)"),
    ("a\t-cmd|'x'!A0", "a\t'-cmd|'x'!A0"),
    ("Steps:\n- wash\n- dry", "Steps:\n- wash\n- dry"),
    ("1 + 1 = 2; so", "1 + 1 = 2; so"),
])
def test_a_formula_behind_another_separator_is_made_safe_and_a_list_stays(text, cell):
    assert sheets.guarded(text) == cell and sheets.restored(cell) == text


@pytest.mark.parametrize("text", ["007", "1234567890123e45", "0.10", "1/2", "3-4", "50 %", "12:30", "5 May", "MAY2021", "SEPT2", "5 pm",
                                  "true", "FALSE"])
def test_what_would_become_a_value_is_marked_as_text(text):
    assert sheets.guarded(text) == f"'{text}" and sheets.restored(f"'{text}") == sheets.restored(text) == text


@pytest.mark.parametrize("text", ["Wash it at 30 degrees.", "a1b2c3d4e5f60718", "yes", "", "Is 5 more than 3?", "x=1", "C++"])
def test_ordinary_texts_are_left_alone(text):
    assert sheets.guarded(text) == sheets.restored(text) == text


TRICKY = st.text(alphabet=st.sampled_from(list("=+-@'\"; \t\r\n,(|!aé1e./5x＝＠’\ufeff\u200b日")), max_size=14)
ANY = st.text(alphabet=st.characters(exclude_categories=("Cs", "Cc")), max_size=60)


@settings(max_examples=1000, deadline=None)
@given(st.one_of(TRICKY, ANY))
def test_every_text_survives_whether_the_apostrophe_is_kept_or_dropped(text):
    cell = sheets.guarded(text)
    assert sheets.restored(cell) == text
    if cell.startswith("'") and not text.startswith("'"):
        assert sheets.restored(cell[1:]) == text
    assert sheets.same(sheets.restored(cell.removeprefix("'")), text)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(TRICKY, ANY), min_size=1, max_size=5))
def test_every_text_survives_the_file(tmp_path_factory, texts):
    assert column(sheets.read_sheet(sheet(tmp_path_factory.mktemp("s"), texts), COLUMNS)) == texts


def test_control_characters_and_lone_surrogates_are_not_written(tmp_path):
    path = sheet(tmp_path, ["a\x00b\x07c\x7fd\x85e\ud800f\tg\nh"])
    assert column(sheets.read_sheet(path, COLUMNS)) == ["abcdef\tg\nh"]


# ------------------------------------------------------------------------------------------------------------- what programs save
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\r\n", "\n"])
def test_other_delimiters_encodings_and_line_ends(tmp_path, delimiter, encoding, end):
    path = sheet(tmp_path)
    saved(path, records(path), delimiter=delimiter, encoding=encoding, end=end)
    assert column(sheets.read_sheet(path, COLUMNS)) == TEXTS


def test_western_windows_is_understood_without_help(tmp_path):
    path = sheet(tmp_path, ["Füße – naïve", "ça va"])
    saved(path, records(path), delimiter=";", encoding="cp1252")
    assert column(sheets.read_sheet(path, COLUMNS)) == ["Füße – naïve", "ça va"]


@pytest.mark.parametrize("encoding, text", [("cp1251", "Как мыть руки?"), ("cp1250", "Źdźbło, žluťoučký kůň"), ("cp1253", "Πώς είσαι;"),
                                            ("cp932", "日本語の文"),
                                            ("gb18030", "怎么洗手"), ("mac_roman", "Füße – naïve"), ("cp949", "안녕하세요")])
def test_other_code_pages_are_recognised_by_what_was_written(tmp_path, encoding, text):
    path = sheet(tmp_path, [text, "plain"])
    saved(path, records(path), encoding=encoding)
    assert column(sheets.read_sheet(path, COLUMNS, known=[text, "plain"])) == [text, "plain"]


def test_bytes_of_no_known_encoding_are_a_message_with_the_line(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"id,text,comment\n1,\x81\x8d,\n")
    with pytest.raises(UserError, match="a.csv, line 2: .* is not UTF-8"):
        sheets.read_sheet(path, COLUMNS)


def test_rows_and_columns_may_move_and_blank_ones_and_others_appear(tmp_path):
    path = sheet(tmp_path, ["one", "two"])
    saved(path, [["Comment ", "TEXT", "", "id", "mine"], ["", "two", "", "id1", "z"], ["", "", "", "", ""], ["", "one", "", "id0", ""]])
    found = sheets.read_sheet(path, COLUMNS)
    assert [(row.number, row.values) for row in found.rows] == [(2, {"id": "id1", "text": "two", "comment": ""}),
                                                                (4, {"id": "id0", "text": "one", "comment": ""})]


def test_an_optional_column_may_be_missing_and_a_needed_one_is_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,a\n")
    assert sheets.read_sheet(path, ("id", "text"), optional=("comment",)).rows[0].values == {"id": "1", "text": "a", "comment": ""}
    with pytest.raises(UserError, match=r"a.csv: the column 'comment' is missing; there are 'id', 'text'"):
        sheets.read_sheet(path, COLUMNS)


@pytest.mark.parametrize("content, message", [
    ('id,text,comment\n1,"a,\n2,b,\n', "row 2: a quote is not closed"),
    ("id,text,comment\n1,a,\n2,b,c,d\n", "row 3: has 4 fields, but the header has 3"),
    ("", "is empty"),
    ("PK\x03\x04xx", "is a zip archive, as Excel and LibreOffice workbooks are"),
])
def test_a_broken_file_names_its_row(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        sheets.read_sheet(path, COLUMNS)


def test_a_message_on_a_converted_file_names_the_file_itself(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("id,text,comment\n1,ü,\n2,b,c,d\n".encode("cp1252"))
    with pytest.raises(UserError) as e:
        sheets.read_sheet(path, COLUMNS)
    assert str(e.value).startswith(f"{path}, row 3: ")


# --------------------------------------------------------------------------------------------------------------------- decisions
@pytest.mark.parametrize("cell, said", [("yes", True), (" YES ", True), ("Ja", True), ("oui", True), ("sí", True), ("1", True),
                                        ("TRUE", True), ("WAHR", True), ("x", True), ("ｙ", True), ("keep", True), ("no", False),
                                        ("Nein", False), ("0", False), ("FAUX", False),
                                        ("reject", False), ("", None), ("maybe", None), ("yes no", None), ("-", None)])
def test_yes_and_no_in_several_languages(cell, said):
    assert sheets.decision(cell) is said


@pytest.mark.parametrize("cell, text, expected", [
    ("a\r\nb ", "a\nb", True), ("=1", "'=1", True), ("a", "b", False), ("A", "a", False), ("", "", True), ("a  b", "a b", False)])
def test_what_counts_as_the_same_text(cell, text, expected):
    assert sheets.same(cell, text) is expected


@pytest.mark.parametrize("cell, text, lost", [
    ("F??e", "Füße", True), ("???", "日本語", True), ("ok ??", "ok 😀", True), ("Fusse?", "Füße", False), ("Füße", "Füße", False),
    ("why?", "why!", False), ("?" * 90 + "x", "日本語" * 20, False), ("Fuße", "Füße", False)])
def test_letters_that_became_question_marks_are_seen(cell, text, lost):
    assert sheets.lost_letters(cell, text) is lost


def test_a_fingerprint_outlives_an_encoding_and_tells_texts_apart():
    assert sheets.fingerprint("Füße waschen", "'ja") == sheets.fingerprint("F??e waschen", "ja")
    assert sheets.fingerprint("ab", "c") != sheets.fingerprint("a", "bc")


def test_a_long_wrong_value_is_not_repeated():
    assert sheets.shown("maybe") == "'maybe'" and sheets.shown("x" * 21) == "a text of 21 characters"
