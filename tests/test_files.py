"""Files that are either whole or absent."""

import hashlib
import math
import os
import stat
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
