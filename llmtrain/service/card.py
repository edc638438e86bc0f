"""The model card: what a visitor of the repository sees, and metadata that the Hub reads."""

import math
from collections.abc import Mapping

from huggingface_hub import EvalResult, ModelCardData

from llmtrain import base_facts, jsonl, ledger, manifest, origin, overfitting, ranking, summary
from llmtrain.config import RunConfig, resolved_yaml
from llmtrain.config.model_sections import QLoRAModel
from llmtrain.ledger import Upload
from llmtrain.ranking import Entry, Ranking
from llmtrain.rundir import RunDir
from llmtrain.service import plan
from llmtrain.service.plan import Shown
from llmtrain.wording import name_steps


def render(repo: str, config: RunConfig, run: RunDir, best: Shown) -> str:
    """README.md of `main`."""
    ranked = best.ranked
    uploads = plan.uploads_at(run, repo)
    parts = [
        f"---\n{metadata(config, run, best.upload).to_yaml()}\n---",
        f"# {run.path.name}",
        f"{_what(config, run)} The weights on this branch are those of step {best.upload.step:,}, {best.describe()}. "
        "Every other checkpoint that is here has a tag of its own (`step-N`).",
        f"## Use\n\n```python\n{_loading(config, repo, best.upload)}\n```",
    ]
    if summary.has_curve(run):
        lower = "" if ranked is None else ranking.lowest_measured(run, ranked.best.step)
        told = "" if ranked is None or not lower else f"\n\n{_lowest_saved(ranked)}; {lower}."
        parts.append(f"## Losses\n\n![Train and held-out loss over epochs](llmtrain/curve.png){told}")
    if ranked is not None:
        parts += [
            f"## Checkpoints\n\n{table(ranked, uploads)}",
            f"Overfitting: {overfitting.judge(ranked).describe()}.",
        ]
    parts.append(_data(run, config))
    parts.append(f"<details><summary>Configuration</summary>\n\n{_fenced(resolved_yaml(config), 'yaml')}\n\n</details>")
    return "\n\n".join(parts) + "\n"


def metadata(config: RunConfig, run: RunDir, shown: Upload) -> ModelCardData:
    """The card's YAML: how to load it, what it was made from, how well it did: that checkpoint, not one of its step."""
    if isinstance(config.model, QLoRAModel):
        library, kind = "peft", "lora"
    else:
        library, kind = "transformers", config.model.model_type
    scored = [(split, ledger.scores(run, split).get(shown.step)) for split in ("heldout", "test")]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=f"{run.path.name}, {split} split",
            dataset_split=split,
            metric_type=metric,
            metric_name=name,
            metric_value=round(value, 6),
        )
        for split, score in scored
        if score is not None and score.checkpoint == shown.checkpoint
        for metric, name, value in (
            ("loss", "loss (nats per token)", score.loss),
            ("perplexity", "perplexity", score.perplexity),
            ("bits_per_byte", "bits per byte", score.bits_per_byte),
        )
        if not math.isnan(value)
    ]
    return ModelCardData(
        model_name=run.path.name,
        library_name=library,
        pipeline_tag="text-generation",
        base_model=_base(config, run),
        tags=["llmtrain", kind],
        eval_results=results or None,
    )


def _base(config: RunConfig, run: RunDir) -> str | None:
    return base_facts.hub_name(config, origin.start_of(run))


def _what(config: RunConfig, run: RunDir) -> str:
    if isinstance(config.model, QLoRAModel):
        lora = config.model.lora
        how = {"nf4": "4 bits (nf4)", "int8": "8 bits", "none": "its own precision"}[config.model.quantisation]
        name = _base(config, run)
        base = "a base model" if name is None else f"`{name}`"
        return f"A LoRA adapter of rank {lora.r} on {base}, trained on the base in {how} with llmtrain."
    model = config.model
    how = "scratch" if model.start_from is None else "given weights"
    return (
        f"A {model.architecture} with {model.num_layers} layers, {model.num_heads} heads and width {model.width}, "
        f"trained from {how} with llmtrain on a context of {model.context} tokens."
    )


