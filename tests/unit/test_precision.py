"""What `train.precision=auto` comes to."""

from pathlib import Path

import pytest
import torch

from llmtrain import cpu, rank0, resume
from llmtrain.config import load_config
from llmtrain.errors import ConfigError
from llmtrain.rank0 import settle_precision
from llmtrain.rundir import RunDir
from llmtrain.service import validate
from tests.support.checkpoint_runs import make_run, save

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("vendor", "flags", "fast"),
    [
        ("AuthenticAMD", "avx2 avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2 avx512f", False),
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16 amx_tile", True),
        ("GenuineIntel", "avx512f avx512_bf16", False),
    ],
)
def test_bf16_is_fast_with_amx_and_on_amd(tmp_path: Path, vendor: str, flags: str, fast: bool):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: fpu {flags} sse\n\n")
    assert cpu.has_fast_bf16(cpuinfo) == fast


def test_a_system_that_does_not_say_what_its_cpu_is_takes_fp32(tmp_path: Path):
    assert not cpu.has_fast_bf16(tmp_path / "cpuinfo")


@pytest.fixture
def fast_at_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank0, "is_bf16_fast", lambda _: True)


def settled(run: RunDir, *settings: str) -> str:
    config, origins = load_config(None, settings)
    return settle_precision(config, resume.check(run, config, origins), CPU).train.precision


@pytest.mark.usefixtures("fast_at_bf16")
def test_a_new_run_takes_what_the_machine_is_fast_at(tmp_path: Path):
    assert settled(RunDir(tmp_path / "new")) == "bf16"
    assert settled(RunDir(tmp_path / "new"), "train.precision=fp32") == "fp32"


@pytest.mark.usefixtures("fast_at_bf16")
def test_a_base_that_computes_in_fp32_is_trained_in_it(tmp_path: Path):
    """Else the run folder would hold a configuration that nothing reads back."""
    settings = ["model.kind=qlora", "model.base=b", "data.sources=[{kind: text, paths: [x]}]"]
    assert settled(RunDir(tmp_path / "new"), *settings) == "bf16"
    assert settled(RunDir(tmp_path / "new"), *settings, "model.compute_dtype=fp32") == "fp32"


def test_a_base_is_scored_in_the_precision_that_its_parts_were_made_for(monkeypatch: pytest.MonkeyPatch):
    """LoRA's weights in fp32 meet activations in bf16: without autocast no score was possible."""
    monkeypatch.setattr(validate, "is_bf16_fast", lambda _: False)
    gpt, _ = load_config(None, ["train.precision=bf16"])
    base, _ = load_config(
        None, ["train.precision=bf16", "model.kind=qlora", "model.base=b", "data.sources=[{kind: text, paths: [x]}]"]
    )
    assert not validate.computes_in_bf16(gpt, CPU)
    assert validate.computes_in_bf16(base, CPU)


def test_what_torch_computes_wrongly_is_refused():
    both, origins = load_config(None, ["train.activation_checkpointing=true", "model.dropout=0.1"])
    with pytest.raises(ConfigError, match="dropout on Apple's MPS"):
        rank0.check_device(both, origins, torch.device("mps"))
    rank0.check_device(both, origins, CPU)
    rank0.check_device(load_config(None, ["model.dropout=0.1"])[0], origins, torch.device("mps"))


@pytest.mark.usefixtures("fast_at_bf16")
def test_a_run_that_resumes_stays_in_what_it_began_in(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run = make_run(tmp_path / "gpt", "train.precision=fp32")
    assert settled(run) == "bf16"  # it has not saved yet, so it starts anew
    save(run, 5)
    assert settled(run) == "fp32"
    assert "precision  fp32, as this run began; on this machine a new one would take bf16" in caplog.text
    assert settled(run, "run.resume=never") == "bf16"
