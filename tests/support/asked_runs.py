"""Checkpoints as runs on text, instructions and chats leave them, made without training; and how they are asked."""

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, processors

from launcher.sharding import tasks
from launcher.sharding.build import build
from launcher.sharding.show import documents
from llmtrain import adapters, export, generate, manifest, origin, prompts, trained
from llmtrain.assemble import make_model_writer
from llmtrain.config import RunConfig, load_config, resolved_yaml
from llmtrain.manifest import Manifest, TrainState
from llmtrain.models import build_model
from llmtrain.rundir import RunDir
from llmtrain.shards import ShardFolder
from tests.support.bases import write_llama, write_tokenizer

CPU = torch.device("cpu")
OWN = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OTHER = OWN.replace("<|", "[").replace("|>", "]")
CHAT = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi there"}]}
RECORDS: dict[str, dict[str, Any]] = {
    "text": {"text": "hello world"},
    "instruction": {"instruction": "hello", "output": "hi"},
    "chat": CHAT,
}


def tuned_tokenizer(folder: Path, template: str | None) -> Path:
    """One with <s> before each text and </s> after it, which ends an answer with <|end|>."""
    write_tokenizer(folder, 400)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"])
    special = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "<s>", "eos_token": "<|end|>"}))
    if template is not None:
        (folder / prompts.TEMPLATE).write_text(template)
    return folder


@dataclass(frozen=True)
class Trained:
    """A run's last checkpoint, of which training saw `shards`."""

    model: Path
    config: RunConfig
    data: ShardFolder

    @property
    def ids(self) -> list[int]:
        """Of a document of the training split."""
        return next(iter(documents(self.data, "train", 1))).ids.tolist()

    @property
    def run(self) -> RunDir:
        return RunDir(self.model.parents[2])


def train(work: Path, kind: str, *settings: str) -> Trained:
    """What a run leaves that was started in the folder `work`, which is the present one."""
    (work / "data.json").write_text(json.dumps([RECORDS[kind]] * 40))
    given = [
        "run.name=a", "data.sources=[{kind: json, paths: [data.json]}]", f"data.format={{kind: {kind}}}",
        "data.tokenizer={kind: folder, path: tuned}", "data.split={by: tail, heldout: 0.2, test: 0.0}",
        "data.packing=none", "model.context=128", "train.precision=fp32",
    ]  # fmt: skip
    config = load_config(None, [*given, *settings])[0]
    data = build(config, workers=1).folder
    run = RunDir(work / "runs/a")
    run.create()
    run.config.write_text(resolved_yaml(config))
    origin.note(run, "cpu", 1, 1)
    folder = run.checkpoint(1) / "model"
    folder.mkdir(parents=True)
    model: Any = build_model(config, data.manifest.tokenizer.vocab_size, CPU)
    weights = dict(model.trainable() if config.model.kind == "qlora" else model.named_parameters())
    make_model_writer(data, model, config.data.format)(folder, {name: w.detach() for name, w in weights.items()})
    described = Manifest(
        train_state=TrainState(step=1), seed=0, num_rows=1, global_batch_size=1, fingerprint=data.fingerprint,
        world_size=1, strategy="ddp", heldout_loss=None,
        files=manifest.describe_files(run.checkpoint(1), sorted(folder.iterdir())),
    )  # fmt: skip
    manifest.write(run.checkpoint(1), described)
    return Trained(folder, config, replace(data, path=data.path.resolve()))


GPT = ["model.kind=gpt", "model.num_layers=1", "model.num_heads=2", "model.width=16"]


def lora(base: Path) -> list[str]:
    return ["model.kind=qlora", f"model.base={base}", "model.quantisation=none", "model.lora.r=2"]


def asked(made: Trained, prompt: str, system: str | None = None) -> tuple[list[int], int | None]:
    format = trained.format_of(made.model)
    ask = functools.partial(generate.ask_model, format=format, prompt=prompt, system=system)
    if adapters.is_adapter(made.model):
        _, _, ids, eos_id = generate.load_adapter(made.model, ask, CPU, trust_remote_code=False)
    else:
        _, _, ids, eos_id = generate.load_whole(made.model, ask, CPU)
    return ids, eos_id


def export_plainly(checkpoint: Path, to: Path, merge: bool = False) -> None:
    export.export(checkpoint, to, merge, "original", torch.float32, CPU, trust_remote_code=False)


def rendered(folder: Path) -> list[int]:
    """The ids of a chat's question, as programs that know transformers alone make them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    return tokenizer.apply_chat_template(CHAT["messages"][:1], add_generation_prompt=True, return_dict=False)


# Fixtures, which tests take by naming them: `work = asked_runs.work`


@pytest.fixture(autouse=True)
def fresh_encoders(monkeypatch: pytest.MonkeyPatch):
    """Sharding keeps the tokenizers of the folders that it has seen; tests put others in the same places."""
    monkeypatch.setattr(tasks, "_encoders", {})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
