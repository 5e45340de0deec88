"""The page as one HTML text: the template filled in, style and script inside, nothing loaded from anywhere.

Text of models and files is inert. In the page's own markup it is escaped; what the script shows comes as JSON and is set as text. Control,
bidirectional and invisible characters are shown as escapes. A content security policy lets only this style and this script run.
"""
from __future__ import annotations

import base64
import functools
import hashlib
import importlib.resources
from typing import Any, Sequence

import jinja2
from markupsafe import Markup

from isara_jax.console import duration, inert
from isara_jax.page import charts, words
from isara_jax.page.embed import script_json
from isara_jax.page.read import Row

NOT_CHECKED = "Generated answers are not fact-checked. Read them before you rely on them."
ARMS_SHOWN = 4          # columns of the table beside the quantity of the verdict that are seen without asking


def render(page: Row, advice: Sequence[Any]) -> str:
    """The HTML of what `gather` found; `advice` has the attributes text and command."""
    style, script = _asset("style.css"), _asset("page.js")
    blind = page["blind"]
    whole = any(r["name"] == "answers" and r["whole"] for r in blind.get("results", []))
    data = {"sensitive": page["sensitive"], "pairs": page["pairs"].to_dict(), "samples": page["samples"], "judged": page["judged"],
            "sheets": blind.get("sheets", []), "judgedBlind": whole, "filters": words.FILTERS,
            "arms": {name: words.arm(name) for judged in page["judged"] for name in judged["arms"]}}
    policy = f"default-src 'none'; style-src '{_sha256(style)}'; script-src '{_sha256(script)}'; base-uri 'none'; form-action 'none'"
    return _template().render(
        page=page, advice=advice, style=Markup(style), script=Markup(script), policy=policy, data=Markup(script_json(data)),
        not_checked=NOT_CHECKED, runs=[_run(run) for run in page["runs"]], evaluations=[_evaluation(e) for e in page["evaluations"]],
        totals=_totals(page), results=[_result(r) for r in blind.get("results", [])])


@functools.cache
def _template() -> jinja2.Template:
    """The template; every value that it shows is made inert, then escaped."""
    safe = lambda value: inert(value, keep="\n") if isinstance(value, str) and not isinstance(value, Markup) else value
    environment = jinja2.Environment(autoescape=True, finalize=safe, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                                     loader=jinja2.FunctionLoader(_asset))
    environment.filters |= {"duration": duration, "number": _number, "signed": _signed, "arm": words.arm}
    return environment.get_template("report.html")


