"""C code compiled at first use with the system's compiler, cached, and loaded by ctypes.

A library is code, and a cache may lie where others write. So it is taken from there only if this
user alone can have put it there, and its name tells its digest.
"""

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

from patchdiffusion.system.files import cache_dir
from patchdiffusion.system.trust import make_private, own_content

# No fast-math: NaN and infinity must come out where they should.
FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")
_PATIENCE = 60  # seconds
_PROCESSOR_FIELDS = ("model name", "flags", "Features", "CPU implementer", "CPU part")


class UnavailableError(Exception):
    """Raised if there is no library; the message says why in a few words."""


def compiled(source: Path) -> ctypes.CDLL:
    """Load the library of a C file, compiled into `cache_dir()/kernels` at its first use.

    The compiler is $CC, else cc. Several processes may do this at once. Raises
    `UnavailableError` if that fails, and if $PATCHDIFFUSION_KERNELS is 0.
    """
    if os.environ.get("PATCHDIFFUSION_KERNELS") == "0":
        raise UnavailableError("switched off by PATCHDIFFUSION_KERNELS=0")
    compiler = shlex.split(os.environ.get("CC") or "cc")
    # Torch's own OpenMP library, so that one pool of threads serves both.
    pools = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp[.-]*"))
    libraries = [*map(str, pools[:1]), "-Wl,--as-needed", "-lm"]
    version = _output([*compiler, "--version"])
    parts = [source.read_text(), *compiler, *FLAGS, *libraries, version, _processor()]
    digest = _short("\n".join(parts).encode())
    name = f"{source.stem}-{digest}"
    try:
        with tempfile.TemporaryDirectory(prefix="patchdiffusion-") as own:
            library = _kept(name)
            if library is None:
                out = Path(own) / "new.so"
                _output([*compiler, *FLAGS, str(source), *libraries, "-o", str(out)])
                library = out.read_bytes()
                _keep(name, library)
            return _loaded(name, library, Path(own))
    except OSError as error:
        raise UnavailableError(str(error)) from error


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _kept(name: str) -> bytes | None:
    """Content of a library compiled before, if it is complete and owned by this user."""
    with contextlib.suppress(OSError):
        for file in sorted((cache_dir() / "kernels").glob(f"{name}-*.so")):
            content = own_content(file)
            if content is not None and file.stem == f"{name}-{_short(content)}":
                return content
    return None


def _keep(name: str, library: bytes) -> None:
    """Store a library for the next process, if possible."""
    with contextlib.suppress(OSError):
        folder = cache_dir() / "kernels"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        make_private(folder)
        handle, temporary = tempfile.mkstemp(dir=folder)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(library)
            os.replace(temporary, folder / f"{name}-{_short(library)}.so")
        except BaseException:
            os.unlink(temporary)
            raise


def _loaded(name: str, library: bytes, own: Path) -> ctypes.CDLL:
    """Load a library from these bytes, if possible from memory, so that no file is exchanged."""
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create(name)  # stays open: the loader knows a library by this number
        os.write(handle, library)
        with contextlib.suppress(OSError):
            return ctypes.CDLL(f"/proc/self/fd/{handle}")
    file = own / f"{name}.so"
    file.write_bytes(library)
    return ctypes.CDLL(str(file))


def _output(command: list[str]) -> str:
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_PATIENCE
        )
    except subprocess.CalledProcessError as error:
        first = (error.stderr.strip().splitlines() or ["no message"])[0]
        raise UnavailableError(f"{command[0]} failed: {first}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"no C compiler: {error}") from error
    return result.stdout


def _processor() -> str:
    """Features of the processor, on which -march=native depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(x for x in lines if x.split(":")[0].strip() in _PROCESSOR_FIELDS)
