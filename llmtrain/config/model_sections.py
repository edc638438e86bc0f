"""Settings of the model: a GPT from scratch, or a quantised base with LoRA."""

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
    init: Literal["gpt2", "pytorch"] = "gpt2"
    """gpt2: N(0, 0.02), residual projections scaled by 1/sqrt(2 layers). pytorch: the layers' defaults."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.num_heads:
            fitting = [h for h in range(1, min(self.width // 8, 4096) + 1) if self.width % h == 0]
            raise ValueError(
                f"num_heads={self.num_heads} does not divide width={self.width}; use one of "
                + ", ".join(map(str, fitting[-12:]))
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


Model = Annotated[GPTModel | QLoRAModel, Field(discriminator="kind")]

QLORA_DEFAULTS: dict[str, object] = {
    "data.packing": "bestfit",
    "optim.lr": 2e-4,
    "optim.weight_decay": 0.0,
    "evaluate.sample.prompt": "",
}
"""Defaults that differ for `model.kind: qlora`."""
