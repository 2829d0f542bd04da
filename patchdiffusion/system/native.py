"""C code compiled at first use with the system's compiler, cached, and loaded by ctypes."""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
from pathlib import Path

import torch

from patchdiffusion.system.files import cache_dir, write_atomic

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
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    library = cache_dir() / "kernels" / f"{source.stem}-{digest}.so"

    def make(out: Path) -> None:
        _output([*compiler, *FLAGS, str(source), *libraries, "-o", str(out)])

    try:
        if not library.exists():
            write_atomic(library, make)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise UnavailableError(str(error)) from error


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
