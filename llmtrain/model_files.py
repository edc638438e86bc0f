"""The config.json of what is trained from scratch, in transformers' format: written, read, compared. No torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain import files, recipe
from llmtrain.config.load import Origins
from llmtrain.config.model_sections import FromScratch, GPTModel, LlamaModel, RopeScalingSection
from llmtrain.config.schema import RunConfig
from llmtrain.errors import CheckpointError, ConfigError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Of weights in several files, as transformers writes large ones."""
SETTINGS = "config.json"
NORM_EPS = 1e-5
"""Of layer norms: GPT-2's."""
_GPT2 = {
    "activation_function": "gelu_new", "layer_norm_epsilon": NORM_EPS, "n_inner": None, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
}  # fmt: skip
_LLAMA: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "qwen2": {"hidden_act": "silu", "use_sliding_window": False},
    "qwen3": {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False},
}
"""What is the same in all that is trained here, by transformers' names of the models."""
_CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}


@dataclass(frozen=True)
class Described:
    """What a model's config.json says."""

    model: FromScratch
    vocab_size: int
    eos_id: int | None


def _settings(model: FromScratch, vocab_size: int, eos_id: int) -> dict[str, Any]:
    common = {
        "model_type": model.model_type,
        "vocab_size": vocab_size,
        "tie_word_embeddings": model.tie_weights,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "dtype": "float32",
    }
    if model.kind == "gpt":
        return {
            **common,
            **_GPT2,
            "architectures": ["GPT2LMHeadModel"],
            "n_layer": model.num_layers,
            "n_head": model.num_heads,
            "n_embd": model.width,
            "n_positions": model.context,
            "embd_pdrop": model.dropout,
            "attn_pdrop": model.dropout,
            "resid_pdrop": model.dropout,
        }
    rope = _rope(model.rope_scaling)
    return {
        **common,
        **_LLAMA[model.model_type],
        "architectures": [_CLASSES[model.model_type]],
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "hidden_size": model.width,
        "head_dim": model.head_channels,
        "rms_norm_eps": model.norm_eps,
        "intermediate_size": model.inner_width,
        "max_position_embeddings": model.context,
        "rope_theta": model.rope_theta,  # where transformers before 5, and others, look for it
        **({} if model.rope_scaling is None else {"rope_scaling": rope}),
        "rope_parameters": {**rope, "rope_theta": model.rope_theta},
        "attention_dropout": 0.0,
    }


def _rope(scaling: RopeScalingSection | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default"}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_context,
    }


