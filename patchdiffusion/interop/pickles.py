"""Reading of pickles without executing them: classes and functions become inert records.

An interpreter of the opcodes (the module `pickletools` documents them) that knows numbers, texts,
bytes and containers. It imports nothing and calls nothing: a class or function is a `Reference`,
and what a pickle would make with it is a `Record` of that name, its arguments and its state, which
readers of tensors look at. Copies are made of nothing, so that memory is bounded by the bytes of
the file and the number of opcodes.
"""

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MOST_OPCODES = 2_000_000
"""Opcodes of all pickles of a file together; each makes at most one value."""
_LONGEST_NAME = 500
_LONGEST_KEY = 10_000
_MOST_KEY_BITS = 512


@dataclass(frozen=True, slots=True)
class Reference:
    """Name of a class or function, which is not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False, repr=False)
class Record:
    """Call of a class or function in a pickle that was not made."""

    reference: Reference
    args: tuple[Any, ...] = ()
    state: Any = None
    """State of the object, as its `__setstate__` or `__dict__` would get it."""
    items: dict[Any, Any] = field(default_factory=dict)
    """Items that would be set on it."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Persistent:
    """Identifier of an object that lies outside the pickle, such as a storage."""

    id: Any


class Budget:
    """Number of opcodes that may still be read from a file."""

    def __init__(self, opcodes: int = MOST_OPCODES) -> None:
        self.left = opcodes

    def spend(self) -> None:
        """Count an opcode; `ValueError` if there are too many."""
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"more than {MOST_OPCODES:,} opcodes, which no checkpoint has")


def read_pickle(
    stream: io.BytesIO, budget: Budget, persistent: list[Persistent] | None = None
) -> Any:
    """Value of the pickle at the place of a stream, which is left behind its end.

    Identifiers of objects outside the pickle are added to `persistent`, or refused. Raises
    `ValueError` in one line, with the byte, for a damaged pickle and for opcodes that no checkpoint
    has.
    """
    machine = _Machine(persistent)
    place = stream.tell()
    try:
        for opcode, argument, at in pickletools.genops(stream):
            place = place if at is None else at
            budget.spend()
            if opcode.name == "STOP":
                return machine.result()
            rule = _RULES.get(opcode.name)
            if rule is None:
                raise ValueError(f"the opcode {opcode.name} is not read")
            rule(machine, argument)
    except (ValueError, OverflowError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"damaged or unknown pickle at byte {place}: {reason}") from None
    raise ValueError(f"damaged pickle: it has no end after byte {place}")


class _Machine:
    def __init__(self, persistent: list[Persistent] | None) -> None:
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks below the marks
        self.memo: dict[int, Any] = {}
        self.persistent = persistent

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("the stack is empty")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise ValueError("the stack is empty")
        return self.stack[-1]

    def mark(self) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        if not self.outer:
            raise ValueError("there is no mark")
        values, self.stack = self.stack, self.outer.pop()
        return values

    def result(self) -> Any:
        value = self.pop()
        if self.stack or self.outer:
            raise ValueError("values are left on the stack")
        return value


def _reference(module: object, name: object) -> Reference:
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("the name of a class is no text")
    if len(module) + len(name) > _LONGEST_NAME or not (module + name).isprintable():
        raise ValueError("the name of a class is too long or not printable")
    return Reference(module, name)


def _record(callable_: object, args: object) -> Record:
    if not isinstance(callable_, Reference):
        raise ValueError(f"a {type(callable_).__name__} is called")
    if not isinstance(args, tuple):
        raise ValueError(f"the arguments of {callable_} are a {type(args).__name__}, not a tuple")
    return Record(callable_, args)


def _key(value: object) -> Any:
    """A key of a dict or member of a set; comparisons of others may take hours."""
    parts = value if isinstance(value, tuple) and len(value) <= 4 else (value,)
    if not all(map(_is_small, parts)):
        raise ValueError(f"this {type(value).__name__} is no key")
    return value


def _is_small(value: object) -> bool:
    if isinstance(value, str | bytes):
        return len(value) <= _LONGEST_KEY
    if isinstance(value, int):
        return value.bit_length() <= _MOST_KEY_BITS
    return value is None or isinstance(value, float | Reference)


# ---- Rules of opcodes ----


def _constant(make: Callable[[], Any]) -> Callable[[_Machine, Any], object]:
    return lambda machine, _: machine.push(make())


def _argument(machine: _Machine, argument: Any) -> None:
    machine.push(argument)


def _tuple(count: int) -> Callable[[_Machine, Any], object]:
    def rule(machine: _Machine, _: Any) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.push(tuple(reversed(values)))

    return rule


def _put(machine: _Machine, argument: Any) -> None:
    machine.memo[len(machine.memo) if argument is None else argument] = machine.top()


