"""slurm/*.sbatch are what `llmtrain submit --dry-run` prints, but for the output and the line that starts Python."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOWHERE = {"PATH": "/nowhere", "PYTHONPATH": str(ROOT), "HOME": "/home/me", "USER": "me"}
SCRIPTS = dict(re.findall(r"^\| `(\S+\.sbatch)` \| `llmtrain (.+)` \|$", (ROOT / "slurm/README.md").read_text(), re.M))


def preview(words: list[str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *words],
        cwd=ROOT, env=NOWHERE, text=True, capture_output=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


def test_every_script_is_in_the_table():
    assert SCRIPTS.keys() == {path.name for path in (ROOT / "slurm").glob("*.sbatch")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_what_submit_renders(name: str):
    """Without SLURM on the machine: PATH leads nowhere."""
    script, words = (ROOT / "slurm" / name).read_text().splitlines(), shlex.split(SCRIPTS[name])
    plain = preview(words)
    assert [line.replace(sys.executable, "python") for line in plain] == script
    through_submitit = preview([word for word in words if word != "--plain"])
    assert [line for line in through_submitit[:-1] if "--output=" not in line] == [
        line for line in script[:-1] if "--output=" not in line
    ]
    [output] = [line for line in through_submitit if line.startswith("#SBATCH --output=")]
    assert "/.jobs/" in output
    assert output.endswith("/%j_0_log.out")  # the first node's: found by `llmtrain status` and `logs`
    assert through_submitit[-1].startswith("srun ")
    assert "submitit.core._submit" in through_submitit[-1]


def test_a_preview_loads_no_torch_and_leaves_nothing_behind(tmp_path: Path):
    code = (
        "import sys; sys.argv[1:] = sys.argv[2:]\n"
        "from launcher.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'datasets', 'matplotlib') if name in sys.modules])"
    )
    cluster, config = str(ROOT / "configs/clusters/example.yaml"), str(ROOT / "configs/gpt2.yaml")
    for command in (["submit", config, "--cluster", cluster, "--dry-run"], ["plan", config, "--cluster", cluster]):
        done = subprocess.run(
            [sys.executable, "-c", code, "-", *command],
            cwd=tmp_path, env=NOWHERE, text=True, capture_output=True, check=True,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1] == "[]", done.stdout
    assert list(tmp_path.iterdir()) == []
