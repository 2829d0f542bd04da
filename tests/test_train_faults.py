"""Runs in which something goes wrong."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from commands import refuses
from PIL import Image

from patchdiffusion import UNetConfig, rng
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.losses import Batch, DenoisingLoss, LossOut
from patchdiffusion.metrics.memorise import Copies
from patchdiffusion.objectives import denoising
from patchdiffusion.system.errors import Stop
from patchdiffusion.system.files import read_json
from patchdiffusion.train import checkpoint, loop, resume, samples
from patchdiffusion.train.log import RunLog
from patchdiffusion.train.save import Saver
from patchdiffusion.train.settings import GuardConfig

Capture = pytest.CaptureFixture[str]


def poison(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Make the loss of some steps NaN."""

    class Poisoned(DenoisingLoss):
        def __call__(self, denoiser: Denoiser, batch: Batch, draws: rng.Draws) -> LossOut:
            out = super().__call__(denoiser, batch, draws)
            return LossOut(out.per_sample * (math.nan if bad(draws.step) else 1.0))

    monkeypatch.setattr(denoising, "DenoisingLoss", Poisoned)


def status(folder: Path) -> str:
    return read_json(folder / "run.json")["status"]


# ---- Numbers that are not finite ----


def test_a_skipped_step_is_counted_and_training_goes_on(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    poison(monkeypatch, lambda step: step == 1)
    folder = tiny.run(tiny.config(images), tmp_path / "run")
    assert status(folder) == "finished"
    assert [line[-1] for line in tiny.history(folder)] == [0, 1, 1, 1]
    losses = [line[4] for line in tiny.history(folder)]
    assert losses[1] is None and all(isinstance(losses[k], float) for k in (0, 2, 3))
    out = capsys.readouterr().out
    assert "loss none" in out and "skipped 1" in out


def test_too_many_in_a_row_end_the_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda step: step >= 2)
    config = tiny.config(images, steps=9, guard=GuardConfig(max_skips=3))
    with pytest.raises(Stop, match=r"3 steps in a row .* the last checkpoint is valid") as caught:
        tiny.run(config, tmp_path / "run", save_minutes=0.0)
    assert caught.value.code == 21
    assert status(tmp_path / "run") == "failed"
    assert "3 steps in a row" in read_json(tmp_path / "run" / "run.json")["reason"]
    (newest, fault), *_ = checkpoint.candidates(tmp_path / "run" / "checkpoints")
    assert (newest.name, fault) == ("step-0000000004", None)
    tensors = checkpoint.read_tensors(newest, "weights", torch.device("cpu"))
    assert all(bool(torch.isfinite(value).all()) for value in tensors.values())


@pytest.mark.parametrize("part", ["raw", "averaged"])
def test_weights_that_are_not_finite_are_never_saved(
    part: str, images: Path, tmp_path: Path
) -> None:
    training = tiny.training(tiny.config(images), tmp_path / "run")
    with resume.opened(training):
        loop.one_step(training)
        saver = Saver(training)
        saver()
    before = tiny.digests(tmp_path / "run")
    network = training.network if part == "raw" else training.ema.network()
    with torch.no_grad():
        network.get_parameter("out_conv.bias")[0] = math.nan
    training.state.step += 1
    with pytest.raises(Stop, match="not finite; nothing was saved") as caught:
        saver()
    assert caught.value.code == 21
    assert tiny.digests(tmp_path / "run") == before


