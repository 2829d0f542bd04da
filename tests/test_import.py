"""Published checkpoints become models with the same outputs, and no file is executed."""

import io
import pickle
import pickletools
import struct
import sys
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from commands import Capture, fails, refuses, works
from golden import golden, weights_and_tensors
from safetensors.torch import save_file
from test_interop_edm import ADM, LITTLE, exported, random_network
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.interop.checkpoints import read_published
from patchdiffusion.interop.kinds import Unsaid, imported
from patchdiffusion.interop.pickles import Budget, read_pickle
from patchdiffusion.model import load_model

CLASSES = {
    "dnnlib.util": ["EasyDict"],
    "torch_utils.persistence": ["_reconstruct_persistent_obj"],
}


class Module:
    """Look-alike of a module of EDM: pickled with its class, source and state."""

    def __init__(self, kind: str, tensors: dict[str, Tensor], **keywords: Any) -> None:
        fake = sys.modules
        self.rebuild = fake["torch_utils.persistence"].__dict__["_reconstruct_persistent_obj"]
        self.table = fake["dnnlib.util"].__dict__["EasyDict"]
        own = {name: value for name, value in tensors.items() if "." not in name}
        heads = dict.fromkeys(name.split(".")[0] for name in tensors if "." in name)
        inner = {
            head: Module("Part", {n[len(head) + 1 :]: v for n, v in tensors.items()
                                  if n.startswith(f"{head}.")})
            for head in heads
        }  # fmt: skip
        filters = {n: v for n, v in own.items() if n == "resample_filter"}
        rest = {n: torch.nn.Parameter(v) for n, v in own.items() if n not in filters}
        self.kind, self.state = kind, self.table(
            _parameters=rest | {"absent": None}, _buffers=filters, _modules=inner,
            _init_args=(), _init_kwargs=self.table(keywords), training=False,
        )  # fmt: skip

    def __reduce__(self) -> tuple[Any, ...]:
        source = "import os\nos.abort()\n"
        meta = self.table(
            type="class", version=6, module_src=source, class_name=self.kind, state=self.state
        )
        return self.rebuild, (meta,)


def look_alike(path: Path, kind: str, tensors: dict[str, Tensor], **keywords: Any) -> Path:
    """Write a pickle as EDM does; its modules exist only meanwhile."""
    before = set(sys.modules)
    for name, members in CLASSES.items():
        for full in (name.split(".")[0], name):
            sys.modules.setdefault(full, ModuleType(full))
        for member in members:
            made: Any = type(member, (dict,), {}) if member == "EasyDict" else (lambda meta: meta)
            made.__module__, made.__qualname__, made.__name__ = name, member, member
            setattr(sys.modules[name], member, made)
    try:
        content = {"ema": Module(kind, tensors, **keywords), "loss_fn": None, "augment_pipe": None}
        path.write_bytes(pickle.dumps(content))
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] in ("dnnlib", "torch_utils"):
                del sys.modules[name]
    return path


# ---- What comes in is what was published ----


@pytest.mark.parametrize("start", [LITTLE, ADM])
def test_pickles_of_edm(start: Any, tmp_path: Path, capsys: Capture) -> None:
    """Network -> published names and classes -> model: the same bits."""
    network = random_network(start)
    path = look_alike(
        tmp_path / "a.pkl", "Patch_EDMPrecond", exported(network, 16), sigma_data=0.25, dropout=0.1
    )
    text = works(capsys, "import", path, "--out", tmp_path / "m", "--head-width", 8)
    assert "patch-diffusion" in text and "16x16" in text and "ema" in text
    model = load_model(tmp_path / "m")
    precond, config = model.config.precond, model.config.network
    assert getattr(precond, "sigma_data", None) == 0.25
    assert (config.dropout, config.num_classes, model.config.canvas) == (0.1, 4, (16, 16))
    x, noise = torch.randn(2, 3, 16, 16), torch.randn(2)
    cond = Cond(labels=torch.tensor([0, -1]))
    with torch.no_grad():
        assert torch.equal(model.network(x, noise, cond), network(x, noise, cond))
    assert "exists" in fails(capsys, "import", path, "--out", tmp_path / "m")
    other = ("--out", tmp_path / "n", "--head-width", 8, "--kind", "edm2")
    assert "edm2" in fails(capsys, "import", path, *other)
    assert "raw" in fails(capsys, "import", path, "--out", tmp_path / "n", "--weights", "raw")
    assert not (tmp_path / "n").exists()
    wrong = look_alike(tmp_path / "b.pkl", "VPPrecond", exported(network, 16))
    assert "VPPrecond" in fails(capsys, "import", wrong, *other[:4])


