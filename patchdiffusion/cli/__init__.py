"""The command line: `patchdiffusion COMMAND ...`.

The module of a command is imported when it is run, so that other answers need no PyTorch.
"""

import ast
import errno
import importlib.util
import io
import keyword
import os
import select
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import NoReturn, TextIO

from patchdiffusion.cli.places import refuse_urls
from patchdiffusion.cli.words import did_you_mean
from patchdiffusion.system.errors import Stop, out_of_memory, peer_lost
from patchdiffusion.system.files import expanded
from patchdiffusion.system.place import leave, place
from patchdiffusion.system.signals import DEFAULT, Interrupted, exit_on, handling
from patchdiffusion.system.text import printable


class HelpShown(Exception):
    """Raised after printing a help."""


@dataclass(frozen=True)
class Command:
    """Command of `patchdiffusion`."""

    main: Callable[[Sequence[str]], None]
    arguments: Callable[[], object]
    """Creates the record of its arguments; the docstring of its class is the help."""


def _command(name: str) -> Command:
    """Command in the module of its name: `main`, and a record such as `TrainArguments`."""

    def main(arguments: Sequence[str]) -> None:
        with _starting(name):
            module = import_module(f"{__name__}.{_module(name)}")
        module.main(arguments)

    def arguments() -> object:
        module = import_module(f"{__name__}.{_module(name)}")
        return getattr(module, f"{name.title()}Arguments")()

    return Command(main, arguments)


def _module(command: str) -> str:
    """Name of the module of a command, which is no word of Python."""
    return f"{command}_" if keyword.iskeyword(command) else command


COMMANDS = {
    name: _command(name)
    for name in (
        "train",
        "adapt",
        "merge",
        "sample",
        "restore",
        "edit",
        "evaluate",
        "prepare",
        "packs",
        "report",
        "average",
        "import",
        "push",
        "export",
        "bench",
        "doctor",
        "info",
        "speed",
        "bricks",
        "distill",
        "concept",
        "walk",
    )
}


SHARED = ("train", "adapt", "distill", "concept", "sample", "evaluate", "bench")
"""Commands whose work the processes of `torchrun` share."""


@contextmanager
def _starting(command: str) -> Iterator[None]:
    """Context of the import of PyTorch: shows a message, and ends at once on a signal.

    A Python exception during the import can abort the process, since C++ does not expect it.
    """
    message = "starting ..." if sys.stderr.isatty() else ""

    def clear() -> None:
        if message:
            print(f"\r{' ' * len(message)}\r", end="", file=sys.stderr, flush=True)

    def end(*_: object) -> None:
        clear()
        code = _interrupted(command)
        sys.stdout.flush()
        os._exit(code)

    print(message, end="", file=sys.stderr, flush=True)
    with handling(end, instead_of=(_interrupt,)):
        yield
    clear()


def _interrupt(*_: object) -> None:
    raise Interrupted


def _interrupted(command: str) -> int:
    """Exit code after a signal when there is nothing to save."""
    if command not in ("train", "distill", "concept"):
        return _fail("interrupted", 130)
    if place().is_main:
        print("stopped   the same command goes on")
    return 0


def usage() -> str:
    """Help of `patchdiffusion` without a command."""
    lines = [
        "usage: patchdiffusion [--import FILE.py] COMMAND [options]",
        "",
        "Train diffusion models from scratch on your own images, on patches.",
        "",
        *(f"  {name:<10}{_summary(name)}" for name in COMMANDS),
        "",
        "patchdiffusion COMMAND --help lists the options of a command.",
        "patchdiffusion --version prints the version.",
        "--import FILE.py adds networks, objectives, solvers ... of your own.",
    ]
    return "\n".join(lines)


def _summary(name: str) -> str:
    """First line of the help of a command, read from its file without importing it."""
    tree = ast.parse(Path(__file__).with_name(f"{_module(name)}.py").read_text(encoding="utf-8"))
    classes = (node for node in tree.body if isinstance(node, ast.ClassDef))
    record = next(node for node in classes if node.name == f"{name.title()}Arguments")
    return (ast.get_docstring(record) or "").split("\n")[0]


