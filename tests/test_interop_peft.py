"""Adapters of low rank are written as peft reads them, and read as peft writes them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refuses
from safetensors.torch import load_file, save_file

from patchdiffusion.interop.peft import CONFIG, WEIGHTS, LowRank, read_adapter, write_adapter


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


ADAPTERS = {
    "blocks.0.qkv.weight": LowRank(draw(4, 6), draw(18, 4), 8.0),
    "qkv.weight": LowRank(draw(2, 6, seed=1), draw(18, 2), 4.0),
    "conv.weight": LowRank(draw(4, 3, 3, 3), draw(5, 4), 8.0),
}
SHAPES = {"blocks.0.qkv.weight": (18, 6), "qkv.weight": (18, 6), "conv.weight": (5, 3, 3, 3)}


def by_hand(folder: Path, facts: dict[str, Any], **tensors: torch.Tensor) -> Path:
    """Write a folder of peft by its documented layout."""
    folder.mkdir(exist_ok=True)
    usual = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["to_q"]}
    (folder / CONFIG).write_text(json.dumps(usual | facts))
    named = {
        f"base_model.model.{name.replace('__', '.')}": value for name, value in tensors.items()
    }
    save_file({name: v.clone().contiguous() for name, v in named.items()}, folder / WEIGHTS)
    return folder


def test_there_and_back(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", ADAPTERS, base="me/photos")
    read = read_adapter(tmp_path / "a", SHAPES)
    assert set(read) == set(ADAPTERS)
    for name, adapter in ADAPTERS.items():
        assert torch.equal(read[name].down, adapter.down) and torch.equal(read[name].up, adapter.up)
        assert read[name].alpha == adapter.alpha and read[name].magnitude is None
        assert read[name].shape == SHAPES[name]
    changed = {n: LowRank(a.down, a.up, a.alpha, draw(a.up.shape[0])) for n, a in ADAPTERS.items()}
    write_adapter(tmp_path / "a", changed)
    read = read_adapter(tmp_path / "a")
    for name, adapter in changed.items():
        magnitude = read[name].magnitude
        assert adapter.magnitude is not None and magnitude is not None
        assert torch.equal(magnitude, adapter.magnitude)


def test_the_layout_is_that_of_peft(tmp_path: Path) -> None:
    """Names, shapes and settings as documented: convolutions, other ranks, exact names."""
    write_adapter(tmp_path / "a", ADAPTERS)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    assert {name: list(value.shape) for name, value in tensors.items()} == {
        "base_model.model.blocks.0.qkv.lora_A.weight": [4, 6],
        "base_model.model.blocks.0.qkv.lora_B.weight": [18, 4],
        "base_model.model.qkv.lora_A.weight": [2, 6],
        "base_model.model.qkv.lora_B.weight": [18, 2],
        "base_model.model.conv.lora_A.weight": [4, 3, 3, 3],
        "base_model.model.conv.lora_B.weight": [5, 4, 1, 1],
    }
    facts = json.loads((tmp_path / "a" / CONFIG).read_text())
    assert (facts["r"], facts["lora_alpha"], facts["use_dora"]) == (4, 8.0, False)
    assert facts["target_modules"] == ["blocks.0.qkv", "conv", "qkv"]
    assert (facts["rank_pattern"], facts["alpha_pattern"]) == ({"^qkv": 2}, {"^qkv": 4.0})


def test_files_of_peft(tmp_path: Path) -> None:
    """Written by hand: LoRA, rank-stabilized, DoRA of a layer, patterns by the end of a name."""
    a, b = draw(2, 6), draw(5, 2)
    parts = {"x__to_q__lora_A__weight": a, "x__to_q__lora_B__weight": b}
    change = read_adapter(by_hand(tmp_path / "a", {}, **parts))["x.to_q.weight"].change()
    assert torch.allclose(change, 3.0 * b @ a)
    facts = {"use_rslora": True, "alpha_pattern": {"to_q": 5}}
    change = read_adapter(by_hand(tmp_path / "b", facts, **parts))["x.to_q.weight"].change()
    assert torch.allclose(change, 5 / math.sqrt(2) * b @ a)
    dora = {**parts, "x__to_q__lora_magnitude_vector": draw(5)}
    adapter = read_adapter(by_hand(tmp_path / "c", {"use_dora": True}, **dora))["x.to_q.weight"]
    assert adapter.magnitude is not None and torch.equal(adapter.magnitude, draw(5))


def test_peft_itself(tmp_path: Path) -> None:
    """Outputs of peft's own model and of weights that are changed by what is read agree."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    for use_dora in (False, True):
        torch.manual_seed(0)
        base = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 5)
        )
        x = draw(2, 3, 4, 4)
        settings = peft.LoraConfig(
            r=2, lora_alpha=6, target_modules=["0", "2"], use_dora=use_dora, rank_pattern={"2": 3},
            init_lora_weights=False,
        )  # fmt: skip
        weights = {n: p.detach().clone() for n, p in base.named_parameters()}
        model = peft.get_peft_model(base, settings).eval()
        model.save_pretrained(tmp_path / "theirs")
        expected = model(x)
        shapes = {n: tuple(v.shape) for n, v in weights.items()}
        read = read_adapter(tmp_path / "theirs", shapes)
        merged = dict(weights)
        for name, adapter in read.items():
            value = weights[name] + adapter.change()
            if adapter.magnitude is not None:
                norm = value.flatten(1).norm(dim=1)
                scale = (adapter.magnitude / norm).reshape(-1, *(1,) * (value.ndim - 1))
                value = value * scale
            merged[name] = value
        plain = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.Flatten(), torch.nn.Linear(16, 5)
        )
        plain.load_state_dict(merged)
        assert torch.allclose(plain(x), expected, atol=1e-5)
        write_adapter(tmp_path / "ours", read)
        plain.load_state_dict(weights)
        again = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
        assert torch.allclose(again(x), expected, atol=1e-5)


