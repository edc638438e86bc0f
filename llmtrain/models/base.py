"""Base models for LoRA: what one is made of, and loading it quantised.

Everything that transformers and bitsandbytes say about a base passes through here; `qlora.py` builds on it.
"""

import contextlib
import functools
import logging
import os
import pickle
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from llmtrain import log
from llmtrain.base_facts import OTHER_FORMATS, BaseFacts, Linear
from llmtrain.config.model_sections import QLoRAModel
from llmtrain.errors import ModelError
from llmtrain.models import base_experts, base_layers, base_linears, base_logits
from llmtrain.models.base_attention import head_width
from llmtrain.models.base_errors import conversion_errors_raised, pass_on_the_disks, pass_on_the_gpus

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_NAMED = 4


def compute_dtype(config: QLoRAModel, precision: str) -> torch.dtype:
    """What the base computes in, where `train.precision` is `precision`."""
    return _DTYPES[precision if config.compute_dtype == "auto" else config.compute_dtype]


def place(base: str) -> str:
    """The base as transformers takes it: a folder's full path, or a name on the Hub."""
    path = Path(base)
    return str(path.resolve()) if path.is_dir() else base


def _folder(base: str) -> Path:
    """Where its files lie; of one on the Hub, where the Hub's client keeps all of them."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(base) if Path(base).is_dir() else Path(HF_HUB_CACHE)


@functools.lru_cache(maxsize=4)
def read_config(base: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The base's configuration, as transformers reads it.

    Raises:
        ModelError: it cannot be had, or wants code of its own that nobody allowed.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(place(base), revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:
        pass_on_the_disks(error, base, _folder(base))
        text = str(error)
        if "trust_remote_code" in text:
            raise ModelError(
                f"model.base={base} comes with Python code of its own, which would run on this machine. If you trust "
                "its authors, set model.trust_remote_code=true (of an adapter outside its run: --trust-remote-code)"
            ) from None
        raise ModelError(
            f"model.base={base}: its configuration cannot be loaded ({type(error).__name__}: "
            f"{text.splitlines()[0] if text else ''}). Give a folder with config.json, or a name on the Hub (for one "
            "that asks for permission: accept its terms there, then 'hf auth login')"
        ) from error


def outline(config: QLoRAModel) -> Any:
    """The base on the meta device: no weights are loaded.

    Raises:
        ModelError: it cannot be had, or is of a kind that cannot be trained here.
    """
    be_quiet()
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    hf = read_config(config.base, config.revision, config.trust_remote_code)
    text = hf.get_text_config()
    if getattr(text, "num_attention_heads", None) is None:  # Mamba, RWKV, xLSTM
        raise ModelError(
            f"model.base={config.base}: not a model with attention (its configuration, of kind {hf.model_type}, has no "
            "num_attention_heads), which is not supported; take another base"
        )
    if hasattr(hf, "quantization_config"):
        hf = hf.__class__.from_dict({k: v for k, v in hf.to_dict().items() if k != "quantization_config"})
    try:
        with init_empty_weights(include_buffers=True):
            model = AutoModelForCausalLM.from_config(hf, trust_remote_code=config.trust_remote_code)
    except ImportError as error:  # Gemma 3n wants timm, for pictures
        raise ModelError(f"model.base={config.base}: {' '.join(str(error).split())}") from error
    except ValueError as error:
        raise ModelError(
            f"model.base={config.base}: not a model that continues text: {str(error).splitlines()[0]}"
        ) from error
    decoder = model.get_decoder()
    if decoder is model or not hasattr(decoder, "config"):  # Llama 4's part that reads text; ModernBERT's
        raise ModelError(
            f"model.base={config.base}: {type(model).__name__} does not tell its output layer from the rest, which is "
            "not supported; take another base"
        )
    return model


def describe(config: QLoRAModel) -> BaseFacts:
    """Count the parts of the base's outline. Raises ModelError as that does."""
    model = outline(config)
    text: Any = read_config(config.base, config.revision, config.trust_remote_code).get_text_config()
    quantised = base_linears.names_quantised(model, _stored(config).get("llm_int8_skip_modules"))
    linears = _count(base_linears.text_linears(model), quantised)
    unread = _count(base_linears.unread_linears(model), quantised)
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = head_width(text)
    return BaseFacts(
        architecture=type(model).__name__,
        vocab_size=model.get_input_embeddings().weight.shape[0],
        positions=getattr(text, "max_position_embeddings", None),
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_width=kv_heads * width if width else max(each.outputs for each in linears if each.name == "k_proj"),
        linears=linears,
        unread=unread,
        other_parameters=sum(p.numel() for p in model.parameters()) - sum(each.weights for each in (*linears, *unread)),
        expert_parameters=base_experts.count(model),
        stacked_experts=sum(shape.numel() for shape, _ in base_experts.shapes(model)),
        largest_stack=base_experts.largest(model),
        caps_logits=base_logits.read(text).cap is not None,
        keeps_scores=model.get_decoder().config._attn_implementation == "eager",
    )


def _count(modules: list[tuple[str, nn.Module]], quantised: set[str]) -> tuple[Linear, ...]:
    kinds = Counter(
        (name.rsplit(".", 1)[-1], *base_linears.shape_of(module), name in quantised) for name, module in modules
    )
    return tuple(Linear(name, ins, outs, count, is_so) for (name, ins, outs, is_so), count in kinds.items())


