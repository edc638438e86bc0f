"""The work folder of a build, FOLDER/.work: what there is to do, and who may do it.

    key                       of the recipe, of every source file's size and time, and of the rules that samples are cut
                              by; other work is not used again
    made-from.json            the same in words, for people
    counts.json               characters of each task (split by `tail` alone)
    tokenizer/                and tokenizer-done, last, which says whether tiktoken gives its ids
    tokens-000000.npz ...     finished tasks
    out/                      shards, before they are moved into place

FOLDER/.work-0123456789ab is such a folder with another key (which begins so), kept aside until shards are published.

Beside it stands FOLDER/.unpublished from when an older build's manifest is taken away, or the new shards begin to move
in, until the new manifest: what has no manifest then is a build's all the same, and the next try replaces it.

Jobs on several machines find the same tasks, in the same order, because each lists the same sources.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.sharding import samples, tasks
from launcher.sharding.progress import say
from launcher.sharding.readers import Unit
from launcher.sharding.sources import group_units, list_units, stamp_of
from llmtrain import files, recipe, shards
from llmtrain.config.schema import RunConfig
from llmtrain.errors import ConfigError, DataMismatch, SourceError, TooLittleData, UserError
from llmtrain.wording import count

WORK = ".work"
_UNPUBLISHED = ".unpublished"
_KEY, _MADE_FROM = "key", "made-from.json"
_SHORT = 12
"""Letters of a key that tell work folders apart."""


@dataclass(frozen=True)
class Plan:
    """What there is to do for a configuration, and where."""

    config: RunConfig
    folder: Path
    tasks: list[list[Unit]]
    key: str

    @functools.cached_property
    def sizes(self) -> list[int]:
        """Bytes of text of each task."""
        return [sum(unit.size_bytes for unit in task) for task in self.tasks]

    @property
    def work(self) -> Path:
        return self.folder / WORK

    @property
    def tokenizer(self) -> Path:
        return self.work / shards.TOKENIZER

    def missing(self) -> list[int]:
        """Numbers of the tasks that are not tokenised yet."""
        there = {path.name for path in self.work.iterdir()}  # one look at the folder, not one for each file
        return [n for n in range(len(self.tasks)) if tasks.task_file(self.work, n).name not in there]


def make_plan(config: RunConfig) -> Plan:
    """List the sources.

    Raises:
        SourceError: names all files that are missing, empty or unreadable.
        TooLittleData: there are fewer documents than splits, which hours of tokenising would not change.
    """
    units = list_units(config.data.sources, config.data.format)
    if not units:
        raise SourceError("the sources hold no text at all")
    split = config.data.rest_split
    rest = {number for number, source in enumerate(config.data.sources) if source.use is None}
    sources = [config.data.sources[number] for number in rest]
    if split.by == "hash" and all(s.kind == "text" and s.separator is None for s in sources):
        documents = len({unit.path for unit in units if unit.source in rest})
        needs_train = all(source.use != "train" for source in config.data.sources)
        wanted = needs_train + (split.heldout > 0) + (split.test > 0)
        if documents < wanted:
            named = len(rest) < len(config.data.sources)
            raise TooLittleData(
                f"{count(documents, 'document')} (a file is one) for {wanted} splits: "
                "data.split.by=hash puts each document into one. Set data.split.by=tail, which cuts the text, or give "
                "the source a separator" + ("; or use: train for it, to train on all of it" if named else "")
            )
    return Plan(config, recipe.shard_folder(config), group_units(units), _key(config, units))


def _key(config: RunConfig, units: list[Unit]) -> str:
    file = recipe.tokenizer_file(config)
    tokenizer = None if file is None else files.sha256(file)
    made_from = [samples.RULES, recipe.recipe_of(config), tokenizer, [asdict(unit) for unit in units]]
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def check_unchanged(plan: Plan) -> None:
    """See that what was read is what was listed: text is read up to three times, to measure, to train on, to tokenise.

    One look at each file. Data sets by name are left out: they are loaded once a process, from a cache of their own.

    Raises:
        DataMismatch: it is not; the next build starts anew, because its key is another one.
    """
    units = list(itertools.chain.from_iterable(plan.tasks))
    named = {number for number, source in enumerate(plan.config.data.sources) if source.kind == "huggingface"}
    read = dict.fromkeys((unit.path, unit.stamp) for unit in units if unit.source not in named)
    changed = [path for path, stamp in read if stamp_of(Path(path)) != stamp]
    if not changed and _key(plan.config, units) == plan.key:
        return
    (plan.work / _KEY).unlink(missing_ok=True)  # nothing may build on what was read of it
    what = "the tokenizer, or the chat template" if not changed else changed[0]
    more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
    raise DataMismatch(
        f"a source changed while it was being read: {what}{more}. Nothing was published; run the same command again, "
        "once nobody writes there"
    )


def num_tasks(config: RunConfig) -> int:
    """How many tasks a build has: more parts than that have nothing to do.

    Raises:
        SourceError: names all files that are missing, empty or unreadable.
    """
    return len(group_units(list_units(config.data.sources, config.data.format)))


def open_work(plan: Plan, anew: bool) -> None:
    """Make the work folder ready; keep what an earlier try has finished, if it is of the same input and not `anew`.

    Work on other input is kept aside, and goes on where the input is again as it was. Nobody else may be at work there.
    """
    own = _aside(plan.folder, plan.key)
    if anew:
        if done := _describe_done(plan.work):
            say(f"--force throws away what was done before: {done}")
        for old in (plan.work, *_asides(plan.folder)):
            if old.exists():
                shutil.rmtree(old)
    elif plan.work.exists() and _key_of(plan.work) != plan.key:
        _put_aside(plan, own)
    if not plan.work.exists() and own.exists():
        say(f"going on with {own}: sources and settings are again what they were")
        own.rename(plan.work)
    if not plan.work.exists():
        plan.work.mkdir(parents=True)  # the job that had the lock before may have removed the folder
        files.write_atomic(plan.work / _MADE_FROM, json.dumps(_made_from(plan)))
        files.write_atomic(plan.work / _KEY, plan.key)
    for left in plan.work.glob(f"*{tasks.ASIDE}"):
        left.unlink()


def _put_aside(plan: Plan, own: Path) -> None:
    """Keep the work on other input, in place of what was kept before; `own` is where work on this one may be kept."""
    key = _key_of(plan.work)
    if key is None:
        if any(plan.work.iterdir()):
            say(f"starting anew; {plan.work} was made while a source changed, or is not whole")
        shutil.rmtree(plan.work)
        return
    if not own.exists():
        say(f"starting anew: {_why_other(plan)}")
    aside = _aside(plan.folder, key)
    if done := _describe_done(plan.work):
        say(f"what was done before ({done}) stays in {aside} until the shards are finished")
    for older in _asides(plan.folder):
        if older != own:
            shutil.rmtree(older)
    plan.work.rename(aside)


def _key_of(work: Path) -> str | None:
    """None where none is written yet."""
    return (work / _KEY).read_text() if (work / _KEY).exists() else None


def _aside(folder: Path, key: str) -> Path:
    return folder / f"{WORK}-{key[:_SHORT]}"


def _asides(folder: Path) -> list[Path]:
    return list(folder.glob(f"{WORK}-{'[0-9a-f]' * _SHORT}"))


def _describe_done(work: Path) -> str:
    sizes = [path.stat().st_size for path in work.glob("tokens-*.npz") if not path.name.endswith(tasks.ASIDE)]
    return f"{len(sizes):,} tasks, {sum(sizes) / 1e6:,.1f} MB of tokens" if sizes else ""


def _made_from(plan: Plan) -> dict[str, Any]:
    """What the key is of."""
    file = recipe.tokenizer_file(plan.config)
    return {
        "rules": samples.RULES,
        "recipe": recipe.recipe_of(plan.config),
        "tokenizer": None if file is None else files.sha256(file),
        "files": {unit.path: unit.stamp for unit in itertools.chain.from_iterable(plan.tasks)},
    }


def _why_other(plan: Plan) -> str:
    """Why the work folder's key is not this input's."""
    now, then = _made_from(plan), None
    with contextlib.suppress(FileNotFoundError, ValueError):
        then = json.loads((plan.work / _MADE_FROM).read_text())
    if then is not None and then["rules"] == now["rules"]:
        if settings := _different(then["recipe"], now["recipe"]):
            names = ("model.context" if name == "context" else f"data.{name}" for name in settings)
            return f"{plan.work} was made with other settings ({', '.join(names)})"
        if then["tokenizer"] != now["tokenizer"]:
            return f"{plan.work} was made with another tokenizer"
        if changed := _different(then["files"], now["files"]):
            first = changed[0]
            how = "is new" if first not in then["files"] else "is gone" if first not in now["files"] else "has changed"
            return f"{first} {how}" + (f" (and {len(changed) - 1} more)" if len(changed) > 1 else "")
    return f"another version of llmtrain made {plan.work}"


def _different(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names under which something else stands now."""
    return sorted(name for name in {*then, *now} if then.get(name) != now.get(name))


