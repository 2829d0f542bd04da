"""Kernels are compiled once, whoever asks; without them everything still works."""

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
from patchdiffusion.system import native

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
        ({"PATCHDIFFUSION_CACHE": "/dev/null/cache"}, "Not a directory"),
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
    assert not list((fresh / "kernels").iterdir())


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
