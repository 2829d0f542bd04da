"""Models and data sets go to the hub and come back, as a server on this machine plays it."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from commands import Capture, fails, refuses, works
from hubserver import TOKEN, Hub, looking_at, serving

from patchdiffusion.data.source import open_source
from patchdiffusion.model import load_model
from patchdiffusion.sampling.pipeline import Pipeline, load
from patchdiffusion.sampling.publish import push, stage
from patchdiffusion.system import hub as on_hub
from patchdiffusion.system.files import SEAL, read_json, sealed, unsealed, write_json
from patchdiffusion.system.hub import hub_name

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")

WARNING = "ignore::DeprecationWarning"
pytestmark = pytest.mark.filterwarnings(WARNING)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Hub]:
    with serving() as hub, looking_at(hub.address, tmp_path / "hub"):
        yield hub


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a run, with an evaluation of its weights."""
    folder = tmp_path / "mine"
    shutil.copytree(finished, folder)
    digest = load_model(folder).digest
    card = {"model": {"digest": digest}, "date": "2026-01-01", "samples": 100, "reference": 40,
            "extractor": {"name": "inception"}}  # fmt: skip
    (folder / "evaluations").mkdir()
    result = {"frechet_distance": 12.345678, "card": card}
    write_json(folder / "evaluations" / "0001.json", result)
    return folder


def test_names() -> None:
    for name in ("user/name", "user/name@v1.0", "a-b/c_d.e@refs/pr/1"):
        assert hub_name(name), name
    assert hub_name("user/name/folder@v1") == ("user/name", "folder", "v1")
    for name in ("photos", "./photos/a", "/a/b", "~/a", "a/../b", "a//b", "tests/none", "a/b@", ""):
        assert hub_name(name) is None, name


def test_there_and_back(server: Hub, run: Path, tmp_path: Path, capsys: Capture) -> None:
    text = works(capsys, "push", run, "me/photos", "--private")
    assert "me/photos" in text and "licence" in text
    assert server.repositories["models/me/photos"].private
    files = server.files("me/photos")
    assert set(files) == {"README.md", "config.json", "evaluation.json", "model.safetensors",
                          "samples.png"}  # fmt: skip
    pipeline, local = Pipeline.from_pretrained("me/photos"), load(run)
    assert pipeline.model.digest == local.model.digest
    assert np.array_equal(pipeline.sample(2, steps=2), local.sample(2, steps=2))
    out = tmp_path / "out"
    works(capsys, "sample", "me/photos", "--count", 2, "--steps", 2, "--out", out)
    assert (out / "grid.png").is_file()
    with refuses("raw.safetensors"):
        load_model("me/photos", weights="raw")
    with refuses("raw.safetensors"):
        pipeline.push_to_hub("me/other@small", raw=True)
    local.push_to_hub("me/other@small", raw=True)
    raw = load_model("me/other@small", weights="raw")
    assert raw.digest == load_model(run, weights="raw").digest
    with refuses("me/other", "config.json"):
        load_model("me/other")


def test_the_card(server: Hub, run: Path, capsys: Capture) -> None:
    """Data, counts, metrics with their settings, a picture, fields to fill in, the command."""
    works(capsys, "push", run, "me/photos")
    files = server.files("me/photos")
    text = files["README.md"].decode()
    model = load_model(run)
    front = text.split("---")[1]
    assert 'license: "unknown"' in front and "unconditional-image-generation" in front
    for part in (
        model.config.data,
        f"{sum(model.config.counts):,}",
        *model.config.classes,
        "12.35",
        "100 samples against 40 images",
        "inception",
        "](samples.png)",
        "patchdiffusion sample me/photos",
        'load("me/photos")',
        "licence of the weights | TO FILL IN",
        model.digest,
    ):
        assert part in text, part
    assert json.loads(files["evaluation.json"])["frechet_distance"] == 12.345678
    shutil.rmtree(run / "evaluations")
    works(capsys, "push", run, "me/photos")
    assert "were not evaluated" in server.files("me/photos")["README.md"].decode()


