"""The page of a run in a real browser: headless Chromium, driven by selenium. Debian's packages are chromium and chromium-driver."""
import csv
import json
import os
import shutil
import time

import page_runs
import pytest

from isara_jax import report
from isara_jax.common import write_jsonl
from isara_jax.data import sheets

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
PLANTED = "</script><script>window.planted=1</script><img src=x onerror='window.planted=2'>\u202etxt\u0007"


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    """One headless browser for all tests, which downloads into its own folder."""
    if not (CHROMIUM and DRIVER):
        reason = "no chromium with its chromedriver is found (Debian: apt-get install chromium chromium-driver)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options, folder = webdriver.ChromeOptions(), tmp_path_factory.mktemp("browser")
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
                     f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_page_load_timeout(60)
    driver.downloads = folder / "downloads"
    driver.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(driver.downloads)})
    yield driver
    driver.quit()


class Page:
    """A page that is open, and what tests ask of it. At the end the console must hold no error."""

    def __init__(self, driver, root, width=1280, mobile=False):
        self.driver, self.root = driver, root
        self.resize(width, mobile)
        driver.get_log("browser")
        driver.get(report.write(root).as_uri())

    def resize(self, width, mobile=False):
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": mobile}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)

    def js(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def all(self, css):
        return self.js("return [...document.querySelectorAll(arguments[0])].map(e => e.innerText)", css)

    def one(self, css):
        return self.driver.find_element("css selector", css)

    def click(self, css, n=0):
        self.js("document.querySelectorAll(arguments[0])[arguments[1]].click()", css, n)

    def press(self, *keys):
        self.driver.switch_to.active_element.send_keys(*keys)

    def choose(self, name, value):
        self.js("const s = document.querySelector(`select[name=${arguments[0]}]`); s.value = arguments[1];"
                "s.dispatchEvent(new Event('change'))", name, value)

    def search(self, text):
        """Type into the search field and wait for its pause."""
        self.js("const s = document.querySelector('#search'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))", text)
        time.sleep(0.2)

    @property
    def asked(self):
        """The questions in the list."""
        return self.all("#list > li > button > .line:first-child")

    @property
    def errors(self):
        return [e for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]

    def wide(self):
        """How wide the page is; a phone zooms out until the widest thing fits, so its window tells nothing."""
        return self.js("return document.documentElement.scrollWidth")


@pytest.fixture
def visit(chromium):
    """Opens the page of a run; after the test its console must be without errors."""
    opened = []

    def visit(root, **how):
        opened.append(Page(chromium, root, **how))
        return opened[-1]

    yield visit
    assert [page.errors for page in opened] == [[] for _ in opened]


# ---------------------------------------------------------------------------------------------------------------------- browser
def test_search_finds_words_in_any_order_and_ids(tmp_path, visit):
    page = visit(page_runs.small(tmp_path))
    assert page.all("#count") == ["7 pairs"] and len(page.asked) == 7
    page.search("SALTY sea")
    assert page.asked == ["Why is the sea salty?"] and page.all("#count") == ["1 of 7 pairs"]
    page.search("rivers")
    assert page.asked == ["Why is the sea salty?"]  # in the answer
    page.search(page_runs.seed(*page_runs.SEEDS[2])["id"])
    assert page.asked == ["What makes bread rise?"]
    page.search("<b>nothing</b>")
    assert page.asked == [] and page.all("#count") == ["0 of 7 pairs"]


@pytest.mark.parametrize("name, value, found", [
    ("verdict", "kept", ["How do fish sleep?", "Why is the sea salty?"]),
    ("verdict", "rejected", ["Why is the sky so blue?", "What makes dough sticky?"]),
    ("origin", "seed", [q for q, _ in page_runs.SEEDS]),
    ("iteration", "1", ["How do fish sleep?", "Why is the sea salty?", "Why is the sky so blue?", "What makes dough sticky?"]),
    ("reason", "answer/min_words", ["What makes dough sticky?"])])
def test_filters_leave_what_they_name(tmp_path, visit, name, value, found):
    page = visit(page_runs.small(tmp_path))
    page.choose(name, value)
    assert page.asked == found


def test_filters_and_search_work_together_and_are_cleared(tmp_path, visit):
    page = visit(page_runs.small(tmp_path))
    page.choose("verdict", "rejected")
    page.search("blue")
    assert page.asked == ["Why is the sky so blue?"]
    page.click(".count button")
    assert len(page.asked) == 7


def test_an_opened_pair_shows_scores_neighbour_and_exemplars_and_leads_to_them(tmp_path, visit):
    page = visit(page_runs.small(tmp_path))
    page.choose("verdict", "rejected")
    page.click("#list > li > button")
    panel = page.one(".open").text
    assert "request 2" in panel and "0.9" in panel and "question: novelty" in panel
    row = next(r for r in page.all(".checks tbody tr") if "novelty" in r)
    assert "rejected" in row and "Why is the sky blue?" in row
    assert page.all(".shots .said") == ["Why is the sky blue?", page_runs.SEEDS[0][1], "Do fish sleep at night?", page_runs.SEEDS[1][1]]
    page.click(".shots .jump")
    assert len(page.asked) == 7
    assert page.js("return document.activeElement.innerText").startswith("Why is the sky blue?")


def test_a_long_list_is_shown_in_steps(tmp_path, visit):
    page_runs.start(tmp_path, [(f"Question number {i}?", "An answer.") for i in range(50)])
    page = visit(tmp_path)
    assert len(page.asked) == 20
    page.click("#browser .more button")
    assert len(page.asked) == 40 and page.js("return document.activeElement.innerText").startswith("Question number 20?")
    page.click("#browser .more button")
    assert len(page.asked) == 50 and not page.one("#browser .more button").is_displayed()


def test_keys_slash_searches_escape_closes_and_tab_reaches_everything(tmp_path, visit):
    from selenium.webdriver.common.keys import Keys

    page = visit(page_runs.small(tmp_path))
    page.press(Keys.TAB)
    assert page.js("return document.activeElement.className") == "skip"
    page.press("/")
    assert page.js("return document.activeElement.id") == "search"
    page.press("fish")
    time.sleep(0.2)
    assert page.asked == ["How do fish sleep?", "Do fish sleep at night?"]
    page.press("/")
    assert page.one("#search").get_attribute("value") == "fish/"
    page.press(Keys.ESCAPE)
    assert page.one("#search").get_attribute("value") == "" and len(page.asked) == 7
    for _ in range(4 + 1):  # four filters, then the first pair
        page.press(Keys.TAB)
    assert page.js("return document.activeElement.dataset.pair") == "0"
    assert page.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press(Keys.ENTER)
    assert len(page.all(".open")) == 1
    page.press(Keys.TAB)
    page.press(Keys.ESCAPE)
    assert page.all(".open") == [] and page.js("return document.activeElement.dataset.pair") == "0"


# ------------------------------------------------------------------------------------------------------------------------ inert
def test_planted_markup_does_nothing_anywhere(tmp_path, visit):
    root = page_runs.small(tmp_path, {"data": {"seeds": PLANTED}, "model": {"name": PLANTED}}, question=f"How {PLANTED}?", answer=PLANTED,
                           author=PLANTED, source=PLANTED, licence=PLANTED)
    (root / "iterations/01/samples.jsonl").write_text(json.dumps({"question": "Why does ice float?", "answer": PLANTED}) + "\n")
    write_jsonl(root / "evaluation/dev/items.jsonl", [{"id": "e1", "question": PLANTED, "answer": PLANTED}])
    write_jsonl(root / "iterations/01/review.jsonl", [{"id": page_runs.kept(f"How {PLANTED}?", PLANTED, [""])["id"], "decision": PLANTED,
                                                      "comment": PLANTED}])
    (root / "command.txt").write_text(PLANTED)
    (root / "versions.json").write_text(json.dumps({PLANTED: PLANTED}))
    (root / "metrics.jsonl").write_text(json.dumps({"kind": "cost", "iteration": 1, "stage": PLANTED, "seconds": 1.0}) + "\n")
    results = json.loads((root / "evaluation/dev/results.json").read_text())
    results |= {"benchmark": PLANTED, "note": PLANTED, "sentences": [PLANTED]}
    results["arms"][1]["arm"] = PLANTED
    (root / "evaluation/dev/results.json").write_text(json.dumps(results))
    (root / "blind").mkdir()
    with open(root / "blind/answers.csv", "w", encoding="utf-8-sig", newline="") as f:
        csv.writer(f).writerows([["row", "question", "answer A", "answer B", "better?", "comment"], ["1", PLANTED, PLANTED, "x", "", ""]])
    page = visit(root)
    for i in range(len(page.asked)):
        page.click("#list > li > button", i)
    page.js("document.querySelectorAll('button').forEach(b => b.innerText.startsWith('Show') && b.click())")
    time.sleep(0.2)
    assert page.js("return window.planted") is None
    assert page.js("return document.images.length") == 0 and page.js("return document.scripts.length") == 2
    said = page.one("body").text
    assert "\u202e" not in said and "\u0007" not in said
    shown = "<img src=x onerror='window.planted=2'>\\u202etxt\\x07"
    for place in ("#top", "#verdict", "#list", "#samples", "#judged", "#sheets", "#cost", "#setup"):
        assert shown in page.one(place).text, place


def test_a_lone_surrogate_is_an_escape(tmp_path, visit):
    page_runs.start(tmp_path)
    with open(tmp_path / "pool/000-seeds.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(page_runs.seed("Half?", "x") | {"answer": "a \ud83d half"}) + "\n")
    assert "a \\ud83d half" in visit(tmp_path).one("#list").text


# -------------------------------------------------------------------------------------------------------------------- sensitive
def test_a_sensitive_run_shows_texts_only_when_asked(tmp_path, visit):
    root = page_runs.small(tmp_path, {"sensitive": True}, question="How do zebras quarrel?", answer="With violet hooves.")
    page = visit(root)
    whole = lambda: page.js("return document.title + document.body.innerText + [...document.querySelectorAll('*')].flatMap("
                            "e => [...e.attributes].map(a => a.value)).join(' ')")
    assert "zebras" not in whole() and "violet" not in whole() and "ice float" not in whole()
    assert page.asked[0] == "hidden: 22 characters"
    page.click("#list > li > button")
    assert "zebras" not in whole() and "eyelids" not in whole()
    page.click("#list .ask")
    assert "zebras" in whole() and "violet" in whole() and "salty" not in whole() and "ice float" not in whole()
    page.click("#reveal")
    assert "salty" in whole() and "ice float" in whole()
    page.click("#reveal")
    assert "zebras" not in whole() and "salty" not in whole() and "ice float" not in whole()


# ----------------------------------------------------------------------------------------------------------------- side by side
def test_answers_stand_beside_one_another_and_arms_are_chosen(tmp_path, visit):
    page = visit(page_runs.small(tmp_path))
    assert page.all("#samples .sides .said") == ["It is lighter than water.", "No idea, no idea.", "Cold air."]
    assert page.all("#judged .sides .said") == ["Its crystals are loose.", "It is ice.", "Ice is light.", "Yes.", "No, they cannot."]
    page.choose("left", "1")
    assert page.all("#judged .sides .said") == ["Its crystals are loose.", "Ice is light.", "No, they cannot."]


# ------------------------------------------------------------------------------------------------------------------------ blind
COLUMNS = ["row", "question", "answer A", "answer B", "better?", "comment"]
ROWS = [["1", "Why is ice light?", "It is ice.", "'=1+1", "", ""], ["2", 'Can "pigs" fly?', "Yes,\r\nthey can.", "No.", "", ""],
        ["3", "Why?", "So.", "So it is.", "tie", "unsure"]]


def blind(root, rows=ROWS):
    (root / "blind").mkdir()
    with open(root / "blind/answers.csv", "w", encoding="utf-8-sig", newline="") as f:
        csv.writer(f, quoting=csv.QUOTE_ALL, lineterminator="\r\n").writerows([COLUMNS, *rows])
    (root / "blind/answers.key.json").write_text('{"order": "the-secret-order"}')
    return root


def test_a_blind_sheet_is_filled_in_and_downloaded_as_the_same_file(tmp_path, visit):
    root = blind(page_runs.small(tmp_path))
    before = (root / "blind/answers.csv").read_bytes()
    page = visit(root)
    assert "the-secret-order" not in (root / "report.html").read_text()
    assert page.all("#judged .pair") == []  # they would tell which answer is whose
    assert page.all("#sheets .sides .said") == ["It is ice.", "=1+1"] and page.all("#sheets .count") == ["1 of 3; 1 judged"]
    page.click("#sheets .choices button", 1)
    assert page.all("#sheets .count") == ["2 of 3; 2 judged"]
    page.click("#sheets .choices button", 0)
    page.click("#sheets .more button", 0)
    assert page.js("return [...document.querySelectorAll('#sheets .choices button')].map(b => b.ariaPressed)") == ["true", "false", "false"]
    page.one("#sheets .comment input").send_keys("=SUM(1)")
    page.click("#sheets .more .main")
    got = page.driver.downloads / "answers.csv"
    for _ in range(100):
        if got.exists() and got.stat().st_size:
            break
        time.sleep(0.05)
    expected = before.replace(b'"\'=1+1","",""', b'"\'=1+1","B",""').replace(b'"No.","",""', b'"No.","A","\'=SUM(1)"')
    assert got.read_bytes() == expected
    got.unlink()
    again = visit(root)  # what was judged outlives the page
    assert again.all("#sheets .count") == ["1 of 3; 3 judged"]


def test_pairs_are_judged_and_results_shown(tmp_path, visit):
    root = page_runs.small(tmp_path)
    (root / "blind").mkdir()
    sheets.write_sheet(root / "blind/pairs.csv", ["row", "question", "answer", "good?", "comment"],
                       [(1, "-1 is what?", "A number.", "", ""), (2, "Why?", "", "", "")])
    share = {"hits": 7, "count": 10, "value": 0.7, "low": 0.35, "high": 0.93}
    made = {"answers": {"without_ties": share, "undecided": 0, "sentences": ["win rate 70 %"]},
            "pairs": {"kept": share, "precision": {"answer/min_words": share}, "undecided": 1, "sentences": ["of the pairs 70 % are good"]}}
    (root / "blind/results.json").write_text(json.dumps(made))
    page = visit(root)
    said = page.one("#blind").text
    assert "-1 is what?" in said and "'-1" not in said
    assert "win rate 70 %" in said and "of the pairs 70 % are good" in said and "rejected by answer: min_words: bad 10 70 35 to 93" in said
    page.click("#sheets .choices button", 1)
    assert page.all("#sheets .count") == ["2 of 2; 1 judged"] and "is it a good question?" in page.one("#sheets").text


def test_a_new_blind_sheet_begins_empty(tmp_path, visit):
    page = visit(blind(page_runs.small(tmp_path), [["1", "Another?", "One.", "Two.", "", ""]]))
    assert page.all("#sheets .count") == ["1 of 1; 0 judged"]


# ------------------------------------------------------------------------------------------------------------------------ looks
def test_a_phone_scrolls_in_one_direction_only(tmp_path, visit):
    long = "Pneumonoultramicroscopicsilicovolcanoconiosis" * 4
    changes = {"data": {"seeds": f"/{long}.csv"}}
    root = blind(page_runs.small(tmp_path, question=f"What is {long}?", answer=long, author=long, changes=changes))
    page = visit(root, width=360, mobile=True)
    page.js("document.querySelectorAll('details').forEach(d => d.open = true)")
    page.click("#list > li > button")
    assert page.wide() == 360
    page.resize(1280)
    assert page.wide() <= 1280


def test_the_theme_follows_the_system_and_the_button(tmp_path, visit):
    page = visit(page_runs.small(tmp_path))
    paper = lambda: page.js("return getComputedStyle(document.body).backgroundColor")
    feature = lambda name: {"features": [{"name": "prefers-color-scheme", "value": name}]}
    system = lambda name: page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", feature(name))
    system("light")
    light = paper()
    system("dark")
    dark = paper()
    assert dark != light
    page.driver.refresh()
    page.click("#theme")
    assert paper() == light
    page.driver.refresh()
    assert paper() == light  # it is remembered
    page.click("#theme")
    assert paper() == dark
    page.js("localStorage.clear()")
    system("light")


def test_an_unfinished_run_has_a_page_without_errors(tmp_path, visit):
    page_runs.start(tmp_path)
    page = visit(tmp_path)
    assert "There are no answers yet" in page.one("#answers").text and len(page.asked) == 3


def test_a_run_without_pairs_has_a_page_without_errors(tmp_path, visit):
    page_runs.start(tmp_path)
    (tmp_path / "pool/000-seeds.jsonl").unlink()
    assert "There are no pairs yet" in visit(tmp_path).one("#pairs").text


def test_five_thousand_pairs_are_searched(tmp_path, visit):
    page = visit(page_runs.large(tmp_path, 5000))
    assert page.all("#count") == ["7,564 pairs"]
    page.choose("verdict", "kept")
    assert page.all("#count") == ["5,000 of 7,564 pairs"]
    page.search(page.asked[3])
    assert page.all("#count") == ["1 of 7,564 pairs"]
