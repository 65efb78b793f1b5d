"""Files that are replaced in one step."""

import pytest

from opd_gym.files import replacing


def test_a_file_is_replaced_only_once_the_new_one_is_complete(tmp_path):
    path = tmp_path / "folder" / "model.zip"
    with replacing(path) as temporary:
        temporary.write_text("old")
        assert not path.exists()
        # Some writers choose the format by it; readers of the folder pass over hidden files
        assert temporary.suffix == ".zip" and temporary.name.startswith(".")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [file.name for file in path.parent.iterdir()] == ["model.zip"]


def test_a_block_that_writes_nothing_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.zip"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old"
