"""Pages about runs: what they say, that nothing from outside acts in them, and which runs may be compared."""

import base64
import fcntl
import hashlib
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from rich.console import Console

from launcher.jobs import JobDir
from launcher.report import compare_page, figures, markup, plots, sections
from launcher.report.compare import compare_runs, labels
from launcher.report.compare_page import compare
from launcher.report.facts import Series, read_facts
from launcher.report.markup import Html, element, visible
from launcher.report.page import write_report
from launcher.report.speed import read_speed
from launcher.watching.queue_view import read_queue
from llmtrain import jsonl, ledger
from llmtrain.errors import RunFolderError
from llmtrain.ledger import Event, HubState, Status
from llmtrain.rundir import RunDir
from llmtrain.tensorboard import TensorBoard
from tests.support import checkpoint_runs

HOSTILE = "</script></pre><img src=x onerror=alert(1)>\"'`&amp;\x00\x1b[31m\u202egnorw\u2066<script>alert(2)</script>"
TAGS = """html head meta title style body main header footer section article nav fieldset legend input label div span p
    a b bdi code pre h1 h2 h3 ul ol li time details summary table thead tbody tr th td
    svg g path use text defs clippath rect"""
ATTRIBUTES = """lang charset http-equiv content name class id href rel type checked for tabindex role aria-label dir
    viewbox preserveaspectratio d x y width height points transform fill stroke clip-path stroke-width stroke-dasharray
    stroke-linecap opacity fill-opacity stroke-opacity font-size font-weight text-anchor"""


class Page(HTMLParser):
    """A page taken apart as a browser does it."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.source = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def check_inert(self) -> None:
        """Raises AssertionError for anything that a page of ours does not have."""
        for tag, attributes in self.tags:
            assert tag in TAGS.split(), tag
            assert set(attributes) <= set(ATTRIBUTES.split()), (tag, attributes)
            target = attributes.get("href") or "#"
            assert target.startswith(("#", "https://huggingface.co/")), target
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", self.source)


@pytest.fixture(autouse=True)
def _figures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time: only those tests draw that look at figures."""
    if "drawn" not in request.fixturenames:
        for module in (sections, compare_page):
            monkeypatch.setattr(module, "picture", lambda name, *_, **__: plots.Picture(name, Html(), b""))


@pytest.fixture
def drawn() -> None:
    """For tests that want real figures."""


def page_of(run: RunDir) -> Page:
    page = Page(write_report(run).read_text(encoding="utf-8"))
    page.check_inert()
    return page


def make_run(
    folder: Path, *settings: str, steps: int = 400, shifts: tuple[float, ...] = (0.4, 0.0, 0.001, 0.3)
) -> RunDir:
    """A run with a scored checkpoint at every 100th step; the second one is the best, the third one's equal."""
    run = checkpoint_runs.make_run(folder, f"train.steps={steps}", *settings)
    checkpoint_runs.train(run, steps)
    jsonl.append(run.heldout, [{"step": 0, "epoch": 0.0, "loss": 9.5, "train_loss": 9.5, "bits_per_byte": 3.8}])
    for number, shift in enumerate(shifts, start=1):
        checkpoint_runs.save(run, 100 * number, loss=3.0 + shift)
        checkpoint_runs.score(run, 100 * number, checkpoint_runs.stretches(shift, noise=0.02, seed=number))
    return run


def test_text_is_escaped_unless_this_package_made_it():
    made = element(
        "p", "<b>", Html("<i></i>"), None, ["&", element("b", "x")], title='"><script>', hidden=True, id=None
    )
    assert made == '<p title="&quot;&gt;&lt;script&gt;" hidden>&lt;b&gt;<i></i>&amp;<b>x</b></p>'
    assert element("input", checked=False, class_="a", aria_label="b") == '<input class="a" aria-label="b">'


def test_characters_that_act_are_shown_as_signs():
    assert visible("a\x00\x1b\u202eb\ud800\n\tc") == "a\u2400\u241b\u27e8U+202E\u27e9b\ufffd\n\tc"


def test_hostile_text_stays_text(tmp_path: Path):
    name = HOSTILE.replace("/", "").replace("\x00", "")
    run = make_run(tmp_path / name, f"evaluate.sample.prompt={json.dumps(HOSTILE)}", "hub.repo=ada/gpt")
    samples = [{"step": step, "prompt": HOSTILE, "text": HOSTILE + "\ud800"} for step in (100, 200)]
    with run.samples.open("w") as file:
        file.write("".join(json.dumps(sample) + "\n" for sample in samples))
    ledger.append(run.events, Event(kind="started", message=HOSTILE, step=0))
    ledger.append(run.service_events, Event(kind="upload-failed", message=HOSTILE, step=100))
    ledger.write(run.service_status, Status(pid=1, host="here", problem=HOSTILE))
    ledger.write(run.hub_state, HubState(state="refused", message="No " + HOSTILE, repo="ada/gpt"))
    page = page_of(run)
    assert not [tag for tag, _ in page.tags if tag in ("script", "img", "iframe", "object", "link", "base", "form")]
    assert page.text.count("onerror=alert(1)") >= 8  # name, samples and prompts, events, problems, configuration