def _get(machine: _Machine, argument: Any) -> None:
    if argument not in machine.memo:
        raise ValueError(f"nothing is memorized as {argument}")
    machine.push(machine.memo[argument])


def _extend(machine: _Machine, values: list[Any]) -> None:
    target = machine.top()
    if not isinstance(target, list):
        raise ValueError(f"values are appended to a {type(target).__name__}")
    target.extend(values)


def _update(machine: _Machine, values: list[Any]) -> None:
    target = machine.top()
    items = target.items if isinstance(target, Record) else target
    if not isinstance(items, dict):
        raise ValueError(f"items are set on a {type(target).__name__}")
    if len(values) % 2:
        raise ValueError("a key without a value")
    for key, value in zip(values[::2], values[1::2], strict=True):
        items[_key(key)] = value


def _append(machine: _Machine, _: Any) -> None:
    value = machine.pop()
    _extend(machine, [value])


def _set_item(machine: _Machine, _: Any) -> None:
    value, key = machine.pop(), machine.pop()
    _update(machine, [key, value])


def _dict(machine: _Machine, _: Any) -> None:
    values = machine.since_mark()
    machine.push({})
    _update(machine, values)


def _add_items(machine: _Machine, _: Any) -> None:
    values = machine.since_mark()
    target = machine.top()
    if not isinstance(target, set):
        raise ValueError(f"members are added to a {type(target).__name__}")
    target.update(map(_key, values))


def _stack_global(machine: _Machine, _: Any) -> None:
    name, module = machine.pop(), machine.pop()
    machine.push(_reference(module, name))


def _global(machine: _Machine, argument: str) -> None:
    machine.push(_reference(*argument.split(" ", 1)))


def _call(machine: _Machine, _: Any) -> None:
    args, called = machine.pop(), machine.pop()
    machine.push(_record(called, args))


def _call_with_keywords(machine: _Machine, _: Any) -> None:
    keywords, args, called = machine.pop(), machine.pop(), machine.pop()
    if not isinstance(keywords, dict):
        raise ValueError("the keywords of a call are no dict")
    record = _record(called, args)
    record.items = keywords
    machine.push(record)


def _object(machine: _Machine, _: Any) -> None:
    called, *args = machine.since_mark() or [None]
    machine.push(_record(called, tuple(args)))


def _instance(machine: _Machine, argument: str) -> None:
    args = tuple(machine.since_mark())
    machine.push(_record(_reference(*argument.split(" ", 1)), args))


def _build(machine: _Machine, _: Any) -> None:
    state, target = machine.pop(), machine.top()
    if not isinstance(target, Record):
        raise ValueError(f"a state is given to a {type(target).__name__}")
    target.state = state


def _persistent(machine: _Machine, argument: Any) -> None:
    if machine.persistent is None:
        raise ValueError("an object outside the pickle, which only files of torch have")
    outside = Persistent(machine.pop() if argument is None else argument)
    machine.persistent.append(outside)
    machine.push(outside)


def _nothing(machine: _Machine, _: Any) -> None:
    pass


_RULES: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"), _argument),
    **dict.fromkeys(("FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING"), _argument),
    **dict.fromkeys(("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"), _argument),
    **dict.fromkeys(("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"), _argument),
    "NONE": _constant(lambda: None),
    "NEWTRUE": _constant(lambda: True),
    "NEWFALSE": _constant(lambda: False),
    "EMPTY_LIST": _constant(list),
    "EMPTY_DICT": _constant(dict),
    "EMPTY_SET": _constant(set),
    "EMPTY_TUPLE": _constant(tuple),
    "MARK": lambda machine, _: machine.mark(),
    "POP": lambda machine, _: machine.pop() if machine.stack else machine.since_mark(),
    "POP_MARK": lambda machine, _: machine.since_mark(),
    "DUP": lambda machine, _: machine.push(machine.top()),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "LIST": lambda machine, _: machine.push(machine.since_mark()),
    "FROZENSET": lambda machine, _: machine.push(frozenset(map(_key, machine.since_mark()))),
    "DICT": _dict,
    "APPEND": _append,
    "APPENDS": lambda machine, _: _extend(machine, machine.since_mark()),
    "SETITEM": _set_item,
    "SETITEMS": lambda machine, _: _update(machine, machine.since_mark()),
    "ADDITEMS": _add_items,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _get),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": _call,
    "NEWOBJ": _call,
    "NEWOBJ_EX": _call_with_keywords,
    "OBJ": _object,
    "INST": _instance,
    "BUILD": _build,
    **dict.fromkeys(("PERSID", "BINPERSID"), _persistent),
    **dict.fromkeys(("PROTO", "FRAME"), _nothing),
}
