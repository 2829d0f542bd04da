"""S: hostile files. Nothing is executed, nothing outside is read, and one line says no."""

import json
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import pytest
import tiny
import torch
from commands import Capture, fails, names, works
from harness import NEWEST
from safetensors.torch import load_file

from patchdiffusion.data.pack import Pack
from patchdiffusion.data.prepare import prepare
from patchdiffusion.data.source import open_source
from patchdiffusion.model import load_model
from patchdiffusion.system.files import SEAL, read_json, sealed, sha256, write_json
from patchdiffusion.train.restore import read_saved

SECRET = "the words of somebody else"

_opened: list[Path] | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], str):
        _opened.append(Path(arguments[0]).resolve())


sys.addaudithook(_note)


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder in which hostile files point, and which stays unread and as it is."""
    global _opened
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret.png").write_text(SECRET)
    _opened = []
    yield folder
    opened, _opened = _opened, None
    assert opened, "nothing was watched"
    assert [file for file in opened if folder in file.parents] == []
    assert [file.name for file in folder.iterdir()] == ["secret.png"]


class Exploit:
    """Makes a file when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.canary), "w")


def as_pt(file: Path, canary: Path) -> None:
    torch.save({"out_conv.bias": Exploit(canary)}, file)


def as_pickle(file: Path, canary: Path) -> None:
    file.write_bytes(pickle.dumps(Exploit(canary)))


def as_array(file: Path, canary: Path) -> None:
    with open(file, "wb") as stream:
        np.save(stream, np.array([Exploit(canary)]), allow_pickle=True)


def vouch(file: Path) -> None:
    """Let the manifest or configuration beside a file give the digest that it has now."""
    if (file.parent / "manifest.json").exists():
        return harness.reseal(file.parent)
    facts = read_json(file.parent / "config.json")
    facts["sha256"][file.name] = sha256(file)
    del facts[SEAL]
    write_json(file.parent / "config.json", sealed(facts))


# ---- S1: pickles, and files that are no safetensors ----


@pytest.mark.parametrize("hostile", [as_pt, as_pickle, as_array])
def test_s1_pickles(
    hostile: Callable[[Path, Path], None],
    run: Path,
    images: Path,
    tmp_path: Path,
    outside: Path,
    capsys: Capture,
) -> None:
    canary = outside / "canary"
    for name in ("m.pt", "m.pkl", "m.npy", "m.npz", "m.safetensors"):
        hostile(tmp_path / name, canary)
        given = tmp_path / name
        assert name in fails(capsys, "sample", given)
        assert name in fails(capsys, "train", given, "--out", tmp_path / "new")
        more = ("--start-from", given, "--out", tmp_path / "new")
        assert name in fails(capsys, "train", images, *more)
    for file, command in (
        (run / "model" / "model.safetensors", ("sample", run)),
        (run / "checkpoints" / NEWEST / "weights.safetensors", ("train", run)),
    ):
        hostile(file, canary)
        vouch(file)
        before = tiny.digests(run)
        assert str(file) in fails(capsys, *command)
        assert tiny.digests(run) == before
    assert not (tmp_path / "new").exists()
    assert not canary.exists()


def crafted(name: str, file: Path) -> bytes:
    """A safetensors file that lies, otherwise like the one given."""
    tensors = {k: v.numpy() for k, v in load_file(file).items()}
    first = min(tensors)
    if name == "another dtype":
        tensors[first] = tensors[first].astype(np.float64)
    if name == "another shape":
        tensors[first] = np.zeros((3, *tensors[first].shape), np.float32)
    if name == "another name":
        tensors["../../secret"] = tensors.pop(first)
    header: dict[str, Any] = {}
    end = 0
    for key, value in tensors.items():
        kind = {"float32": "F32", "float64": "F64"}[str(value.dtype)]
        offsets = [end, end := end + value.nbytes]
        header[key] = {"dtype": kind, "shape": list(value.shape), "data_offsets": offsets}
    data = b"".join(value.tobytes() for value in tensors.values())
    if name == "overlapping offsets":
        for facts in header.values():
            size = facts["data_offsets"][1] - facts["data_offsets"][0]
            facts["data_offsets"] = [0, size]
    if name == "offsets outside":
        header[first]["data_offsets"] = [2**40, 2**40 + tensors[first].nbytes]
    if name == "negative offsets":
        header[first]["data_offsets"] = [-tensors[first].nbytes, 0]
    text = json.dumps(header).encode()
    if name == "nested header":
        text = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    length = 2**63 if name == "huge header" else len(text)
    return struct.pack("<Q", length) + text + data


