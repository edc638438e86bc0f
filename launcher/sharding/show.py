"""What `llmtrain shard` prints: what a job came to, and samples as the model will see them (`--show N`)."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.text import Text

from launcher.sharding import reasons
from launcher.sharding.build import Built, BuiltPart, PreparedBuild
from llmtrain import log, recipe
from llmtrain.shards import ShardFolder, SplitName

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_OPEN, _CLOSE = "\u27e6", "\u27e7"
_SPECIAL = "\u27e8{}\u27e9"
"""Around a special token, whose text may stand in a document as well."""
_LONGEST = 4000
"""Characters of one sample that are shown."""


@dataclass(frozen=True)
class RowDocument:
    """One document of a row."""

    row: int
    ids: NDArray[np.int64]
    learned: NDArray[np.bool_]


def describe(done: Built | PreparedBuild | BuiltPart) -> Iterator[str]:
    """What a job came to, in lines."""
    match done:
        case Built(was_there=True):
            yield f"shards     {done.folder.path} (finished before; fingerprint {done.folder.fingerprint[:12]})"
            if done.newer_source is not None:
                yield f"note       {recipe.describe_newer(done.newer_source, done.folder.path)}"
        case Built():
            yield from _describe_built(done)
        case PreparedBuild():
            plan, num_tasks = done.plan, len(done.plan.tasks)
            size = f"{sum(plan.sizes) / 1e6:,.1f} MB in {num_tasks:,} tasks"
            yield f"prepared   {plan.folder}: {size}, {done.missing:,} of them to tokenise"
            yield "next       llmtrain shard CONFIG --part I/N for every I from 0 to N-1, then llmtrain shard CONFIG"
        case BuiltPart():
            sizes = done.plan.sizes
            size = f"{sum(sizes[number] for number in done.chosen) / 1e6:,.1f} MB in {len(done.chosen):,} tasks"
            now = f"{done.size_bytes / 1e6:,.1f} MB of it now, in {done.seconds:,.1f} s"
            yield f"part {done.part}   {done.plan.folder}: {size} are tokenised, {now}"
            if done.part.count > len(sizes):
                yield f"note       there are only {len(sizes)} tasks: more parts than that have nothing to do"


def _describe_built(built: Built) -> Iterator[str]:
    folder, manifest = built.folder, built.folder.manifest
    for name, split in manifest.splits.items():
        yield (
            f"{name:<10} {split.documents:,} documents, {split.text_bytes / 1e6:,.2f} MB to learn -> {split.rows:,} "
            f"rows, {split.tokens:,} tokens, {split.targets:,} learned"
            f" ({split.text_bytes / max(1, split.text_tokens):.2f} bytes a token)"
            + (f", {split.tokens_dropped} dropped" if split.tokens_dropped else "")
        )
    yield from reasons.describe_skipped(manifest.skipped)
    yield from built.notes
    if manifest.cut:
        yield f"cut        {manifest.cut:,} samples lack the beginning of their prompt, to fit into model.context"
    by = "tiktoken (ids proven equal)" if built.fast else "tokenizers"
    yield f"tokenizer  {manifest.tokenizer.vocab_size:,} tokens, applied with {by}"
    now = f"{built.size_bytes / 1e6:,.1f} MB tokenised now, {built.seconds:,.1f} s"
    yield f"shards     {folder.path}, {now}, fingerprint {folder.fingerprint[:12]}"


def documents(folder: ShardFolder, split: SplitName, count: int) -> Iterator[RowDocument]:
    """The first `count` documents of a split, from the shards themselves."""
    shards = folder.split(split)
    found = 0
    for row in range(shards.num_rows):
        rows = shards.rows(np.array([row], np.int64))
        at = 0
        for length in rows.doc_lens[0].tolist():
            learned = np.ones(length, bool) if rows.loss_mask is None else rows.loss_mask[0, at : at + length] == 1
            learned[0] = False  # nothing predicts the first token
            yield RowDocument(row, rows.tokens[0, at : at + length].astype(np.int64), learned)
            at, found = at + length, found + 1
            if found == count:
                return


def show_samples(folder: ShardFolder, count: int, console: Console) -> None:
    """Print samples. Without colours (in a file, say) what is learned stands between double brackets, and a special
    token between angle ones.

    The text may come from anywhere: it is printed as text, never as markup.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder.tokenizer / "tokenizer.json"))
    plain = console.color_system is None
    marked = f"{_OPEN} {_CLOSE}" if plain else "[bold green]green[/bold green]"
    special = _SPECIAL.format("so") if plain else "[reverse]reversed[/reverse]"
    console.print(
        f"the first {count} samples of the training split; what is learned is {marked}, special tokens are {special}",
        highlight=False,
    )
    numbers = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for number, document in enumerate(documents(folder, "train", count), start=1):
        learned = int(document.learned.sum())
        console.print(
            f"\n[bold]sample {number}[/bold], row {document.row}: {len(document.ids)} tokens, {learned} learned",
            highlight=False,
        )
        text = Text()
        edges = np.flatnonzero(np.diff(document.learned)) + 1
        for part, is_learned in zip(
            np.split(document.ids, edges), document.learned[[0, *edges.tolist()]].tolist(), strict=True
        ):
            style = "bold green" if is_learned else "dim"
            pieces = [
                (log.printable(_SPECIAL.format(piece) if plain and special else piece, keep="\n\t"), special)
                for piece, special in _decoded(tokenizer, part.tolist(), numbers)
            ]
            if is_learned and plain:
                pieces = [(_OPEN, False), *pieces, (_CLOSE, False)]
            for piece, special in pieces:
                text.append(piece, style=f"{style} reverse" if special else style)
        console.print(text[:_LONGEST], soft_wrap=True)


def _decoded(tokenizer: "Tokenizer", ids: list[int], special: set[int]) -> Iterator[tuple[str, bool]]:
    """The text of ids in pieces, and whether a piece is a special token."""
    before: list[int] = []
    for is_special, group in itertools.groupby(ids, key=special.__contains__):
        piece = list(group)
        if is_special:
            yield from ((tokenizer.id_to_token(number) or "", True) for number in piece)
            before = piece[-1:]
        else:
            # With the token before it: some decoders drop a space at the beginning.
            name, whole = (tokenizer.decode(each, skip_special_tokens=False) for each in (before, before + piece))
            if whole.startswith(name):
                yield whole.removeprefix(name), False
            else:
                yield tokenizer.decode(piece, skip_special_tokens=False), False
