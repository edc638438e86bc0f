"""The top of a run's page: what one wants to know in the morning, in the order in which one asks."""

import os
import re
import shlex
from urllib.parse import urlsplit

from launcher import display
from launcher.report import words
from launcher.report.facts import Facts
from launcher.report.markup import Html, element
from llmtrain import overfitting, ranking
from llmtrain.config.schema import RunConfig

STATE_TONES = {"running": "go", "starting": "go", "finished": "best", "stopped": "warn", "not started": "warn"}
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def header(facts: Facts) -> Html:
    """Name, state and model."""
    about = "" if facts.config is None else describe_model(facts.config)
    return element(
        "header",
        element("h1", element("bdi", facts.name)),
        element(
            "span", facts.now.training.state, class_=f"badge {STATE_TONES.get(facts.now.training.state, '')}".strip()
        ),
        element("p", about) if about else None,
        _progress(facts),
        class_="head",
    )


def describe_model(config: RunConfig) -> str:
    model = config.model
    if model.kind == "gpt":
        what = f"GPT, {words.count(model.num_layers, 'layer')}, width {model.width}"
    else:
        plain = "" if model.quantisation == "none" else f" in {model.quantisation}"
        what = f"LoRA, r {model.lora.r}, on {model.base}{plain}"
    strategy = display.STRATEGIES[config.strategy.kind]
    batch = words.count(config.train.global_batch_size, "row")
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
    listed = element("ul", [element("li", problem) for problem in found]) if found else None
    said = words.count(len(found), "problem") if found else "None"
    return element(
        "div",
        _card("Is it done?", _training(facts)),
        _card("Held-out loss", _heldout(facts)),
        _card("Use this checkpoint", _proposal(facts), tone="best" if facts.listed.proposed is not None else ""),
        _card("Overfitting", _overfitting(facts), tone="warn" if _overfits(facts) else ""),
        _card("On the Hugging Face Hub", _hub(facts)),
        _card("Problems", [said, listed or _all_well(facts)], tone="bad" if found else ""),
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
    match training.state:
        case "finished":
            big, then = f"Yes, {words.count(facts.last_step, 'step')}", None
        case "running":
            left = None if training.left_s is None else display.duration(training.left_s)
            big, then = f"Running, step {step}{total}", None if left is None else f"About {left} left"
        case "starting":
            big, then = f"Starting, at step {step}{total}", "Its ranks do not train yet"
        case "ended early":
            big, then = f"Ended early, step {step}{total}", training.early_stop
        case _:
            big, then = f"Stopped at step {step}{total}", _goes_on(facts)
    done = f"{float(clock.epochs[-1]):.2f} epochs, {words.quantity(float(clock.tokens[-1]))} learned tokens"
    return [big, then, done, _when(facts)]


def _goes_on(facts: Facts) -> str:
    last = facts.now.checkpoints.last
    if last is None:
        return "Nothing is training here now, and there is no checkpoint to go on from"
    return f"Nothing is training here now; the same command goes on from step {last:,}"


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
    return text[:1].upper() + text[1:] or None


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
    low = lower[:1].upper() + lower[1:] or None
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
    why = facts.listed.why[:1].upper() + facts.listed.why[1:]
    if chosen is None:
        return ["None yet" if facts.ranking is None else "None is left", why]
    how = "" if chosen.epoch is None else f", epoch {chosen.epoch:.2f}"
    return [f"Step {chosen.step:,}", f"Held-out loss {words.loss(chosen.loss)}{how}", why]


def _overfits(facts: Facts) -> bool:
    return facts.ranking is not None and overfitting.judge(facts.ranking).began


def _overfitting(facts: Facts) -> list[str | None]:
    verdict = None if facts.ranking is None else overfitting.judge(facts.ranking)
    if verdict is None or not verdict.is_known:
        return ["Not known yet", "It takes two checkpoints with a held-out loss."]
    said = verdict.describe()
    big = f"Began after step {verdict.best.step:,}" if verdict.began else "None seen"
    if verdict.perhaps:
        big = f"Perhaps since step {verdict.best.step:,}"
    why = said.partition(": ")[2] or said
    return [big, why[:1].upper() + why[1:]]


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
        f"{words.count(len(hub.confirmed), 'checkpoint')} confirmed",
        element("p", hub_link(hub.repo), class_="small"),
        f"{known}{display.size(total)} read back from there and compared" if hub.confirmed else None,
        f"Not there yet: {display.steps(hub.waiting)}" if hub.waiting else None,
        f"Now {doing}" if doing else None,
        f"{words.count(removed, 'tag')} taken away again; the history keeps the files" if removed else None,
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
    waiting = _left_behind(facts)
    if waiting:
        service = shlex.join(["python", "-m", "llmtrain.service", "--run", str(facts.run.path)])
        found.append(f"The checkpoint service is not running, but {waiting}: {service}")
    return [problem[:1].upper() + problem[1:] for problem in found]


def _left_behind(facts: Facts) -> str:
    """What a service would still do, where there should be one and is none."""
    now = facts.now
    if now.service.at_work or not now.service.wanted:
        return ""
    left: list[str] = []
    if now.checkpoints.not_scored:
        left.append(f"{display.steps(now.checkpoints.not_scored)} not scored")
    if now.hub is not None and now.hub.waiting:
        left.append(f"{display.steps(now.hub.waiting)} not on the Hub")
    return " and ".join(left)


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
    dealt_with = [words.count(number, noun) for noun, number in counts.items() if number]
    return f"On the way: {display.words(dealt_with)}." if dealt_with else "Nothing failed on the way."
