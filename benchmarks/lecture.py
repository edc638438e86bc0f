"""The lecture's whole run by the clock, evaluations and samples included: `python -m benchmarks.lecture [ROUNDS]`.

162 M parameters, 10 epochs of 9 steps on "The Verdict", a held-out loss every 5 steps, a sample of 50 tokens after each
epoch. The lecture's is its own `train_model_simple`, without what comes before it (its text is encoded beforehand).
Ours is `python -m llmtrain configs/verdict.yaml` from the process's start, sharding included; once as that file has it,
with a checkpoint of 1.95 GB after every epoch that the service scores, and once with what the lecture does alone: no
checkpoint but that at the end. It evaluates twice more than the lecture, after steps 0 and 1.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks import machine
from benchmarks.peers import ROOT, python_of
from benchmarks.words import with_range
from llmtrain.config import load_config

CONFIG = ROOT / "configs/verdict.yaml"
_ALONE = ["checkpoint.every_epochs=null", "service.start=never"]
OURS = {
    "llmtrain, as configs/verdict.yaml": [],
    "llmtrain, one save at the end": _ALONE,
    "llmtrain, one save at the end, fp32": [*_ALONE, "train.precision=fp32"],
}
LECTURE = "lecture (`train_model_simple`, fp32)"


@dataclass(frozen=True)
class Result:
    seconds: float
    lowest: float
    """Held-out loss."""
    training_loss: float
    """At the end, by the run's own evaluation."""


def timed(command: list[str], folder: Path) -> tuple[float, str]:
    """Run one process to its end; its seconds and its output."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)[:200]}\n{done.stderr[-3000:]}")
    (folder / "output").write_text(done.stdout)
    return time.perf_counter() - began, done.stdout


def run_ours(folder: Path, settings: list[str], number: int) -> Result:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    name = f"run-{number}"
    places = [f"run.dir={folder}/runs", f"run.name={name}", f"data.dir={folder}/shards-{number}", "train.device=cpu"]
    command = [sys.executable, "-m", "llmtrain", str(CONFIG), *places, *settings]
    seconds, _ = timed(command, folder)
    events = EventAccumulator(str(folder / "runs" / name / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    heldout = [event.value for event in events.Scalars("heldout/loss")]
    return Result(seconds, min(heldout), events.Scalars("heldout/train_loss")[-1].value)


def run_lecture(python: str, job: Path) -> Result:
    """Its lines `Ep 1 (Step 000005): Train loss 8.123, Val loss 8.456`."""
    seconds, output = timed([python, str(ROOT / "benchmarks/worker_lecture.py"), str(job)], job.parent)
    found = re.findall(r"Train loss ([\d.]+), Val loss ([\d.]+)", output)
    return Result(seconds, min(float(loss) for _, loss in found), float(found[-1][0]))


def write_job(path: Path) -> Path:
    """What the lecture's run needs: shape, text and prompt as ids, and the text of each id."""
    config, _ = load_config(CONFIG, [])
    source, model = config.data.sources[0], config.model
    text = "".join((ROOT / name).read_text() for name in source.paths)
    tokenizer = Tokenizer.from_file(str(ROOT / config.data.tokenizer.path / "tokenizer.json"))
    cut = int(len(text) * (1 - config.data.split.heldout))
    prompt = config.evaluate.sample.prompt
    job = {
        "model": {
            "vocab_size": tokenizer.get_vocab_size(), "context_length": model.context, "emb_dim": model.width,
            "n_heads": model.num_heads, "n_layers": model.num_layers, "drop_rate": model.dropout, "qkv_bias": False,
        },
        "epochs": int(config.train.epochs or 0),
        "train": tokenizer.encode(text[:cut]).ids,
        "heldout": tokenizer.encode(text[cut:]).ids,
        "prompt_text": prompt,
        "prompt": tokenizer.encode(prompt).ids,
        "pieces": [tokenizer.decode([i]) for i in range(tokenizer.get_vocab_size())],
    }  # fmt: skip
    path.write_text(json.dumps(job))
    return path


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    python = python_of("lecture")
    if python is None:
        raise SystemExit("the lecture's package could not be installed: nothing to compare with")
    limits = machine.with_limits()
    found: dict[str, list[Result]] = {name: [] for name in (*OURS, LECTURE)}
    references = [machine.reference_s()]
    with tempfile.TemporaryDirectory(dir=os.environ.get("SCRATCH")) as scratch:
        folder = Path(scratch)
        job = write_job(folder / "job.json")
        for number in range(rounds):
            for place, (name, settings) in enumerate(OURS.items()):
                found[name].append(run_ours(folder, settings, len(OURS) * number + place))
                print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
            found[LECTURE].append(run_lecture(python, job))
            print(f"{LECTURE}: {found[LECTURE][-1]}", file=sys.stderr, flush=True)
            references.append(machine.reference_s())
    moved = machine.drift(references)
    print(f"{limits}; {rounds} rounds, reference product steady within {moved:.0%}\n")
    if moved > machine.MOST_DRIFT:
        print("Not reported: that is too much for a comparison. Something else was running; the figures are above.")
    else:
        print(table(found))


def table(found: dict[str, list[Result]]) -> str:
    """Medians; ratios are the medians of the rounds' own ratios."""
    lines = [
        "| the whole lecture run | seconds (range) | the lecture's / it | lowest held-out loss | training loss |",
        "|---|---|---|---|---|",
    ]
    for name, results in found.items():
        ratios = [lecture.seconds / result.seconds for lecture, result in zip(found[LECTURE], results, strict=True)]
        lines.append(
            f"| {name} | {with_range([result.seconds for result in results])} | {statistics.median(ratios):.2f} | "
            f"{statistics.median(result.lowest for result in results):.3f} | "
            f"{statistics.median(result.training_loss for result in results):.3f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
