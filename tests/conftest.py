"""What every test has: a place for what Stable-Baselines3 writes unasked, and models that several modules read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def sb3_logs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model without a logger makes a folder ``SB3-<date>`` in the system's temporary folder, and leaves it there."""
    folder = tmp_path_factory.mktemp("sb3_logs")
    with pytest.MonkeyPatch.context() as patch:
        # By the variable of Stable-Baselines3, so that programs that tests start have it too
        patch.setenv("SB3_LOGDIR", str(folder))
        yield folder


@pytest.fixture(scope="session", params=["smolvlm", "qwen"])
def pretrained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained image-text-to-text model as it would lie on the hub."""
    # Late: it imports much of transformers
    import vlms

    return getattr(vlms, request.param)(tmp_path_factory.mktemp("hub") / request.param)
