"""A model on disk."""

import hashlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import Capture, fails, names, refuses

from patchdiffusion import load_model, model
from patchdiffusion.model import ModelConfig, save_model
from patchdiffusion.noise import LogNormal
from patchdiffusion.parameterisation import EDM
from patchdiffusion.system.files import SEAL, read_json, sealed, write_json

CONFIG = ModelConfig(
    network=tiny.NETWORK,
    precond=EDM(sigma_data=0.4),
    noise=LogNormal(mean=-0.7),
    canvas=(8, 12),
    classes=("cat", "\u00e4"),
    data="animals",
    images=1 / 3,
    step=17,
)


def state(seed: int) -> dict[str, torch.Tensor]:
    network = CONFIG.network.build()
    tiny.randomize(network, seed)
    return network.state_dict()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", CONFIG, state(1), state(2))
    return tmp_path / "model"


def edit(folder: Path, **changes: object) -> None:
    facts = read_json(folder / "config.json")
    del facts[SEAL]
    write_json(folder / "config.json", sealed({**facts, **changes}))


def edit_network(folder: Path, **changes: object) -> None:
    edit(folder, network={**read_json(folder / "config.json")["network"], **changes})


@pytest.mark.parametrize(("weights", "seed"), [("averaged", 1), ("raw", 2)])
def test_round_trip(weights: model.Weights, seed: int, saved: Path) -> None:
    loaded = load_model(saved, weights=weights)
    assert loaded.config == CONFIG
    expected = state(seed)
    got = loaded.network.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert not loaded.network.training
    assert not any(p.requires_grad for p in loaded.network.parameters())
    assert loaded.denoiser.precond == CONFIG.precond
    assert loaded.denoiser.law == CONFIG.noise
    assert loaded.device == torch.device("cpu")
    file = saved / {"averaged": "model.safetensors", "raw": "raw.safetensors"}[weights]
    assert hashlib.sha256(file.read_bytes()).hexdigest().startswith(loaded.digest)
    assert len(loaded.digest) == 16


def test_only_safe_files(saved: Path) -> None:
    names = sorted(f.name for f in saved.iterdir())
    assert names == ["config.json", "model.safetensors", "raw.safetensors"]
    assert json.loads((saved / "config.json").read_text())["format"] == 1


def test_a_run_is_loaded_as_its_model(finished: Path) -> None:
    run, folder = load_model(finished), load_model(str(finished / "model"))
    assert run.digest == folder.digest
    assert run.config == folder.config
    assert run.config.classes == ("a", "b")
    assert run.config.canvas == (16, 16)
    assert (run.config.step, run.config.images, run.config.data) == (4, 12.0, "images")
    raw = load_model(finished, weights="raw")
    assert raw.digest != run.digest


def test_saving_again_replaces(saved: Path) -> None:
    save_model(saved, replace(CONFIG, step=18), state(3), state(2))
    assert load_model(saved).config.step == 18
    assert sorted(f.name for f in saved.parent.iterdir()) == ["model"]


