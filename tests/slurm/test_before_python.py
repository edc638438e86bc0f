"""What goes wrong before Python runs, or without it, is said where a run's jobs are looked for."""

from pathlib import Path

from launcher.cluster import load_profile
from launcher.slurm import client
from launcher.slurm.batch import JobSpec
from launcher.slurm.job import CommandJob
from launcher.submitting.submit import queue_jobs
from tests.support.runs import Workplace
from tests.support.slurm_cluster import Cluster
from tests.support.slurm_runs import launch, submit, wait_until, write_profile


def test_a_setup_that_fails_and_what_waited_for_it(cluster: Cluster, own_workplace: Workplace):
    workplace = own_workplace
    gate = workplace.folder / "gate"  # sbatch refuses what waits for a job that has failed already
    setup = f"until [ -e {gate} ]; do sleep 0.2; done; echo no such module; exit 7"
    profile = write_profile(workplace, setup=[setup])
    first = submit(workplace, "broken", profile=profile).job_id
    second = submit(workplace, "waiting", "--after", first).job_id
    gate.touch()
    assert cluster.wait_for(first) == "FAILED"
    assert "no such module" in launch(workplace, "logs", "runs/broken")
    said = " ".join(launch(workplace, "status", "runs/broken").split())
    assert f"mend job {first} ended: failed, exit code 7; its output: " in said
    assert f"{first}_0_log.out" in said

    assert cluster.wait_for(second) == "CANCELLED"
    assert client.queue([second])[second].reason == client.NEVER_STARTS
    said = " ".join(launch(workplace, "status", "runs/waiting").split())
    assert f"mend job {second} never starts: it was submitted to start afterok:{first}, and " in said
    assert f"job {first} ended: failed, exit code 7" in said


def test_output_of_the_script_and_of_its_first_node_share_a_file(
    cluster: Cluster, tmp_path: Path, own_workplace: Workplace
):
    """Of each task of an array, and neither takes the other's place; SLURM's own notes are there too."""
    profile = load_profile(write_profile(own_workplace, setup=["echo loaded"]))
    folder = own_workplace.folder / "jobs"
    spec = JobSpec("said", folder, profile)
    ids = queue_jobs(spec, [CommandJob(["--version"]), CommandJob(["logs", "--help"])])
    for job_id in ids:
        wait_until(lambda job_id=job_id: client.queue([job_id])[job_id].is_over)
    said = [(folder / f"{job_id}_0_log.out").read_text() for job_id in ids]
    assert all(text.startswith("loaded\n") for text in said)
    assert "llmtrain" in said[0]
    assert "--follow" in said[1]
    assert not list(Path.cwd().glob("said-*.out"))
