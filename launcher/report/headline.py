"""The top of a run's page: what one wants to know in the morning, in the order in which one asks."""

import os
import re
from urllib.parse import urlsplit

from launcher import display
from launcher.report import words
from launcher.report.facts import Facts
from launcher.report.markup import Html, badge, element
from launcher.watching import queue_view
from llmtrain import overfitting, ranking
from llmtrain.config.schema import RunConfig
from llmtrain.ledger import drain_command
from llmtrain.overfitting import Overfitting
from llmtrain.wording import count, listed, name_steps

_TONES = {"running": "go", "starting": "go", "finished": "best", "stopped": "warn", "not started": "warn"}
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def header(facts: Facts) -> Html:
    """Name, state and model."""
    about = "" if facts.config is None else describe_model(facts.config)
    return element(
        "header",
        element("h1", element("bdi", facts.name)),
        state_badge(facts),
        element("p", about) if about else None,
        _progress(facts),
        class_="head",
    )


def state_badge(facts: Facts) -> Html:
    state = facts.now.training.state
    return badge(state, _TONES.get(state, ""))


def describe_model(config: RunConfig) -> str:
    model = config.model
    if model.kind != "qlora":
        what = f"{model.architecture}, {count(model.num_layers, 'layer')}, width {model.width}"
    else:
        plain = "" if model.quantisation == "none" else f" in {model.quantisation}"
        what = f"LoRA, r {model.lora.r}, on {model.base}{plain}"
    strategy = display.STRATEGIES[config.strategy.kind]
    batch = count(config.train.global_batch_size, "row")
    return f"{what}, context {model.context:,} \u00b7 {batch} a step \u00b7 {strategy}, {config.train.precision}"


def _progress(facts: Facts) -> Html | None:
    """A bar, for a run that is not at its end."""
    training = facts.now.training
    if training.total_steps is None or training.step >= training.total_steps:
        return None
    share = 100 * training.step / training.total_steps
    return element(
        "svg",
        element("rect", class_="rest", width="100", height="1"),
        element("rect", class_="done", width=f"{share:.1f}", height="1"),
        class_="progress", viewBox="0 0 100 1", preserveAspectRatio="none", role="img",
        aria_label=f"{share:.0f} percent of the planned steps are done",
    )  # fmt: skip


def cards(facts: Facts) -> Html:
    """The answers."""
    found = problems(facts)
    items = element("ul", [element("li", problem) for problem in found]) if found else None
    said = count(len(found), "problem") if found else "None"
    verdict = None if facts.ranking is None else overfitting.judge(facts.ranking)
    return element(
        "div",
        _card("Is it done?", _training(facts)),
        _card("Held-out loss", _heldout(facts)),
        _card("Use this checkpoint", _proposal(facts), tone="best" if facts.listed.proposed is not None else ""),
        _card("Overfitting", _overfitting(verdict), tone="warn" if verdict is not None and verdict.began else ""),
        _card("On the Hugging Face Hub", _hub(facts)),
        _card("Problems", [said, items or _all_well(facts)], tone="bad" if found else ""),
        class_="cards",
    )


def _card(title: str, lines: list[str | None], tone: str = "") -> Html:
    """The first line is the answer, the others say more."""
    big, *more = [line for line in lines if line is not None]
    below = [line if isinstance(line, Html) else element("p", line, class_="small") for line in more]
    return element("div", element("h3", title), element("p", big, class_="big"), below, class_=f"card {tone}".strip())


def _training(facts: Facts) -> list[str | None]:
    training, clock = facts.now.training, facts.clock
    if training.state == "not started":
        return ["Not a step yet", "Training has written no metrics so far."]
    step = f"{facts.last_step:,}"
    total = "" if training.total_steps is None else f" of {training.total_steps:,}"
    then: list[str | None] = []
    match training.state:
        case "finished":
            big = f"Yes, {count(facts.last_step, 'step')}"
        case "running":
            big = f"Running, step {step}{total}"
            then += [] if training.left_s is None else [f"About {display.duration(training.left_s)} left"]
        case "starting":
            big = f"Starting, at step {step}{total}"
            then.append("Its ranks do not train yet")
        case "ended early":
            big = f"Ended early, step {step}{total}"
            then.append(training.early_stop)
        case _:
            big = f"Stopped at step {step}{total}"
            then += _goes_on(facts)
    done = f"{float(clock.epochs[-1]):.2f} epochs, {words.quantity(float(clock.tokens[-1]))} learned tokens"
    return [big, *then, done, _when(facts)]


def _goes_on(facts: Facts) -> list[str]:
    """How a run that stands still goes on."""
    now = facts.now
    if now.again is None:
        waiting = [queue_view.describe(job, now.slurm)[0] for job in now.jobs if job.kind == "train"]
        return ["Nothing is training here now; it may go on by itself", *waiting]
    last = now.checkpoints.last
    how = "starts from the beginning" if last is None else f"goes on from step {last:,}"
    return [f"Nothing is training here now; it {how} with", element("pre", now.again)]


def _when(facts: Facts) -> str | None:
    """From the first start to the last step, pauses included."""
    began = next((event.time for event in facts.events if event.kind == "started"), None)
    written = facts.now.training.written
    parts = [
        None if began is None else f"began {words.moment(began)}",
        None if began is None or written is None else f"last step {display.duration(written - began)} later",
        _pace(facts, None if began is None or written is None else written - began),
    ]
    text = "; ".join(part for part in parts if part is not None)
    return words.capital(text) or None


