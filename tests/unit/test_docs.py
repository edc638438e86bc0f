"""What the documents say is true."""

import re
from pathlib import Path

import pytest

from llmtrain import errors
from llmtrain.config.schema import RunConfig

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(document: Path):
    for target in re.findall(r"(?:\]\(|src=\")(?!http)([^)#\"]+)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_every_setting_says_what_it_means():
    for section, described in RunConfig.model_json_schema()["$defs"].items():
        for name, setting in described["properties"].items():
            is_section = "$ref" in setting or "discriminator" in setting.get("items", setting)
            assert name == "kind" or is_section or setting.get("description"), f"{section}.{name}"


def test_every_exit_code_is_documented():
    documented = {int(code) for code in re.findall(r"^\| (\d+) \|", (ROOT / "docs/exit-codes.md").read_text(), re.M)}
    others = {0, 1, 3, errors.EXIT_REQUEUE, 130}
    assert documented == errors.FOR_A_PERSON | others


def test_after_no_error_for_a_person_a_run_is_started_again():
    kinds = [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, errors.UserError)]
    assert {kind.exit_code for kind in kinds} == errors.FOR_A_PERSON
    for kind in kinds:
        told = errors.of_another_rank("why", kind.exit_code)
        assert type(told) is kind or kind.exit_code == errors.UserError.exit_code
        assert str(told) == "why"
    assert isinstance(errors.of_another_rank("why", 1), RuntimeError)


def paths_in_tree(document: str, heading: str) -> set[str]:
    """Paths of the folders and files in the tree below a heading: one a line, indented by two blanks a level."""
    tree = (ROOT / document).read_text().split(f"{heading}\n")[1].split("```")[1]
    parents: list[str] = []
    paths: set[str] = set()
    for indent, name in re.findall(r"^( *)([\w.]+/?)  ", tree, re.M):
        parents = [*parents[: len(indent) // 2], name]
        paths.add("".join(parents))
    return paths


def test_the_tree_of_the_architecture_is_what_is_there():
    modules = {
        str(path.relative_to(ROOT))
        for package in ("llmtrain", "launcher")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    named = {path for path in paths_in_tree("docs/architecture.md", "## Files") if path.endswith(".py")}
    assert modules - named == set(), "add these to docs/architecture.md"
    assert named - modules == set(), "these are no more"


def test_the_readmes_tree_names_all_packages():
    named = paths_in_tree("README.md", "## The code on one screen")
    packages = {
        f"{path.parent.relative_to(ROOT)}/"
        for package in ("llmtrain", "launcher")
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert packages <= named, packages - named
    for path in named:
        assert (ROOT / path).exists(), path


def test_makefile_targets_that_people_are_told_of_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("train", "test", "soak", "lint", "bench", "clean"):
        assert re.search(rf"^{target}:", makefile, re.M)
