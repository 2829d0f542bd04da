"""Files that are either whole or absent."""

import errno
import hashlib
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import refuses

from patchdiffusion.system import files


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATCHDIFFUSION_CACHE", str(tmp_path / "own"))
    assert files.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("PATCHDIFFUSION_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_dir() == tmp_path / "xdg" / "patchdiffusion"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert files.cache_dir() == Path.home() / ".cache" / "patchdiffusion"


def test_sha256(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    (tmp_path / "a").write_bytes(data)
    assert files.sha256(tmp_path / "a") == hashlib.sha256(data).hexdigest()
    (tmp_path / "a").write_bytes(data[:-1])
    assert files.sha256(tmp_path / "a") != hashlib.sha256(data).hexdigest()


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.bin"
    files.write_bytes(path, b"one")
    with path.open("rb") as reader:
        files.write_bytes(path, b"two")
        assert reader.read() == b"one"  # another file took its name
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]
    assert mode(path) == 0o666 & ~umask()


def test_write_atomic_keeps_the_old_content_when_the_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"old")

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        assert path.read_bytes() == b"old"  # a reader in the meantime
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_atomic(path, fail)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_json_round_trip(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True, "text"], "b": {}}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_text().endswith("}\n")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_json_refuses_what_is_not_json(tmp_path: Path, bad: float) -> None:
    files.write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"x": bad})
    assert files.read_json(tmp_path / "a.json") == 1


def test_read_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"a": ')
    with refuses("broken.json", "line 1"):
        files.read_json(tmp_path / "broken.json")


def test_folder_atomic(tmp_path: Path) -> None:
    path = tmp_path / "step-1"
    for text in ("first", "second"):  # the second time it replaces a folder that is not empty
        with files.folder_atomic(path) as temporary:
            (temporary / "sub").mkdir()
            (temporary / "sub" / "a.txt").write_text(text)
            (temporary / "private").touch(mode=0o600)
        assert (path / "sub" / "a.txt").read_text() == text
        assert mode(path / "private") == 0o666 & ~umask()
        assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_folder_atomic_leaves_nothing_on_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), files.folder_atomic(tmp_path / "new") as temporary:
        (temporary / "a").write_text("half")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_folder_atomic_keeps_the_old_folder_on_error(tmp_path: Path) -> None:
    with files.folder_atomic(tmp_path / "model") as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(KeyError), files.folder_atomic(tmp_path / "model") as temporary:
        (temporary / "a").write_text("half")
        raise KeyError
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "a").read_text() == "old"


def test_folder_atomic_puts_the_old_folder_back_when_the_last_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with files.folder_atomic(tmp_path / "model") as temporary:
        (temporary / "a").write_text("old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == "model.tmp":
            raise OSError("disk full")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with (
        pytest.raises(OSError, match="disk full"),
        files.folder_atomic(tmp_path / "model") as temporary,
    ):
        (temporary / "a").write_text("new")
    assert (tmp_path / "model" / "a").read_text() == "old"


def test_folder_atomic_clears_what_a_crash_left(tmp_path: Path) -> None:
    for name in ("model.tmp", "model.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "stale").touch()
    with files.folder_atomic(tmp_path / "model") as temporary:
        assert list(temporary.iterdir()) == []
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_folder_atomic_recovers_a_crash_between_the_two_renames(tmp_path: Path) -> None:
    (tmp_path / "model.old").mkdir()
    (tmp_path / "model.old" / "a").write_text("old")
    with pytest.raises(KeyError), files.folder_atomic(tmp_path / "model"):
        raise KeyError
    assert (tmp_path / "model" / "a").read_text() == "old"


# ---- File systems that cannot do everything ----


@pytest.fixture
def untold(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a new process, which has warned of nothing."""
    monkeypatch.setattr(files, "_TOLD", set())


def failing(error: int) -> Callable[..., None]:
    def fail(*given: object, **options: object) -> None:
        raise OSError(error, os.strerror(error))

    return fail


@pytest.mark.parametrize("name", ["fsync", "chmod"])
def test_what_a_file_system_cannot_do_is_told_once(
    name: str,
    untold: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, name, failing(errno.EINVAL if name == "fsync" else errno.EPERM))
    files.write_bytes(tmp_path / "a", b"one")
    with files.folder_atomic(tmp_path / "folder") as temporary:
        (temporary / "b").write_text("two")
    assert (tmp_path / "a").read_bytes() == b"one"
    assert (tmp_path / "folder" / "b").read_text() == "two"
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("warning: ")


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fails_to_flush_is_an_error(
    error: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "fsync", failing(error))
    with pytest.raises(OSError, match=re.escape(os.strerror(error))):
        files.write_bytes(tmp_path / "a", b"one")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_on_the_disk_before_it_gets_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flushed: list[tuple[int, bool]] = []
    path = tmp_path / "a"
    monkeypatch.setattr(
        os, "fsync", lambda handle: flushed.append((os.fstat(handle).st_ino, path.exists()))
    )
    files.write_bytes(path, b"one")
    assert flushed == [(path.stat().st_ino, False)]


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("PATCHDIFFUSION_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    with refuses("PATCHDIFFUSION_CACHE", error=OSError):
        files.cache_dir()
    with refuses("~no-such-user/x"):
        files.expanded("~no-such-user/x")


# ---- Locks ----


def test_a_lock_whose_file_was_deleted(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lock"
    with files.lock(path, tmp_path) as held:
        assert held.keep() and files.is_held(path)
        path.unlink()
        path.parent.rmdir()
        assert held.keep() and files.is_held(path)  # made anew
        path.unlink()
        with files.lock(path, tmp_path):
            assert not held.keep()
            assert not held.keep()
        assert held.keep()
    assert not path.exists()


def test_a_lock_that_was_deleted_while_it_was_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who locks a file that has no name any more holds nothing."""
    path, flock = tmp_path / "lock", files.fcntl.flock

    def late(*given: int) -> None:
        path.unlink()
        flock(*given)

    monkeypatch.setattr(files.fcntl, "flock", late)
    assert files._take(path) is None


def test_a_lock_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("content")
    (tmp_path / "lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError), files.lock(tmp_path / "lock", tmp_path):
        pass
    assert (tmp_path / "victim").read_text() == "content"
