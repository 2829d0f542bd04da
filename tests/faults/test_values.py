"""S4: whatever is asked for on the command line or in `config.json`, the answer is one line."""

import contextlib
import io
import json
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st

from patchdiffusion import cli
from patchdiffusion.sampling.pipeline import SamplerConfig
from patchdiffusion.system.files import SEAL, read_json
from patchdiffusion.system.serialize import encode
from patchdiffusion.train.config import RunConfig

quick = settings(
    derandomize=True,
    max_examples=150,
    phases=(Phase.explicit, Phase.generate),
    report_multiple_bugs=False,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

VALUES: list[Any] = [None, "", "x", "\u96ea\u2603", "../x", [], {}, [1], [-1, 2], True, -1, 0, 0.5]
VALUES += [float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 10**18, 10**400]
WORDS = ["nan", "inf", "-1", "0", "0.5", "1e300", "1" + "0" * 400, "", "\u96ea", "x", "None", "--"]


def leaves(value: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, item in value.items():
        if isinstance(item, dict):
            yield from leaves(item, (*path, key))
        yield (*path, key)


def tried(*arguments: object) -> tuple[int, str]:
    """The exit code of a command and its one line, if it refuses."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(a) for a in arguments])
    lines = err.getvalue().splitlines()
    told = [x for x in lines if x.startswith("patchdiffusion: error: ")]
    assert len(told) == (code != 0), (arguments, lines)
    return code, told[0].removeprefix("patchdiffusion: error: ") if told else ""


def names(error: str, path: tuple[str, ...]) -> bool:
    """Whether a line names a field, or its part of the configuration."""
    said = re.sub(r"[-_ ]", "_", error)
    # A value may be possible in itself and contradict the weights or the data.
    known = ("does_not_fit", "network", "its_digest", "unknown_flag", "needs_about")
    return path[-1] in said or ".".join(path[:-1] or path) in said or any(k in said for k in known)


def put(good: Any, path: tuple[str, ...], value: Any, file: Path) -> None:
    whole = inner = json.loads(json.dumps(good))
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    file.write_text(json.dumps(whole))


@pytest.mark.parametrize("command", ["train", "sample"])
def test_s4_any_value_in_config_json(command: str, run: Path, images: Path) -> None:
    folder = run if command == "train" else run / "model"
    file, before = folder / "config.json", tiny.digests(run)
    good, text = read_json(file), file.read_bytes()
    good.pop(SEAL, None)  # which would tell of any change
    paths = [p for p in leaves(good) if p[-1] != "path" and p[0] != "sha256" and p != ("data",)]
    more = {"train": ["--dry-run"], "sample": ["--steps", "1", "--count", "1", "--batch", "1"]}

    @quick
    @example(("optim", "lr") if command == "train" else ("images",), float("nan"), False)
    @example(("preview", "grid") if command == "train" else ("canvas",), 10**400, False)
    @example(("optim",) if command == "train" else ("canvas",), [-1, 2], False)
    @example(("precond", "sigma_data"), 1e300, False)
    @given(st.sampled_from(paths), st.sampled_from(VALUES), st.booleans())
    def attempt(path: tuple[str, ...], value: Any, unknown: bool) -> None:
        path = (*path[:-1], "surprise") if unknown else path
        put(good, path, value, file)
        code, error = tried(command, run, *more[command])
        assert code in (0, 2), (path, value, error)
        assert not error or names(error, path), (path, value, error)
        refused = unknown or (isinstance(value, float) and not math.isfinite(value))
        assert code == 2 or not refused, (path, value)
        shutil.rmtree(run / "generated", ignore_errors=True)

    attempt()
    file.write_bytes(text)
    assert tiny.digests(run) == before


def test_s4_any_value_of_a_flag(run: Path, images: Path, tmp_path: Path) -> None:
    before = tiny.digests(run)
    config = {**encode(RunConfig()), **read_json(run / "config.json")}
    skipped = {"type", "path", "out", "fresh", "dry_run", "allow_config_change"}
    training = [p for p in leaves(config) if p[-1] not in skipped]
    sampling = [p for p in leaves(encode(SamplerConfig())) if p[-1] != "type"]

    @quick
    @given(st.sampled_from([*training, *sampling]), st.sampled_from(WORDS), st.booleans())
    def attempt(path: tuple[str, ...], value: str, unknown: bool) -> None:
        sample = path in sampling and path not in training
        path = (*path[:-1], "surprise") if unknown else path
        flag = "--" + ".".join(path).replace("_", "-")
        command = ["sample", run, "--count", 1] if sample else ["train", run, "--dry-run"]
        code, error = tried(*command, flag, value)
        assert code in (0, 2), (flag, value, error)
        assert not error or names(error, path), (flag, value, error)
        assert code == 2 or not unknown, (flag, value)
        shutil.rmtree(run / "generated", ignore_errors=True)

    attempt()
    assert tiny.digests(run) == before
