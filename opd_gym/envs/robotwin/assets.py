"""RoboTwin's own assets, from the Hugging Face hub."""

from __future__ import annotations

import errno
import os
import tempfile
import zipfile
import zlib
from pathlib import Path

# The snapshot that the runtime was made for; the same archives as its own downloader takes.
REPOSITORY = "TianxingChen/RoboTwin2.0"
REVISION = "c15cc97be71e35244b6605d2d84c187f8565cc4d"
ARCHIVES = ("background_texture.zip", "embodiments.zip", "objects.zip")


def download_assets(root: Path) -> Path:
    """
    Download and unpack RoboTwin's robots, objects and textures, several gigabytes.

    :param root: folder that is to contain ``assets``
    :return: the folder
    :raises ImportError: huggingface_hub is not installed
    :raises ValueError: the folder is not empty, or an archive is damaged
    :raises ConnectionError: the hub cannot be reached
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ImportError("Downloading RoboTwin's assets needs: pip install huggingface_hub") from error
    root = Path(root).expanduser().absolute()
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"{root} is not empty. Remove it to download RoboTwin's assets anew.")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as name:
        # Not the temporary folder itself, which nobody else may read
        folder = Path(name) / "root"
        folder.mkdir()
        for archive in ARCHIVES:
            try:
                # Into the hub's own cache: a download that broke off goes on where it stopped
                path = hf_hub_download(REPOSITORY, archive, repo_type="dataset", revision=REVISION)
            except Exception as error:
                raise ConnectionError(
                    f"{archive} of {REPOSITORY} cannot be downloaded from the Hugging Face hub "
                    f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). Check that this "
                    "machine reaches the hub (HF_ENDPOINT and HTTPS_PROXY choose another way), or download it on "
                    "another machine and pass that folder as assets_root. `opd-gym robotwin assets --stand-in` needs "
                    "no download."
                ) from error
            unpack(Path(path), folder / "assets")
        if root.exists():
            root.rmdir()
        os.replace(folder, root)
    return root


def unpack(archive: Path, folder: Path) -> None:
    """
    :param archive: zip file
    :param folder: where its content goes
    :raises ValueError: it is no zip file, or a member lies outside the folder
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(archive) as content:
            for member in content.namelist():
                if not (folder / member).resolve().is_relative_to(folder.resolve()):
                    raise ValueError(f"{archive.name} has a member that lies outside its folder: {member}.")
            content.extractall(folder)
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        IndexError,
        NotImplementedError,
        RuntimeError,
        UnicodeError,
        OSError,
    ) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # a full disk is no fault of the archive
            raise
        raise ValueError(f"{archive} is not a zip file: the download is broken. Remove it and try again.") from error
