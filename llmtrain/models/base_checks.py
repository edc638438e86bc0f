"""Whether a base can be used as it is configured: all that can be known to fail before its weights are loaded."""

import difflib
from typing import Any

from llmtrain.base_facts import BaseFacts
from llmtrain.config.model_sections import QLoRAModel
from llmtrain.errors import ModelError
from llmtrain.models.base import read_config, stored_quantisation


def check(config: QLoRAModel, facts: BaseFacts, tokenizer_size: int | None) -> None:
    """Everything about the base that can be known to fail.

    Raises:
        ModelError: lists all that is wrong.
    """
    problems = [*_quantised_another_way(config), *_experts(config, facts), *_unknown_targets(config, facts)]
    problems += facts.tokenizer_problems(tokenizer_size)
    text: Any = read_config(config.base, config.revision, config.trust_remote_code).get_text_config()
    problems += _two_scales(config, text)
    if facts.positions is not None and config.context > facts.positions:
        problems.append(
            f"model.context={config.context} is longer than the base was made for ({facts.positions} positions)"
        )
    if problems:
        raise ModelError(f"model.base={config.base} cannot be used so:" + "".join(f"\n  - {p}" for p in problems))


def _quantised_another_way(config: QLoRAModel) -> list[str]:
    stored = stored_quantisation(config)
    if stored in (None, config.quantisation):
        return []
    use = f"set model.quantisation={stored} to train on it as it is" if stored in ("nf4", "int8") else None
    fix = "; ".join(filter(None, [use, "or take the base before it was quantised"]))
    return [f"its weights are already quantised ({stored}), and model.quantisation={config.quantisation}; {fix}"]


def _experts(config: QLoRAModel, facts: BaseFacts) -> list[str]:
    """Few of them are a part of the plan; where they are most of a base, it is not what quantised means."""
    experts, stored = facts.expert_parameters, stored_quantisation(config)
    if config.quantisation == "none" or experts <= facts.linear_parameters:
        return []
    whole = facts.linear_parameters + facts.other_parameters
    told = f"{experts / 1e9:,.2f} of its {whole / 1e9:,.2f} G parameters are experts"
    if stored is not None:
        return [f"{told}, of which it is not known how they were quantised; take the base before it was quantised"]
    can_be_nf4 = experts - facts.stacked_experts <= facts.linear_parameters
    if can_be_nf4 and config.quantisation == "nf4":
        return []
    return [
        f"{told}, which stay in 16 bits with model.quantisation={config.quantisation} ({2 * experts / 1e9:,.2f} GB in "
        f"bf16). Set model.quantisation={'nf4, or ' if can_be_nf4 else ''}none ({2 * whole / 1e9:,.2f} GB in bf16)"
    ]


def _two_scales(config: QLoRAModel, text: Any) -> list[str]:
    """longrope scales all rows of a batch by the factors for long texts as soon as one of them is long."""
    rope: dict[str, Any] = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) != "longrope":
        return []
    short = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    if short is None or config.context <= short:
        return []
    return [
        f"model.context={config.context}: beyond {short} tokens this base computes positions another way (longrope), "
        "for all rows of a batch as soon as one is so long: a sample's loss would depend on its neighbours. Write "
        f"model.context={short} or less"
    ]


def _unknown_targets(config: QLoRAModel, facts: BaseFacts) -> list[str]:
    wanted = config.lora.target_modules
    if wanted == "all-linear":
        return []
    problems: list[str] = []
    for name in wanted:
        if name not in facts.names:
            near = difflib.get_close_matches(name, facts.names, n=1, cutoff=0.5)
            meant = f"did you mean {near[0]}? " if near else ""
            problems.append(
                f"model.lora.target_modules: {name} matches nothing; {meant}{facts.architecture} has: "
                + ", ".join(facts.names)
            )
    return problems
