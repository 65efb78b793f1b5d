"""What every test has: an order of the files, a place for what Stable-Baselines3 writes unasked, shared models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

# Files that take minutes, the longest first. Processes share the files between them: one of these begun last would
# leave the other process idle for as long as it takes.
LONGEST_FIRST = [
    "test_robotwin",
    "test_libero",
    "test_vec_env",
    "test_exactness",
    "test_benchmarks",
    "test_main_job",
    "test_docs",
    "test_zoo",
    "test_libero_plus",
    "test_conformance",
    "test_doctor",
    "test_versions",
    "test_plan",
    "test_ids",
    "test_models",
    "test_openvla",
]


def pytest_configure(config: pytest.Config) -> None:
    # pytest-xdist begins with the files of the most tests, which are not those that take the longest
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


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
