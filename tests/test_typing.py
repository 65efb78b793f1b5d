"""What type checkers and completion see of the public names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import opd_gym

HERE = Path(__file__).resolve().parent
# Their types are no part of ours, and reading them takes most of the time
SKIPPED = (
    "huggingface_hub",
    "peft",
    "scipy",
    "sympy",
    "tensorboard",
    "torch._dynamo",
    "torch._inductor",
    "torch.fx",
    "transformers",
)


def test_public_names_are_listed() -> None:
    """They are loaded at first use, and completion asks before."""
    assert dir(opd_gym) == sorted(opd_gym.__all__)
    assert all(getattr(opd_gym, name) is not None for name in dir(opd_gym))


def test_a_users_program_passes_mypy_strict(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed: pip install 'opd_gym[dev]'")
    modules = ",".join(f"{name}.*" for name in SKIPPED)
    config = tmp_path / "mypy.ini"
    lines = ("[mypy]", "strict = True", "follow_imports = silent", f"[mypy-{modules}]", "follow_imports = skip")
    config.write_text("\n".join(lines))
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run([*command, str(HERE / "typed_program.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
