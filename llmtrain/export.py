"""`llmtrain export`: a checkpoint as a folder that loads elsewhere, whole and checked.

Every option is given: `launcher/cli.py` knows the defaults.
"""

import argparse
import contextlib
import gc
import glob
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain import adapters, devices, log, manifest, prompts, trained, transformers_ids
from llmtrain.adapters import Adapter
from llmtrain.config.data_sections import Format, TextFormat
from llmtrain.errors import CheckpointError, ConfigError, ModelError, TokenizerError, disk_errors, exit_with_code
from llmtrain.generate import find_model

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Root mean square of the logits' differences that rounding explains, as a share of their standard deviation."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_TEXTS, _LENGTH = 4, 64
_ASIDE_BYTES = 4
_SAMPLING = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 50, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "min_p": None, "top_h": None,
}  # fmt: skip
"""Settings that mean something in sampling alone, and the values that change nothing."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="llmtrain export", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("to", type=Path)
    parser.add_argument("--merge", action="store_true")
    parser.add_argument("--base", choices=["original", "dequantised"], required=True)
    parser.add_argument("--dtype", choices=list(_DTYPES), required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--trust-remote-code", action="store_true")
    options = parser.parse_args(arguments)
    with exit_with_code():
        dtype, device = _DTYPES[options.dtype], find_device(options.device)
        trust = options.trust_remote_code
        export(options.checkpoint, options.to, options.merge, options.base, dtype, device, trust)


def find_device(setting: str) -> torch.device:
    """auto: a GPU, else the CPU. Raises ConfigError where the one that was asked for is not there."""
    name = "cuda" if torch.cuda.is_available() else "cpu"
    return devices.take(name if setting == "auto" else setting, f"--device={setting}")


def export(
    checkpoint: Path,
    to: Path,
    merge: bool,
    base: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool,
) -> None:
    """Write the model of `checkpoint` to the new folder `to`; an adapter is merged on `device`, or copied with its
    run's configuration, by which it is asked and quantised as it was trained.

    Raises:
        CheckpointError: there is no model, it is altered, or what was written does not give the same logits.
        ConfigError: `to` exists.
        ModelError: the base cannot be had, or takes more memory than there is.
        TokenizerError: the chat template that an adapter was trained with is gone.
    """
    folder = find_model(checkpoint)
    if to.exists():
        raise ConfigError([f"{to} exists already; name a folder that does not"])
    if (folder.parent / manifest.NAME).exists():
        manifest.verify(folder.parent)
    is_adapter = adapters.is_adapter(folder)
    if merge and not is_adapter:
        raise ConfigError([f"--merge: {folder} is a whole model, not an adapter; leave --merge out"])
    goes_whole = merge or not is_adapter
    format = find_format(folder, merge) if goes_whole else None  # an adapter goes without a tokenizer
    say_leftovers(to)
    aside = to.with_name(f".writing-{to.name}-{secrets.token_hex(_ASIDE_BYTES)}")  # another export may be at work
    try:
        with disk_errors("export", to.parent, then="it begins anew"):
            if merge:
                with memory_errors(device):
                    write_merged(adapters.find(folder, trust_remote_code), aside, base, dtype, device)
            else:
                shutil.copytree(folder, aside)
                if is_adapter and (training := trained.find(folder)) is not None:
                    copy_beside(training, aside / "llmtrain")
            if goes_whole:
                template = prompts.shipped_template(format, aside) if format and format.kind == "chat" else None
                prompts.write_settings(aside, None, template, transformers_ids.settings_needed(aside))
                check_tokenizer(aside, format or TextFormat())
        if not is_adapter:
            check_whole(folder, aside)
        if to.exists():
            raise ConfigError([f"{to} exists already: another export was faster; nothing of this one is kept"])
        aside.rename(to)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    how = f"exported   model in {to}: AutoModelForCausalLM"
    if not goes_whole:
        told = "copied as it is (with --merge the whole model's logits are checked)"
        how = f"exported   adapter in {to}, {told}: AutoPeftModelForCausalLM"
    say(f"{how}.from_pretrained({str(to)!r})")


def say_leftovers(to: Path) -> None:
    """Exports that were killed leave gigabytes; whether one is still at work cannot be told from here."""
    for left in sorted(to.parent.glob(f".writing-{glob.escape(to.name)}-{'[0-9a-f]' * 2 * _ASIDE_BYTES}")):
        log.warning(f"{left}: left by an export that was killed, unless it is still at work; delete it")


def copy_beside(training: trained.Training, to: Path) -> None:
    """What `trained.find` reads, as an upload to the Hub has it."""
    to.mkdir(exist_ok=True)
    shutil.copyfile(training.file, to / "config.yaml")
    described = training.described / manifest.NAME
    if described.is_file():
        shutil.copyfile(described, to / manifest.NAME)


@contextlib.contextmanager
def memory_errors(device: torch.device) -> Iterator[None]:
    """Turn "out of memory", also under what loading makes of it, into a `ModelError` that says what can be done."""
    try:
        yield
    except (RuntimeError, ModelError) as error:
        causes = (error, error.__cause__)
        if not any(isinstance(each, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(each) for each in causes):
            raise
        instead = "use --device=cpu" if device.type == "cuda" else "take a machine with more"
        raise ModelError(
            f"--merge: out of memory on {device}: the base is loaded without quantisation, once at a time; {instead} "
            "(with --dtype=bf16 it takes half of what fp32 takes)"
        ) from error


def find_format(folder: Path, merge: bool) -> Format | None:
    """What the run's samples were; None where the template of chats is gone and was never beside the model.

    Raises:
        TokenizerError: it is gone, and a tokenizer is to be put together for a merged adapter.
    """
    try:
        return trained.format_of(folder)
    except TokenizerError as error:
        if merge:
            raise TokenizerError(f"--merge: {error}") from None
        log.warning(f"exported without the chat template that it was trained with: {error}")
        return None


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def write_merged(adapter: Adapter, to: Path, base: str, dtype: torch.dtype, device: torch.device) -> None:
    """Merge the adapter into unquantised weights, write them, read them back and compare.

    Never into the 4-bit weights: rounding to 4 bits again would change as much as the adapter does. Holds one
    unquantised model at a time.
    """
    from transformers import AutoModelForCausalLM

    from llmtrain.models import base as bases
    from llmtrain.models import base_experts, base_linears

    bases.be_quiet()
    quantised = adapter.base.quantisation != "none"
    stored = bases.stored_quantisation(adapter.base)
    ids = texts(bases.read_config(adapter.base.base, adapter.base.revision, adapter.base.trust_remote_code))
    as_trained: Tensor | None = None
    model: Any = None
    if quantised:
        say(f"loading    {adapter.base.base} in {adapter.base.quantisation}, as it was trained")
        peft = adapters.attach(adapter, bases.load(adapter.base, adapters.good_dtype(device), device))
        as_trained = logits(peft, ids)
        model = peft.unload()
        del peft
    if stored is not None or base == "original":
        model = None
        free(device)
    if stored is not None:
        model = bases.load(adapter.base, dtype, device).dequantize(dtype)
    else:
        say(f"loading    {adapter.base.base} in {str(dtype).removeprefix('torch.')}")
        original = bases.load(adapter.base, dtype, device, quantisation="none")
        if quantised and base == "dequantised":
            base_linears.dequantise(model, into=original)
            base_experts.dequantise(model, into=original)
        model, original = original, None
    peft = adapters.attach(adapter, model)
    before = logits(peft, ids)
    merged = peft.merge_and_unload(safe_merge=True)
    to.mkdir()
    ends_with(merged, adapters.write_tokenizer(adapter, to))
    merged.save_pretrained(str(to))
    del model, peft, merged
    free(device)
    trust = adapter.base.trust_remote_code
    again = AutoModelForCausalLM.from_pretrained(str(to), dtype=dtype, device_map={"": device}, trust_remote_code=trust)
    after = logits(again.eval(), ids)
    compare("merging", before, after, TOLERANCE[dtype])
    if as_trained is not None:
        found = distance(as_trained, after)
        say(f"           from the quantised base with the adapter, as it was trained, they differ by {found:.2e}")


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ends_with(model: Any, eos_id: int) -> None:
    """Let transformers' generation stop also at what ended the texts of training, where the base does not."""
    settings = model.generation_config
    if any(getattr(settings, name, None) not in (None, neutral) for name, neutral in _SAMPLING.items()):
        settings.do_sample = True  # which these settings mean; some bases leave it out, and could not be saved again
    known = model.generation_config.eos_token_id
    known = known if isinstance(known, list) else [] if known is None else [known]
    if eos_id not in known:
        model.generation_config.eos_token_id = [*known, eos_id] if known else eos_id


