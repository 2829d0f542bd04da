"""Kernels are compiled once, whoever asks; without them everything still works."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from patchdiffusion.nets import fused
from patchdiffusion.nets.layers import Norm
from patchdiffusion.system import native, trust

SOURCE = Path(fused.__file__).with_suffix(".c")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """As in a new process with an empty cache."""
    monkeypatch.setenv("PATCHDIFFUSION_CACHE", str(tmp_path))
    fused._library.cache_clear()
    yield tmp_path
    fused._library.cache_clear()


def normalized() -> Tensor:
    x = torch.arange(2 * 16 * 4.0).sin().reshape(2, 16, 2, 2)
    return Norm(16)(x.contiguous(memory_format=torch.channels_last), silu=True)


def is_fused(y: Tensor) -> bool:
    assert y.grad_fn is not None
    return "_Norm" in y.grad_fn.name()


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"CC": "/nonexistent"}, "no C compiler"),
        ({"CC": "false"}, "false failed"),
        ({"PATCHDIFFUSION_KERNELS": "0"}, "switched off"),
    ],
)
def test_operators_without_a_kernel(
    setting: dict[str, str], reason: str, fresh: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = normalized()
    assert is_fused(expected) and fused.status() == "fused kernels"
    fused._library.cache_clear()
    monkeypatch.setenv("PATCHDIFFUSION_CACHE", str(fresh / "empty"))
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    found = normalized()
    assert not is_fused(found)
    torch.testing.assert_close(found, expected)
    assert fused.status().startswith("operators (") and reason in fused.status()
    assert not (fresh / "empty").exists()


def test_a_compiler_that_dies_leaves_nothing(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = fresh / "cc"
    script.write_text("for last; do :; done; [ $last = --version ] || { echo > $last; exit 1; }")
    monkeypatch.setenv("CC", f"sh {script}")
    assert "sh failed: no message" in fused.status()
    assert not list(fresh.glob("kernels/*"))


def test_without_a_cache_kernels_are_compiled_for_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PATCHDIFFUSION_CACHE", "/dev/null/cache")
    assert fused.status() == "fused kernels"


# ---- Only what this user has compiled is executed ----

HOSTILE = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void run(void) { fclose(fopen(getenv("CANARY"), "w")); }
"""


def kept(cache: Path) -> Path:
    """The library in a cache."""
    (library,) = (cache / "kernels").glob("*.so")
    return library


def of_another_user(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a file or folder belonged to somebody else."""
    fstat, lstat = os.fstat, os.lstat

    def other(status: os.stat_result) -> os.stat_result:
        if not os.path.samestat(status, os.stat(path)):
            return status
        return os.stat_result((*status[:4], status.st_uid + 1, *status[5:]))

    monkeypatch.setattr(trust.os, "fstat", lambda handle: other(fstat(handle)))
    monkeypatch.setattr(trust.os, "lstat", lambda file, **more: other(lstat(file, **more)))


@pytest.mark.parametrize(
    "attack", ["its content", "its owner", "the folder's owner", "its mode", "a link", "cut short"]
)
def test_a_library_that_others_may_have_put_there_is_compiled_anew(
    attack: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "one.c"
    source.write_text("int f(void) { return 1; }")
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    assert native.compiled(source).f() == 1
    library, good = kept(fresh), kept(fresh).read_bytes()
    hostile = tmp_path / "hostile.so"
    (tmp_path / "hostile.c").write_text(HOSTILE)
    subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "hostile.c", "-o", hostile], check=True)
    content = hostile.read_bytes()
    name = "-".join([*library.stem.split("-")[:-1], native._short(content)])
    if attack == "its content":
        library.write_bytes(content)
    elif attack == "cut short":
        library.write_bytes(good[: len(good) // 2])
    else:  # its name tells the right digest
        library.unlink()
        library = library.with_name(f"{name}.so")
        library.write_bytes(content)
        library.chmod(0o600)
        if attack == "a link":
            library.unlink()
            library.symlink_to(hostile)
        elif attack == "its mode":
            library.chmod(0o666)
        else:
            of_another_user(library if attack == "its owner" else library.parent, monkeypatch)
    assert native.compiled(source).f() == 1
    assert not (tmp_path / "canary").exists()


def test_a_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy:
        def __getattr__(self, name: str) -> Callable[..., int]:
            return lambda *args: 0

    monkeypatch.setattr(fused, "compiled", lambda source: Lazy())
    assert not is_fused(normalized())
    assert "wrong results" in fused.status()


def test_the_first_use_may_be_anywhere() -> None:
    with torch.inference_mode(), torch.device("meta"):
        assert fused.status() == "fused kernels"


def test_threads_compile_at_once(fresh: Path) -> None:
    with ThreadPoolExecutor(3) as pool:
        assert all(library.norm_forward for library in pool.map(native.compiled, [SOURCE] * 3))
    (library,) = (fresh / "kernels").iterdir()
    stamp = library.stat()
    assert fused.status() == "fused kernels" and library.stat() == stamp  # found, not made again


def test_what_is_compiled_names_what_it_depends_on(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "one.c"
    source.write_text("int f(void) { return 1; }")
    assert native.compiled(source).f() == 1
    source.write_text("int f(void) { return 2; }")
    assert native.compiled(source).f() == 2
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-g"))
    native.compiled(source)
    monkeypatch.setattr(native, "_processor", lambda: "another")
    native.compiled(source)
    assert len(list((fresh / "kernels").iterdir())) == 4


@pytest.mark.slow
def test_processes_compile_at_once(fresh: Path) -> None:
    code = "from patchdiffusion.nets import fused; print(fused.status())"
    pair = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [p.communicate(timeout=120)[0] for p in pair] == ["fused kernels\n"] * 2
    assert len(list((fresh / "kernels").iterdir())) == 1
