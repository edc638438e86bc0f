"""Settings of the model: a GPT or a Llama from scratch, or a quantised base with LoRA."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llmtrain.config.section import MAY_CHANGE, Folder, Section


class GPTModel(Section):
    kind: Literal["gpt"] = "gpt"
    """GPT-2's architecture. 12 layers, 12 heads, width 768 is GPT-2 small (124 M parameters tied)."""
    num_layers: Annotated[int, Field(ge=1)] = 4
    """Transformer blocks."""
    num_heads: Annotated[int, Field(ge=1)] = 4
    """Attention heads per block; must divide `width`."""
    width: Annotated[int, Field(ge=1)] = 256
    """Size of the hidden states; the MLP is 4 times as wide."""
    context: Annotated[int, Field(ge=2)] = 256
    """Tokens that the model sees at once; also the length of a training row."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On embeddings, attention probabilities and each block's two outputs."""
    qkv_bias: bool = True
    """Biases on query, key and value."""
    tie_weights: bool = True
    """Use the token embedding as output matrix too."""
    vocab_size: Annotated[int, Field(ge=1)] | None = None
    """Rows of the embedding; null: as many as the tokenizer has tokens. Given weights may have more."""
    init: Literal["gpt2", "pytorch"] = "gpt2"
    """gpt2: N(0, 0.02), residual projections scaled by 1/sqrt(2 layers). pytorch: the layers' defaults."""
    start_from: Annotated[Folder, Field(min_length=1, json_schema_extra=MAY_CHANGE)] | None = None
    """Begin with the weights of this folder (`model/` of a checkpoint, what was exported, a GPT-2 of transformers')
    instead of random ones; it is read at the first start alone, and its tokenizer is the default one."""

    @property
    def architecture(self) -> str:
        """For people."""
        return "GPT"

    @property
    def inner_width(self) -> int:
        """Size inside the MLP."""
        return 4 * self.width

    @property
    def head_channels(self) -> int:
        """Of queries and keys, in each head."""
        return self.width // self.num_heads

    def rows(self, tokens: int) -> int:
        """Of the embedding, where the tokenizer has so many tokens."""
        return self.vocab_size or tokens

    @property
    def model_type(self) -> str:
        """transformers' name of it."""
        return "gpt2"

    @property
    def has_dropout(self) -> bool:
        """Whether random numbers are drawn in training."""
        return self.dropout > 0

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        _check_heads(self.num_heads, self.width)
        return self


def _check_heads(num_heads: int, width: int, multiple_of: int = 1) -> None:
    """Raises ValueError unless the width can be divided so; a head's width is a multiple of `multiple_of`."""
    if width % (num_heads * multiple_of):
        sizes = range(1, min(width // 8, 4096) + 1)
        fitting = [str(heads) for heads in sizes if width % (heads * multiple_of) == 0]
        evenly = "" if multiple_of == 1 else f" into heads of a multiple of {multiple_of}"
        use = f"one of {', '.join(fitting[-12:])}" if fitting else f"a width of a multiple of {num_heads * multiple_of}"
        raise ValueError(f"num_heads={num_heads} does not divide width={width}{evenly}; use {use}")


class RopeScalingSection(Section):
    factor: Annotated[float, Field(ge=1)] = 8.0
    """How many times as slowly the slow channels turn; Llama 3.1 has 8, 3.2 has 32."""
    low_freq_factor: Annotated[float, Field(gt=0)] = 1.0
    """Channels that turn less often than this within `original_context` are slow."""
    high_freq_factor: Annotated[float, Field(gt=0)] = 4.0
    """Those that turn more often than this stay as they are; those between are mixed."""
    original_context: Annotated[int, Field(ge=1)] = 8192
    """Tokens that the model saw at once before it was stretched."""

    @model_validator(mode="after")
    def _factors_are_ordered(self) -> Self:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} has to be above low_freq_factor={self.low_freq_factor}; "
                "Llama 3.1 has 4 and 1"
            )
        return self