def check_folder(config: RunConfig) -> None:
    """See that publishing, which replaces FOLDER/tokenizer, would not delete what no build has written.

    Raises:
        ConfigError: it would.
    """
    folder, chosen = recipe.shard_folder(config), config.data.tokenizer
    ours = folder / shards.TOKENIZER
    setting = f"the shards' folder, {folder}" if config.data.dir is None else f"data.dir={folder}"
    elsewhere = f"set data.dir to another folder, such as {folder / 'shards'}"
    if chosen.kind == "folder" and Path(chosen.path).resolve().is_relative_to(ours.resolve()):
        problem = (
            f"data.tokenizer.path={chosen.path}: a build replaces {ours} ({setting}) by the shards' own copy of the "
            f"tokenizer; {elsewhere}, or move the tokenizer and set data.tokenizer.path to where it is then"
        )
    elif os.path.lexists(ours) and not shards.exists(folder) and not (folder / _UNPUBLISHED).exists():
        problem = (
            f"{setting}: a build would replace {ours}, and no build has written it, as far as can be told (there is no "
            f"{shards.MANIFEST}); {elsewhere}, or move {ours} away (or delete it, if shards that are gone left it)"
        )
    else:
        return
    raise ConfigError([problem])


def take_manifest(plan: Plan) -> None:
    """From now on the folder does not count as finished, and what stands there may be replaced.

    Raises:
        ConfigError: it is not a build's; a tokenizer may have come there while this one was at work.
    """
    check_folder(plan.config)
    files.write_atomic(plan.folder / _UNPUBLISHED, "")
    (plan.folder / shards.MANIFEST).unlink(missing_ok=True)


def remove_work(folder: Path) -> None:
    """Delete what a build needs until its manifest is written."""
    (folder / _UNPUBLISHED).unlink(missing_ok=True)
    for work in (folder / WORK, *_asides(folder)):
        shutil.rmtree(work, ignore_errors=True)


def check_work(plan: Plan) -> None:
    """See that the work folder was made ready for this input.

    Raises:
        UserError: it was not made ready.
        DataMismatch: it was made for something else.
    """
    key = _key_of(plan.work)
    if key is None:
        raise not_prepared(plan)
    if key != plan.key:
        raise DataMismatch(
            f"{plan.work}: prepared for other sources or settings than what this job finds ({_why_other(plan)}). A "
            "file was changed since, is not the same on this machine, another configuration uses the same data.dir, or "
            "another version of llmtrain prepared it. Run 'llmtrain shard CONFIG --only prepare' again: it starts anew"
        )


def not_prepared(plan: Plan) -> UserError:
    return UserError(
        f"{plan.folder}: --part needs the tokenizer, and it is not prepared yet; run "
        "'llmtrain shard CONFIG --only prepare' first, with the same configuration"
    )