def test_nothing_private_is_pushed(server: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No path of this machine, no image of the data, no log, no name of user and host."""
    facts = unsealed(read_json(run / "model" / "config.json"))
    facts |= {"data": "/home/somebody/photos", "classes": ["a", "<script>|b"]}
    write_json(run / "model" / "config.json", sealed(facts))
    evaluation = read_json(run / "evaluations" / "0001.json")
    evaluation["card"]["extractor"]["file"] = "C:\\Users\\somebody\\features.pt"
    write_json(run / "evaluations" / "0001.json", evaluation)
    push(load_model(run), "me/photos")
    for name, content in server.files("me/photos").items():
        for part in (b"somebody", b"/home", b"C:\\", bytes(run), str(run.parent).encode(), b"<scr"):
            assert part not in content or (name == "config.json" and part == b"<scr"), (name, part)
        assert b"tEXt" not in content, "texts in the picture"
    config = json.loads(server.files("me/photos")["config.json"])
    assert config["data"] == "photos" and unsealed(config) and SEAL in config
    assert load("me/photos").model.config.classes == ("a", "<script>|b")
    facts["data"] = TOKEN
    write_json(run / "model" / "config.json", sealed(facts))
    before = len(server.asked)
    with refuses("config.json", "secret", "hf_ttt"):
        push(load_model(run), "me/photos")
    assert len(server.asked) == before


def test_staged_files_are_those_of_the_run(run: Path, tmp_path: Path) -> None:
    """Pushing changes nothing in the run, whose weights may be linked."""
    before = {p: p.read_bytes() for p in sorted((run / "model").iterdir())}
    stage(load_model(run), "me/photos", tmp_path)
    assert {p: p.read_bytes() for p in sorted((run / "model").iterdir())} == before
    with refuses("user/name", "./me"):
        push(load_model(run), "./me")
    with refuses("new", "merge"):
        stage(replace(load_model(run), adapters=(("new", 1.0, "digest"),)), "me/photos", tmp_path)
    with refuses("averaged"):
        stage(load_model(run, weights="raw"), "me/photos", tmp_path)


def test_offline(server: Hub, run: Path, tmp_path: Path) -> None:
    """What was fetched once is used without a network, and nothing else is asked for."""
    push(load_model(run), "me/photos")
    load_model("me/photos")
    with looking_at("http://127.0.0.1:9", tmp_path / "hub") as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        before = len(server.asked)
        assert load_model("me/photos").digest == load_model(run).digest
        with refuses("me/none", "HF_HUB_OFFLINE"):
            load_model("me/none")
        assert len(server.asked) == before


def test_errors_are_one_line(
    server: Hub, run: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "404" in fails(capsys, "sample", "me/none")
    push(load_model(run), "me/photos", private=True)
    assert "no such revision" in fails(capsys, "sample", "me/photos@none")
    server.add("me/other", {"config.json": b"{}"})
    assert "no model of patchdiffusion" in fails(capsys, "sample", "me/other")
    server.add("me/broken", {"config.json": b"{"})
    assert "not valid JSON" in fails(capsys, "sample", "me/broken")
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in fails(capsys, "push", run, "me/photos")
    shutil.rmtree(tmp_path / "hub")
    assert "401" in fails(capsys, "sample", "me/photos")
    with looking_at("http://127.0.0.1:9", tmp_path / "hub"):
        assert "cannot be reached" in fails(capsys, "sample", "me/photos")
        assert "cannot be reached" in fails(capsys, "push", run, "me/photos")

    def absent(module: str, *, extra: str) -> None:
        raise ImportError(f"{module} is not installed; pip install {module}")

    monkeypatch.setattr(on_hub, "require", absent)
    assert "pip install huggingface_hub" in fails(capsys, "sample", "me/photos")
    assert "pip install huggingface_hub" in fails(capsys, "train", "me/photos")


def test_data_sets(server: Hub, tmp_path: Path, capsys: Capture) -> None:
    """Images with a table, and parquet, by name; folders and revisions; the same pack again."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    images = tiny.write_images(tmp_path / "images")
    files = {p.relative_to(images).as_posix(): p.read_bytes() for p in images.rglob("*.png")}
    server.add("me/pictures", {**files, "notes.bin": b"x" * 100}, "datasets")
    source = open_source("me/pictures")
    assert (source.name, len(source)) == ("pictures", len(files))
    assert source.classes == open_source(images).classes
    assert not any("notes.bin" in line for line in server.asked)
    table = arrow.table({"image": list(files.values())})
    sink = arrow.BufferOutputStream()
    pytest.importorskip("pyarrow.parquet").write_table(table, sink)
    parquet = {"small/train.parquet": sink.getvalue().to_pybytes(), "large/train.parquet": b"PAR1"}
    server.add("me/tables", parquet, "datasets")
    text = works(capsys, "prepare", "me/tables/small", "--out", tmp_path / "pack")
    assert f"{len(files)} images" in text and "tables" in text
    commit = server.repositories["datasets/me/tables"].branches["main"]
    assert len(open_source(f"me/tables/small@{commit}")) == len(files)
    assert "large/train.parquet" in fails(capsys, "prepare", "me/tables", "--out", tmp_path / "p2")
    text = works(capsys, "train", "me/pictures", "--dry-run", "--device", "cpu")
    assert "pictures" in text and torch is not None
