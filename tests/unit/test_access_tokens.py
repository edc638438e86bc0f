"""What looks like an access token is refused in a profile, and not sent to the Hub; by the same pattern."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cluster import load_profile
from llmtrain.errors import ConfigError
from llmtrain.service.remote import secrets_in


def refused_in_a_profile(folder: Path, text: str) -> bool:
    (folder / "c.yaml").write_text(f'gpus_per_node: 1\nsetup: ["cd {text}"]\n')
    try:
        load_profile(folder / "c.yaml")
    except ConfigError:
        return True
    return False


def kept_from_the_hub(folder: Path, text: str) -> bool:
    (folder / "config.yaml").write_bytes(b"\xff\n" + f"train: [{text}]\n".encode())
    return bool(secrets_in([folder / "config.yaml"], "hf_of_another_kind"))


CALLERS = pytest.mark.parametrize("found", [refused_in_a_profile, kept_from_the_hub])


@CALLERS
@pytest.mark.parametrize(
    "token",
    [
        "hf_" + "a1B2" * 5,
        "hf_" + "aBcD" * 8 + "eF",
        "ghp_" + "a1B2" * 9,
        "glpat-" + "a1-B2_c3" * 2 + "d4E5",
        "sk-" + "a1B2" * 5,
        "sk-proj-" + "a1B2" * 8,
        "sk-ant-api03-" + "a1B2" * 8,
        "sk-" + "a1_B2-c3" * 4,
        "AKIA" + "A1B2" * 4,
        "github_pat_" + "a1B2" * 8,
        "gho_" + "a1B2" * 9,
        "api_org_" + "aBcD" * 8,
        "AIza" + "a1-B2_c" * 5,
        "xoxb-" + "a1B2-" * 4,
        "nvapi-" + "a1B2" * 12,
        "my_hf_" + "a1B2" * 5,
        ".".join(["eyJ" + "a1B2" * 5] * 3),
    ],
)
@pytest.mark.parametrize("around", ["{}", "https://me:{}@host/path", "KEY={}"])
def test_tokens_are_found(found: Callable[[Path, str], bool], tmp_path: Path, token: str, around: str):
    assert found(tmp_path, around.format(token))


@CALLERS
@pytest.mark.parametrize(
    "address",
    [
        "https://jane:S3cretPassw0rd@host/x",
        "s3://host/x?X-Amz-Signature=" + "0a1b" * 8,
        "https://host/x?sv=2024&sig=" + "a1%2B" * 5,
    ],
)
def test_passwords_and_signatures_of_addresses_are_found(
    found: Callable[[Path, str], bool], tmp_path: Path, address: str
):
    assert found(tmp_path, address)


@CALLERS
@pytest.mark.parametrize(
    "text",
    [
        "hf_hub_download_of_the_year_2024",
        "/data/hf_datasets_of_2024/train",
        "/data/sk-wikipedia-articles-2024",
        "risk-adjusted-returns-of-many-funds-in-2024",
        "disk-a1B2a1B2a1B2a1B2a1B2a1B2a1B2",
        "AKIA-2024",
        "llama-7b_instruct-0123456789abcdef0123456789abcdef",
        "https://host:8080/jane@home?sig=short",
        "git@github.com:jane/x.git",
    ],
)
def test_ordinary_text_is_not(found: Callable[[Path, str], bool], tmp_path: Path, text: str):
    assert not found(tmp_path, text)