@pytest.mark.parametrize("form", ["pkl", "zip", "legacy", "safetensors"])
def test_forms_of_files(form: str, tmp_path: Path) -> None:
    tensors = {n: v for n, v in exported(random_network(LITTLE), 16).items() if "filter" not in n}
    path = tmp_path / "a"
    if form == "pkl":
        look_alike(path, "EDMPrecond", tensors)
    elif form == "safetensors":
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    else:
        wrapped = {f"module.{name}": value for name, value in tensors.items()}
        content = {"model": {"x": torch.zeros(1)}, "ema": wrapped, "step": 3}
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    found = read_published(path)
    assert set(found.tensors) == set(tensors)
    assert all(torch.equal(found.tensors[name], value) for name, value in tensors.items())
    if form in ("zip", "legacy"):
        assert set(read_published(path, weights="model").tensors) == {"x"}


def test_types_and_views_of_tensors(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    values = {
        "view": base[1:, ::2].t(), "half": base.half(), "brain": base.bfloat16(), "again": base,
        "scalar": torch.tensor(3.0), "none": torch.zeros(0, 2), "long": torch.arange(3),
    }  # fmt: skip
    for zipped in (True, False):
        torch.save(values, tmp_path / "a", _use_new_zipfile_serialization=zipped)
        found = read_published(tmp_path / "a").tensors
        assert all(
            torch.equal(found[n], v) and found[n].dtype == v.dtype for n, v in values.items()
        )
    array = np.arange(6.0).reshape(2, 3)
    record = read_pickle(io.BytesIO(pickle.dumps(array)), Budget())
    assert record.reference.name == "_reconstruct"


@pytest.mark.parametrize(
    "name",
    [
        "ddpmpp-patch-64-crop16x32",
        "ncsnpp-32-labels",
        "adm-patch-latent-32-labels",
        "edm2-32-labels",
        "lego-pg-16-labels",
    ],
)
def test_reference_outputs(name: str, tmp_path: Path) -> None:
    weights, t = weights_and_tensors(golden(name))
    kind = "Precond" if "edm2" in name else "EDMPrecond"
    published = read_published(look_alike(tmp_path / "a.pkl", kind, weights, sigma_data=0.5))
    _, config, network = imported(published, unsaid=Unsaid(heads=4 if "lego" in name else None))
    labels = None
    if "in/labels" in t:
        labels = torch.where(t["in/labels"].sum(1) > 0, t["in/labels"].argmax(1), -1)
    with torch.no_grad():
        cond = Cond(labels=labels, pos=t.get("in/pos"))
        found = NetDenoiser(network, config.precond)(t["in/x"], t["in/sigma"], cond)
    expected = t["out/denoised"]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_weights_that_do_not_fit_are_named(tmp_path: Path, capsys: Capture) -> None:
    tensors = exported(random_network(LITTLE), 16)
    path, out = tmp_path / "a.safetensors", tmp_path / "m"

    def told(**changes: Any) -> str:
        content = {n: v for n, v in (tensors | changes).items() if v is not None}
        save_file({name: value.contiguous() for name, value in content.items()}, path)
        return fails(capsys, "import", path, "--out", out)

    assert "map_layer0.weight" in told(**{"model.map_layer0.weight": None})
    assert "map_layer0.bias" in told(**{"model.map_layer0.bias": torch.zeros(1)})
    assert "finite" in told(**{"model.map_layer0.bias": torch.full((32,), torch.nan)})
    assert "base" in told(**{"model.enc.16x16_conv.weight": torch.zeros(8000, 5, 1, 1)})
    save_file({"x": torch.zeros(1)}, path)
    assert "dit" in fails(capsys, "import", path, "--out", out)
    assert "folder" in fails(capsys, "import", tmp_path, "--out", out)
    assert "no file" in fails(capsys, "import", tmp_path / "none", "--out", out)
    loop = {"enc.0x0_conv.weight": torch.zeros(8, 5, 3, 3), "dec.0x0_aux_conv.weight": tensors[
        "model.dec.16x16_aux_conv.weight"], "enc.0x0_block0.conv0.weight": torch.zeros(8, 8, 3, 3),
    }  # fmt: skip
    save_file(loop, path)
    assert "fit" in fails(capsys, "import", path, "--out", out)  # halving 0 never ends


# ---- Hostile files ----


def executing(canary: Path) -> Iterator[bytes]:
    """Pickles that run a command when `pickle` reads them, by each way to call something."""
    command = f"touch {canary}".encode()
    text = b"X" + struct.pack("<I", len(command)) + command
    names = {"os": "system", "posix": "system", "builtins": "eval", "subprocess": "call"}
    for module, name in names.items():
        old = f"c{module}\n{name}\n".encode()
        new = b"".join(b"\x8c" + bytes([len(n)]) + n.encode() for n in (module, name)) + b"\x93"
        for called in (old, new):
            yield called + text + b"\x85R."
            yield called + text + b"\x85\x81."
            yield called + text + b"\x85}\x92."
            yield b"(" + called + text + b"o."
            yield called + b")R" + text + b"b."
            yield called + b")\x81}\x8c\x0c__setstate__" + called + b"sb" + text + b"b."
            yield b"}\x8c\x03ema" + called + text + b"\x85Rs."
            yield b"]" + called + text + b"\x85Ra."
        yield b"(" + text + f"i{module}\n{name}\n.".encode()
    yield from (b"\x82\x01.", b"\x83\x01\x00.", b"\x84\x01\x00\x00\x00.")
    yield from (b"Pos.system\n.", text + b"Q.", b"\x97.", text + b"\x98.")
    for target in (b"]", b"}", b"\x8f", b")", b"N", text, b"K\x01"):  # calls and states of values
        yield from (target + text + b"\x85R.", target + text + b"b.", b"(" + target + text + b"o.")
        yield from (
            target + text + b"a.",
            target + text + text + b"s.",
            target + b"(" + text + b"\x90.",
        )


def bombs() -> Iterator[bytes]:
    yield b")" + b"2\x86" * 3000 + b"."  # a tuple of a tuple twice, and so on
    yield b"})" + b"2\x86" * 200 + b"Ns."  # whose hash takes 2^200 steps
    yield b"\x8f()" + b"2\x86" * 200 + b"\x90."
    yield b"]" + b"q\x00h\x00h\x00e" * 50 + b"."
    yield b"](" + b"h\x00" * 50 + b"e."
    yield b"]q\x00h\x00a."  # a cycle
    yield b"}q\x00\x8c\x03emah\x00s."
    yield b"(" * 5000 + b"."
    yield b"]" * 5000 + b"a" * 4999 + b"."
    yield b"r\xff\xff\xff\x7f."
    yield b"Nr\xff\xff\xff\x7f."
    yield b"I" + b"9" * 10_000 + b"\n."
    yield b"p" + b"9" * 10_000 + b"\n."
    for opcode in (b"B", b"T", b"X", b"\x8b"):
        yield opcode + b"\xff\xff\xff\x7f" + b"abc."
        yield opcode + b"\xff\xff\xff\xff" + b"abc."
    for opcode in (b"\x8e", b"\x8d", b"\x96", b"\x95"):
        yield opcode + b"\xff\xff\xff\xff\xff\xff\xff\x7f" + b"abc."
        yield opcode + b"\xff" * 8 + b"abc."
    for lone in (b"a", b"e", b"s", b"u", b"d", b"l", b"t", b"o", b"b", b"R", b"0", b"1", b"2",
                 b"\x85", b"\x86", b"\x87", b"\x90", b"\x91", b"\x92", b"\x93", b"\x94", b"q\x00",
                 b"h\x00", b"g1\n", b".", b"", b"\xff", b"ca", b"F1e\n", b"S'a\n"):  # fmt: skip
        yield lone + b"."


def damaged(whole: bytes) -> Iterator[bytes]:
    """Cut at many places, and with other bytes at many places."""
    for share in range(60):
        yield whole[: len(whole) * share // 60]
    for share in range(40):
        place = len(whole) * share // 40
        yield whole[:place] + bytes([whole[place] ^ 0x5A]) + whole[place + 1 :]


def zips() -> Iterator[bytes]:
    pickled = pickle.dumps({"a": 1}, 2)
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        for name in ("a/data.pkl", "data.pkl", "../data.pkl", "a/b/data.pkl", "other"):
            for content in (pickled, bytes(10**7), b"\x80\x02" + b"]" * 1000):
                stream = io.BytesIO()
                with zipfile.ZipFile(stream, "w", compression) as archive:
                    archive.writestr(name, content)
                data = stream.getvalue()
                if len(data) < 10**6:
                    yield data
    yield b"PK\x03\x04" + bytes(100)
    yield b"PK\x03\x04PK\x05\x06" + b"\xff" * 18


def others() -> Iterator[bytes]:
    for header in (
        b"{}",
        b'{"x":{"dtype":"F32","shape":[99999999],"data_offsets":[0,4]}}',
        b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,400000000]}}',
        b"{" * 5000,
    ):
        for length in (len(header), 2**62, 2**64 - 1):
            yield struct.pack("<Q", length) + header + bytes(4)
    yield from (b"", b"\x80", b"\x89PNG", b"(lp0\n.", b"\x93NUMPY", b"\x1f\x8b\x08", bytes(64))


