"""Files that are replaced in one step."""

import importlib.util
import os
import resource
import subprocess
import sys

import pytest

from opd_gym.files import check_writable, code_dir, replacing, write_atomic


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


def test_a_write_that_fails_names_its_file_and_leaves_nothing(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path / 'results.json'}'"):
            write_atomic(tmp_path / "results.json", "x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_the_next_write_removes_what_killed_processes_left(tmp_path):
    path = tmp_path / "model.zip"
    code = (
        "import os, signal, sys; from opd_gym.files import replacing\n"
        "with replacing(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half'); temporary.with_suffix('').mkdir()\n"
        "    print(flush=True); sys.stdin.read(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    # What another machine, or an earlier version, writes or has left
    names = [f".tmp-0123456789ab-{other.pid}-{'0' * 32}.zip", f".tmp-{'0' * 32}.zip", f".tmp-{'1' * 32}", ".tmp-mine"]
    for name in names:
        (tmp_path / name).write_text("")
    with replacing(path) as temporary:
        temporary.write_text("whole")
        # Those of two living processes, and what may be of others
        assert len(list(tmp_path.iterdir())) == 3 + len(names)
    other.communicate()
    for name in names[1:]:
        os.utime(tmp_path / name, (0, 0))
    with replacing(path) as temporary:
        temporary.write_text("new")
    assert sorted(file.name for file in tmp_path.iterdir()) == [names[0], ".tmp-mine", "model.zip"]


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_nothing_but_a_file_is_replaced(kind, tmp_path):
    # As root it would put a file in the place of /dev/null; a pipe here is as little a file
    path = tmp_path / "results.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to("/proc/self/fd/1")
    else:
        path.mkdir()
    before = path.lstat()
    for write in (lambda: write_atomic(path, "new"), lambda: check_writable(path)):
        with pytest.raises(OSError, match=f"{path} cannot be written: it is a"):
            write()
    assert path.lstat() == before and len(list(tmp_path.iterdir())) == 1


def test_a_block_that_writes_nothing_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.zip"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "old"


def test_code_is_run_from_no_folder_that_others_can_write(tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_GYM_CACHE", str(tmp_path / "cache"))
    folder = code_dir("numba")
    assert folder.stat().st_mode & 0o777 == 0o700
    index = folder / "abc" / "physics.nbi"
    index.parent.mkdir(mode=0o755)
    index.write_bytes(b"")
    index.chmod(0o644)
    assert code_dir("numba") == folder
    for path in (tmp_path / "cache", folder, index.parent, index):
        mode = path.stat().st_mode & 0o777
        path.chmod(mode | 0o002)
        with pytest.raises(PermissionError, match=f"{path} can be written by other users.*OPD_GYM_CACHE"):
            code_dir("numba")
        path.chmod(mode)
    assert code_dir("numba") == folder


def test_libero_does_not_run_code_that_others_can_have_put_into_the_cache(tmp_path):
    pytest.importorskip("libero")
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba").chmod(0o777)
    code = "from opd_gym.envs.libero.runtime import import_libero; import_libero()"
    env = {**os.environ, "OPD_GYM_CACHE": str(tmp_path)}
    env.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 1 and "numba can be written by other users" in done.stderr


def test_damaged_compiled_code_is_compiled_again(tmp_path, caplog, monkeypatch):
    numba = pytest.importorskip("numba")
    # Another test may have set the folder
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "cache"))
    from opd_gym.envs.libero.runtime import mend_compiled_code

    mend_compiled_code()
    file = tmp_path / "compiled.py"
    file.write_text("import numba\n@numba.njit(cache=True)\ndef f(x):\n    return x + 1\n")

    def run():
        spec = importlib.util.spec_from_file_location("compiled", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert module.f(1) == 2
        return sum(module.f.stats.cache_hits.values())

    assert run() == 0 and run() == 1
    index, data = next(tmp_path.rglob("*.nbi")), next(tmp_path.rglob("*.nbc"))
    whole = data.read_bytes()
    middle = len(whole) // 2
    zeros = whole[:middle] + bytes(64) + whole[middle + 64 :]
    damages = [(index, b""), (index, index.read_bytes()[:40]), (data, b""), (data, whole[:middle]), (data, zeros)]
    for path, damage in damages:
        path.write_bytes(damage)
        assert run() == 0 and run() == 1
    assert len(caplog.messages) == 1 and "compiled again" in caplog.text
