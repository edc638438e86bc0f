"""Devices by name, and what is said of one that is not there."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain import devices, export, generate, rank0
from llmtrain.config import load_config
from llmtrain.errors import ConfigError, ModelError
from llmtrain.service import validate
from tests.support.checkpoint_runs import make_run

CPU = torch.device("cpu")
ASKED = ["--prompt", "def", "--tokens", "1", "--temperature", "0", "--seed", "0"]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def pretend(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    return pretend


def test_names_and_what_they_mean(gpus: Callable[[int], None]):
    gpus(2)
    found = [str(devices.find(name, "--device")) for name in ("auto", "cpu", "cuda", "cuda:1")]
    assert found == ["cuda", "cpu", "cuda", "cuda:1"]
    gpus(0)
    assert devices.find("auto", "--device") == CPU


@pytest.mark.parametrize(
    ("name", "count", "why"),
    [
        ("gpu", 2, r"--device=gpu: no device has that name; use auto, cpu, mps, cuda, or one GPU of several: cuda:1"),
        ("cuda:", 2, r"--device=cuda:: no device has that name"),
        ("cpu:1", 2, r"--device=cpu:1: no device has that name"),
        ("cuda:2", 2, r"--device=cuda:2: no such GPU here; GPUs are counted from 0, there are: cuda:0, cuda:1"),
        ("cuda:0", 0, r"--device=cuda:0: no such device here; use auto or one of: cpu"),
        ("mps", 2, r"--device=mps: no such device here; use auto or one of: cuda, cpu"),
    ],
)
def test_what_is_not_there_is_refused(gpus: Callable[[int], None], name: str, count: int, why: str):
    gpus(count)
    with pytest.raises(ConfigError, match=why):
        devices.find(name, f"--device={name}")


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:1"])
@pytest.mark.parametrize("command", ["generate", "export", "test"])
def test_commands_name_the_option(
    command: str, device: str, tmp_path: Path, gpus: Callable[[int], None], capsys: pytest.CaptureFixture[str]
):
    gpus(0)
    run = make_run(tmp_path / "run")
    mains: dict[str, tuple[Callable[[Sequence[str]], None], list[str]]] = {
        "generate": (generate.main, [str(run.path), *ASKED]),
        "export": (
            export.main,
            [str(run.path), str(tmp_path / "to"), "--merge", "--base", "original", "--dtype", "bf16"],
        ),
        "test": (validate.main, [str(run.path), "--steps", "10", "--split", "test"]),
    }
    main, words = mains[command]
    with pytest.raises(SystemExit) as left:
        main([*words, "--device", device])
    assert left.value.code == 2
    assert f"--device={device}: no " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capability", "built", "wanted"),
    [
        ((7, 0), "sm_75 sm_80 sm_86 sm_90 sm_100 sm_120", "for CUDA 12.6"),
        ((10, 0), "sm_50 sm_60 sm_70 sm_75 sm_80 sm_86 sm_90", "for a newer CUDA"),
        ((8, 9), "sm_75 sm_80 sm_86 sm_90a", None),  # of its generation, and not newer
        ((8, 0), "sm_75 sm_86 compute_90", "for a newer CUDA"),
        ((12, 0), "sm_80 sm_90a compute_90", None),  # the driver compiles it
        ((7, 0), "", None),
    ],
)
def test_a_gpu_that_torch_has_no_code_for_is_refused(
    gpus: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    built: str,
    wanted: str | None,
):
    """Its first kernel would fail, after the data was prepared."""
    gpus(1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_arch_list", built.split)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    config, origins = load_config(None, ["train.device=cuda"])
    for place, deed in (
        ("train.device", lambda: rank0.check_device(config, origins, torch.device("cuda", 0))),
        ("--device", lambda: devices.take("auto", "--device=auto")),
    ):
        if wanted is None:
            deed()
            continue
        with pytest.raises(ConfigError) as refused:
            deed()
        assert f"no code for Tesla V100 (compute capability {capability[0]}.{capability[1]})" in str(refused.value)
        assert f"its build {wanted} (docs" in str(refused.value)
        assert f"or set {place}=cpu" in str(refused.value)
    rank0.check_device(config, origins, CPU)


def test_a_gpu_too_small_to_generate_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def exhausted(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(generate, "generate", exhausted)
    with pytest.raises(SystemExit) as left:
        generate.main([str(tmp_path), *ASKED, "--device", "auto"])
    assert left.value.code == ModelError.exit_code
    assert "--device=auto: CUDA out of memory. Tried to allocate 2.00 GiB; take" in capsys.readouterr().err


def test_a_device_to_score_on_has_to_be_where_training_is(gpus: Callable[[int], None]):
    gpus(1)
    for settings in (["service.score=cuda"], ["service.score=cuda:7", "service.start=manual"], []):
        config, origins = load_config(None, settings)
        rank0.check_device(config, origins, CPU)
    config, origins = load_config(None, ["service.score=cuda:7"])
    with pytest.raises(ConfigError, match=r'service.score="cuda:7" \(command line\): no such GPU here'):
        rank0.check_device(config, origins, CPU)
    gpus(0)
    config, origins = load_config(None, ["service.score=cuda"])
    with pytest.raises(ConfigError, match=r'service.score="cuda" \(command line\): no such device here'):
        rank0.check_device(config, origins, CPU)
