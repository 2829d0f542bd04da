"""What takes the place of what protects a run: each function makes it out of the original."""

import contextlib
import itertools
import json
import pickle
import signal
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

StandIn = Callable[[Any], Any]


# ---- Constants ----


def constant(value: Any) -> StandIn:
    """Something else."""
    return lambda original: value


absent, one, endless, own_umask = constant(None), constant(1), constant(10**9), constant(0o077)
no_names = constant(())
same_text = constant(property(lambda self: "the same"))


def no_sigterm(signals: tuple[signal.Signals, ...]) -> tuple[signal.Signals, ...]:
    return tuple(s for s in signals if s != signal.SIGTERM)


def no_sigint(signals: tuple[signal.Signals, ...]) -> tuple[signal.Signals, ...]:
    return tuple(s for s in signals if s != signal.SIGINT)


class _Unchanging(list[bool]):
    def __setitem__(self, *given: Any) -> None:
        pass


unchanging = constant(_Unchanging([False]))


def wall_clock(original: types.ModuleType) -> Any:
    """Of the module `time`, with a clock that can be set."""
    return types.SimpleNamespace(**{**vars(original), "monotonic": lambda: original.time()})


def all_main(original: types.ModuleType) -> Any:
    """Of the module `threading`, as if every thread were the main one."""
    return types.SimpleNamespace(**{**vars(original), "main_thread": original.current_thread})


# ---- Functions that only return something ----


def returning(make: Callable[[], Any]) -> StandIn:
    """A function of any arguments."""
    return lambda original: lambda *given, **options: make()


nothing, yes, no = returning(lambda: None), returning(lambda: True), returning(lambda: False)
zero, never = returning(lambda: 0), returning(lambda: float("inf"))
empty_text, empty_list, empty_dict = returning(str), returning(list), returning(dict)
no_context = returning(contextlib.nullcontext)
plain_exit, plain_json, unpickling = (
    constant(sys.exit),
    constant(json.loads),
    constant(pickle.loads),
)


def argument(original: Any) -> Any:
    """Returns what it is given, as a function or method."""
    return lambda *given, **options: given[-1]


# ---- Functions that do part of what they did ----


def result(change: Callable[[Any], Any]) -> StandIn:
    """A function with another result."""
    return lambda original: lambda *given, **options: change(original(*given, **options))


copied = result(lambda found: {name: value.clone() for name, value in found.items()})
first_of_all = result(lambda found: itertools.islice(found, 1))
never_bad = result(lambda told: told._replace(bad=0 * told.bad))
never_scaled = result(lambda verdict: verdict._replace(max_norm=0 * verdict.max_norm + 1e9))


def first_argument(original: Any) -> Any:
    return lambda first, *others, **options: original(first)


def own_vote(original: Any) -> Any:
    return lambda self, mine: list(mine)


def own_draws(original: Any) -> Any:
    """Draws that are counted from the first crop of this process or micro-batch."""

    def draws(self: Any, group: Any, *, first: int, chunk: range, **options: Any) -> Any:
        return original(self, group, first=first - chunk.start, chunk=chunk, **options)

    return draws


def by_picture(original: Any) -> Any:
    """Samples count as shown when there is their picture."""
    from patchdiffusion.train.status import picture_of

    return lambda training: picture_of(training).exists()


def newest_only(original: Any) -> Any:
    """Pruning that keeps nothing for good."""
    return lambda root, keep, every=None: original(root, keep)


class _Impatient:
    """A tracker that is used in the thread of the training."""

    problem = ""

    def __init__(self, make: Callable[[], Any]):
        self.tracker = make()

    def do(self, action: Callable[[Any], None] | None) -> None:
        (action or (lambda tracker: tracker.close()))(self.tracker)

    def hangs(self, patience: float) -> bool:
        return False

    def join(self, seconds: float) -> bool:
        return True


same_thread = constant(_Impatient)


def by_loss(original: Any) -> Any:
    return lambda self, kind, loss, norm, **options: original(self, kind, loss, loss, **options)


def clipped(original: Any) -> Any:
    """What Pillow makes of 16 bits."""
    import numpy as np

    return lambda image: image.clip(0, 255).astype(np.uint8)


def without_errors(original: Any) -> Any:
    def tried(*given: Any) -> Any:
        with contextlib.suppress(Exception):
            return original(*given)

    return tried


def lenient(original: Any) -> Any:
    """The field of a record may have any value."""

    def field(hint: Any, value: Any, where: str) -> Any:
        try:
            return original(hint, value, where)
        except ValueError:
            return value

    return field


def only_known(original: Any) -> Any:
    """What a record has not is passed over."""

    def decode(cls: Any, value: Any, where: str = "") -> Any:
        if isinstance(value, dict):
            known = {"type", *cls.__dataclass_fields__}
            value = {name: item for name, item in value.items() if name in known}
        return original(cls, value, where)

    return decode


def named_by_latest(original: Any) -> Any:
    def folders(root: Path) -> list[Path]:
        latest = root / "latest"
        return [root / latest.read_text().strip()] if latest.exists() else original(root)

    return folders


def raising(original: Any) -> Any:
    def warn(self: Any, name: str, error: OSError) -> None:
        raise error

    return warn


# ---- Functions that do it otherwise ----


def random_normal(original: Any) -> Any:
    """Draws with a random state."""

    def normal(self: Any, stream: str, shape: tuple[int, ...]) -> Any:
        return self.keys(stream).new_empty((len(self.index), *shape)).float().normal_()

    return normal


def in_place(original: Any) -> Any:
    """A folder that is filled under its own name."""

    @contextlib.contextmanager
    def folder_atomic(folder: Path) -> Iterator[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder

    return folder_atomic


def one_signal(original: Any) -> Any:
    """Signals that nobody counts."""

    @contextlib.contextmanager
    def stop_signals() -> Iterator[threading.Event]:
        event = threading.Event()
        before = signal.signal(signal.SIGINT, lambda *given: event.set())
        yield event
        signal.signal(signal.SIGINT, before)

    return stop_signals
