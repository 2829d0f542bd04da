"""The command line: `patchdiffusion COMMAND ...`."""

import io
import os
import select
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, TextIO

from patchdiffusion import __version__
from patchdiffusion.cli import average, bench, doctor, evaluate, prepare, report, sample, train
from patchdiffusion.cli.help import first_line
from patchdiffusion.cli.parse import HelpShown
from patchdiffusion.system.dist import leave, place
from patchdiffusion.system.errors import Stop, out_of_memory, peer_lost


@dataclass(frozen=True)
class Command:
    """A word after `patchdiffusion`."""

    main: Callable[[Sequence[str]], None]
    arguments: Callable[[], object]
    """Makes the record that its arguments change; the docstring of its class is the help."""


COMMANDS: dict[str, Command] = {
    "train": Command(train.main, train.TrainArguments),
    "sample": Command(sample.main, sample.SampleArguments),
    "evaluate": Command(evaluate.main, evaluate.EvaluateArguments),
    "prepare": Command(prepare.main, prepare.PrepareArguments),
    "report": Command(report.main, report.ReportArguments),
    "average": Command(average.main, average.AverageArguments),
    "bench": Command(bench.main, bench.BenchArguments),
    "doctor": Command(doctor.main, doctor.DoctorArguments),
}

USAGE = "\n".join(
    [
        "usage: patchdiffusion COMMAND [options]",
        "",
        "Train diffusion models from scratch on your own images, on patches.",
        "",
        *(f"  {name:<10}{first_line(command.arguments)}" for name, command in COMMANDS.items()),
        "",
        "patchdiffusion COMMAND --help lists the options of a command.",
        "patchdiffusion --version prints the version.",
    ]
)


def program() -> NoReturn:
    """The command `patchdiffusion`."""
    leave(main())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. Errors of the user are one line and code 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # no name that it cannot show may end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError as error:
        closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)]
        code = 141 if closed else _fail(str(error), 2)
    return code


def _is_closed(stream: TextIO) -> bool:
    """Whether nobody reads an output any more; what is still in it goes nowhere then."""
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
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"patchdiffusion {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    try:
        if name not in COMMANDS:
            raise ValueError(f"unknown command {name!r}; commands are {', '.join(COMMANDS)}")
        COMMANDS[name].main(rest)
    except HelpShown:
        return 0
    except Stop as error:
        return _fail(str(error), error.code)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ImportError) as error:
        return _fail(str(error) or type(error).__name__, 2)
    except (RuntimeError, MemoryError) as error:
        if peer_lost(error):
            return _fail(str(error).splitlines()[0], 24)
        if not out_of_memory(error):
            raise
        return _fail("out of memory; use a smaller --batch or a smaller size", 26)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    return 0


def _fail(message: str, code: int) -> int:
    if message:  # else another process of the run has said it
        rank = place().rank
        who = f"rank {rank}: " if rank else ""
        print(f"patchdiffusion: error: {who}{' '.join(message.split())}", file=sys.stderr)
    return code