def _pace(facts: Facts, seconds: float | None) -> str | None:
    """While it computes steps, and over all that time: evaluations, saves, pauses, steps done twice."""
    rates = sorted(facts.speed.tokens_per_s.values())
    if not rates:
        return None
    has_prompts = facts.config is not None and facts.config.data.format.kind != "text"
    included, learned = (", prompts included", " learned ones") if has_prompts else ("", "")
    pace = f"{words.quantity(rates[len(rates) // 2])} tokens a second while stepping{included}"
    if not seconds or seconds < 0:
        return pace
    return f"{pace} ({words.quantity(float(facts.clock.tokens[-1]) / seconds)}{learned} overall)"


def _heldout(facts: Facts) -> list[str | None]:
    measured = sorted(facts.heldout().steps.astype(int).tolist())
    if measured and facts.ranking is None and not measured[-1]:
        start = words.loss(facts.evaluations[measured[0]]["loss"])
        return [f"{start} before the first step", "None since; one comes at evaluate.every_steps, or at a save."]
    if not measured:
        return ["No evaluation yet", "The first one comes at evaluate.every_steps, or at the first save."]
    losses, ranked = facts.evaluations, facts.ranking
    best = None if ranked is None else ranked.best.score
    first, last = losses[measured[0]]["loss"], losses[measured[-1]]["loss"]
    lower = ranking.lowest_measured(facts.run, 0 if best is None else best.step)
    low = words.capital(lower) or None
    if ranked is not None and best is not None:
        low = (
            f"Lowest {f'of the {ranked.scope} ones ' if lower else ''}{words.loss(best.loss)} at step {best.step:,} "
            f"(epoch {best.epoch:.2f}): perplexity {words.figure(best.perplexity)}, "
            f"{words.figure(best.bits_per_byte, 3)} bits per byte{lower and f'; {lower}'}"
        )
    tested = [f"Test split {words.loss(s.loss)} (step {s.step:,})" for _, s in sorted(facts.test_scores.items())]
    return [
        f"{words.loss(first)} \u2192 {words.loss(last)}",
        f"From step {measured[0]:,} to step {measured[-1]:,}",
        low,
        "; ".join(tested[-2:]) or None,
    ]


def _proposal(facts: Facts) -> list[str | None]:
    chosen = facts.listed.proposed
    why = words.capital(facts.listed.why)
    if chosen is None:
        return ["None yet" if facts.ranking is None else "None is left", why]
    how = "" if chosen.epoch is None else f", epoch {chosen.epoch:.2f}"
    return [f"Step {chosen.step:,}", f"Held-out loss {words.loss(chosen.loss)}{how}", why]


def _overfitting(verdict: Overfitting | None) -> list[str | None]:
    if verdict is None or not verdict.is_known:
        return ["Not known yet", "It takes two checkpoints with a held-out loss."]
    said = verdict.describe()
    big = f"Began after step {verdict.best.step:,}" if verdict.began else "None seen"
    if verdict.perhaps:
        big = f"Perhaps since step {verdict.best.step:,}"
    why = said.partition(": ")[2] or said
    return [big, words.capital(why)]


def _hub(facts: Facts) -> list[str | None]:
    hub, service = facts.now.hub, facts.now.service
    if hub is None:
        return ["Not used", "hub.repo names a repository to upload checkpoints to."]
    uploads = [upload for upload in facts.uploads.values() if upload.repo == hub.repo]
    removed = sum(upload.removed for upload in uploads)
    total = sum(upload.size_bytes for upload in uploads if not upload.removed)
    known = {None: "", True: "private; ", False: "public; "}[hub.state.private if hub.state is not None else None]
    doing = "; ".join(service.status.doing) if service.status is not None and service.at_work else ""
    return [
        f"{count(len(hub.confirmed), 'checkpoint')} confirmed",
        element("p", hub_link(hub.repo), class_="small"),
        f"{known}{display.size(total)} read back from there and compared" if hub.confirmed else None,
        f"Not there yet: {name_steps(hub.waiting)}" if hub.waiting else None,
        f"Now {doing}" if doing else None,
        f"{count(removed, 'tag')} taken away again; the history keeps the files" if removed else None,
    ]


def hub_link(repo: str) -> Html:
    """A link where the name is one that the Hub could have."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    if not _REPO.fullmatch(repo) or urlsplit(hub).scheme not in ("http", "https"):
        return element("bdi", repo)
    return element("a", repo, href=f"{hub}/{repo}", rel="noreferrer noopener")


def problems(facts: Facts) -> list[str]:
    """What somebody has to look at."""
    found = list(facts.now.problems)
    if facts.not_finite is not None:
        found.append(f"Step {facts.not_finite:,} came to a loss or gradient norm that is no finite number")
    status, hub = facts.now.service.status, facts.now.hub
    is_explained = status is not None and status.problem is not None  # in more words than the Hub's
    if hub is not None and hub.state is not None and hub.state.state != "ok" and not is_explained:
        found.append(f"Hub {hub.state.state}: {hub.state.message}")
    service, waits = facts.now.service, facts.now.waits
    if service.wanted and not service.at_work and waits:
        command = drain_command(facts.run.path)
        found.append(f"The checkpoint service is not running, but {listed(waits)}: {command}")
    return [words.capital(problem) for problem in found]


def _all_well(facts: Facts) -> str:
    """What nobody has to look at, since it was dealt with; the section of events tells it."""
    kinds = [event.kind for event in facts.events]
    counts = {
        "resume": kinds.count("resumed"),
        "restart": kinds.count("restarted"),
        "unsaved end": kinds.count("unsaved"),
        "failed attempt": sum(kinds.count(kind) for kind in ("score-failed", "upload-failed", "stalled")),
        "rejected checkpoint": kinds.count("rejected"),
    }
    dealt_with = [count(number, noun) for noun, number in counts.items() if number]
    return f"On the way: {listed(dealt_with)}." if dealt_with else "Nothing failed on the way."