@pytest.mark.parametrize(
    "name",
    [
        *("huge header", "nested header", "overlapping offsets", "offsets outside"),
        *("negative offsets", "another dtype", "another shape", "another name"),
    ],
)
def test_s1_safetensors(name: str, run: Path, outside: Path, capsys: Capture) -> None:
    for file, command in (
        (run / "model" / "model.safetensors", ("sample", run, "--count", 1)),
        (run / "checkpoints" / NEWEST / "weights.safetensors", ("train", run, "--images", 15)),
    ):
        file.write_bytes(crafted("nothing", file))
        vouch(file)
        file.write_bytes(crafted(name, file))
        vouch(file)
        before = tiny.digests(run)
        assert str(file) in fails(capsys, *command)
        assert tiny.digests(run) == before


# ---- S1: names that lead elsewhere ----


@pytest.mark.parametrize("name", ["../../../outside/secret.png", "..", "", "/", ".hidden"])
@pytest.mark.parametrize("absolute", [False, True])
def test_s1_names_in_a_manifest(
    name: str, absolute: bool, run: Path, outside: Path, capsys: Capture
) -> None:
    facts = {"bytes": len(SECRET), "sha256": sha256(outside / "secret.png")}
    if _opened is not None:
        _opened.clear()
    for folder in (run / "checkpoints").glob("step-*"):
        manifest = read_json(folder / "manifest.json")
        manifest["files"] = {str(folder / name) if absolute else name: facts, **manifest["files"]}
        write_json(folder / "manifest.json", manifest)
    before = tiny.digests(run)
    assert names(fails(capsys, "train", run, code=25), run / "checkpoints")
    assert tiny.digests(run) == before


def test_s1_a_pointer_elsewhere(run: Path, outside: Path, images: Path, capsys: Capture) -> None:
    """`latest` is for people; what it says is not believed."""
    shutil.copytree(run / "checkpoints" / NEWEST, run.parent / "other" / NEWEST)
    for text in ("../../outside", str(outside), f"../../other/{NEWEST}", "../" * 9, "\0", ""):
        (run / "checkpoints" / "latest").write_text(text)
        assert "is finished" in works(capsys, "train", run)


def test_s1_pictures_of_a_report(run: Path, outside: Path, capsys: Capture) -> None:
    for name in ("../../outside/secret.png", str(outside / "secret.png"), "..", ""):
        record = {"kind": "preview", "step": 4, "images": 12.0, "picture": name}
        with open(run / "log.jsonl", "a") as log:
            log.write(json.dumps(record) + "\n")
    works(capsys, "report", run)
    assert "data:image/png" in (run / "report.html").read_text()


# ---- S1: JSON of another form ----

DEEP = "[" * 100_000 + "]" * 100_000
TEXTS = ["{", "[]", "null", "{}", DEEP, '{"format": NaN}', '{"format": 1e999}', "9" * 5000]


@pytest.fixture
def pack(tmp_path: Path, images: Path) -> Path:
    return Path(shutil.copytree(prepare(open_source(images)).path, tmp_path / "pack"))


@pytest.mark.parametrize("name", ["config", "model", "state", "manifest", "run", "pack"])
def test_s1_json_of_another_form(
    name: str, run: Path, pack: Path, outside: Path, capsys: Capture
) -> None:
    newest = run / "checkpoints" / NEWEST
    for folder in (run / "checkpoints").glob("step-*"):
        if folder != newest:
            shutil.rmtree(folder)
    file, command = {
        "config": (run / "config.json", ("train", run, "--dry-run")),
        "model": (run / "model" / "config.json", ("sample", run)),
        "state": (newest / "state.json", ("train", run)),
        "manifest": (newest / "manifest.json", ("train", run)),
        "run": (run / "run.json", ("report", run)),
        "pack": (pack / "pack.json", ("train", pack, "--out", run.parent / "new")),
    }[name]
    for text in TEXTS:
        if name == "run" and text.endswith("}"):
            continue  # a run that has not said anything yet
        file.write_bytes(text.encode())
        if name == "state":
            harness.reseal(newest)
        before = tiny.digests(run), tiny.digests(pack)
        code = 25 if name == "manifest" else 2
        assert len(fails(capsys, *command, code=code)) < 1000
        assert (tiny.digests(run), tiny.digests(pack)) == before
    assert not (run.parent / "new").exists()


BAD = [None, "x", "../../outside", [], ["x"], {}, {"a": 1}, -1.5, 10**400]


