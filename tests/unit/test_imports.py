"""The import table of docs/architecture.md, walked."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import environment, free_port

ROOT = Path(__file__).parents[2]
CONTRACTS = [
    "wording", "access_tokens", "launched", "log", "errors", "files", "jsonl", "locks", "heartbeat",
    "config.yaml_lines", "config.section", "config.data_sections", "config.model_sections", "config.service_sections",
    "config.schema", "config.other_names", "config.explain",
    "config.load", "config", "config.reference", "rundir", "shards", "manifest", "source_files", "recipe",
    "batches", "memory", "base_facts", "model_files", "memory_lora", "ledger", "intervals", "ranking", "overfitting",
    "choose", "early_stop", "retention", "resume", "summary", "origin", "unsaved",
    "gpus", "scoring_place", "cpu", "prompts", "transformers_ids",
]  # fmt: skip
PROCESS = ["devices", "world", "stop"]
PARTS = ["models", "data", "optim", "metrics", "evaluate", "task", "hardware", "progress", "tensorboard", "tensorfile"]
# Parts may use these parts: batches of data are what models and evaluation are given; metrics shows itself
# through its two displays.
AMONG_PARTS = {
    "models": {"data", "tensorfile"}, "evaluate": {"data"}, "task": {"evaluate"},
    "metrics": {"hardware", "progress", "tensorboard"},
}  # fmt: skip
ASSEMBLY = ["fragments", "strategies", "checkpoint", "saver", "run_start", "failures"]


TOP = [
    "assemble", "evaluation", "__main__", "command", "generate", "export", "adapters", "trained", "inspect_base",
    "allocator", "finish", "rank0",
]  # fmt: skip
# The service, a process of its own: contracts, and TensorBoard's writer. What scores is a process of its own again,
# which alone may import models; `hub` and what it uses are the only ones that import huggingface_hub.
SERVICE = ["service", "tensorboard"]
SCORES = ["models", "data", "evaluate", "hardware", "strategies", "service", "devices"]


# The launcher's parts: each may import those before it.
LAUNCHER = [
    "display", "findings", "walltime", "runs", "jobs", "cluster", "keeper", "sharding", "planning", "slurm", "checks",
    "submitting", "choosing", "watching", "report", "stop", "cli_report", "cli_plan", "cli_jobs", "cli", "__main__",
]  # fmt: skip


def modules(package: str) -> dict[str, Path]:
    root = ROOT / package
    names = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def imported(path: Path) -> set[str]:
    """Names of modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def llmtrain_imports(path: Path) -> set[str]:
    known = modules("llmtrain")
    names = {name.removeprefix("llmtrain.") for name in imported(path) if name.startswith("llmtrain.")}
    return {name for name in names if name in known}


def top(name: str) -> str:
    return name if name in CONTRACTS else name.split(".", maxsplit=1)[0]


@pytest.mark.parametrize("name", [name for name in modules("llmtrain") if name])
def test_core_modules_import_only_what_their_layer_may(name: str):
    layer = top(name)
    uses = {top(used) for used in llmtrain_imports(modules("llmtrain")[name])} - {layer, layer.split(".")[0]}
    if layer in CONTRACTS:
        allowed = set(CONTRACTS[: CONTRACTS.index(layer)])
    elif layer in PROCESS:
        allowed = {*CONTRACTS, "devices", "world"}
    elif layer in PARTS:
        allowed = {*CONTRACTS, *PROCESS, *AMONG_PARTS.get(layer, set())}
    elif layer in ASSEMBLY:
        allowed = {*CONTRACTS, *PROCESS, "optim", "data", "tensorfile", *ASSEMBLY}
    elif layer == "trainer":
        allowed = {*CONTRACTS, *PROCESS, *PARTS, *ASSEMBLY} - {"models"}
    elif layer == "service":
        allowed = {*CONTRACTS, *(SCORES if name == "service.validate" else SERVICE)}
    elif layer in TOP:
        return
    else:
        pytest.fail(f"llmtrain/{name} stands in no layer: add it to this table and to docs/architecture.md")
    assert uses <= allowed, f"{name} must not import {sorted(uses - allowed)}"


def test_the_core_never_imports_the_launcher():
    for name, path in modules("llmtrain").items():
        assert not any(used.split(".")[0] == "launcher" for used in imported(path)), name


def test_contracts_and_launcher_do_not_load_torch():
    launcher = [f"launcher.{name}" for name in modules("launcher") if name and name != "__main__"]
    contracts = [f"llmtrain.{name}" for name in CONTRACTS]
    code = f"import sys, importlib\nfor m in {launcher + contracts!r}: importlib.import_module(m)\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_only_the_hubs_process_imports_its_client():
    hub = {"service.hub", "service.remote", "service.publish", "service.card", "service.restore"}
    for name, path in modules("llmtrain").items():
        uses_client = any(used.split(".")[0] == "huggingface_hub" for used in imported(path))
        assert not uses_client or name in hub | {"models.base"}, name  # models.base: fetches a base model
        if name not in hub:
            assert not {f"{used}" for used in llmtrain_imports(path)} & (hub - {"service.hub"}), name


def test_the_service_does_not_load_torch():
    own = [name for name in modules("llmtrain") if name.startswith("service") and name != "service.validate"]
    code = f"import sys, importlib\nfor m in {own!r}: importlib.import_module('llmtrain.' + m)\n"
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


TRAINS_A_STEP = """
import sys, torch
import llmtrain.assemble
from llmtrain.config.schema import GPTModel, RunConfig
from llmtrain.data import Batch
from llmtrain.models import build_model
from llmtrain.strategies import build_strategy
from llmtrain.world import find_world
config = RunConfig(model=GPTModel(num_layers=1, num_heads=2, width=16, context=8))
world = find_world("cpu", "default")
world.start_groups(60)
strategy = build_strategy(config, build_model(config, 64, world.device), world, False)
ids = torch.zeros(2, 8, dtype=torch.int64)
strategy.accumulate(Batch(ids, ids, None, None, 16), 1.0, last=True)
strategy.update(1e-3)
print(sorted({"torch._dynamo", "torch._inductor", "sympy", "transformers", "datasets", "deepspeed"} & set(sys.modules)))
"""


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_loads_no_compiler(ranks: int):
    """A second at each start of each rank, and 80 MB."""
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINS_A_STEP],
            cwd=ROOT,
            env={**environment(), **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["[]\n"] * ranks


def test_the_launcher_imports_only_contracts():
    for name, path in modules("launcher").items():
        used = {top(module) for module in llmtrain_imports(path)}
        assert used <= set(CONTRACTS), f"launcher/{name} must not import {used - set(CONTRACTS)}"


@pytest.mark.parametrize("name", [name for name in modules("launcher") if name])
def test_the_launchers_parts_import_only_those_before_them(name: str):
    part = name.split(".", maxsplit=1)[0]
    used = imported(modules("launcher")[name])
    parts = {module.split(".")[1] for module in used if module.startswith("launcher.")} - {part}
    assert parts <= set(LAUNCHER[: LAUNCHER.index(part)])


def test_modules_stay_small():
    for package in ("launcher", "llmtrain"):
        for name, path in modules(package).items():
            assert len(path.read_text().splitlines()) <= 360, f"{package}.{name} is too long"
