"""What the documents say is true."""

import re
from pathlib import Path

import pytest

from llmtrain import errors

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path):
    for target in re.findall(r"\]\((?!http)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_every_exit_code_is_documented():
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", (ROOT / "docs/exit-codes.md").read_text(), re.M)}
    used = {kind.exit_code for kind in errors.UserError.__subclasses__()} | {0, 1, errors.EXIT_REQUEUE, 130}
    assert used <= documented, f"undocumented: {used - documented}"


def test_the_readmes_tree_names_what_is_there():
    tree = (ROOT / "README.md").read_text().split("## The code on one screen")[1]
    launcher = [path for path in (ROOT / "launcher").rglob("*.py") if path.parent.name != "report"]
    for name in [path.name for path in [*(ROOT / "llmtrain").glob("*.py"), *launcher]]:
        if not name.startswith("__init__") and name != "__main__.py":
            assert name in tree, name


def test_makefile_targets_that_people_are_told_of_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("train", "test", "soak", "lint", "bench", "clean"):
        assert re.search(rf"^{target}:", makefile, re.M)