# ---- Memory and disk ----


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    ],
)
@pytest.mark.parametrize(("micro_batch", "proposed"), [(None, 2), (2, 1), (1, 1)])
def test_out_of_memory_says_what_to_change(
    error: Exception,
    micro_batch: int | None,
    proposed: int,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(training: loop.Training) -> None:
        raise error

    monkeypatch.setattr(loop, "one_step", fail)
    with pytest.raises(Stop, match=f"out of memory; .*--micro-batch {proposed},") as caught:
        tiny.run(tiny.config(images, micro_batch=micro_batch), tmp_path / "run")
    assert caught.value.code == 26
    assert status(tmp_path / "run") == "failed"


def test_other_errors_are_not_hidden(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(training: loop.Training) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(loop, "one_step", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        tiny.run(tiny.config(images), tmp_path / "run")
    assert status(tmp_path / "run") == "failed"


def test_a_file_in_the_way_is_one_line(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises((OSError, ValueError)) as caught:
            tiny.run(tiny.config(images), folder)
        assert "\n" not in str(caught.value) and "file" in str(caught.value)


def test_a_log_that_cannot_be_written_stops_nothing(
    images: Path, tmp_path: Path, capsys: Capture, finished: Path
) -> None:
    folder = tmp_path / "run"
    with resume.opened(tiny.training(tiny.config(images), folder)):
        pass
    (folder / "log.jsonl").unlink()
    (folder / "log.jsonl").mkdir()
    (folder / "run.json").mkdir()
    tiny.run(tiny.config(images), folder)
    out = capsys.readouterr().out
    assert out.count("warning: cannot write " + str(folder / "log.jsonl")) == 1
    assert "warning: cannot write " + str(folder / "run.json") in out
    assert tiny.weights(folder) == tiny.weights(finished)


def test_numbers_that_json_cannot_hold_stop_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.record("preview", held_out={"loss": math.inf, "bands": {"0-1": math.nan}}, rates=[1.0])
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["held_out"] == {"loss": None, "bands": {"0-1": None}}
    assert record["rates"] == [1.0]


def test_a_line_that_was_cut_short_does_not_swallow_the_next(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"kind": "start"}\n{"kind": "sta')
    log = RunLog(tmp_path)
    log.record("resume", step=1)
    log.record("status", step=2)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(lines[i])["kind"] for i in (0, 2, 3)] == ["start", "resume", "status"]


# ---- Data ----


def test_channels_and_classes_must_fit(images: Path, tmp_path: Path) -> None:
    plain = UNetConfig(base=4, mult=(1,), blocks=1, attention=())
    for network, message in (
        (replace(plain, channels=1), "network.channels is 1, and the images have 3; set --network"),
        (
            replace(plain, num_classes=5),
            "network.num_classes is 5, and the data has 2 classes; set --network",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            tiny.run(tiny.config(images, network=network), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_labels_may_be_ignored(images: Path, tmp_path: Path) -> None:
    network = UNetConfig(base=4, mult=(1,), blocks=1, attention=())
    folder = tiny.run(tiny.config(images, steps=1, network=network), tmp_path / "run")
    assert read_json(folder / "model" / "config.json")["classes"] == []


def test_no_cuda_is_one_line(images: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with refuses("CUDA", "--device cpu"):
        tiny.run(tiny.config(images), tmp_path / "run", device="cuda")


def test_a_single_image_trains(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    Image.fromarray(tiny.picture(1)).save(tmp_path / "one" / "only.png")
    network = UNetConfig(base=4, mult=(1,), blocks=1, attention=())
    folder = tiny.run(tiny.config(tmp_path / "one", steps=2, network=network), tmp_path / "run")
    assert status(folder) == "finished"


def test_copies_are_warned_of(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    def some(samples: torch.Tensor, *rest: torch.Tensor, **options: object) -> Copies:
        return Copies(0.5, torch.zeros(2).long(), torch.zeros(2))

    tiny.run(tiny.config(images, steps=1), tmp_path / "honest")
    assert "near copies" not in capsys.readouterr().out
    monkeypatch.setattr(samples, "copy_rate", some)
    tiny.run(tiny.config(images, steps=1), tmp_path / "copying")
    assert "warning: 50% of the samples are near copies" in capsys.readouterr().out


def test_grids_are_what_is_measured(images: Path, tmp_path: Path) -> None:
    """The picture on disk holds the samples that the copy rate is computed of."""
    training = tiny.training(tiny.config(images), tmp_path / "run")
    samples = tiny.preview(training).draw(training.averaged)
    shown = training.preview.show(training.averaged).picture
    assert samples.shape == (2, 3, 16, 16)
    factor = shown.shape[0] // 16
    first = ((samples[0] + 1) * 127.5).round().clamp(0, 255).byte().movedim(0, -1).numpy()
    assert (shown[: 16 * factor : factor, : 16 * factor : factor] == first).all()
