"""Pieces of the page: data inside HTML, charts, colours, reading."""
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

import isara_jax.page
from isara_jax.evals import diversity
from isara_jax.page import charts, gather, pairs, words
from isara_jax.page.embed import script_json
from isara_jax.page.read import Reader, number


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_data_comes_back_and_holds_no_markup(value):
    made = script_json(value)
    assert json.loads(made) == value
    assert not set("<>&\u2028\u2029") & set(made)


def test_data_with_half_a_character_can_be_written():
    assert script_json(["a\ud83d"]).encode() == b'["a\\ud83d"]'


# ----------------------------------------------------------------------------------------------------------------------- charts
def drawn(markup):
    return ElementTree.fromstring(str(markup).split("</svg>")[0] + "</svg>")


def test_a_line_ends_where_its_values_are():
    svg = drawn(charts.lines("loss", [("a", [(0, 1.0), (10, 3.0)])], "step", zero=True))
    (line,) = svg.findall("polyline")
    first, last = (tuple(map(float, point.split(","))) for point in line.get("points").split())
    ticks = {t.text: float(t.get("y")) - 4 for t in svg.findall("text") if t.get("text-anchor") == "end"}
    assert first[0] == charts.LEFT and last[0] == charts.WIDTH - charts.RIGHT
    assert first[1] == pytest.approx(ticks["1.00"], abs=0.2) and last[1] == pytest.approx(ticks["3.00"], abs=0.2)
    assert min(ticks, key=float) == "0.00"


def test_long_curves_are_thinned_to_means():
    line = drawn(charts.lines("loss", [("a", [(i, float(i % 2)) for i in range(10_000)])], "step")).find("polyline")
    values = {round(float(p.split(",")[1]), 1) for p in line.get("points").split()}
    assert 50 < len(line.get("points").split()) < 130 and len(values) == 1


@pytest.mark.parametrize("points", [[(1, 5.0)], [(1, 5.0), (2, 5.0)], [(1, 0.0), (2, 0.0)], [(1, -1e-9), (2, 1e9)], [(0, -3.0), (1, -2.0)],
                                    [(1, 1e300), (2, -1e300)]])
def test_odd_values_are_drawn_inside_the_picture(points):
    line = drawn(charts.lines("x", [("a", points)], "step")).find("polyline")
    for point in line.get("points").split():
        x, y = map(float, point.split(","))
        assert 0 <= x <= charts.WIDTH and 0 <= y <= charts.HEIGHT


def test_nothing_is_drawn_of_nothing_and_names_are_escaped():
    assert charts.lines("x", [("a", [])], "step") == ""
    assert "<b>" not in charts.lines("<b>", [("<b>", [(0, 1.0)]), ("b", [(0, 2.0)])], "<b>")


def test_intervals_share_an_axis():
    first, missing, second = charts.intervals([(1.0, 0.0, 2.0), None, (2.0, None, None)], 0.0)
    assert missing == ""
    assert drawn(first).find("line[@class='span']").get("x2") == drawn(second).find("circle").get("cx")
    assert drawn(first).find("line[@class='axis']").get("x1") == drawn(first).find("line[@class='span']").get("x1")


# ---------------------------------------------------------------------------------------------------------------------- colours
def themes():
    """The colours of both themes, each with its name."""
    style = (Path(isara_jax.page.__file__).parent / "style.css").read_text()
    blocks = re.findall(r"(?:^|\s)(:root[^{]*)\{([^}]*)\}", style.split("@media print")[0])
    return {name.strip(): dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for name, block in blocks}


def contrast(a, b):
    """Of two colours, as WCAG 2 defines it."""
    def luminance(colour):
        parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
        return sum(w * (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4) for w, p in zip((0.2126, 0.7152, 0.0722), parts))

    dark, light = sorted(map(luminance, (a, b)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", range(3))
def test_text_has_contrast_aa_in_both_themes(theme):
    name, c = list(themes().items())[theme]
    for text, ground in (("ink", "page"), ("ink", "raised"), ("ink", "tint"), ("soft", "page"), ("soft", "raised"), ("soft", "tint"),
                         ("accent", "page"), ("accent", "raised"), ("accent", "tint"), ("page", "accent"), ("kept", "kept-tint"),
                         ("rejected", "rejected-tint"), ("warn", "warn-tint")):
        assert contrast(c[text], c[ground]) >= 4.5, f"{name}: {text} on {ground}"
    for curve in ("c0", "c1", "c2", "c3", "c4", "c5", "kept", "rejected"):
        assert contrast(c[curve], c["raised"]) >= 3, f"{name}: {curve}"


def test_the_dark_colours_are_the_same_by_button_and_by_system():
    light, by_button, by_system = themes().values()
    assert by_button == by_system != light and set(light) == set(by_button)


# ---------------------------------------------------------------------------------------------------------------------- reading
def test_a_line_that_is_being_written_is_no_problem_but_a_broken_one_is(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"id": "a"}\n{"id": 1}\n{"id": "b"}\n{"id": "c"')
    problems = []
    assert [r["id"] for r in Reader(tmp_path, problems).rows("rows.jsonl", id=str)] == ["a", "b"]
    assert problems == ["rows.jsonl has 1 line(s) that cannot be read (2); they are left out."]


@pytest.mark.parametrize("value, found", [(1, 1), (0.5, 0.5), (True, None), ("1", None), (None, None), (float("nan"), None),
                                          (float("inf"), None)])
def test_numbers_are_finite_numbers_only(value, found):
    assert number(value) == found


def test_every_filter_and_setting_is_told_in_words():
    from isara_jax import config
    from isara_jax.data import filters

    assert {n for n in (*config.Filters().question, *config.Filters().answer)} <= set(words.FILTERS)
    assert [name for name, _ in words.method(config.to_dict(config.Config()), {})] == [
        "Form", "Retrieval", "Generation", "Filters", "Fine-tuning", "Stops", "Judged on", "Randomness"]
    assert all(words.arm(name) for name in config.ARMS if name != "isara_each") and words.arm("isara_3").endswith("iteration 3")
    assert filters.check_names(config.Filters()) is None


def test_rows_beyond_the_limit_are_taken_evenly_and_that_is_said(monkeypatch, tmp_path):
    import page_runs

    page_runs.start(tmp_path, [(f"Question {i}?", "An answer.") for i in range(100)])
    monkeypatch.setattr(pairs, "MOST", 10)
    made = pairs.browser([(0, Reader(tmp_path, []), [])], {})
    assert [made.texts[i] for i in made.columns["question"]] == [f"Question {i}?" for i in range(0, 100, 10)]
    assert made.notes == ["Of 100 pairs 10 are here, evenly from all iterations. All are in pool/ and iterations/."]


def test_diversity_looks_at_as_many_questions_as_self_bleu_does():
    assert gather.DIVERSE == diversity.MOST