def program() -> NoReturn:
    """The command `patchdiffusion`."""
    code = main()
    exit_on(code)
    leave(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Errors of the user print one line and return 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # no name that it cannot show may end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with handling(_interrupt, instead_of=DEFAULT):
            code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError as error:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)]
        code = 141 if closed else _fail(str(error), 2)
    return code


def _import(arguments: Sequence[str]) -> Sequence[str]:
    """Execute the Python file after `--import`, which adds types to families.

    It may import other modules of its folder. Returns the remaining arguments. Raises `ValueError`
    if there is no such file, or if it cannot be executed.
    """
    if len(arguments) < 2:
        raise ValueError("--import needs a Python file: patchdiffusion --import FILE COMMAND ...")
    file = expanded(arguments[1]).resolve()
    if file.suffix != ".py" or not file.is_file():
        raise ValueError(f"--import is {arguments[1]}; allowed is an existing .py file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    other = sys.modules.get(file.stem)
    if other is not None and getattr(other, "__file__", None) != str(file):
        raise ValueError(
            f"--import is {file}, and another module is called {file.stem}; rename the file"
        )
    if other is None:
        sys.path.append(str(file.parent))
        module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[file.stem]
            raise ValueError(f"--import {file}: {type(error).__name__}: {error}") from error
    return arguments[2:]


def _is_closed(stream: TextIO) -> bool:
    """True if the reader of an output has closed it; discards the buffered text then."""
    if not hasattr(select, "poll"):  # Windows
        return False
    poll = select.poll()
    try:
        poll.register(stream.fileno(), 0)
    except io.UnsupportedOperation:  # it is no file
        return False
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return closed


def _run(arguments: Sequence[str]) -> int:
    try:
        while arguments and arguments[0] == "--import":
            arguments = _import(arguments)
    except ValueError as error:
        return _fail(str(error), 2)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        from patchdiffusion import __version__  # which is read from a file

        print(f"patchdiffusion {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    try:
        if name not in COMMANDS:
            raise ValueError(_unknown(name))
        refuse_urls(rest)
        _check_processes(name)
        COMMANDS[name].main(rest)
    except HelpShown:
        return 0
    except Stop as error:
        return _fail(str(error), error.code)
    except BrokenPipeError:
        raise
    except OSError as error:
        return _fail(_of_system(error), 2)
    except (ValueError, ImportError) as error:
        return _fail(str(error) or type(error).__name__, 2)
    except (RuntimeError, MemoryError) as error:
        if peer_lost(error):
            return _fail(str(error).splitlines()[0], 24)
        if not out_of_memory(error):
            raise
        return _fail("out of memory; use a smaller --batch or a smaller size", 26)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Interrupted:
        return _interrupted(name)
    return 0


def _check_processes(name: str) -> None:
    """Raise `ValueError` for a command that several processes cannot share."""
    if name not in SHARED and place().size > 1:
        raise ValueError(
            f"{name} is for one process and {place().size} were started; type patchdiffusion "
            f"{name} ... without torchrun (these share their work: {', '.join(SHARED)})"
        )


def _unknown(name: str) -> str:
    """Error message for an unknown command."""
    text = f"unknown command {name!r}; commands are {', '.join(COMMANDS)}"
    if Path(name).exists():
        verb = "sample" if (Path(name) / "log.jsonl").exists() else "train"
        return f"{text}; did you mean patchdiffusion {verb} {name}?"
    return text + did_you_mean(name, COMMANDS)


def _of_system(error: OSError) -> str:
    """Message about an error of the system: the file, what is wrong, and what helps."""
    if error.filename is None or error.strerror is None:
        return str(error) or type(error).__name__
    unwritable = error.errno in (errno.EROFS, errno.ENOSPC, errno.EDQUOT)
    helps = "; another place is chosen by --out" if unwritable else ""
    return f"{os.fsdecode(error.filename)}: {error.strerror}{helps}"


def _fail(message: str, code: int) -> int:
    if message:  # else another process of the run has reported it
        rank = place().rank
        who = f"rank {rank}: " if rank else ""
        line = printable(" ".join(message.split()))
        try:
            print(f"patchdiffusion: error: {who}{line}", file=sys.stderr)
        except BrokenPipeError:
            raise
        except OSError:
            pass  # a terminal that was closed
    return code