def write(folder: Path, model: FromScratch, vocab_size: int, eos_id: int) -> None:
    """Write the config.json of this model."""
    (folder / SETTINGS).write_text(json.dumps(_settings(model, vocab_size, eos_id), indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Described:
    """What a folder's config.json describes, which `write` or transformers wrote.

    Raises:
        CheckpointError: it cannot be read, or the model is none that is trained here.
    """
    file = folder / SETTINGS
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        match found["model_type"]:
            case "gpt2":
                model = _gpt(found)
            case kind if kind in _LLAMA:
                model = _llama(found)
            case other:
                raise ValueError(f"a {other} model; only gpt2, {', '.join(_LLAMA)} are read here")
        eos_id = found.get("eos_token_id")
        return Described(model, found["vocab_size"], eos_id if isinstance(eos_id, int) else None)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: cannot be read as a GPT-2 or a Llama of ours: {error}") from error


def _gpt(found: dict[str, Any]) -> GPTModel:
    _refuse_others(found, {**_GPT2, "n_inner": found.get("n_inner") and 4 * found["n_embd"]})
    return GPTModel(
        num_layers=found["n_layer"],
        num_heads=found["n_head"],
        width=found["n_embd"],
        context=found["n_positions"],
        dropout=found.get("embd_pdrop", 0.1),
        tie_weights=found.get("tie_word_embeddings", True),
    )


def _llama(found: dict[str, Any]) -> LlamaModel:
    """Of what is absent, transformers' defaults."""
    _refuse_others(found, _LLAMA[found["model_type"]])
    if others := set(found.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(f"it has layers of the kinds {', '.join(sorted(others))}; only full_attention is trained here")
    kind, usual = found["model_type"], found["hidden_size"] // found["num_attention_heads"]
    head_width = found.get("head_dim") or (128 if kind == "qwen3" else usual)
    rope = {"rope_theta": found.get("rope_theta", 10000.0), **(found.get("rope_scaling") or {})}
    rope |= found.get("rope_parameters") or {}
    return LlamaModel(
        kind="llama",
        num_layers=found["num_hidden_layers"],
        num_heads=found["num_attention_heads"],
        num_kv_heads=found.get("num_key_value_heads"),
        head_width=None if head_width == usual else head_width,
        width=found["hidden_size"],
        mlp_width=found["intermediate_size"],
        context=found["max_position_embeddings"],
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=_rope_scaling(rope),
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2",
        norm_eps=float(found.get("rms_norm_eps", 1e-6)),
        tie_weights=found.get("tie_word_embeddings", False),
    )


def _rope_scaling(rope: dict[str, Any]) -> RopeScalingSection | None:
    match rope.get("rope_type", rope.get("type", "default")):
        case "default":
            return None
        case "llama3":
            return RopeScalingSection(
                factor=float(rope["factor"]),
                low_freq_factor=float(rope["low_freq_factor"]),
                high_freq_factor=float(rope["high_freq_factor"]),
                original_context=rope["original_max_position_embeddings"],
            )
        case other:
            raise ValueError(f"its rotary positions are of the kind {other}; only default and llama3 are trained here")


def weight_files(folder: Path) -> list[Path]:
    """Where a folder's weights lie, in one file or in those that an index names.

    Raises:
        CheckpointError: the index cannot be read, or names what does not lie beside it.
        OSError: it cannot be read now, which says nothing about it.
    """
    index = folder / INDEX
    if (folder / WEIGHTS).is_file() or not index.is_file():
        return [folder / WEIGHTS]
    try:
        names: set[str] = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("it has to name files beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: cannot be read: {error}") from error
    return [folder / name for name in sorted(names)]


def _refuse_others(found: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raises ValueError for a setting with which the model computes something else. One that is absent is transformers'
    default, which is ours."""
    theirs = {name: found.get(name, ours[name]) for name in ours}
    if other := [f"{name}={theirs[name]} (here {our})" for name, our in ours.items() if theirs[name] != our]:
        raise ValueError(f"it is computed with {', '.join(other)}")


def check_start(config: RunConfig, origins: Origins) -> None:
    """Before hours of sharding.

    Raises:
        ConfigError: a run cannot begin with the weights of `model.start_from`.
        TokenizerError: a tokenizer.json is none.
    """
    model = config.model
    if model.kind == "qlora" or model.start_from is None:
        return
    folder, told = Path(model.start_from), origins.describe(config, "model.start_from")
    if not (folder / SETTINGS).is_file():
        instead = "the folder model/ of a checkpoint, or what was exported"
        if (folder / "model" / SETTINGS).is_file():
            instead = str(folder / "model")
        elif (folder / "checkpoints").is_dir():
            instead = f"{folder}/checkpoints/step-.../model, of the step that 'llmtrain checkpoints {folder}' names"
        raise ConfigError([f"{told}: no {SETTINGS} there; give {instead}"])
    try:
        if missing := [file.name for file in weight_files(folder) if not file.is_file()]:
            others = ""
            if missing == [WEIGHTS]:
                others = (
                    ". Weights in torch's own format, transformers writes anew: "
                    "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
                )
            raise ConfigError([f"{told}: no {', '.join(missing)} there{others}"])
        has = read(folder)
    except CheckpointError as error:
        raise ConfigError([f"{told}: {error}"]) from error
    if problems := _misfits(model, has):
        whole = {"start_from": model.start_from, **_sizes(has.model)}
        settings = ", ".join(f"{name}: {json.dumps(value)}" for name, value in whole.items())
        raise ConfigError([*(f"{told}: {problem}" for problem in problems), f"all of it: model: {{{settings}}}"])
    if (file := recipe.tokenizer_file(config)) is not None:
        check_vocabulary(config, origins, file)


def check_vocabulary(config: RunConfig, origins: Origins, tokenizer: Path) -> None:
    """`tokenizer`: the tokenizer.json of the data. With another one of the same size the embedding would mean nothing.

    Raises:
        ConfigError: there are fewer rows than tokens, or the weights of `model.start_from` were trained with others.
        TokenizerError: a tokenizer.json is none.
    """
    model = config.model
    if model.kind == "qlora" or (model.start_from is None and model.vocab_size is None):
        return
    ids = recipe.tokenizer_ids(tokenizer)
    tokens = max(ids.values()) + 1
    if model.rows(tokens) < tokens:
        told = origins.describe(config, "model.vocab_size")
        raise ConfigError([f"{told}: the data's tokenizer has {tokens:,} tokens; set model.vocab_size=null"])
    if model.start_from is None:
        return
    folder, told = Path(model.start_from), origins.describe(config, "model.start_from")
    use = "take the tokenizer that it was trained with (data.tokenizer: {kind: folder, path: ...})"
    own = recipe.tokenizer_ids(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else None
    has = read(folder).vocab_size
    if has != model.rows(tokens):
        if own == ids and has > tokens:
            use = f"set model.vocab_size={has}"
        raise ConfigError([f"{told}: it has a vocabulary of {has:,} tokens, the data's tokenizer {tokens:,}; {use}"])
    if own is not None and own != ids:
        raise ConfigError([f"{told}: its tokenizer has other tokens than the data's; {use}"])


def describe_start(config: RunConfig) -> str | None:
    """With which weights a run begins; None: with random ones."""
    if config.model.kind == "qlora" or config.model.start_from is None:
        return None
    weights = [f"{file} (SHA-256 {files.sha256(file)[:16]})" for file in weight_files(Path(config.model.start_from))]
    return f"with the weights {', '.join(weights)}"


def _misfits(model: FromScratch, has: Described) -> list[str]:
    if has.model.kind != model.kind:
        return [f"it is a {has.model.architecture}; set model.kind={has.model.kind}"]
    ours, theirs = _sizes(model), _sizes(has.model)
    return [
        f"it has {name}={json.dumps(value)}, here {json.dumps(ours[name])}; set model.{name}={json.dumps(value)}"
        for name, value in theirs.items()
        if ours[name] != value
    ]


def _sizes(model: FromScratch) -> dict[str, Any]:
    """Settings without which its weights would fit nowhere, or mean something else."""
    sizes: dict[str, Any] = {"kind": model.kind}
    sizes |= {name: getattr(model, name) for name in ("num_layers", "num_heads", "width", "tie_weights")}
    if model.kind == "gpt":
        return {**sizes, "context": model.context}
    return {
        **sizes,
        "num_kv_heads": model.kv_heads,
        "mlp_width": model.inner_width,
        "rope_theta": model.rope_theta,
        "head_width": model.head_channels,
        "rope_scaling": None if model.rope_scaling is None else model.rope_scaling.model_dump(),
        **{name: getattr(model, name) for name in ("qk_norm", "qkv_bias", "norm_eps")},
    }