def stored_quantisation(config: QLoRAModel) -> str | None:
    """How the base's weights are quantised where they lie; None if they are not."""
    values = _stored(config)
    if not values:
        return None
    if values.get("quant_method") != "bitsandbytes":
        return str(values.get("quant_method"))
    if values.get("load_in_8bit"):
        return "int8"
    return str(values.get("bnb_4bit_quant_type", "fp4"))


def _stored(config: QLoRAModel) -> dict[str, Any]:
    stored = getattr(read_config(config.base, config.revision, config.trust_remote_code), "quantization_config", None)
    if stored is None or isinstance(stored, dict):
        return stored or {}
    return stored.to_dict()


def fetch(config: QLoRAModel) -> Path:
    """Bring a base from the Hub onto this machine, with progress; one in a folder is there already.

    Returns the folder that it lies in.

    Raises:
        ModelError: it cannot be had.
    """
    folder = Path(config.base)
    if folder.is_dir():
        return folder
    import huggingface_hub

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", *(["*.py"] if config.trust_remote_code else [])]
    try:
        if sys.stderr.isatty():
            huggingface_hub.utils.enable_progress_bars()
        else:
            log.info(f"base       fetching {config.base} from the Hub")
        return Path(
            huggingface_hub.snapshot_download(
                config.base, revision=config.revision, allow_patterns=wanted, ignore_patterns=[*OTHER_FORMATS]
            )
        )
    except Exception as error:
        pass_on_the_disks(error, config.base, _folder(config.base))
        raise ModelError(
            f"model.base={config.base} cannot be fetched from the Hub: {type(error).__name__}: "
            f"{(str(error).splitlines() or [''])[0]}"
        ) from error
    finally:
        be_quiet()


def load(config: QLoRAModel, dtype: torch.dtype, device: torch.device, quantisation: str | None = None) -> Any:
    """The base on `device`, frozen, quantised as configured (or as `quantisation` says).

    Raises:
        ModelError: it cannot be loaded.
        DiskFull, RunFolderError, OSError: what a disk reports, which says nothing about it.
        torch.OutOfMemoryError, torch.AcceleratorError: the GPU is too full for it, or does not work.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    be_quiet()
    quantisation = quantisation or config.quantisation
    how = {
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.double_quantisation,
            bnb_4bit_compute_dtype=dtype,
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "none": None,
    }[quantisation]
    # Where the weights lie quantised already, their own configuration says how; even None would override it.
    how = {} if how is None or stored_quantisation(config) is not None else {"quantization_config": how}
    try:
        experts_too = base_experts.quantised_on_load(config.double_quantisation)
        with warnings.catch_warnings(), conversion_errors_raised(), experts_too:
            warnings.simplefilter("ignore")
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place(config.base),
                revision=config.revision,
                dtype=dtype,
                **how,
                device_map={"": device},
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
            )
            model, told = loaded
    except pickle.UnpicklingError as error:  # torch advises to load it all the same
        raise ModelError(
            f"model.base={config.base}: its .bin file holds more than weights, and reading it would run its code. Ask "
            "its authors for safetensors"
        ) from error
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        pass_on_the_gpus(error)
        pass_on_the_disks(error, config.base, _folder(config.base))
        raise ModelError(
            f"model.base={config.base} cannot be loaded: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    _refuse_drawn(config, told)
    model.requires_grad_(False)
    base_experts.use_quantised(model)
    base_layers.keep_layout(model, dtype)
    if device.type == "cpu":
        base_layers.keep_scales(model)
    return model


def _refuse_drawn(config: QLoRAModel, told: dict[str, Any]) -> None:
    """What the files lack transformers draws at random, in each process anew.

    Raises:
        ModelError: names it.
    """
    drawn = {"missing": sorted(told["missing_keys"]), "of another shape": sorted(map(_key, told["mismatched_keys"]))}
    found = [
        f"{len(names)} {how} ({', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''})"
        for how, names in drawn.items()
        if names
    ]
    if found:
        raise ModelError(
            f"model.base={config.base}: its files do not hold all of its weights: {'; '.join(found)}. Get them again, "
            "or take the base that they belong to; what is not there would be random numbers"
        )


def _key(mismatched: str | tuple[str, ...]) -> str:
    return mismatched if isinstance(mismatched, str) else mismatched[0]  # with the two shapes behind it


def be_quiet() -> None:
    """Libraries say much on the way that is nobody's to act on."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for talkative in ("autograd._functions", "backends.cpu.ops"):  # at every int8 layer; of a kernel that is not needed
        logging.getLogger(f"bitsandbytes.{talkative}").setLevel(logging.ERROR)
    # peft imports DeepSpeed where it is installed, which then looks for accelerators aloud.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def rows_apart(quantised: nn.Module) -> Iterator[None]:
    """Within it an int8 base computes each position from its own input alone.

    LLM.int8() takes the columns with a large value in any row of a forward pass out of the 8 bits, in all rows: what a
    document gives then depends, by what 8 bits round, on which others are computed with it.
    """
    from bitsandbytes.nn.modules import Linear8bitLt

    states: list[Any] = [module.state for module in quantised.modules() if isinstance(module, Linear8bitLt)]
    before = [state.threshold for state in states]
    for state in states:
        state.threshold = 0.0
    try:
        yield
    finally:
        for state, threshold in zip(states, before, strict=True):
            state.threshold = threshold
