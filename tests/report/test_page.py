"""report.html: one page without a request, shown by a real browser, in which text is only text."""

import html
import json
import re
import shutil
import subprocess

import pytest

from qat import records
from qat.report import page
from qat.shown import shown as seen
from tests.report import synthetic

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
EVIL = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">&amp;\u2028`${1}"

PROBE = "const root = document.documentElement; root.dataset.over = root.scrollWidth - root.clientWidth"
OVERLAPS = """
const box = (node) => [node.textContent, node.getBoundingClientRect()];
const boxes = (svg) => [...svg.querySelectorAll("text")].map(box);
const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
const found = [...document.querySelectorAll("svg")].flatMap((svg) => boxes(svg).flatMap(([name, box], index, all) =>
  all.slice(index + 1).filter(([, other]) => meet(box, other)).map(([other]) => `${name} on ${other}`)));
document.documentElement.dataset.labels = document.querySelectorAll("svg text").length;
document.documentElement.dataset.overlaps = found.join("; ");
"""
CLICKS = """
const all = (name) => [...document.querySelectorAll(name)];
const head = (name) => all("#runs th button").find((button) => button.textContent === name);
const column = (name) => all("#runs th").indexOf(head(name).parentElement);
const shown = (name) => all("#runs tbody tr").map((row) => row.cells[column(name)].textContent);
const sorted = (name) => head(name).parentElement.getAttribute("aria-sort");
const said = {};
const press = (name) => {
  head(name).click();
  (said[name] ??= []).push([sorted(name), shown(name), all("th[aria-sort]").length]);
};
["perplexity", "perplexity", "run", "goal", "tokens/s", "KD after", "KD after"].forEach(press);
const find = document.querySelector("#filter");
find.value = "failed";
find.dispatchEvent(new Event("input"));
said.found = shown("status");
find.value = "";
find.dispatchEvent(new Event("input"));
all("#none")[0].click();
all("#runs tbody input")[5].click();
all("#runs tbody input")[7].click();
said.chosen = [5, 7].map((index) => shown("run")[index]);
said.cards = all(".card h3").map((node) => node.textContent);
const told = document.body.appendChild(document.createElement("textarea"));
told.id = "said";
told.textContent = JSON.stringify(said);
"""


def dom(path, *flags):
    """The page after its script ran, as Chromium has it."""
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", *flags]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{path}"], capture_output=True, text=True, timeout=100, check=True
    )
    return done.stdout


def body(text):
    """What is shown: the page without its scripts and styles."""
    return re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)


@pytest.fixture
def outputs(tmp_path):
    return tmp_path / "outputs"


@browser
def test_browser_shows_five_hundred_runs(outputs):
    synthetic.fill(outputs, 500, steps=250, sized=True)
    path = page.write(outputs)
    shown = body(dom(path))
    assert path.stat().st_size < 2.6e6  # 2.9 MB with every step of every curve
    assert len(re.findall(r'<td class="pick">', shown)) == 500
    assert "500 runs in outputs" in shown
    drawn = {name: len(re.findall(f'class="{name}', shown)) for name in ("dot", "ring", 'card"', 'answer"', "curve")}
    complete = [run for run in records.runs(outputs) if run.status == "complete"]
    assert drawn["dot"] > len(complete) and drawn["ring"] == 4 and drawn['card"'] == 4
    assert drawn['answer"'] >= 8 and drawn["curve"] == 8 + 7 * 4
    best = min(complete, key=lambda run: run.number("metrics", "kl"))
    assert re.search(r'<td class="pick">.*?</td><td>(SR-\d+)</td>', shown)[1] == best.run_id


@browser
def test_text_of_runs_stays_text(outputs):
    synthetic.fill(outputs, 34, steps=4, goal=EVIL, notes=EVIL, name=EVIL, error=EVIL, said=EVIL)
    shown = dom(page.write(outputs))
    assert "<title>34 runs in outputs</title>" in shown
    assert "<img" not in body(shown)
    assert body(shown).count("&lt;img src=x onerror") > 34


def with_script(path, script):
    path.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))


@browser
def test_clicks_sort_the_table_and_choose_runs(outputs):
    synthetic.fill(outputs, 60)
    path = page.write(outputs)
    with_script(path, f"{{ {CLICKS} }}")
    said = json.loads(html.unescape(re.search(r'<textarea id="said">(.*?)</textarea>', dom(path), re.DOTALL)[1]))
    runs = {run.run_id: run for run in records.runs(outputs)}
    missing = sum(run.status != "complete" for run in runs.values())
    perplexities = sorted(run.number("metrics", "perplexity") for run in runs.values() if run.status == "complete")
    told = [f"{value:.2f}" for value in perplexities]
    assert said["perplexity"] == [
        ["ascending", told + ["–"] * missing, 1],
        ["descending", told[::-1] + ["–"] * missing, 1],
    ]
    assert said["run"] == [["ascending", list(runs), 1]]
    goals = [text for text in said["goal"][0][1] if text]
    assert goals == sorted(goals) and said["goal"][0][1][len(goals) :] == [""] * (60 - len(goals))
    down = [float(text) for text in said["KD after"][1][1][:-missing]]
    assert down == sorted(down, reverse=True) and said["KD after"][1][0] == "descending"
    assert said["found"] == ["failed"] * sum(run.status == "failed" for run in runs.values())
    assert [text.split()[0] for text in said["cards"]] == said["chosen"]