def changes(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every entry of a JSON object, replaced by a value of another type."""
    for key, item in value.items():
        for bad in BAD if key != SEAL else ():
            if type(bad) is not type(item):
                yield (*path, key), bad
        if isinstance(item, dict) and key not in ("config", "engine", "options"):
            yield from changes(item, (*path, key))


def put(file: Path, path: tuple[str, ...], value: Any) -> None:
    whole = inner = read_json(file)
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    if whole.pop(SEAL, None):
        whole = sealed(whole)
    file.write_text(json.dumps(whole) + "\n")


def test_s1_facts_of_another_type(
    run: Path, images: Path, pack: Path, outside: Path, capsys: Capture
) -> None:
    """A checkpoint, a model and a pack whose digests are right and whose facts are not."""
    newest = run / "checkpoints" / NEWEST
    for file, read in (
        (newest / "state.json", lambda: read_saved(newest)),
        (run / "model" / "config.json", lambda: load_model(run)),
        (pack / "pack.json", lambda: Pack.open(pack)),
    ):
        good = file.read_bytes()
        tried = list(changes(json.loads(good)))
        assert len(tried) > 100
        for path, bad in tried:
            if path[0] in ("config", "options") or (path[0] == "labels_crc32" and bad is None):
                continue  # checked later, and a pack without labels
            file.write_bytes(good)
            put(file, path, bad)
            try:
                read()
            except ValueError as error:
                assert "\n" not in str(error)
            else:
                # Names are compared later.
                free = path[0] in ("engine", "teacher") or "raw.safetensors" in path
                assert free, (file, path, bad)
        file.write_bytes(good)
    put(newest / "state.json", ("state", "crops"), "many")
    harness.reseal(newest)
    before = tiny.digests(run)
    assert names(fails(capsys, "train", run), "state.crops", "int", "many")
    assert tiny.digests(run) == before


def test_s1_labels_of_a_pack(pack: Path, tmp_path: Path, outside: Path, capsys: Capture) -> None:
    for label in (2, -2, 2**31 - 1):
        labels = np.fromfile(pack / "labels.bin", "<i4")
        labels[7] = label
        labels.tofile(pack / "labels.bin")
        error = fails(capsys, "train", pack, "--out", tmp_path / "new")
        assert names(error, pack / "labels.bin")


def test_s1_a_log_of_another_form(
    run: Path, outside: Path, images: Path, capsys: Capture, with_report: None
) -> None:
    """It is for people: training goes on, and the page says what it cannot show."""
    lines = [DEEP, "{", "\0", "[1]", "NaN", '{"kind": []}', '{"kind": "status"}']
    lines += ['{"kind": "status", "step": "x"}', '{"kind": "resume"}', '{"kind": "preview"}']
    with open(run / "log.jsonl", "a") as log:
        log.write("\n".join(lines))
    assert names(fails(capsys, "report", run), run)
    out = works(capsys, "train", run, "--images", 15)
    assert any(names(x, "warning", "report", run) for x in out.splitlines())


# ---- S1: links, pipes and code in a run ----


@pytest.mark.parametrize(
    "name", ["lock", "log.jsonl", "run.json", "samples/0000000012.png", "samples", "checkpoints"]
)
def test_s1_links_in_a_run(name: str, run: Path, tmp_path: Path, capsys: Capture) -> None:
    link, victim = run / name, tmp_path / "victim"
    victim.mkdir()
    (victim / "file").write_text(SECRET)
    shutil.rmtree(link) if link.is_dir() else link.unlink(missing_ok=True)
    link.symlink_to(victim if name in ("samples", "checkpoints") else victim / "file")
    for command in (("train", run, "--images", 15), ("report", run, "--out", tmp_path / "page")):
        assert names(fails(capsys, *command), link)
    assert (victim / "file").read_text() == SECRET
    assert len(list(victim.iterdir())) == 1
    assert not (tmp_path / "page").exists()
    link.unlink()
    (run / "own.png").symlink_to(run / "samples" / "0000000012.png")  # inside, which is allowed
    works(capsys, "report", run, "--out", tmp_path / "page")


@pytest.mark.parametrize("name", ["config.json", "run.json", "log.jsonl", "model/config.json"])
def test_s1_pipes_in_a_run(name: str, run: Path, tmp_path: Path, capsys: Capture) -> None:
    """Nobody writes into them: who reads waits for ever."""
    (run / name).unlink()
    os.mkfifo(run / name)
    command = ("sample", run) if "model" in name else ("report", run, "--out", tmp_path / "page")
    assert names(fails(capsys, *command), run / name)


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_s1_code_that_only_a_run_names(
    more: tuple[str, ...],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    canary = tmp_path / "canary"
    code = f"import pathlib\npathlib.Path({str(canary)!r}).touch()\n"
    (tmp_path / "hostile.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    stored = read_json(run / "config.json")
    stored["preview"] |= {"extractor": "hostile:make", "distance": 2}
    write_json(run / "config.json", stored)
    told = fails(capsys, "train", run, "--images", 15, *more)
    assert names(told, "hostile:make", "--preview.extractor")
    assert not canary.exists()
