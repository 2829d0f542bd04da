"""Checkpoints on disk."""

import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch

from patchdiffusion.nets.unet import SongUNet
from patchdiffusion.system.dist import Team
from patchdiffusion.system.files import write_json
from patchdiffusion.train import checkpoint
from patchdiffusion.train.optim import moments
from patchdiffusion.train.optimizers import AdamW, Muon, OptimizerConfig
from patchdiffusion.train.parallel import Owners
from patchdiffusion.train.restore import empty_moments, fill

CPU = torch.device("cpu")
TENSORS = {"weights": {"a": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(2.0)}}
NEWEST, OLDER = "step-0000000004", "step-0000000003"


def stored(root: Path) -> list[str]:
    return sorted(f.name for f in root.iterdir())


# ---- The format ----


def test_round_trip(tmp_path: Path) -> None:
    state = {"step": 7, "equivalents": (1 / 3).hex()}
    folder = checkpoint.save(tmp_path, 7, TENSORS, state)
    assert stored(tmp_path) == ["latest", "step-0000000007"]
    assert (tmp_path / "latest").read_text() == "step-0000000007\n"
    assert stored(folder) == ["manifest.json", "state.json", "weights.safetensors"]
    assert list(checkpoint.candidates(tmp_path)) == [(folder, None)]
    assert checkpoint.read_state(folder) == {"format": checkpoint.FORMAT, **state}
    read = checkpoint.read_tensors(folder, "weights", CPU)
    assert all(torch.equal(read[name], value) for name, value in TENSORS["weights"].items())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 9, 10, 100):
        checkpoint.save(tmp_path, step, TENSORS, {})
        checkpoint.prune(tmp_path, 3)
    names = ["step-0000000009", "step-0000000010", "step-0000000100"]
    assert stored(tmp_path) == ["latest", *names]
    assert [f.name for f, _ in checkpoint.candidates(tmp_path)] == names[::-1]


def test_a_save_that_fails_leaves_nothing(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, TENSORS, {})
    with pytest.raises(ValueError):
        checkpoint.save(tmp_path, 2, TENSORS, {"loss": float("nan")})
    assert stored(tmp_path) == ["latest", "step-0000000001"]


def test_no_root_is_no_checkpoint(tmp_path: Path) -> None:
    assert list(checkpoint.candidates(tmp_path / "none")) == []


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, TENSORS, {})
    (tmp_path / "plain").touch()
    expected = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert {stat.S_IMODE(f.stat().st_mode) for f in folder.iterdir()} == {expected}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("optimizer", [AdamW(), Muon()], ids=["adamw", "muon"])
def test_optimizer_round_trip(
    optimizer: OptimizerConfig, layout: torch.memory_format, tmp_path: Path
) -> None:
    """Files hold values in their plain order, memory may not."""
    networks = [SongUNet(tiny.NETWORK, seed=1) for _ in range(2)]
    for network in networks:
        network.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    updates = [tiny.update(n, optimizer) for n in networks]

    def step(which: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for p in networks[which].parameters():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))
        zero = torch.zeros(())
        updates[which](zero + 1.0, zero + 1.0, zero, 0.1)

    step(0, seed=5)
    tensors = moments(updates[0], networks[0])
    assert len(tensors) >= len(list(networks[0].parameters()))
    folder = checkpoint.save(tmp_path, 1, {"optimizer": tensors}, {})
    read = checkpoint.read_tensors(folder, "optimizer", CPU)
    fill(Owners(Team()), empty_moments(updates[1], networks[1], list(tensors)), read)
    networks[1].load_state_dict(networks[0].state_dict())
    for which in (0, 1):
        step(which, seed=6)
    pairs = zip(networks[0].parameters(), networks[1].parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    ("weights.safetensors", flip, "does not have the digest"),
    ("averaged.safetensors", truncate, "bytes instead of"),
    ("optimizer.safetensors", Path.unlink, "No such file"),
    ("state.json", flip, "does not have the digest"),
    ("state.json", empty, "has 0 bytes instead of"),
    ("manifest.json", empty, "is not valid JSON"),
    ("manifest.json", Path.unlink, "No such file"),
]


@pytest.mark.parametrize(("name", "damage", "reason"), DAMAGE)
def test_damage_is_seen(
    name: str, damage: Callable[[Path], None], reason: str, finished: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished / "checkpoints" / NEWEST, tmp_path / NEWEST))
    assert checkpoint.fault(folder) is None
    damage(folder / name)
    fault = checkpoint.fault(folder)
    assert fault is not None and reason in fault and name in fault
    assert "\n" not in fault


@pytest.mark.parametrize("name", ["../state.json", "/etc/passwd", "a/b", "..", "a\\b"])
def test_a_manifest_cannot_lead_outside(name: str, tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, TENSORS, {})
    write_json(folder / "manifest.json", {"files": {name: {"bytes": 1, "sha256": ""}}})
    fault = checkpoint.fault(folder)
    assert fault is not None and "outside the folder" in fault


@pytest.mark.parametrize("manifest", [[], {}, {"files": []}, {"files": {"state.json": 3}}])
def test_a_strange_manifest_is_a_fault(manifest: object, tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, 1, TENSORS, {})
    write_json(folder / "manifest.json", manifest)
    assert checkpoint.fault(folder) is not None