def check_whole(folder: Path, written: Path) -> None:
    """A model that was trained from scratch gives transformers the same logits."""
    from transformers import AutoModelForCausalLM

    from llmtrain.models import base as bases
    from llmtrain.models import read_model

    bases.be_quiet()

    ours, _ = read_model(folder)
    theirs = AutoModelForCausalLM.from_pretrained(str(written), dtype=torch.float32).eval()
    ids = texts(theirs.config)
    with torch.no_grad():
        mine = ours.eval().logits(ids)
    compare("transformers' forward pass", mine, logits(theirs, ids), TOLERANCE[torch.float32])


def check_tokenizer(written: Path, format: Format) -> None:
    """Say whether transformers gives the ids of training."""
    wrong = transformers_ids.wrong_texts(written, format)
    if wrong:
        log.warning(
            f"transformers' AutoTokenizer gives other ids than training saw for {wrong[0]!r}, one of {len(wrong)} such "
            "texts: apply the folder's tokenizer.json with the package tokenizers (Tokenizer.from_file) instead"
        )
    else:
        say("verified   transformers' tokenizer gives the ids of training")


def texts(config: Any) -> Tensor:
    """Token ids to compare logits on; the same at each call."""
    text = config.get_text_config()
    length = min(_LENGTH, getattr(text, "max_position_embeddings", _LENGTH))
    return torch.randint(text.vocab_size, (_TEXTS, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits.float().cpu()


def distance(one: Tensor, two: Tensor) -> float:
    """Root mean square of the differences, as a share of the logits' standard deviation."""
    return ((one - two).square().mean().sqrt() / one.std()).item()


def compare(what: str, before: Tensor, after: Tensor, tolerance: float) -> None:
    """Print how far logits moved; raises CheckpointError if by more than rounding."""
    found = distance(before, after)
    largest = (before - after).abs().max().item()
    say(f"verified   {what} moved the logits by {found:.2e} of their standard deviation (at most by {largest:.2e})")
    if not found <= tolerance:
        raise CheckpointError(
            f"{what} changed the logits by {found:.2e}, more than the tolerance {tolerance:.0e}; nothing was kept"
        )
    say(f"           within the tolerance of {tolerance:.0e}")


if __name__ == "__main__":
    main()