class LlamaModel(Section):
    kind: Literal["llama"]
    """Llama's architecture: rotary positions, RMS norms, a gated MLP; no dropout. With `qk_norm` it is Qwen 3's, with
    `qkv_bias` Qwen 2's."""
    num_layers: Annotated[int, Field(ge=1)] = 4
    """Transformer blocks."""
    num_heads: Annotated[int, Field(ge=1)] = 4
    """Attention heads per block; must divide `width` into even parts, unless `head_width` is given."""
    num_kv_heads: Annotated[int, Field(ge=1)] | None = None
    """Heads of keys and values, each for several of queries; must divide `num_heads`. null: as many."""
    head_width: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """Channels of a head; null: `width` / `num_heads`."""
    width: Annotated[int, Field(ge=1)] = 256
    """Size of the hidden states."""
    mlp_width: Annotated[int, Field(ge=1)] | None = None
    """Size inside the MLP; null: 8/3 of `width`, up to a multiple of 64 (a block is then as large as GPT-2's)."""
    context: Annotated[int, Field(ge=2)] = 256
    """Tokens that the model sees at once; also the length of a training row."""
    rope_theta: Annotated[float, Field(gt=1)] = 10000.0
    """Base of the rotary positions' wavelengths."""
    rope_scaling: RopeScalingSection | None = None
    """Rotary positions stretched as in Llama 3.1, for weights that were trained so; null: not."""
    qk_norm: bool = False
    """RMS norms on each head's queries and keys, which bound the attention's scores."""
    qkv_bias: bool = False
    """Biases on query, key and value."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Added to the mean square in RMS norms."""
    tie_weights: bool = True
    """Use the token embedding as output matrix too."""
    vocab_size: Annotated[int, Field(ge=1)] | None = None
    """Rows of the embedding; null: as many as the tokenizer has tokens. Given weights may have more."""
    start_from: Annotated[Folder, Field(min_length=1, json_schema_extra=MAY_CHANGE)] | None = None
    """Begin with the weights of this folder (`model/` of a checkpoint, what was exported, transformers' Llama or Qwen)
    instead of random ones; it is read at the first start alone, and its tokenizer is the default one."""

    @property
    def architecture(self) -> str:
        """For people."""
        return "Qwen3" if self.qk_norm else "Qwen2" if self.qkv_bias else "Llama"

    @property
    def model_type(self) -> str:
        """transformers' name of it."""
        return self.architecture.lower()

    @property
    def head_channels(self) -> int:
        """Of queries and keys, in each head: head_width, or its default."""
        return self.head_width or self.width // self.num_heads

    def rows(self, tokens: int) -> int:
        """Of the embedding, where the tokenizer has so many tokens."""
        return self.vocab_size or tokens

    @property
    def has_dropout(self) -> bool:
        """Whether random numbers are drawn in training."""
        return False

    @property
    def kv_heads(self) -> int:
        """num_kv_heads, or its default."""
        return self.num_kv_heads or self.num_heads

    @property
    def inner_width(self) -> int:
        """mlp_width, or its default."""
        return self.mlp_width or -(-8 * self.width // (3 * 64)) * 64

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.qk_norm and self.qkv_bias:
            raise ValueError("qk_norm=true and qkv_bias=true: no model has both (Qwen 3 the one, Qwen 2 the other)")
        if self.head_width is None:
            _check_heads(self.num_heads, self.width, multiple_of=2)
        if self.num_heads % self.kv_heads:
            fitting = [str(heads) for heads in range(1, self.num_heads + 1) if self.num_heads % heads == 0]
            raise ValueError(
                f"num_kv_heads={self.num_kv_heads} does not divide num_heads={self.num_heads}; use one of "
                + ", ".join(fitting)
            )
        return self


class LoraSection(Section):
    r: Annotated[int, Field(ge=1)] = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The update is scaled by alpha / r; by default alpha is 2 r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On the update's input."""
    target_modules: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Names of the linear layers that get an update, e.g. [q_proj, v_proj]; all-linear: all but the output layer."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) instead (Kalajdzievski 2023)."""
    dora: bool = False
    """Learn magnitude and direction apart (Liu et al. 2024, DoRA)."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Of the update's weights and of their optimizer state."""

    @property
    def scale_alpha(self) -> float:
        """alpha, or its default."""
        return 2.0 * self.r if self.alpha is None else self.alpha


class QLoRAModel(Section):
    kind: Literal["qlora"]
    """A frozen, quantised base model with LoRA (Hu et al. 2021; Dettmers et al. 2023)."""
    base: Annotated[Folder, Field(min_length=1)]
    """The base model: a local folder, or a name on the Hugging Face Hub."""
    revision: str | None = None
    """The base's branch, tag or commit on the Hub."""
    quantisation: Literal["nf4", "int8", "none"] = "nf4"
    """nf4: 4 bits a weight. int8: 8. none: plain LoRA over the base as it is."""
    double_quantisation: bool = True
    """nf4 only: quantise the block scales too, which saves 0.4 bits a weight."""
    compute_dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """What the base computes in, and the type of its weights that are not quantised; auto: `train.precision`."""
    context: Annotated[int, Field(ge=2)] = 1024
    """Length of a training row, in tokens."""
    trust_remote_code: Annotated[bool, Field(json_schema_extra=MAY_CHANGE)] = False
    """Run Python code that comes with the base. Only for authors whom you trust with this machine."""
    lora: LoraSection = LoraSection()

    @property
    def has_dropout(self) -> bool:
        """Whether random numbers are drawn in training."""
        return self.lora.dropout > 0


FromScratch = GPTModel | LlamaModel
Model = Annotated[FromScratch | QLoRAModel, Field(discriminator="kind")]

QLORA_DEFAULTS: dict[str, object] = {
    "data.packing": "bestfit",
    "optim.lr": 2e-4,
    "optim.weight_decay": 0.0,
    "evaluate.sample.prompt": "",
}
"""Defaults that differ for `model.kind: qlora`."""
