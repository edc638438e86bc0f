"""Cluster profiles: strict, with every mistake named at once."""

from pathlib import Path

import pytest

from launcher.cluster import load_profile
from llmtrain.errors import ConfigError

ROOT = Path(__file__).parents[2]


def problems(tmp_path: Path, text: str) -> list[str]:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_profile(file)
    return [problem.replace(str(file), "c.yaml") for problem in caught.value.problems]


def test_the_smallest_profile_is_named_by_its_file(tmp_path: Path):
    (tmp_path / "juno.yaml").write_text("gpus_per_node: 4\n")
    profile = load_profile(tmp_path / "juno.yaml")
    assert (profile.name, profile.gpus_per_node, profile.requeue) == ("juno", 4, True)
    assert profile.time_s == 86_400
    (tmp_path / "juno.yaml").write_text("gpus_per_node: 4\nname: pluto\n")
    assert load_profile(tmp_path / "juno.yaml").name == "pluto"


def test_the_example_loads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("USER", "ada")
    profile = load_profile(ROOT / "configs/clusters/example.yaml")
    assert profile.name == "example"
    assert profile.environment == {"OMP_NUM_THREADS": "8"}
    assert profile.shared_folders() == [Path("/scratch/ada"), Path.home()]
    assert profile.service.partition == "cpu"


def test_paths_are_filled_in_where_the_job_is_submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("USER", "ada")
    (tmp_path / "c.yaml").write_text(
        "gpus_per_node: 1\nvenv: ~/venv\ncontainer: docker://nvcr.io/pytorch\ncontainer_mounts: [/s/$USER:/s]\n"
    )
    profile = load_profile(tmp_path / "c.yaml")
    assert profile.venv == f"{Path.home()}/venv"
    assert (profile.container, profile.container_mounts) == ("docker://nvcr.io/pytorch", ["/s/ada:/s"])


def test_numbers_may_stand_where_sbatch_takes_text(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(
        "gpus_per_node: 0\nmem: 0\ntime: 90\nextra: {nice: 100, overcommit: ''}\n"
        "environment: {TOKENIZERS_PARALLELISM: 'false', HF_TOKEN_PATH: /home/ada/token}\n"
    )
    profile = load_profile(tmp_path / "c.yaml")
    assert (profile.mem, profile.time_s, profile.extra) == ("0", 5400, {"nice": "100", "overcommit": ""})


def test_all_mistakes_are_reported_at_once_with_their_lines(tmp_path: Path):
    text = "partitoin: gpu\ngpus_per_node: four\ntime: tomorrow\nshard:\n  cpu: 3\nextra:\n  partition: x\n  nodes: 3\n"
    assert problems(tmp_path, text) == [
        "time (c.yaml:3): 'tomorrow' is not a time such as 90, 24:00:00 or 2-12:00:00",
        'gpus_per_node="four" (c.yaml:2): must be a whole number, not a text',
        "extra.partition (c.yaml:7): has a key of its own in a profile: partition",
        "extra.nodes (c.yaml:8): is decided by 'llmtrain submit'; leave it out",
        "shard.cpu=3 (c.yaml:5): unknown key; did you mean shard.cpus?",
        'partitoin="gpu" (c.yaml:1): unknown key; did you mean partition?',
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("partition: gpu\n", "gpus_per_node (default): missing; it has no default"),
        ("gpus_per_node: 1\ngrace: 3\n", "grace=3 (c.yaml:2): unknown key; the keys are: name, partition, account"),
        ("gpus_per_node: 1\nshared: [runs]\n", "shared (c.yaml:2): 'runs' must start at the root"),
        ("gpus_per_node: 1\ncontainer_mounts: [/a:/a]\n", "container_mounts needs a container"),
        ("gpus_per_node: 0\ncpus_per_gpu: 4\n", "cpus_per_gpu needs GPUs"),
        ("gpus_per_node: 1\ntime: 1\n", "signal_s=120 must be shorter than the time limit (1)"),
        ('gpus_per_node: 1\npartition: "a b"\n', 'partition="a b" (c.yaml:2): must be one word, without blanks'),
        ('gpus_per_node: 1\nsetup: ["a\\nb"]\n', "setup.0"),
        ("gpus_per_node: 1\nmem: lots\n", 'mem="lots" (c.yaml:2)'),
        ("gpus_per_node: 1\nextra: {--nice: 3}\n", "extra.--nice (c.yaml:2): is no option of sbatch"),
        ("gpus_per_node: 1\nextra: {chdir: /tmp}\n", "extra.chdir (c.yaml:2): is decided by 'llmtrain submit'"),
        ("gpus_per_node: 1\nextra: {wait: ''}\n", "extra.wait (c.yaml:2): is decided by 'llmtrain submit'"),
    ],
)
def test_bad_profiles(tmp_path: Path, text: str, expected: str):
    assert any(expected in problem for problem in problems(tmp_path, text)), problems(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "environment:\n  HF_TOKEN: x\n",
        "environment:\n  wandb_api_key: x\n",
        "environment:\n  DB_PASSWORD: x\n",
        "environment:\n  WHATEVER: SECRET\n",
        "setup:\n  - export A=SECRET\n",
        "extra:\n  comment: SECRET\n",
    ],
)
def test_secrets_are_refused_by_line_and_not_repeated(tmp_path: Path, text: str):
    secret = "hf_" + "a1B2" * 8
    (found,) = problems(tmp_path, "gpus_per_node: 1\n" + text.replace("SECRET", secret))
    assert "c.yaml:3" in found
    assert "hf auth login" in found
    assert secret not in found


def test_a_missing_profile_names_those_that_are_there():
    with pytest.raises(ConfigError, match=r"there are: .*example\.yaml"):
        load_profile(ROOT / "configs/clusters/nowhere.yaml")