def test_a_model_may_be_replaced_while_it_is_read(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = model.read_json, []

    def replacing(path: Path) -> object:
        facts = original(path)
        calls.append(path)
        if len(calls) == 1:
            save_model(saved, replace(CONFIG, step=18), state(3), state(2))
        return facts

    monkeypatch.setattr(model, "read_json", replacing)
    loaded = load_model(saved)
    assert loaded.config.step == 18
    got = loaded.network.state_dict()
    assert all(torch.equal(got[name], value) for name, value in state(3).items())


def test_a_model_may_be_absent_for_a_moment(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two renames of a save there is no folder of that name."""
    saved.rename(saved.with_name("model.old"))
    saved.with_name("model.tmp").mkdir()
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            saved.with_name("model.old").rename(saved)

    monkeypatch.setattr(model.time, "sleep", sleep)
    assert load_model(saved).config == CONFIG
    assert waits == [0.1, 0.3]


# ---- What is refused ----


@pytest.mark.parametrize("name", ["model.safetensors", "raw.safetensors"])
def test_damage_is_found(name: str, saved: Path) -> None:
    data = bytearray((saved / name).read_bytes())
    data[-1] ^= 1
    (saved / name).write_bytes(data)
    weights = "averaged" if name.startswith("model") else "raw"
    with refuses(name, "digest"):
        load_model(saved, weights=weights)
    load_model(saved, weights="raw" if weights == "averaged" else "averaged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "is not a model configuration of format 1"),
        ({"surprise": 1}, "unknown key 'surprise'"),
        ({"type": "TrainConfig"}, "the type must be ModelConfig"),
        ({"canvas": [8, 0]}, r"canvas .* \(8, 0\)"),
        ({"sha256": {}}, "is damaged"),
        ({"precond": {"type": "EDM", "sigma_data": 0.0}}, "sigma_data"),
    ],
)
def test_strange_configurations(change: dict[str, object], message: str, saved: Path) -> None:
    edit(saved, **change)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"type": "Exploit"},
            "network has the type 'Exploit'; allowed are UNetConfig, DiTConfig",
        ),
        ({"type": "os.system"}, "network has the type 'os.system'"),
        ({"path": "x.py"}, "unknown key 'network.path'"),
        ({"base": -4}, "base"),
        ({"base": 8}, "does not fit its configuration"),
        ({"num_classes": 0}, "does not fit its configuration"),
    ],
)
def test_hostile_networks(change: dict[str, object], message: str, saved: Path) -> None:
    edit_network(saved, **change)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)


def test_a_configuration_that_was_changed(saved: Path) -> None:
    facts = read_json(saved / "config.json")
    write_json(saved / "config.json", {**facts, "step": facts["step"] + 1})
    with refuses("config.json"):
        load_model(saved)
    del facts[SEAL]  # one of an older version
    write_json(saved / "config.json", facts)
    assert load_model(saved).config == CONFIG


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(value: float, saved: Path, capsys: Capture) -> None:
    weights = state(1)
    name = max(weights)
    weights[name].view(-1)[0] = value
    save_model(saved, CONFIG, weights, state(2))
    for command in ("sample", "evaluate"):
        assert names(fails(capsys, command, saved), "model.safetensors", name)
    load_model(saved, weights="raw")


@pytest.mark.parametrize("content", ["[]", "3", "null", "{", '{"format": 1}'])
def test_other_json(content: str, saved: Path) -> None:
    (saved / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json|damaged"):
        load_model(saved)


def test_a_file_that_is_no_safetensors(saved: Path) -> None:
    data = b"\xff" * 64  # a header of 2^64 bytes
    (saved / "model.safetensors").write_bytes(data)
    edit(saved, sha256={"model.safetensors": hashlib.sha256(data).hexdigest()})
    with refuses("model.safetensors"):
        load_model(saved)


def test_nothing_there(tmp_path: Path, finished: Path) -> None:
    missing = tmp_path / "missing" / "deep"
    for path, told in ((tmp_path, "config.json"), (missing, "does not exist")):
        with refuses(path, told):
            load_model(path)
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    shutil.rmtree(run / "model")  # it has not saved yet
    with refuses(run):
        load_model(run)


def test_weights_are_a_function_of_the_seed() -> None:
    a, b, c = (CONFIG.network.build(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_a_record_is_about_the_weights_beside_it(saved: Path) -> None:
    loaded = load_model(saved)
    assert loaded.record("facts.json") is None
    file = loaded.write_record("facts.json", {"losses": [0.1, 0.2]})
    assert file == saved / "facts.json" and load_model(saved).record("facts.json") == {
        "losses": [0.1, 0.2]
    }
    raw = load_model(saved, weights="raw")
    assert raw.record("facts.json") is None
    assert raw.write_record("facts.json", {}) == saved / "raw-facts.json"
    assert raw.record("facts.json") == {} != loaded.record("facts.json")
    shutil.copy(saved / "raw-facts.json", file)
    with refuses("facts.json", raw.digest, loaded.digest):
        loaded.record("facts.json")
    facts = read_json(loaded.write_record("facts.json", {"losses": [0.1, 0.2]}))
    write_json(file, {**facts, "losses": [0.1, 0.3]})
    with refuses("facts.json", "changed"):
        loaded.record("facts.json")
    write_json(file, {"losses": [0.1]})
    with refuses("facts.json", "sealed"):
        loaded.record("facts.json")
    save_model(saved, CONFIG, state(3), state(2))
    assert load_model(saved).record("facts.json") is None
