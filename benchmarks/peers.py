"""Environments for the peers: each its own, pinned, under .venv-peers (made once)."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
_PACKAGES = {
    "lecture": [
        ["torch==2.13.0", "numpy", "tiktoken", "matplotlib", "tqdm"],
        ["--no-deps", "llms-from-scratch==1.0.19"],
    ],
    "hf": [["torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0"]],
    "trl": [
        ["torch==2.13.0", "trl==1.16.0", "transformers==5.23.0", "peft==0.21.2", "bitsandbytes==0.50.2"],
        ["accelerate==1.15.0", "datasets==5.2.0"],
    ],
    "litgpt": [["torch==2.13.0", "litgpt==0.5.13"]],
}
_SHARED = {"lightning": "litgpt", "nanogpt": "hf"}
"""Peers that run in another's environment: litgpt depends on Lightning, nanoGPT's train.py needs nothing but torch."""


def python_of(peer: str) -> str | None:
    """The interpreter of a peer's environment; ours for our own rows; None (said why) if it cannot be made."""
    peer = _SHARED.get(peer, peer)
    if peer not in _PACKAGES:
        return sys.executable
    folder = ROOT / ".venv-peers" / peer
    python = folder / "bin/python"
    if not (folder / "ready").exists():
        print(f"installing {peer} into {folder.relative_to(ROOT)} ...", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for words in _PACKAGES[peer]:
            done = subprocess.run([str(python), "-m", "pip", "install", "-q", *words], check=False)
            if done.returncode:
                print(f"{peer}: could not be installed, its rows are left out", file=sys.stderr)
                return None
        (folder / "ready").touch()
    return str(python)