def _loading(config: RunConfig, repo: str, shown: Upload) -> str:
    if isinstance(config.model, QLoRAModel):
        cls, package = "AutoPeftModelForCausalLM", "peft"
    else:
        cls, package = "AutoModelForCausalLM", "transformers"
    lines = [
        f"from {package} import {cls}",
        f'model = {cls}.from_pretrained("{repo}")                          # step {shown.step}',
        f'model = {cls}.from_pretrained("{repo}", revision="{shown.tag}")   # or any other',
    ]
    if package == "transformers":
        lines += ["from transformers import AutoTokenizer", f'tokenizer = AutoTokenizer.from_pretrained("{repo}")']
    return "\n".join(lines)


def table(ranked: Ranking, uploads: Mapping[int, Upload]) -> str:
    """All checkpoints, as Markdown; `uploads`: those that are in this repository."""
    lines = [
        "| step | epoch | held-out loss | perplexity | bits per byte | difference to the best (95%) | |",
        "|---:|---:|---:|---:|---:|---|---|",
    ]
    return "\n".join([*lines, *(_row(entry, ranked, uploads) for entry in ranked.entries)])


def _lowest_saved(ranked: Ranking) -> str:
    return f"Lowest of the {ranked.scope} ones {ranked.best.score.loss:.4f} (step {ranked.best.step:,})"


def _row(entry: Entry, ranked: Ranking, uploads: Mapping[int, Upload]) -> str:
    s, upload = entry.score, uploads.get(entry.step)
    interval = "" if entry.difference is None else f"{entry.difference[0]:+.4f} to {entry.difference[1]:+.4f}"
    notes = [
        name
        for name, holds in (
            ("**lowest**", entry.is_best),
            ("within noise of it", entry.is_tie),
            ("**proposed**", entry is ranked.proposed),
            ("not here", upload is None or not plan.is_of(entry, upload)),
        )
        if holds
    ]
    bits = "" if math.isnan(s.bits_per_byte) else f"{s.bits_per_byte:.4f}"
    return (
        f"| {s.step} | {s.epoch:.2f} | {s.loss:.4f} | {s.perplexity:.2f} | {bits} | {interval} | {', '.join(notes)} |"
    )


def _data(run: RunDir, config: RunConfig) -> str:
    fingerprint = _fingerprint(run)
    share, by = config.data.rest_split.heldout, config.data.split.by
    held = f"{share:.0%}, by {by}" if share else "of sources of their own"
    told = f" Their fingerprint is `{fingerprint}`." if fingerprint else ""
    return (
        f"## Data\n\nHeld-out data ({held}) chose the checkpoint and was never trained on"
        f"{_test_data(run, config)}.{told}"
    )


def _test_data(run: RunDir, config: RunConfig) -> str:
    """The end of a sentence: what the test split was used for, as far as is recorded."""
    if not config.data.has_test:
        return "; there is no test data"
    scored = {(r["step"], r["checkpoint"]) for r in jsonl.read(run.scores) if r.get("split") == "test"}
    steps = sorted(step for step, _ in scored)
    match steps:
        case []:
            use = "was not used for choosing: no checkpoint was scored on it"
        case [step]:
            use = f"was not used for choosing: step {step} alone was scored on it"
        case _:
            use = (
                f"takes no part in the ranking, but {len(steps)} checkpoints were scored on it "
                f"({name_steps(steps)}), so a choice may have followed it"
            )
    share = config.data.rest_split.test
    return f"; test data ({f'{share:.0%}' if share else 'of sources of their own'}) {use}"


def _fingerprint(run: RunDir) -> str | None:
    steps = run.checkpoint_steps()
    return manifest.read(run.checkpoint(steps[-1])).fingerprint if steps else None


def _fenced(text: str, language: str) -> str:
    """A code block that its own content cannot end."""
    fence = "`" * max(3, max((len(run) for run in text.split() if set(run) == {"`"}), default=0) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
