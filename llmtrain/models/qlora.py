"""A frozen, quantised base with LoRA (Hu et al. 2021; Dettmers et al. 2023, QLoRA).

Shapes: B rows, T positions, D hidden width, V vocabulary.

The base runs as transformers built it, up to its last hidden state; the output layer and the loss are
ours (`loss.py`), so that the logits of a 128k vocabulary never exist all at once, in fp32 or otherwise.
Documents that share a row are computed one by one (`base_attention.py`) where the base lets us; else they are kept
apart by positions that restart at 0: transformers isolates them then, but only without an attention mask and without a
cache. `isolation.check` proves it at the start of a run.
"""

import inspect
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain import tensorfile
from llmtrain.config.model_sections import QLoRAModel
from llmtrain.data import IGNORE, Documents
from llmtrain.errors import CheckpointError, ModelError
from llmtrain.manifest import FileInfo
from llmtrain.models import base as bases
from llmtrain.models import base_attention, base_experts, base_linears, base_logits, lora_layers
from llmtrain.models.cached import CachedGenerator
from llmtrain.models.loss import Head, batch_loss, token_losses

ADAPTER = "adapter_model.safetensors"
_PREFIX = "peft."
_IN_FILE = "base_model.model."
"""What peft puts before the names of the base's layers."""


class QLoRA(nn.Module):
    """`forward` returns the summed loss of a batch, `logits` what the isolation check compares."""

    def __init__(
        self,
        config: QLoRAModel,
        precision: str,
        device: torch.device,
        seed: int,
        activation_checkpointing: bool = False,
    ):
        """Loads the base onto `device`; the adapter's initial weights depend on configuration and seed alone.

        Raises:
            ModelError: the base cannot be used.
        """
        super().__init__()
        self.config = config
        self.dtype = bases.compute_dtype(config, precision)
        model = bases.load(config, self.dtype, device)
        self._logit_changes = base_logits.read(model.config.get_text_config())
        self._by_document = base_attention.use(model, config.context, self.dtype, device)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft and we ask transformers for what it renamed
            if activation_checkpointing:  # restores dropout's random numbers: the same loss and gradients
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            torch.manual_seed(seed)
            self.peft: Any = _with_adapter(config, model)
        lora_layers.use(self.peft)
        self._autocast = precision == "bf16"
        if self._autocast:  # peft would copy each layer's input to fp32, for autocast to bring it back to bf16
            for module in self.peft.modules():
                if hasattr(module, "cast_input_dtype_enabled"):
                    module.cast_input_dtype_enabled = False
        dtype = torch.float32 if config.lora.dtype == "fp32" else torch.bfloat16
        for parameter in self.trainable().values():
            parameter.data = parameter.data.to(dtype)

    def trainable(self) -> dict[str, nn.Parameter]:
        """The adapter's parameters by name; all else is frozen."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    @property
    def _base(self) -> Any:
        return self.peft.get_base_model()

    @property
    def _head(self) -> Head:
        layer = self._base.get_output_embeddings()
        return Head(layer.weight, getattr(layer, "bias", None), self._logit_changes.cap)

    def forward(
        self,
        input_ids: Tensor,
        targets: Tensor,
        documents: Documents | None = None,
        positions: Tensor | None = None,
        learned: Tensor | None = None,
    ) -> Tensor:
        """Sum of the cross-entropies of all supervised positions, in nats: fp32, without gradients float64."""
        hidden_BTD = self.hidden(input_ids, documents, positions)
        return batch_loss(hidden_BTD, self._head, targets, learned, IGNORE)

    @torch.no_grad()
    def token_losses(
        self, input_ids: Tensor, targets: Tensor, documents: Documents | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """(B, T) cross-entropies in nats, 0 where a position is not supervised; their sum is `forward`'s result."""
        hidden_ND, targets_N = self.hidden(input_ids, documents, positions).flatten(0, 1), targets.flatten()
        supervised = targets_N != IGNORE  # indexing by it is a host sync; who scores reads the result next anyway
        losses_N = torch.zeros(targets_N.shape, device=targets_N.device)
        losses_N[supervised] = token_losses(hidden_ND[supervised], self._head, targets_N[supervised], IGNORE)
        return losses_N.view_as(targets)

    def hidden(self, input_ids: Tensor, documents: Documents | None, positions: Tensor | None) -> Tensor:
        """(B, T, D), after the last norm, and scaled as the logits will be."""
        told = {} if documents is None or not self._by_document else base_attention.told(documents)
        output = self._base.get_decoder()(input_ids=input_ids, position_ids=positions, use_cache=False, **told)
        scale = self._logit_changes.scale
        return output.last_hidden_state if scale == 1 else output.last_hidden_state * scale

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """(N, V), as the loss sees them."""
        return self._head.logits(hidden_ND.to(self._head.weight.dtype))

    def text_generator(self) -> CachedGenerator:
        self.eval()  # the whole: its mode is what tells a strategy to switch back
        return text_generator(self.peft, self.config.context, self._autocast)

    def title(self) -> str:
        """What is trained, for people."""
        linears = [module for _, module in base_linears.linear_modules(self._base)]
        plain = str(self.dtype).removeprefix("torch.")
        how = {"nf4": "4 bits (nf4)", "int8": "8 bits", "none": plain}[self.config.quantisation]
        experts = list(base_experts.shapes(self._base))
        unquantised = _num_frozen([module for module in linears if not base_linears.is_quantised(module)]) / 1e6
        unquantised += sum(shape.numel() for shape, packed in experts if not packed) / 1e6
        frozen = (_num_frozen(linears) + sum(shape.numel() for shape, _ in experts)) / 1e6
        if self.config.quantisation != "none" and unquantised:
            frozen -= unquantised
            how += f" and {unquantised:,.1f} M, which bitsandbytes does not quantise, in {plain}"
        return (
            f"{type(self._base).__name__} from {self.config.base}, {frozen:,.1f} M weights frozen in {how}, "
            f"LoRA of rank {self.config.lora.r} with {self.num_parameters() / 1e6:.2f} M"
        )

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.trainable().values())

    def flops_per_token(self) -> float:
        """Forward, and backward without the gradients of frozen weights: 4 N for the base, 6 N for the adapter."""
        text = self._base.config.get_text_config()
        linears = [module for _, module in base_linears.text_linears(self._base)]
        frozen = float(_num_frozen(linears) + self._head.weight.numel())
        chosen = getattr(text, "num_experts_per_tok", None) or 0  # of a mixture's experts, for each token
        frozen += sum(shape.numel() * chosen / shape[0] for shape, _ in base_experts.shapes(self._base))
        attention = 12 * text.num_hidden_layers * text.hidden_size * self.config.context
        return 4.0 * frozen + 6.0 * self.num_parameters() + attention

    def save(self, folder: Path, weights: dict[str, Tensor], eos_id: int) -> dict[str, FileInfo]:
        """Write the adapter as peft reads it: its weights (`weights`, by this module's names) and configuration.

        No tokenizer: `AutoPeftModel` would cut or enlarge the base's embedding to its size.
        Returns the weights' file, which is on the disk by then.
        """
        from peft import get_peft_model_state_dict

        named = {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}
        tensors = get_peft_model_state_dict(self.peft, state_dict=named, save_embedding_layers=False)
        described = self.peft.peft_config["default"]
        was, described.inference_mode = described.inference_mode, True
        described.save_pretrained(str(folder))
        described.inference_mode = was
        return {ADAPTER: tensorfile.write(folder / ADAPTER, tensors, {"format": "pt"})}

    def load(self, folder: Path) -> None:
        """Fill the adapter from what `save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged, or its tensors are not this adapter's.
            OSError: it cannot be read now, which says nothing about it.
        """
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        # Earlier versions put LoRA on what text never goes through too, where it stayed as it began.
        unread = {name for name, _ in base_linears.unread_linears(self._base)}
        tensors = {
            name: tensor
            for name, tensor in tensorfile.read(folder / ADAPTER).items()
            if name.removeprefix(_IN_FILE).partition(".lora_")[0] not in unread
        }
        mine = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        if {k: v.shape for k, v in mine.items()} != {k: v.shape for k, v in tensors.items()}:
            raise CheckpointError(f"{folder / ADAPTER}: not the weights of this adapter")
        set_peft_model_state_dict(self.peft, tensors)


