"""Sharding the embedded corpus against Hugging Face's `encode_batch`: `python -m benchmarks.sharding`.

Ours is the whole of `build`: read, tokenise, pack, hash, sync. The peer reads the same files, encodes them in
batches with the same number of processes, and writes the ids to one file per process. The tokenizer is trained
before, outside the time. Rounds are interleaved; the ids are compared.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.words import with_range
from launcher.sharding import tokenize
from launcher.sharding.build import build
from launcher.sharding.sources import list_units
from llmtrain import cpu, shards
from llmtrain.config import load_config

_ROUNDS = int(os.environ.get("ROUNDS", "5"))
_BATCH = 64


def encode_files(tokenizer_file: str, paths: list[str], out: str) -> int:
    """The peer's process: returns the bytes that it encoded."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    tokenizer = Tokenizer.from_file(tokenizer_file)
    tokenizer.encode_special_tokens = True
    done = 0
    with Path(out).open("wb") as file:
        for first in range(0, len(paths), _BATCH):
            texts = []
            for path in paths[first : first + _BATCH]:
                try:
                    texts.append(Path(path).read_bytes().decode("utf-8").removeprefix("\ufeff").replace("\r\n", "\n"))
                except UnicodeDecodeError:
                    continue
            for text, encoding in zip(texts, tokenizer.encode_batch(texts, add_special_tokens=False), strict=True):
                done += len(text.encode())
                file.write(np.array(encoding.ids, np.uint16).tobytes())
    return done


def run_peer(tokenizer_file: str, paths: list[str], folder: Path, workers: int) -> tuple[float, int]:
    started = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(encode_files, tokenizer_file, paths[number::workers], str(folder / f"{number}.bin"))
            for number in range(workers)
        ]
        size = sum(job.result() for job in jobs)
    return time.perf_counter() - started, size


def main() -> None:
    workers = cpu.usable_cores()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        trained, _ = load_config(None, [f"data.dir={folder}/first"])
        tokenizer_file = build(trained, workers).folder.tokenizer
        settings = [
            f"data.tokenizer={{kind: folder, path: '{tokenizer_file}'}}",
            "data.split={heldout: 0.02, test: 0.01}",
        ]
        paths = [unit.path for unit in list_units(trained.data.sources, trained.data.format)]
        ours: list[float] = []
        theirs: list[float] = []
        ids = 0
        for number in range(_ROUNDS):
            config, _ = load_config(None, [*settings, f"data.dir={folder}/ours-{number}"])
            built = build(config, workers)
            seconds, size = run_peer(str(tokenizer_file / "tokenizer.json"), paths, folder, workers)
            ours.append(size / built.seconds / 1e6)
            theirs.append(size / seconds / 1e6)
            written = sum((folder / f"{n}.bin").stat().st_size // 2 for n in range(workers))
            splits = shards.open_folder(built.folder.path).manifest.splits.values()
            ids = sum(split.text_tokens - split.documents for split in splits)
            assert ids == written, "the two did not write the same number of ids"
        fast, slow = (tokenize.Encoder(tokenizer_file, fast=f) for f in (True, False))
        texts = [Path(path).read_bytes().decode("utf-8", "ignore") for path in paths]
        same = sum(np.array_equal(fast.encode(text), slow.encode(text)) for text in texts)
    print(f"{os.cpu_count()} cores, {workers} processes; Python {platform.python_version()}; {_ROUNDS} rounds\n")
    print("| | MB/s, median (range) | ours / it |\n|---|---|---|")
    ratio = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    for name, found, against in (("llmtrain shard, end to end", ours, 1.0), ("encode_batch to files", theirs, ratio)):
        print(f"| {name} | {with_range(found, '.1f')} | {against:.2f} |")
    print(f"\n{ids:,} ids each; identical on {same} of {len(texts)} files ({json.dumps(same == len(texts))})")


if __name__ == "__main__":
    main()
