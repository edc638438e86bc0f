"""The lecture's whole run, by its own `train_model_simple`: epochs, evaluations and samples. Prints what it prints.

Runs in the peer's own environment, so it imports nothing of this project. The argument names a JSON file with the
ids of the text, encoded beforehand, and with what each id stands for.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from llms_from_scratch.ch04 import GPTModel
from llms_from_scratch.ch05 import train_model_simple
from torch.utils.data import DataLoader, TensorDataset


class KnownText:
    """In the place of tiktoken's encoding, which would be fetched from the network."""

    def __init__(self, prompt: list[int], pieces: list[str]):
        self._prompt = prompt
        self._pieces = pieces

    def encode(self, text: str, **options: Any) -> list[int]:
        return self._prompt

    def decode(self, ids: list[int]) -> str:
        return "".join(self._pieces[i] for i in ids)


def rows_of(ids: list[int], context: int) -> TensorDataset:
    """As the lecture's dataset: rows of `context` tokens one behind the other, and the same moved on by one."""
    starts = range(0, len(ids) - context, context)
    inputs, targets = ([ids[start + by : start + by + context] for start in starts] for by in (0, 1))
    return TensorDataset(torch.tensor(inputs), torch.tensor(targets))


def main() -> None:
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(123)
    config = job["model"]
    context = config["context_length"]
    model = GPTModel(config)
    train_model_simple(
        model,
        DataLoader(rows_of(job["train"], context), batch_size=2, shuffle=True, drop_last=True),
        DataLoader(rows_of(job["heldout"], context), batch_size=2),
        torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1),
        torch.device("cpu"),
        num_epochs=job["epochs"],
        eval_freq=5,
        eval_iter=5,
        start_context=job["prompt_text"],
        tokenizer=KnownText(job["prompt"], job["pieces"]),
    )


if __name__ == "__main__":
    main()