A, B = draw(2, 6), draw(5, 2)
PARTS = {"x__lora_A__weight": A, "x__lora_B__weight": B}


@pytest.mark.parametrize(
    ("facts", "tensors", "parts"),
    [
        ({"peft_type": "LOHA"}, PARTS, ("LOHA", "LORA")),
        ({"bias": "all"}, PARTS, ("bias", "all", "none")),
        ({"modules_to_save": ["x"]}, PARTS, ("modules_to_save",)),
        ({"r": "2"}, PARTS, ("r is 2", "numbers")),
        ({"r": 3}, PARTS, ("x", "[2, 6]", "3")),
        ({"lora_alpha": 1e999}, PARTS, ("lora_alpha",)),
        ({"use_dora": True}, PARTS, ("x", "lora_magnitude_vector")),
        ({"use_dora": 1}, PARTS, ("use_dora",)),
        ({"alpha_pattern": {"(a+)+$": 2}}, PARTS, ("alpha_pattern", "(a+)+$")),
        ({"rank_pattern": [1]}, PARTS, ("rank_pattern",)),
        ({}, {**PARTS, "x__lora_embedding_A": A}, ("lora_embedding_A",)),
        ({}, {**PARTS, "x__lora_magnitude_vector": B[:, 0]}, ("use_dora",)),
        ({}, {"x__lora_A__weight": A}, ("x", "lora_B.weight")),
        ({}, {**PARTS, "x__lora_A__weight": A * math.nan}, ("x.weight", "finite")),
        ({}, {**PARTS, "x__lora_B__weight": B.T}, ("x", "[2, 6]", "[2, 5]")),
        ({}, {**PARTS, "x__lora_B__weight": draw(5, 2, 3)}, ("[5, 2, 3]",)),
        ({}, {**PARTS, "x__lora_A__weight": A.int()}, ("x.weight", "floats")),
        ({}, {}, ("no changes",)),
    ],
)
def test_refusals(facts: Any, tensors: Any, parts: Any, tmp_path: Path) -> None:
    with refuses(*parts):
        read_adapter(by_hand(tmp_path / "a", facts, **tensors))


def test_other_refusals(tmp_path: Path) -> None:
    with refuses("holds no adapter"):
        read_adapter(tmp_path)
    folder = by_hand(tmp_path / "a", {}, **PARTS)
    with refuses("x.weight", "does not have"):
        read_adapter(folder, {"y.weight": (5, 6)})
    with refuses("x.weight", "[5, 7]", "[5, 6]"):
        read_adapter(folder, {"x.weight": (5, 7)})
    (folder / WEIGHTS).write_bytes(b"\xff" * 100)
    with refuses("damaged"):
        read_adapter(folder)
    with refuses("x.bias", "end in .weight"):
        write_adapter(tmp_path / "b", {"x.bias": LowRank(A, B, 1.0)})
    with refuses("no changes"):
        write_adapter(tmp_path / "b", {})
    with refuses("some have none"):
        write_adapter(tmp_path / "b", {"x.weight": LowRank(A, B, 1.0),
                                       "y.weight": LowRank(A, B, 1.0, B[:, 0])})  # fmt: skip
    assert not (tmp_path / "b").exists()