@pytest.mark.usefixtures("drawn")
def test_hostile_names_stay_text_in_figures_and_on_the_terminal(tmp_path: Path):
    run = make_run(tmp_path / HOSTILE.replace("/", "").replace("\x00", ""))
    other = make_run(tmp_path / "$a^{b}$")
    out = io.StringIO()
    compared = compare([run.path, other.path], tmp_path / "c.html", Console(file=out, width=300))
    found = Page(compared.read_text(encoding="utf-8"))
    found.check_inert()
    assert "onerror=alert(1)" in found.text
    assert found.source.count("$a^{b}$</text>") >= 7  # names are not formulas: six legends, an interval
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", out.getvalue())


def test_the_policy_allows_the_one_style_sheet_and_nothing_else(tmp_path: Path):
    page = page_of(make_run(tmp_path / "run"))
    style = page.source.split("<style>")[1].split("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.usefixtures("drawn")
def test_figures_follow_the_theme_and_do_not_clash(tmp_path: Path):
    run = make_run(tmp_path / "run")
    page = page_of(run)
    body = page.source.split("</style>")[1]
    assert not re.search(r"#[0-9a-fA-F]{6}\b|style=", body)
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    used = re.findall(r'(?:href="|url\()#([^")]+)', body)
    assert set(used) <= set(ids)
    shown = [a["class"] for tag, a in page.tags if tag == "div" and "by-" in (a.get("class") or "")]
    for variant in ("wide by-steps", "narrow by-epochs", "wide by-tokens"):
        assert shown.count(variant) == 2  # losses and gap; TensorBoard was off, and no learning rate noted
    pictures = {path.name for path in run.report.parent.glob("*.png")}
    assert pictures == {"losses.png", "intervals.png", "gap.png"}
    assert all((run.report.parent / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_the_headline_answers_the_morning(tmp_path: Path):
    run = make_run(tmp_path / "run", "hub.repo=ada/gpt")
    for step in (100, 200, 300, 400):
        checkpoint_runs.upload(run, step)
    ledger.append(run.events, Event(kind="started", message="from the beginning", step=0, time=1e9))
    ledger.append(run.events, Event(kind="restarted", message="rank 1 was killed, or crashed", step=100, time=1e9 - 1))
    for at in range(3):
        ledger.append(run.service_events, Event(kind="upload-failed", message=f"try {at}", step=200, time=1e9 + at))
    ledger.append(run.service_events, Event(kind="quarantined", message="bad", step=300, time=1e9 + 9))
    text = page_of(run).text
    for said in (
        "Yes, 400 steps", "9.5000 \u2192 3.3000", "Use this checkpoint Step 200", "Began after step 200",
        "4 checkpoints confirmed", "Problems None", f"llmtrain generate {run.checkpoint(200)}",
        "revision='step-00000200'", "3 times until", "step 200:", "try 2", "Quarantined", "step 300:",
        "1 restart", "Started again", "step 100: rank 1 was killed, or crashed",
    ):  # fmt: skip
        assert said.replace(" ", "") in text.replace(" ", ""), said
    assert "try 1" not in text


@pytest.mark.parametrize(("with_steps", "said"), [(True, "Starting, at step 400"), (False, "Starting, at step 0")])
def test_a_run_that_is_being_started_is_not_called_stopped(tmp_path: Path, with_steps: bool, said: str):
    run = make_run(tmp_path / "run", "train.steps=900")
    if not with_steps:
        run.metrics.unlink()
    jobs = JobDir.of(run)
    jobs.local.mkdir(parents=True)
    with jobs.local_lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        text = page_of(run).text
    assert said in text
    assert "Nothing is training here" not in text


def test_ties_and_where_each_lies_stand_in_the_ranking(tmp_path: Path):
    run = make_run(tmp_path / "run", "hub.repo=ada/gpt", shifts=(0.0, 0.0, 0.2, 0.3))
    checkpoint_runs.upload(run, 300, removed=True)
    ranked = read_facts(run, read_queue([run])).ranking
    assert ranked is not None
    rows = [row.split("<td") for row in page_of(run).source.split("<tr")[2:6]]
    cells = [[Page("<td" + cell).text for cell in row[1:]] for row in rows]
    assert {cells[0][1], cells[1][1]} == {"100", "200"}
    marks = {row[1]: row[2] for row in cells}
    assert marks["100"].startswith("proposed")
    assert sorted((marks["100"].removeprefix("proposed"), marks["200"])) == ["best", "tie"]
    assert cells[2][1] == "300"
    assert cells[2][-2].startswith("+0.19")
    assert cells[2][-1] == "disk"
    assert float(cells[2][8]) == pytest.approx(0.3, abs=0.01)  # the gap


@pytest.mark.parametrize(("shifts", "told"), [((0.0, 0.0, 5.0, 6.0), True), ((0.0, 0.2), False)])
def test_what_the_figure_of_intervals_leaves_out_is_said(tmp_path: Path, shifts: tuple[float, ...], told: bool):
    text = page_of(make_run(tmp_path / "run", shifts=shifts)).text
    assert ("2 checkpoints further off: in the table alone." in text) is told
    assert ("further off" in text) is told


def test_a_run_without_a_service_says_what_is_missing(tmp_path: Path):
    run = checkpoint_runs.make_run(tmp_path / "run", "train.steps=300", "service.start=never")
    checkpoint_runs.train(run, 300)
    for step, loss in ((100, 4.0), (200, 3.0), (300, 3.5)):
        checkpoint_runs.save(run, step, loss)
    text = page_of(run).text
    assert "Step 200" in text
    assert "No checkpoint has been scored from its files." in text
    assert "Nothing was scored from disk, so there are no intervals" in text
    assert "Perhaps since step 200" in text
    assert "Began after" not in text
    assert "Problems None" in text.replace("ProblemsNone", "Problems None")


@pytest.mark.parametrize("steps", [0, 40])
def test_a_run_at_its_start_has_a_page(tmp_path: Path, steps: int):
    run = checkpoint_runs.make_run(tmp_path / "run", "train.steps=300")
    if steps:
        checkpoint_runs.train(run, steps)
    text = page_of(run).text
    assert "No evaluation yet" in text
    assert "Nothing to rank yet" in text
    assert ("Stopped at step 40 of 300" if steps else "Not a step yet") in text


def test_a_run_that_diverged_says_where(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=500)
    with run.metrics.open("a") as file:
        file.write(
            '{"step": 401, "epoch": 13.0, "loss": NaN, "grad_norm": Infinity, "lr": 1, "targets": 9, "samples": 9}\n'
        )
    assert "Step 401 came to a loss or gradient norm that is no finite number" in page_of(run).text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    make_run(tmp_path / "runs" / "a")
    with pytest.raises(RunFolderError, match="runs/a"):
        write_report(RunDir(tmp_path / "runs"))


@pytest.mark.usefixtures("drawn")
def test_a_long_run_stays_a_small_page(tmp_path: Path):
    run = checkpoint_runs.make_run(tmp_path / "run", "train.steps=30000")
    checkpoint_runs.train(run, 30_000, every=1)
    record = {"loss": 3.0, "train_loss": 3.0}
    jsonl.append(run.heldout, [{"step": s, "epoch": s / 31, **record} for s in range(0, 30_000, 10)])
    jsonl.append(run.samples, [{"step": s, "prompt": "", "text": "word " * 9000} for s in range(0, 30_000, 100)])
    run.service.mkdir()
    for number in range(3000):
        jsonl.append(run.service_events, [{"kind": "stalled", "message": "m", "step": number, "time": number}])
    assert write_report(run).stat().st_size < 1_000_000


def test_thinning_keeps_means_and_extremes():
    steps = np.arange(1.0, 100_001.0)
    values = np.sin(steps / 7000)
    values[[123, 77_777]] = (50.0, -50.0)
    thinned = plots.thin(Series(steps, values))
    assert len(thinned.steps) == plots.MOST_POINTS
    assert (thinned.high.max(), thinned.low.min()) == (50.0, -50.0)
    assert np.abs(np.interp(30_000, thinned.steps, thinned.mean) - np.sin(30_000 / 7000)) < 0.01
    assert plots.thin(Series(steps[:900], values[:900])).is_whole


def test_a_steep_start_is_cut_off_and_nothing_else():
    steps = np.arange(0.0, 1000.0)
    falling = Series(steps, 3 + 8 * np.exp(-steps / 20))
    limits = figures.crop([falling])
    assert limits is not None
    assert limits[0] < 3 < limits[1] < 4
    assert figures.crop([Series(steps, 5 - steps / 1000)]) is None
    assert figures.crop([]) is None


def test_speed_is_read_over_all_starts(tmp_path: Path):
    run = RunDir(tmp_path)
    for first, rate in ((0, 10.0), (3, 20.0)):  # the second start computes steps 3 and 4 again
        board = TensorBoard(run.tensorboard, first_step=first)
        for step in range(first or 1, 5 if not first else 4):
            board.scalars(step, {"train/loss": 1.0})
            board.scalars(step, {"speed/tokens_per_s": rate, "speed/step_ms": 1.0}, wall_time=float(step))
        board.scalars(4 if not first else 3, {"speed/save_wait_s": 0.5})
        board.close()
        for number, path in enumerate(sorted(run.tensorboard.glob("events.*"))):  # in the order of their names
            path.rename(path.with_name(f"events.out.tfevents.{number}"))
    speed = read_speed(run)
    assert speed.tokens_per_s == {1: 10.0, 2: 10.0, 3: 20.0}
    assert speed.save_wait_s == {3: 0.5}


def test_runs_are_ranked_with_intervals_between_them(tmp_path: Path):
    runs = [
        make_run(tmp_path / "a", "optim.lr=1e-3", shifts=(0.5, 0.1)),
        make_run(tmp_path / "b", "optim.lr=2e-3", shifts=(0.6, 0.0)),
        make_run(tmp_path / "c", "optim.lr=3e-3", shifts=(0.0005, 0.7)),
    ]
    found = compare_runs(runs)
    assert [c.label for c in found.contenders] in (["b", "c", "a"], ["c", "b", "a"])
    assert found.measure == "loss"
    assert not found.doubts
    assert found.is_tie(1)
    assert found.differences[2] == pytest.approx((0.1, 0.1), abs=0.01)
    assert list(found.settings) == ["optim.lr"]
    assert sorted(found.settings["optim.lr"]) == ["0.001", "0.002", "0.003"]


def test_other_data_are_said_loudly_and_bits_per_byte_are_compared(tmp_path: Path):
    a = make_run(tmp_path / "a", "data.tokenizer.vocab_size=700", shifts=(0.0,), steps=100)
    b = make_run(tmp_path / "b", shifts=(0.5,), steps=100)
    shutil.rmtree(a.checkpoint(100))  # with its fingerprint: the configuration has to tell
    records = jsonl.read(b.scores)
    b.scores.write_text("")
    jsonl.append(b.scores, [{**records[0], "bits_per_byte": 0.5, "targets": 77}])
    out = io.StringIO()
    page = compare([a.path, b.path], None, Console(file=out, width=160))
    assert page == tmp_path / "compare.html"
    assert "NOT COMPARABLE" in out.getvalue()
    assert "learned tokens" in out.getvalue()
    assert "bits per byte" in out.getvalue()
    found = compare_runs([a, b])
    assert found.measure == "bits_per_byte"
    assert [c.label for c in found.contenders] == ["b", "a"]
    assert found.differences == [None, None]
    text = Page(page.read_text(encoding="utf-8")).text
    assert "Losses are not comparable between these runs" in text
    assert "data.tokenizer differs" in text
    assert "data.tokenizer.vocab_size" in text


def test_a_run_without_a_loss_is_ranked_last(tmp_path: Path):
    new = checkpoint_runs.make_run(tmp_path / "new", "train.steps=400")
    found = compare_runs([new, make_run(tmp_path / "old")])
    assert [c.label for c in found.contenders] == ["old", "new"]
    out = io.StringIO()
    text = Page(compare([tmp_path], None, Console(file=out, width=160)).read_text(encoding="utf-8")).text
    assert "not started" in text
    assert "No setting differs" in out.getvalue()


def test_one_run_is_no_comparison(tmp_path: Path):
    make_run(tmp_path / "only")
    with pytest.raises(RunFolderError, match="two runs or more"):
        compare([tmp_path], None, Console(file=io.StringIO()))


def test_labels_tell_runs_apart():
    assert labels([RunDir(Path("x/a")), RunDir(Path("y/b"))]) == ["a", "b"]
    assert labels([RunDir(Path("x/a")), RunDir(Path("y/a"))]) == ["x/a", "y/a"]


def test_markup_is_never_built_from_plain_strings():
    """`Html(...)` around text that is not constant belongs into the modules that escape."""
    sources = sorted(Path(markup.__file__).parent.glob("*.py"))
    allowed = {"markup.py", "plots.py", "theme.py", "page.py"}
    users = {path.name for path in sources if re.search(r"\bHtml\((?!\))", path.read_text())}
    assert users <= allowed


def test_the_curves_on_training_rows_do_not_leave_the_picture(tmp_path: Path):
    """Where the steep start is cut off."""
    runs = [make_run(tmp_path / name, shifts=(0.4, 0.0, 0.1, 0.2)) for name in "ab"]
    figure = Figure()
    compare_page.draw_curves(compare_runs(runs), figure, "steps", narrow=False)
    low, high = figure.axes[0].get_ylim()
    assert high < 9.5
    assert low < min(record["train_loss"] for record in jsonl.read(runs[0].heldout))
