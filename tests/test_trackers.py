"""Trackers get numbers with units, pictures and settings, as their own readers see them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image

from patchdiffusion.train import trackers
from patchdiffusion.train.report import read_log
from patchdiffusion.train.trackers import WeightsAndBiases, flat


def test_event_files_of_a_run(images: Path, tmp_path: Path) -> None:
    """TensorBoard's own reader finds what the log and the folder of the run have."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: '.[log]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny.config(images)
    run = tiny.run(config, tmp_path / "run", track=("tensorboard",))
    events = EventAccumulator(str(run), size_guidance={"images": 0, "scalars": 0}).Reload()
    tags = events.Tags()
    names = ["train/loss", "train/gradient norm", "train/learning rate", "train/skipped steps",
             "progress/images seen", "speed/images per second", "speed/share of peak (%)",
             "memory/peak (GiB)", "preview/held-out loss"]  # fmt: skip
    assert set(names) <= set(tags["scalars"]), tags["scalars"]
    assert all("/" in name for name in tags["scalars"])
    status = [record for record in read_log(run) if record["kind"] == "status"]
    losses = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert losses == [(r["step"], pytest.approx(r["loss"])) for r in status if r["loss"]]
    seen = [e.value for e in events.Scalars("progress/images seen")]
    assert seen == [pytest.approx(record["images"]) for record in status]
    pictures = sorted((run / "samples").glob("*.png"))
    shown = [Image.open(io.BytesIO(e.encoded_image_string)) for e in events.Images("samples")]
    assert len(shown) == len(pictures)
    for image, path in zip(shown, pictures, strict=True):
        with Image.open(path) as expected:
            assert np.array_equal(np.asarray(image), np.asarray(expected.convert("RGB")))
    plugins = events.PluginTagToContent("hparams")
    content = b"".join(plugins.values())
    for part in (b"optim.lr", b"batch", b"train/loss", b"network.base"):
        assert part in content
    text = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0]
    assert b'"batch"' in text and b'"optim"' in text


def test_settings_are_flat() -> None:
    config = {"a": {"b": 1, "c": None, "d": [1, 2]}, "e": True, "f": "x"}
    assert flat(config) == {"a.b": 1, "a.c": "none", "a.d": "[1, 2]", "e": True, "f": "x"}


def test_what_wandb_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of its documented interface: settings, numbers by step, captioned pictures."""
    calls: list[Any] = []

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            calls.append((values, step))

        def finish(self) -> None:
            calls.append("finish")

    class Api:
        @staticmethod
        def init(**settings: Any) -> Run:
            calls.append(settings)
            return Run()

        @staticmethod
        def Image(path: str, caption: str) -> tuple[str, str]:
            return path, caption

    monkeypatch.setattr(trackers, "require", lambda name, extra: Api)
    tracker = WeightsAndBiases(tmp_path / "mine", {"batch": 8})
    tracker.numbers({"train/loss": 0.5}, 3)
    tracker.picture(tmp_path / "0000000120.png", 3)
    tracker.close()
    assert calls[0]["config"] == {"batch": 8} and calls[0]["name"] == "mine"
    assert calls[0]["dir"] == str(tmp_path / "mine")
    assert calls[1:] == [
        ({"train/loss": 0.5}, 3),
        ({"samples": (str(tmp_path / "0000000120.png"), "120 images seen")}, 3),
        "finish",
    ]
