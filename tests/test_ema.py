"""Averages against their closed forms, and averages made afterwards."""

import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import Capture, fails, names, refuses, works
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from patchdiffusion import load_model
from patchdiffusion.system.files import read_json, sha256, write_json
from patchdiffusion.train.checkpoint import read_tensors
from patchdiffusion.train.ema import EMA, power_decay, profile_name
from patchdiffusion.train.posthoc import (
    Sources,
    exponent,
    inner_product,
    snapshots,
    solve,
)
from patchdiffusion.train.settings import WIDEST, EMAConfig

# ---- Closed forms ----


def test_published_exponents() -> None:
    for std, gamma in ((0.05, 16.9722), (0.075, 10.2891), (0.1, 6.9372), (0.135, 4.3139)):
        assert exponent(std) == pytest.approx(gamma, abs=1e-4)


@pytest.mark.parametrize("std", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_exponents_and_widths_are_inverse(std: float) -> None:
    gamma = exponent(std)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(std**2, rel=1e-9)


@pytest.mark.parametrize("std", [0.0, -0.1, WIDEST, 0.5, math.nan])
def test_impossible_widths(std: float) -> None:
    with refuses(std, 0, "0.2887"):
        exponent(std)


def density(time: float, std: float, tau: np.ndarray) -> np.ndarray:
    gamma = exponent(std)
    return np.where(tau <= time, (gamma + 1) * tau**gamma / time ** (gamma + 1), 0.0)


def test_a_profile_has_its_width() -> None:
    tau = np.linspace(0, 1, 200_001)
    for std in (0.05, 0.1, 0.2):
        weight = density(1.0, std, tau) / len(tau)
        mean = (weight * tau).sum()
        assert weight.sum() == pytest.approx(1.0, abs=1e-3)
        assert ((weight * (tau - mean) ** 2).sum()) ** 0.5 == pytest.approx(std, rel=1e-3)


def test_inner_products_are_integrals() -> None:
    points = [(0.3, 0.05), (0.3, 0.1), (0.7, 0.1), (1.0, 0.2)]
    tau = (np.arange(400_000) + 0.5) / 400_000
    for a, b in itertools.product(points, repeat=2):
        integral = (density(*a, tau) * density(*b, tau)).mean()
        assert inner_product(a, b) == pytest.approx(integral, rel=1e-4)


def test_a_stored_profile_is_itself() -> None:
    stored = [(t, std) for t in (1.0, 2.0, 3.0) for std in (0.05, 0.1)]
    weights = solve(stored, stored[3])
    assert weights == pytest.approx(np.eye(6)[3], abs=1e-8)
    assert solve(stored, (2.5, 0.07)).sum() == pytest.approx(1.0)


def walk(steps: int, size: int = 500) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(steps, size, generator=generator, dtype=torch.float64).cumsum(0)


def test_averages_of_any_width_are_made_afterwards() -> None:
    """64 snapshots of a random walk in float32; the published bound is 1e-3, ours is 2e-4."""
    steps, tracked, wanted = 4096, (0.05, 0.1), {0.075: 2e-4, 0.15: 2e-4, 0.2: 1e-3}
    averages = {std: torch.zeros(500, dtype=torch.float64) for std in (*tracked, *wanted)}
    stored: list[tuple[tuple[float, float], Tensor]] = []
    for t, theta in enumerate(walk(steps), start=1):
        for std, average in averages.items():
            average.lerp_(theta, 1 - power_decay(std, t, 1))
        if t % (steps // 32) == 0:
            stored += [((float(t), std), averages[std].float()) for std in tracked]
    assert len(stored) == 64
    for std, bound in wanted.items():
        weights = solve([point for point, _ in stored], (float(steps), std))
        made = sum((w * x.double() for w, (_, x) in zip(weights, stored, strict=True)), start=0)
        error = (torch.as_tensor(made) - averages[std]).norm() / averages[std].norm()
        assert float(error) < bound, std


# ---- The averages of a run ----


def test_every_average_follows_its_formula() -> None:
    config = EMAConfig(half_life=9.0, ramp_up=0.8, profiles=(0.05, 0.2))
    network = nn.Linear(3, 2)
    ema = EMA(network, config)
    expected = {name: [x.clone() for x in tensors] for name, tensors in ema.averages.items()}
    seen = 0.0
    for step in range(6):
        generator = torch.Generator().manual_seed(step)
        for p in network.parameters():
            p.data = torch.randn(p.shape, generator=generator)
        advance = 2.0 + step % 3
        seen += advance
        ema.update(seen, advance)
        for name, std in (("averaged", None), ("power-0.05", 0.05), ("power-0.2", 0.2)):
            decay = config.decay(seen, advance)
            if std is not None:
                decay = (1 - advance / seen) ** (exponent(std) + 1)
            for x, p in zip(expected[name], network.parameters(), strict=True):
                x.mul_(decay).add_(p.detach() * (1 - decay))
    for name, tensors in expected.items():
        for x, y in zip(tensors, ema.averages[name], strict=True):
            torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6)
    assert list(ema.averages) == ["averaged", profile_name(0.05), profile_name(0.2)]
    weight = dict(ema.network().named_parameters())["weight"]
    assert weight.data_ptr() == ema.averages["averaged"][0].data_ptr()  # no copy to sample from


def test_the_first_step_of_a_profile_is_the_weights_themselves() -> None:
    assert power_decay(0.1, 8.0, 8.0) == 0.0


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stores two profiles eight times and tracks the average that is to be found."""
    config = tiny.config(images, steps=16, ema=EMAConfig(profiles=(0.05, 0.2, 0.1), snapshots=8))
    return tiny.run(config, tmp_path_factory.mktemp("runs") / "run")


def test_snapshots_are_complete_and_evenly_spaced(run: Path) -> None:
    found = snapshots(run)
    assert sorted({s.point[0] for s in found}) == [6.0 * k for k in range(1, 9)]
    assert len(found) == 24 and all(s.folder.name.startswith("step-") for s in found)


def test_an_average_as_a_command(run: Path, tmp_path: Path, capsys: Capture) -> None:
    out = works(capsys, "average", run, "--std", "0.1")
    made = run / "averages" / "std-0.1"
    assert str(made) in out
    stored = {s.name: s for s in snapshots(run)}["power-0.1"]  # the last of this name
    expected = read_tensors(stored.folder, stored.name, torch.device("cpu"))
    got = dict(load_model(made).network.named_parameters())
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-5)
    works(capsys, "sample", made, "--count", 1, "--steps", 1, "--out", tmp_path / "samples")
    works(capsys, "average", run, "--std", "0.15", "--at", "24", "--out", tmp_path / "model")
    assert load_model(tmp_path / "model").config.step == 8


def test_an_average_is_made_once(
    run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several are written one by one, and those that are there are not made again."""
    copy = Path(shutil.copytree(run, tmp_path / "run", ignore=lambda *_: {"averages"}))
    command = ("average", copy, "--std", "0.07", "0.12", "0.18")
    made, reconstruct = [], Sources.reconstruct

    def interrupted(self: Sources, std: float) -> dict[str, Tensor]:
        made.append(std)
        if len(made) == 2:
            raise KeyboardInterrupt
        return reconstruct(self, std)

    monkeypatch.setattr(Sources, "reconstruct", interrupted)
    fails(capsys, *command, code=130)
    folder = copy / "averages"
    assert [f.name for f in folder.iterdir()] == ["std-0.07"]
    before = tiny.digests(folder)
    works(capsys, *command)
    assert made == [0.07, 0.12, 0.12, 0.18]
    works(capsys, *command)
    assert len(made) == 4 and before.items() <= tiny.digests(folder).items()
    assert sorted(f.name for f in folder.iterdir()) == ["std-0.07", "std-0.12", "std-0.18"]
    out = ("--out", folder / "std-0.07")
    assert names(fails(capsys, "average", copy, "--std", "0.12", *out), "std-0.07", "--out")
    assert names(fails(capsys, *command, *out), "--out", 3)
    file = folder / "std-0.07" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert str(file) in fails(capsys, *command)


def test_what_cannot_be_averaged(run: Path, finished: Path, capsys: Capture) -> None:
    fails(capsys, "average")
    assert names(fails(capsys, "average", finished), finished, "--ema.profiles")
    assert names(fails(capsys, "average", run, "--std", "0.4"), "0.2887", "0.4")
    assert names(fails(capsys, "average", run, "--at", "1", "--std", "0.07"), 6)


def test_a_damaged_snapshot_is_named(run: Path, capsys: Capture) -> None:
    file = run / "snapshots" / "step-0000000002" / "power-0.05.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert str(file) in fails(capsys, "average", run, "--std", "0.12")
    file.write_bytes(whole)


def hostile(run: Path, folder: Path, **facts: object) -> None:
    """Change a snapshot, and let its manifest vouch for it."""
    write_json(folder / "state.json", {**read_json(folder / "state.json"), **facts})
    files = {
        f.name: {"bytes": f.stat().st_size, "sha256": sha256(f)}
        for f in folder.iterdir()
        if f.name != "manifest.json"
    }
    write_json(folder / "manifest.json", {"files": files})


@pytest.mark.parametrize(
    "facts",
    [
        {"images": -6.0},
        {"images": "6"},
        {"images": None},
        {"step": 3},
        {"profiles": ["power-0.05"]},
        {"profiles": {"power-0.05": 0.5}},
        {"profiles": {"power-0.05": 0.2}},
        {"profiles": {"../../secret": 0.05}},
        {"profiles": {"power-0.07": 0.07}},
        {"surprise": 1},
    ],
)
def test_facts_of_a_snapshot_that_are_refused(
    facts: dict[str, object], run: Path, tmp_path: Path, capsys: Capture
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run", ignore=lambda *_: {"averages"}))
    hostile(copy, copy / "snapshots" / "step-0000000002", **facts)
    assert names(fails(capsys, "average", copy, "--std", "0.12"), "step-0000000002")
    assert not (copy / "averages").exists()


@pytest.mark.parametrize("what", ["one", "every", "shape", "nan", "type", "unlisted", "empty"])
def test_tensors_of_a_snapshot_that_are_refused(
    what: str, run: Path, tmp_path: Path, capsys: Capture
) -> None:
    """Without a word there would be an average of what is not there."""
    copy = Path(shutil.copytree(run, tmp_path / "run", ignore=lambda *_: {"averages"}))
    folders = sorted((copy / "snapshots").glob("step-*"))
    for folder in folders if what == "every" else folders[:1]:
        for file in folder.glob("*.safetensors"):
            tensors = load_file(file)
            name = "out_conv.weight"
            if what in ("one", "every"):
                del tensors[name]
            elif what == "shape":
                tensors[name] = tensors[name][:1].clone()
            elif what == "nan":
                tensors[name][0] = math.nan
            elif what == "type":
                tensors[name] = tensors[name].double()
            if what != "unlisted":
                save_file({} if what == "empty" else tensors, file)
        hostile(copy, folder)
        if what == "unlisted":
            manifest = read_json(folder / "manifest.json")
            del manifest["files"]["power-0.05.safetensors"]
            write_json(folder / "manifest.json", manifest)
    assert str(copy) in fails(capsys, "average", copy, "--std", "0.12")
    assert not (copy / "averages").exists()


@pytest.mark.parametrize("at", ["0", "-1", "nan", "inf"])
def test_times_that_are_refused(at: str, run: Path, capsys: Capture) -> None:
    fails(capsys, "average", run, "--at", at, "--std", "0.12")
