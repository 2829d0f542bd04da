"""`info`: size, cost, memory and parts of networks and runs, without training."""

import re
from pathlib import Path

import pytest
import torch
from commands import Capture, fails, works
from torch.utils.flop_counter import FlopCounterMode

from patchdiffusion.cli.info import subject_of
from patchdiffusion.cond import Cond
from patchdiffusion.nets import Network
from patchdiffusion.nets.attention import twice_differentiable
from patchdiffusion.nets.count import count
from patchdiffusion.system import families
from patchdiffusion.train.outlook import Activations

FLAGS = {
    "unet": "--network.base 8 --network.mult 1 2 --network.blocks 1 --network.attention 1",
    "adm": "--network.base 16 --network.mult 1 2 --network.blocks 1 --network.attention 1 "
    "--network.head-width 16",
    "edm2": "--network.base 8 --network.mult 1 2 --network.blocks 1 --network.attention 1 "
    "--network.head-width 8",
    "dit": "--network.width 32 --network.depth 2 --network.heads 2",
    "lego": "--network.width 16 --network.heads 2 --network.regions 4 8 --network.patches 2 4 "
    "--network.depths 1 2",
    "kl": "--network.base 4 --network.mult 1 2 --network.blocks 1 --network.groups 2",
    "vq": "--network.base 4 --network.mult 1 2 --network.blocks 1 --network.groups 2 "
    "--network.codes 16",
    "diffusers": "",
    "vae": "--network.base 8 --network.mult 1 2 --network.blocks 1 --network.side 16",
    "pixel-dit": "--network.width 32 --network.depth 2 --network.heads 2",
}


def told(capsys: Capture, *words: object) -> dict[str, str]:
    """Lines by name; further lines of a name are joined."""
    lines: dict[str, str] = {}
    name = ""
    for line in works(capsys, "info", *words, "--device", "cpu").splitlines():
        name = line[:10].strip() or name
        lines[name] = " ".join([*([lines[name]] if name in lines else []), line[10:]])
    return lines


def test_every_family_is_tested() -> None:
    assert families.words(Network).keys() <= FLAGS.keys()


@pytest.mark.parametrize("word", FLAGS)
def test_operations_are_those_of_a_real_pass(word: str, capsys: Capture) -> None:
    """Within 2 % of what PyTorch counts while the network computes, also on crops."""
    arguments = [word, *FLAGS[word].split(), "--resolution", "16", "--precision", "fp32"]
    lines = told(capsys, *arguments)
    found = {
        int(side): float(macs) * 1e9
        for side, macs in re.findall(r"of (\d+)x\d+: ([\d.e-]+) GMAC", lines["cost"])
    }
    assert max(found) == 16 and len(found) > (0 if word == "vae" else 1)  # which sees no crops
    network = subject_of([*arguments, "--device", "cpu"], word).training.network.build()
    for side, macs in found.items():
        # Fused attention of a CPU is not counted; its products are.
        with twice_differentiable(), torch.no_grad(), FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, side, side), torch.zeros(1), Cond())
        assert macs == pytest.approx(counter.get_total_flops() / 2, rel=0.02)
    assert f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f}M" in lines["network"]
    assert lines["taps"].split() == (list(network.taps) or ["none"])
    assert set(lines["reads"].split()) == (network.config.reads or {"image", "alone"})
    assert sum(map(int, re.findall(r"\d+", lines["units"]))) == len(network.units())
    assert "measured on" in lines["time"]


def test_large_networks_are_printed_without_being_built(capsys: Capture) -> None:
    """From the published table: DiT-XL/2 on latents, 675 million parameters and 119 GMAC."""
    latents = "--resolution 32 --channels 4 --classes 1000 --batch 256"
    lines = told(capsys, "dit-xl/2", *latents.split())
    assert "674." in lines["network"] and "1,000 classes" in lines["network"]
    assert lines["cost"].startswith("whole images of 32x32: 119 GMAC, 256 tokens crops of 16x16")
    assert "at least" in lines["time"] and "matrix products" in lines["time"]
    assert "labels" in lines["reads"]


def test_step_and_memory_follow_from_the_counts(capsys: Capture) -> None:
    """Without crops a step trains on whole images; memory is the sum of what is listed."""
    flags = ["unet", *FLAGS["unet"].split(), "--resolution", "16", "--batch", "8"]
    flags += ["--ema.profiles", "0.05", "0.1"]
    whole = subject_of(
        [*flags, *["--patches.fractions", "1", "--patches.probs", "1", "--device", "cpu"]], "unet"
    )
    assert whole.step == pytest.approx(8 * 6 * whole.costs[16, 16].macs)
    text = told(capsys, *flags)["memory"]
    assert "3 averages" in text
    total, weights, moments, kept = map(
        float, re.findall(r"[\d.]+(?:e-\d+)?(?= (?:GB|of weights|of moments|kept))", text)
    )
    assert moments == pytest.approx(2 * weights, rel=0.1)
    assert total == pytest.approx((1 + 1 + 3) * weights + moments + kept, rel=0.05)


def test_a_run_is_described(finished: Path, capsys: Capture) -> None:
    lines = told(capsys, finished)
    assert lines["network"].startswith("unet") and "denoiser" in lines["model"]
    assert told(capsys, finished / "model")["network"] == lines["network"]
    larger = told(capsys, finished, "--resolution", "32", "--channels", "1")
    assert "1 channel," in larger["network"] and "32x32" in larger["cost"]


def test_a_run_in_a_folder_of_the_name_of_a_network_is_meant(
    finished: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dit").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    assert told(capsys, "dit")["network"] == told(capsys, finished)["network"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "NETWORK|RUN is missing"),
        ("nothing", "neither a network nor a run"),
        ("dit-s4", "--help network; did you mean dit-s/4"),
        ("u-dit", "did you mean dit, u-dit-s/"),
        ("dit --resolution 0", "resolution must be positive"),
        ("dit --resolution 8 8 8 --network.patch 2 2", "2 axes"),
        ("dit --channels 0", "channels must be at least 1"),
        ("dit --classes -1", "classes must be at least 0"),
        ("dit --network.width 20", "width"),
        ("dit --wide 20", "--wide"),
        ("tests", "holds no run"),
    ],
)
def test_bad_input_is_one_line(
    words: str, message: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").mkdir()
    error = fails(capsys, "info", *words.split(), "--device", "cpu")
    assert message in error and error.count("\n") <= 1


def test_kept_bytes_are_counted_without_computing() -> None:
    """On the meta device, where tensors have no address, and without weights."""
    for device in ("cpu", "meta"):
        layers = [torch.nn.Linear(50, 50, bias=False, device=device) for _ in range(3)]
        kept = Activations(excepted=[layer.weight for layer in layers])
        x = torch.ones(10, 50, device=device)
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
            for layer in layers:
                x = layer(x)
        assert kept.most == 3 * x.nbytes


def test_counting_is_of_the_whole_and_its_parts() -> None:
    """Without attention twice the sides are four times the operations."""
    network = families.create(Network, "unet", "network")
    network = type(network)(**{**vars(network), "base": 8, "attention": ()}).build()
    assert count(network, 32).macs == pytest.approx(4 * count(network, 16).macs, rel=0.01)