def lora_config(config: QLoRAModel, model: Any) -> Any:
    """peft's configuration of the adapter."""
    from peft import LoraConfig

    lora = config.lora
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.scale_alpha,  # pyright: ignore[reportArgumentType]  peft declares int and computes alpha / r
        lora_dropout=lora.dropout,
        target_modules=_targets(lora.target_modules, model),
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=bases.place(config.base),
        revision=config.revision,
        fan_in_fan_out=type(base_linears.text_linears(model)[0][1]).__name__ == "Conv1D",
    )


def _with_adapter(config: QLoRAModel, model: Any) -> Any:
    """The base with an adapter (a peft model).

    Raises:
        ModelError: peft cannot add LoRA to these layers.
    """
    from peft import get_peft_model

    has = dict.fromkeys(name.rsplit(".", 1)[-1] for name, _ in base_linears.text_linears(model))
    try:
        return get_peft_model(model, lora_config(config, model), autocast_adapter_dtype=False)
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        wanted = config.lora.target_modules
        raise ModelError(
            f"model.lora.target_modules={wanted if isinstance(wanted, str) else ', '.join(wanted)}: LoRA cannot be "
            f"added to these layers of model.base={config.base}. peft says: {' '.join(str(error).split())} Name "
            f"others in model.lora.target_modules; the base has {', '.join(has)}"
        ) from error


def check_adapter(config: QLoRAModel) -> None:
    """Raises ModelError if peft cannot add LoRA to the base, which is not loaded for that."""
    plain = config.lora.model_copy(update={"dora": False})  # DoRA looks at the weights
    model = bases.outline(config)
    with torch.device("meta"):
        _with_adapter(config.model_copy(update={"lora": plain}), model)


def _targets(wanted: list[str] | str, model: nn.Module) -> list[str]:
    """The linear layers that are counted (`BaseFacts.targets`), for peft: named in full where their names alone would
    mean others too. Its own all-linear takes a mixture's experts as well."""
    linears = {name: name.rsplit(".", 1)[-1] for name, _ in base_linears.text_linears(model)}
    chosen = {name: last for name, last in linears.items() if wanted == "all-linear" or last in wanted}
    meant = {name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in chosen.values()}
    return list(dict.fromkeys(chosen.values())) if meant == set(chosen) else list(chosen)


def _num_frozen(linears: list[nn.Module]) -> int:
    """Weights of the base's among these layers; the adapter's own lie among them."""
    return sum(math.prod(base_linears.shape_of(module)) for module in linears if not module.weight.requires_grad)


def text_generator(model: Any, context: int, autocast: bool = False) -> CachedGenerator:
    """Of a base with an adapter (a peft model) in evaluation mode, with transformers' cache."""
    takes = "logits_to_keep" in inspect.signature(model.get_base_model().forward).parameters
    last: dict[str, Any] = {"logits_to_keep": 1} if takes else {}  # not a vocabulary for each token of the prompt
    device = next(model.parameters()).device

    def forward(input_ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, **last)
        return output.logits[0, -1], output.past_key_values

    return CachedGenerator(forward, context, device)
