"""What `--after` means: jobs that another one waits for."""

import re

from launcher.findings import Finding, doubtful
from launcher.slurm import client
from llmtrain.errors import ConfigError, SlurmError
from llmtrain.wording import listed

_JOB = r"\d+(?:_(?:\d+|\*))?"
_NUMBERS = re.compile(rf"{_JOB}(?:[,:]{_JOB})*")
_CONDITION = rf"(?:after(?:any|burstbuffer|corr|notok|ok)?(?::{_JOB}(?:\+\d+)?)+|singleton)"
_DEPENDENCY = re.compile(rf"{_CONDITION}(?:[,?]{_CONDITION})*")


def parse(text: str) -> str:
    """As sbatch takes it: job numbers mean that each of them has to end well.

    Raises:
        ConfigError: it is neither job numbers nor a dependency.
    """
    dependency = re.sub(r"\s", "", text)
    if not dependency:
        return ""
    if _NUMBERS.fullmatch(dependency):
        return f"afterok:{dependency.replace(',', ':')}"  # with a comma SLURM would wait for any end of the second one
    if not _DEPENDENCY.fullmatch(dependency):
        raise ConfigError(
            [
                f"--after {text}: write a job's number (--after 4711), several (--after 4711,4712), or a dependency as "
                "sbatch takes it (--after afterany:4711:4712)"
            ]
        )
    return dependency


def check_known(dependency: str) -> list[Finding]:
    """Of a dependency: numbers of jobs that SLURM never had, or has forgotten."""
    numbers = list(dict.fromkeys(re.findall(r"(?<=:)\d+", dependency)))
    try:
        known = client.queue(numbers)
    except SlurmError:
        return []  # the other checks say that
    unknown = [number for number in numbers if number not in known]
    if not unknown:
        return []
    jobs = f"job {unknown[0]}" if len(unknown) == 1 else f"jobs {listed(unknown)}"
    return [doubtful("--after", f"SLURM does not know {jobs}, and does not wait for it: is the number right?")]