def _asset(name: str) -> str:
    return importlib.resources.files("isara_jax.page").joinpath(name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    """A source expression of the policy: the hash of an inline block."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --------------------------------------------------------------------------------------------------------------------- numbers
def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _signed(value: float | None, digits: int = 1) -> str:
    """With its sign, a real minus, and no minus before 0."""
    return "–" if value is None else f"{value:+z.{digits}f}".replace("-", "−")


def _totals(page: Row) -> Row:
    """The figures at the top; of folds the sums."""
    done = [i for run in page["runs"] for i in run["iterations"] if i["done"] and i["iteration"]]
    requests, kept = (sum(i[name] for i in done) for name in ("requests", "kept"))
    first = page["runs"][0]["iterations"] if len(page["runs"]) == 1 else []
    losses = [i["held_out"] for i in first if i["held_out"] is not None]
    return {"iterations": max((i["iteration"] for i in done), default=0), "requests": requests, "kept": kept,
            "yield": kept / requests if requests else None, "before": losses[0] if len(losses) > 1 else None,
            "after": losses[-1] if len(losses) > 1 else None,
            "seconds": sum(c["seconds"] for run in page["runs"] for c in run["costs"])}


def _result(found: Row) -> Row:
    """What came of a blind sheet, with a picture of each share between 0 and 1 beside one half."""
    pictures = charts.intervals([(0.0, 0.0, 1.0), *(tuple(s["interval"]) for s in found["shares"])], 0.5)[1:]
    return {**found, "shares": [{**s, "picture": picture} for s, picture in zip(found["shares"], pictures, strict=True)]}


# ---------------------------------------------------------------------------------------------------------------------- charts
def _evaluation(e: Row) -> Row:
    """An evaluation with its pictures: one for each arm, one for each comparison."""
    cells = [arm["cells"][0] if arm["cells"] else None for arm in e["arms"]]
    rows = [c and c["value"] is not None and (c["value"], c["low"], c["high"]) or None for c in cells]
    differences = [(c["difference"], c["low"], c["high"]) if c["difference"] is not None else None for c in e["comparisons"]]
    against = [line for line in e["sentences"] if line.startswith("against ")]  # what the table says in numbers
    remarks = [line for line in e["sentences"] if line not in against]
    return {**e, "against": against, "remarks": remarks, "pictures": charts.intervals(rows),
            "differences": charts.intervals(differences, 0.0), "shown": ARMS_SHOWN + 1}


def _run(run: Row) -> Row:
    """A run with its charts. A curve over iterations needs two of them."""
    done = [i for i in run["iterations"] if i["done"]]
    over = lambda name: [(i["iteration"], i[name]) for i in done if i.get(name) is not None]
    yields = [(i["iteration"], 100 * i["kept"] / i["requests"]) for i in done if i["requests"]]
    probes = list(dict.fromkeys(name for i in done for name in i["probe"]))
    probe = [(name, [(i["iteration"], i["probe"][name]) for i in done if name in i["probe"]]) for name in probes]
    held_out, spread = over("held_out"), run["diversity"]
    drawn = [
        ("Training loss", "Nats per answer token over optimizer steps.", charts.lines(
            "Training loss by iteration", [(f"iteration {t}", points) for t, points in run["losses"].items()], "optimizer step")),
        ("Held-out loss", "Nats per answer token on seeds that were never trained on. It says how closely they are imitated, not whether "
         "answers are right.", _over("Held-out loss", [("held-out loss", held_out)])),
        ("Yield", "Pairs kept, percent of the requests.", _over("Yield in percent", [("yield", yields)], zero=True, digits=0)),
        ("Diversity of the questions", f"Of the first {spread[0]['questions'] if spread else 0} questions of each iteration; 0 is the "
         "seeds. More distinct-n and less self-BLEU is more diverse.", _over("Diversity of the questions", [
             (label, [(d["iteration"], d[name]) for d in spread])
             for name, label in (("distinct_1", "distinct-1"), ("distinct_2", "distinct-2"), ("self_bleu", "self-BLEU"))], zero=True)),
        ("Answer probe", "What each iteration's generator made of human questions in context, beside right and wrong references; "
         "“diff” is right less wrong.", _over("Answer probe", probe)),
    ]
    by_iteration: dict[int, list[Row]] = {}
    for row in run["costs"]:
        by_iteration.setdefault(row["iteration"], []).append(row)
    most = max((row["seconds"] for row in run["costs"]), default=0.0)
    return {**run, "done": [i for i in done if i["iteration"]], "charts": [(n, t, c) for n, t, c in drawn if c],
            "costs": [(t, [{**r, "bar": charts.bar(r["seconds"], most), "rate": _rate(r)} for r in rows])
                      for t, rows in by_iteration.items()],
            "funnels": [_funnel(i) for i in done if i["iteration"]], "probes": probes,
            "spread": {d["iteration"]: d for d in spread}, "before": next((i["held_out"] for i in done if not i["iteration"]), None)}


def _over(title: str, series: Sequence[tuple[str, charts.Points]], *, zero: bool = False, digits: int = 2) -> Markup:
    series = [(name, points) for name, points in series if len(points) > 1]
    return charts.lines(title, series, "iteration", whole_x=True, zero=zero, digits=digits)


def _rate(row: Row) -> float | None:
    tokens = row["prefilled"] + row["generated"] + row["trained"]
    return tokens / row["seconds"] if tokens and row["seconds"] else None


def _funnel(i: Row) -> Row:
    """The steps of an iteration's requests with their share and bar; then what rejected the others, most first."""
    def row(name: str, n: int, kind: str, why: str = "") -> Row:
        return {"name": name, "count": n, "share": n / i["requests"] if i["requests"] else None, "bar": charts.bar(n, i["requests"], kind),
                "why": why}

    steps = [row("requests", i["requests"], ""), row("questions accepted", i["questions"], ""), row("pairs kept", i["kept"], "kept")]
    why = lambda name: words.FILTERS.get(name.split(" ")[-1], "")
    return {**i, "steps": steps, "reasons": [row(name, n, "rejected", why(name)) for name, n in i["rejected"]]}