@browser
def test_phone_scrolls_no_page_sideways(outputs):
    synthetic.fill(outputs, 40, goal="a-very-long-word-without-a-space-" * 6)
    path = page.write(outputs)
    with_script(path, PROBE)
    for width in (390, 800, 1400):
        assert 'data-over="0"' in dom(path, f"--window-size={width},1200")


@browser
@pytest.mark.parametrize("width", [390, 1280])
def test_labels_do_not_sit_on_each_other(outputs, width):
    synthetic.varied(outputs)
    path = page.write(outputs)
    with_script(path, PROBE + OVERLAPS)
    shown = dom(path, f"--window-size={width},1200")
    assert 'data-over="0"' in shown
    assert int(re.search(r'data-labels="(\d+)"', shown)[1]) > 40
    assert re.search(r'data-overlaps="([^"]*)"', shown)[1] == ""


@browser
def test_conversion_student_and_teacher_stand_side_by_side(outputs):
    count = synthetic.varied(outputs)
    runs = page.data(outputs)["runs"]
    students = [run for run in runs if run["trains"] and run["status"] == "complete"]
    conversions = {run["conversion"] for run in runs if run["kl0"] is not None}
    assert len(runs) == count and len(students) == 24 and len(conversions) == 25
    shown = body(dom(page.write(outputs)))
    first = shown[: shown.index("Chosen runs are drawn")]
    drawn = [
        len(re.findall(f"<{mark}", first))
        for mark in ('circle[^>]*"dot trained', 'circle[^>]*"dot converted', 'line class="stem')
    ]
    assert drawn == [24 + 1, 25 + 1, 24]  # one more of each in the legend
    assert len(re.findall("<polyline", first)) == 4  # trained and converted, on either text
    assert len(re.findall('<div class="answers"', shown)) == 2 * 4
    said = [re.findall("<h3>(.*?)</h3>", row) for row in shown.split('<div class="answers"')[1:]]
    assert all([name.split(", ")[1] for name in row[:3]] == ["teacher", "converted", "trained"] for row in said)
    table = re.search(r'<table class="sides">(.*?)</table>', shown)[1]
    assert re.findall("<th [^>]*>(.*?)</th>", table)[:4] == ["converted", "trained", "teacher", "full KL"]


@browser
@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_runs_make_a_page_too(outputs, count):
    outputs.mkdir()
    if count:
        synthetic.fill(outputs, count, sized=True)
    shown = body(dom(page.write(outputs)))
    assert shown.count('<td class="pick">') == count
    assert ("No complete run with the size of its file has been evaluated yet." in shown) == (count == 0)


def test_runs_of_one_teacher_and_text_are_told_from_others(outputs):
    synthetic.fill(outputs, 12)
    for number, path in enumerate(sorted(outputs.rglob("result.json"))):
        ground = {"teacher": {"name": "tiny", "fingerprint": "f"}, "text": f"{number % 2}abcdef", "called": "L64"}
        given = {"measured_on": ground} if number < 6 else {}
        stage = {"stage": "evaluate"} if number == 0 else {}
        path.write_text(json.dumps(json.loads(path.read_text()) | given | stage))
    runs = page.data(outputs)["runs"]
    assert [run["trains"] for run in runs] == [run["stage"] != "evaluate" for run in runs] and runs[0]["name"] == ""
    assert len({run["ground"] for run in runs}) == 3
    told = [name for name in {run["ground"] for run in runs} if name in ("tiny, L64 (0abcde)", "tiny, L64 (1abcde)")]
    assert len(told) == 2
    assert "run.trains &&" in page.render(outputs)


def test_page_asks_for_nothing(outputs):
    synthetic.fill(outputs, 3)
    text = page.write(outputs).read_text()
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)|@import|url\(|\bfetch\(|XMLHttpRequest|import\(""", text)
    assert "default-src 'none'" in text
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}


def test_page_is_the_same_whenever_it_is_made(outputs):
    synthetic.fill(outputs, 20)
    assert page.write(outputs).read_bytes() == page.write(outputs).read_bytes()


def test_data_cannot_end_its_script():
    text = page.embedded({"a": EVIL, "b": "\ud800"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text)["a"] == seen(EVIL)


def test_curves_are_thinned_and_keep_their_ends(tmp_path):
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 5001)]
    curve = page._curve(rows, "loss")
    assert len(curve) == page.POINTS and curve[0] == [1, 1.0] and curve[-1] == [5000, 0.0002]


def test_settings_of_runs_are_said_once(outputs):
    synthetic.fill(outputs, 50)
    made = page.data(outputs)
    for run, shown in zip(records.runs(outputs), made["runs"], strict=True):
        whole = made["common"] | shown["settings"]
        assert {key: value for key, value in whole.items() if key not in shown["unset"]} == page._flat(
            run.section("config")
        )
    assert all("cache.name" not in shown["settings"] for shown in made["runs"])


def test_errors_by_depth_are_those_of_the_manifest(outputs):
    synthetic.fill(outputs, 20)
    for name, leaves in page.data(outputs)["conversions"].items():
        figures = json.loads((outputs / "artifacts" / "checkpoints" / name / "manifest.json").read_text())["figures"]
        assert {len(errors) for errors in leaves.values()} == {30}
        assert leaves["q_proj"][7] == pytest.approx(figures["model.layers.7.q_proj"]["output_error"], rel=1e-4)
