"""`llmtrain generate`: a checkpoint continues a prompt, or answers it as its run's samples are, streamed to the
terminal.

Every option is given: `launcher/cli.py` knows the defaults.
"""

import argparse
import functools
import io
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pydantic
import torch
from tokenizers import Tokenizer

from llmtrain import adapters, choose, devices, files, log, prompts, ranking, trained
from llmtrain.config.data_sections import Format, TextFormat
from llmtrain.config.schema import SampleSection
from llmtrain.errors import CheckpointError, ConfigError, ModelError, exit_with_code
from llmtrain.evaluate import Generator, continue_text
from llmtrain.rundir import RunDir


def find_model(path: Path) -> Path:
    """The model folder of a run (its best checkpoint), of a checkpoint, or `path` itself.

    Says what may still change which checkpoint is a run's best.

    Raises:
        CheckpointError: there is no model in any of these places.
    """
    for folder in (path, path / "model"):
        if _is_model(folder):
            return folder
    run = RunDir(path)
    chosen = choose.propose_on_disk(run, ranking.rank(run))
    if chosen is not None and _is_model(run.checkpoint(chosen.step) / "model"):
        if chosen.note:
            sys.stderr.write(chosen.note + "\n")
        return run.checkpoint(chosen.step) / "model"
    for step in reversed(run.checkpoint_steps()):
        if _is_model(run.checkpoint(step) / "model"):
            sys.stderr.write(f"note: step {step} is taken, the newest: no held-out loss of any checkpoint is known\n")
            return run.checkpoint(step) / "model"
    raise CheckpointError(
        f"{path}: no model here; give a run folder (its best checkpoint is taken), a checkpoint such as "
        "runs/NAME/checkpoints/step-00000100, or a folder with a model or an adapter"
    )


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or adapters.is_adapter(folder)


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Text piece by piece; bytes of a character that is not whole yet are held back."""
    seen: list[int] = []
    shown = ""
    for token in ids:
        seen.append(token)
        text = tokenizer.decode(seen)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(seen)[len(shown) :]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="llmtrain generate", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--system")
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--temperature", type=float, required=True)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--raw", action="store_true")
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args(arguments)
    with exit_with_code():
        try:
            generate(options)
        except torch.OutOfMemoryError as error:
            said = str(error).partition(" If reserved")[0].removesuffix(".")
            raise ModelError(f"--device={options.device}: {said}; take another GPU, or --device=cpu") from error


def generate(options: argparse.Namespace) -> None:
    """Print the prompt and its continuation; of a run on instructions or chats, the answer alone."""
    try:
        sampling = SampleSection(
            prompt=options.prompt,
            tokens=options.tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
        )
    except pydantic.ValidationError as error:
        problems = [f"--{str(e['loc'][0]).replace('_', '-')}={e['input']}: {e['msg']}" for e in error.errors()]
        raise ConfigError(problems) from None
    device = devices.take(options.device, f"--device={options.device}")
    folder = find_model(options.checkpoint)
    if not options.prompt:
        raise ConfigError(["--prompt is empty; give the model something to continue"])
    if options.system is not None and (options.raw or not options.system):
        why = "--raw continues the prompt as it stands" if options.raw else "it is empty"
        raise ConfigError([f"--system: {why}; leave --system out"])
    for name, text in (("--prompt", options.prompt), ("--system", options.system or "")):
        if not files.is_utf8(text):
            raise ConfigError([f"{name}={text!r}: is not UTF-8"])
    format = TextFormat() if options.raw else trained.format_of(folder)
    ask = functools.partial(ask_model, format=format, prompt=options.prompt, system=options.system)
    if adapters.is_adapter(folder):
        loaded = load_adapter(folder, ask, device, options.trust_remote_code)
    else:
        loaded = load_whole(folder, ask, device)
    model, tokenizer, prompt_ids, eos_id = loaded
    ids = continue_text(model, prompt_ids, sampling, options.seed, eos_id)
    pieces = stream_text(tokenizer, ids)
    write(pieces if format.kind in ("instruction", "chat") else itertools.chain([options.prompt], pieces))


def write(pieces: Iterable[str]) -> None:
    """Print a text as it comes. In a terminal nothing that a model writes moves the cursor or sets the title."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # not a letter that this terminal's encoding lacks is to end it
        sys.stdout.reconfigure(errors="backslashreplace")
    shows = sys.stdout.isatty()
    try:
        for piece in pieces:
            sys.stdout.write(log.printable(piece, keep="\n\t") if shows else piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    except BrokenPipeError:  # `llmtrain generate ... | head` has seen enough
        log.flush()


Ask = Callable[[Path, int], tuple[Tokenizer, list[int]]]
"""`ask_model` of what a person has asked."""


def load_whole(folder: Path, ask: Ask, device: torch.device) -> tuple[Generator, Tokenizer, list[int], int]:
    """Model, tokenizer, the prompt's ids, and the id that ends a text."""
    from llmtrain.models import read_model

    model, eos_id = read_model(folder)
    tokenizer, prompt_ids = ask(folder, eos_id)
    return model.to(device).text_generator(), tokenizer, prompt_ids, eos_id


def load_adapter(
    folder: Path, ask: Ask, device: torch.device, trust_remote_code: bool
) -> tuple[Generator, Tokenizer, list[int], int]:
    """The same of an adapter on its base, quantised as it was trained."""
    from llmtrain.models import base
    from llmtrain.models.qlora import text_generator

    adapter = adapters.find(folder, trust_remote_code)
    with tempfile.TemporaryDirectory() as scratch:
        eos_id = adapters.write_tokenizer(adapter, Path(scratch))
        tokenizer, prompt_ids = ask(Path(scratch), eos_id)
    model = adapters.attach(adapter, base.load(adapter.base, adapters.good_dtype(device), device))
    return text_generator(model, adapter.base.context), tokenizer, prompt_ids, eos_id


def ask_model(
    folder: Path, eos_id: int, format: Format, prompt: str, system: str | None
) -> tuple[Tokenizer, list[int]]:
    """The tokenizer of a folder, and the prompt's ids as samples of this format have them."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer, prompts.asked_ids(tokenizer, folder, eos_id, format, prompt, system)


if __name__ == "__main__":
    main()
