"""What a build tells about its input: what was left out, what stood nowhere, and why there is too little of it."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from launcher.sharding import tasks, unseen
from launcher.sharding.records import Found
from launcher.sharding.samples import COMPLETION_TOO_LONG, TOO_LONG
from llmtrain.config import data_sections as schema
from llmtrain.config.schema import RunConfig
from llmtrain.shards import SplitName


def read_found(work: Path, num_tasks: int) -> Found:
    """What all tasks have counted, from their files."""
    found = Found()
    for number in range(num_tasks):
        with np.load(tasks.task_file(work, number)) as arrays:
            found.cut += int(arrays["cut"][0])
            found.records += int(arrays["records"][0])
            found.separators.update(dict(enumerate(arrays["separators"].tolist())))
            for name, counter in (("skipped", found.skipped), ("field", found.fields), ("noted", found.noted)):
                names, counts = arrays[f"{name}_names"].tolist(), arrays[f"{name}_counts"].tolist()
                counter.update(dict(zip(names, counts, strict=True)))
    return found


def describe_skipped(skipped: dict[str, int]) -> Iterator[str]:
    """Lines for people: what was left out."""
    for reason, count in sorted(skipped.items()):
        yield f"skipped    {count:,} documents: {reason}"


def describe_found(data: schema.DataSection, found: Found) -> Iterator[str]:
    """Lines for people: how often what may be absent was there, and what may be misspelt."""
    if isinstance(data.format, schema.InstructionFormat):
        name = data.format.input
        yield f"fields     {name}: in {found.fields[name]:,} of {found.records:,} records"
        if not found.fields[name]:
            yield (
                f"warning    data.format.input={name}: no record has anything there; if the records have inputs under "
                "another name, set it to that name"
            )
    for number, source in enumerate(data.sources):
        separator = getattr(source, "separator", None)
        if separator is not None and found.separators[number] == 0:
            setting = f"data.sources.{number}.separator={json.dumps(separator, ensure_ascii=False)}"
            meant = r"""; a line break is "\n" in double quotes in a file""" if "\\n" in separator else ""
            yield f"warning    {setting}: stands in none of its files; each of them is one document{meant}"
    yield from unseen.describe(found)


def too_little(config: RunConfig, name: SplitName, tokens: int, documents: int, found: Found) -> str:
    """Why a split has not one row, and what to change."""
    said = (
        f"the {name} split has {tokens} tokens of {documents} documents: not one row of {config.model.context} tokens."
    )
    long, samples = found.skipped[TOO_LONG], found.records
    if count := long or found.skipped[COMPLETION_TOO_LONG]:
        said += f" {count:,} of {samples:,} samples are longer than model.context + 1 tokens" + (
            ": use a longer model.context, or data.format.overlong=cut_prompt."
            if long
            else ", even without their prompts: use a longer model.context."
        )
    if count < samples or not count:
        *ways, last = _ways(config, name, documents)
        listed = f"{', '.join(ways)}, or {last}" if ways else last
        said += f" {'Otherwise use' if count else 'Use'} {listed}"
    return "\n".join([said, *describe_skipped(found.skipped), *describe_found(config.data, found)])


def _ways(config: RunConfig, name: SplitName, documents: int) -> Iterator[str]:
    split, uses = config.data.rest_split, {source.use for source in config.data.sources}
    if name in uses and (name != "train" or None not in uses):
        yield f"more text in the source with use: {name}"
        if name == "train" and config.data.packing == "contiguous":
            yield "a shorter model.context"
        return
    yield "more text"
    if name == "train":
        if config.data.packing == "contiguous":  # only there a row has to be full, and only in this split
            yield "a shorter model.context"
        shares = [f"data.split.{each}" for each in ("heldout", "test") if getattr(split, each)]
        if shares:
            yield f"a smaller {' or '.join(shares)}"
    else:
        yield f"a larger data.split.{name}"
    if name == "test":
        yield "data.split.test=0 (no test split)"
    if split.by == "hash" and (name != "train" or documents == 0):
        yield "data.split.by=tail (few documents cannot be split by their hash)"
