"""`llmtrain report` and `llmtrain compare` on a run that was really trained, looked at with a real browser."""

import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmtrain.errors import RunFolderError
from tests.support.runs import Workplace, environment

HOSTILE = (
    "</pre></script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
    "<svg onload=\"document.title='owned'\"><input id=axis-owned type=radio>"
)
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Seen(HTMLParser):
    """What a browser has made of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.title = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1] == "title" and not self.title:
            self.title = data


def launcher(folder: Path, *words: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *words],
        cwd=folder, env={**environment(), "COLUMNS": "140"}, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def browse(page: Path, profile: Path, *options: str) -> subprocess.CompletedProcess[bytes]:
    """Open a page in a browser of its own, which may not reach any network."""
    assert BROWSER is not None
    quiet = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND"]  # fmt: skip
    return subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", *quiet, f"--user-data-dir={profile}", *options, page.as_uri()],
        capture_output=True,
        check=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def trained(workplace: Workplace) -> Workplace:
    """A run of a few steps, and its twin with another learning rate and higher losses."""
    settings = ["run.dir=runs/reported", "train.steps=12", "evaluate.every_steps=2", "service.start=never"]
    workplace.train("run.name=fast", *settings)
    twin = workplace.folder / "runs/reported/slow"
    shutil.copytree(workplace.folder / "runs/reported/fast", twin)
    config, heldout = twin / "config.yaml", twin / "heldout.jsonl"
    config.write_text(config.read_text().replace("lr: 0.003", "lr: 0.0001"))
    records = [json.loads(line) for line in heldout.read_text().splitlines()]
    heldout.write_text("".join(json.dumps({**r, "loss": r["loss"] + 0.1}) + "\n" for r in records))
    return workplace


def test_a_report_of_a_real_run(trained: Workplace):
    said = launcher(trained.folder, "report", "runs/reported/fast")
    assert said.strip() == "runs/reported/fast/report/index.html"
    folder = trained.folder / "runs/reported/fast/report"
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "Yes, 12 steps" in page
    assert "tokens a second (median)" in page
    assert str(trained.folder) not in page  # paths as they were given
    assert {p.name for p in folder.glob("*.png")} >= {"losses.png", "gap.png", "schedule.png", "speed.png"}
    assert "runs/reported/fast" in launcher(trained.folder, "report", "runs/reported", code=RunFolderError.exit_code)


def test_a_comparison_of_real_runs(trained: Workplace):
    said = launcher(trained.folder, "compare", "runs/reported", "--output", "pages/both.html")
    rows = [line.split() for line in said.splitlines() if line[:1].isdigit()]
    assert [row[:2] for row in rows] == [["1", "fast"], ["2", "slow"]]
    assert "0.0001" in said
    assert "not comparable" not in said.lower()
    assert "2 runs compared" in (trained.folder / "pages/both.html").read_text()
    launcher(trained.folder, "compare", "runs/reported/fast", code=RunFolderError.exit_code)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed here")
def test_nothing_acts_in_a_browser_and_the_axis_can_be_switched(trained: Workplace, tmp_path: Path):
    run = tmp_path / "runs" / "hostile"
    shutil.copytree(trained.folder / "runs/reported/fast", run)
    with (run / "samples.jsonl").open("a") as file:
        file.write(json.dumps({"step": 12, "prompt": HOSTILE, "text": HOSTILE}) + "\n")
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "resumed", "message": HOSTILE, "step": 12, "time": 2e9}) + "\n")
    assert not launcher(tmp_path, "report", str(run), "--quiet")
    page = run / "report" / "index.html"

    shown = browse(page, tmp_path / "profile", "--dump-dom", "--enable-logging=stderr")
    seen = Seen(shown.stdout.decode())
    assert seen.title == "hostile: finished"
    assert not {"script", "img", "iframe"} & set(seen.tags)
    assert [found for found in seen.ids if found.startswith("axis-")] == ["axis-steps", "axis-epochs", "axis-tokens"]
    assert b"owned" in shown.stdout  # it stands there, as text
    assert b"Security Policy" not in shown.stderr, shown.stderr.decode()[-2000:]  # it forbids nothing of our own

    pictures: list[bytes] = []
    for axis in ("steps", "tokens"):  # without a script, as style alone
        chosen = tmp_path / f"{axis}.html"
        text = page.read_text(encoding="utf-8").replace('id="axis-steps" checked', 'id="axis-steps"')
        chosen.write_text(text.replace(f'id="axis-{axis}"', f'id="axis-{axis}" checked'), encoding="utf-8")
        shot = tmp_path / f"{axis}.png"
        browse(chosen, tmp_path / "profile", f"--screenshot={shot}", "--window-size=1200,2400")
        pictures.append(shot.read_bytes())
    assert pictures[0] != pictures[1]