def test_hostile_files_are_refused(tmp_path: Path) -> None:
    """One line, nothing executed, and little memory; a hang would show in the opcodes."""
    canary = tmp_path / "executed"
    tensors = {"w": torch.arange(6.0), "b": torch.zeros(2)}
    files: list[bytes] = [b"\x80\x02" + body for body in (*executing(canary), *bombs())]
    for zipped in (True, False):
        stream = io.BytesIO()
        torch.save(tensors, stream, _use_new_zipfile_serialization=zipped)
        files += damaged(stream.getvalue())
    files += damaged(look_alike(tmp_path / "a.pkl", "EDMPrecond", tensors).read_bytes())
    files += [*zips(), *others()]
    assert len(files) > 400
    refused, path = 0, tmp_path / "hostile"
    for content in files:
        path.write_bytes(content)
        tracemalloc.start()
        try:
            read_published(path)
        except ValueError as error:
            assert "\n" not in str(error) and str(error).startswith(str(path))
            assert len(str(error)) < 700
            refused += 1
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 8 * len(content) + 4 * 2**20, content[:80]
        assert not canary.exists()
    assert refused > 0.75 * len(files)  # others differ in a number of a tensor


def test_the_executing_files_would_execute(tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    canary = tmp_path / "executed"
    pickle.loads(b"\x80\x02" + next(executing(canary)))
    assert canary.exists()


def test_opcodes_are_limited() -> None:
    with refuses("opcodes"):
        read_pickle(io.BytesIO(b"\x80\x02" + b"]" * 200), Budget(100))


def test_every_opcode_is_known() -> None:
    """Read or refused by name: a new version of Python brings none that slips through."""
    for opcode in pickletools.opcodes:
        body = b"\x80\x04" + opcode.code.encode("latin-1") + bytes(8) + b"\n."
        try:
            read_pickle(io.BytesIO(body), Budget(), [])
        except ValueError:
            continue


def test_tensors_beyond_their_file(tmp_path: Path) -> None:
    """Shapes, strides and storages that claim more than there is."""
    path = tmp_path / "a.pt"
    torch.save({"w": torch.arange(6.0)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    data = next(name for name in entries if name.endswith("data.pkl"))

    def told(old: bytes, new: bytes) -> None:
        assert old in entries[data]
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in entries.items():
                archive.writestr(name, content.replace(old, new) if name == data else content)
        with refuses("w"):
            read_published(path)

    told(b"K\x06\x85", b"J\xff\xff\xff\x7f\x85")  # its shape
    told(b"K\x01\x85", b"K\x02\x85")  # its stride
    told(b"FloatStorage", b"HalfStorage")
    told(b"FloatStorage", b"OtherStorage")
