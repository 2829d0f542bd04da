"""Alignment to a frozen encoder: features of whole images under crops, the term, its gradient."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from commands import Capture, fails, refuses, works
from little import alive
from mapped import DIT, Data, batch_of, box_of, materials, pixels
from oracles import draws
from sameruns import check_micro_batches, check_resumed
from torch import Tensor
from toynets import ToyNet

from patchdiffusion import TrainConfig, rng
from patchdiffusion.cond import Tape
from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.encoders.featurestore import FeatureStore, Preparation, components, stored
from patchdiffusion.encoders.maps import EncoderOptions, map_encoder
from patchdiffusion.losses import Batch, DenoisingLoss, LossOut
from patchdiffusion.nets.lego import LegoConfig
from patchdiffusion.nets.projector import Projector, enlarged
from patchdiffusion.nets.routing import Route
from patchdiffusion.nets.tapmaps import as_map, cell_of, tap_maps
from patchdiffusion.objectives import AlignConfig, ConsistencyConfig
from patchdiffusion.objectives.align import AlignLoss, factor_of
from patchdiffusion.parameterisation import EDM
from patchdiffusion.rng import Draws
from patchdiffusion.train.report import read_log

ENCODER = "mapped:brightness"


# ---- Features under a crop ----


def store(grid: tuple[int, ...] = (4, 6), canvas: tuple[int, ...] = (8, 12)) -> FeatureStore:
    values = rng.normal(rng.keys(0, "y", 0, torch.arange(5)), (*grid, 3)).half()
    return FeatureStore(values, canvas, tuple(map(float, canvas)))


def test_the_whole_image_has_the_features_as_they_are() -> None:
    y, index, still = store(), torch.tensor([3, 1]), torch.zeros(2, dtype=torch.bool)
    found = y.crop(index, box_of(2, (0, 0), (8, 12)), still, (4, 6), (2, 2))
    torch.testing.assert_close(found.movedim(1, -1), y.values[index].float(), atol=1e-6, rtol=0)


def test_a_crop_is_what_sampling_a_picture_gives() -> None:
    """By `grid_sample`, at the coordinates of the centers of places."""
    y, index, still = store(), torch.tensor([0, 2, 4]), torch.zeros(3, dtype=torch.bool)
    box = torch.tensor([[1, 3, 5, 7], [0, 0, 5, 7], [3, 5, 5, 7]])
    found = y.crop(index, box, still, (3, 4), (5 / 3, 7 / 4))
    down, right = torch.arange(3) + 0.5, torch.arange(4) + 0.5
    rows = 2 * (box[:, 0, None] + down * 5 / 3) / 8 - 1
    columns = 2 * (box[:, 1, None] + right * 7 / 4) / 12 - 1
    at = torch.stack(
        [columns[:, None].expand(-1, 3, -1), rows[:, :, None].expand(-1, -1, 4)], dim=-1
    )
    maps = y.values[index].float().movedim(-1, 1)
    expected = F.grid_sample(maps, at, padding_mode="border", align_corners=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_overlapping_crops_agree_where_they_share_centers() -> None:
    y, index, still = store(), torch.tensor([1]), torch.zeros(1, dtype=torch.bool)
    whole = y.crop(index, box_of(1, (0, 0), (8, 12)), still, (8, 12), (1, 1))
    part = y.crop(index, box_of(1, (2, 5), (4, 6)), still, (4, 6), (1, 1))
    torch.testing.assert_close(part, whole[:, :, 2:6, 5:11], atol=1e-6, rtol=0)


def test_features_are_mirrored_with_the_image() -> None:
    y, index = store(), torch.tensor([1, 2])
    flip, still = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    found = y.crop(index, box_of(2, (1, 3), (4, 6)), flip, (2, 3), (2, 2))
    plain = y.crop(index, box_of(2, (1, 3), (4, 6)), still, (2, 3), (2, 2))  # 12 - 3 - 6 = 3
    torch.testing.assert_close(found, plain.flip(-1), atol=1e-6, rtol=0)
    turned = FeatureStore(y.values.flip(2), y.canvas, y.extent)
    box = box_of(2, (1, 4), (4, 6))
    of_mirrored = turned.crop(index, box, still, (2, 3), (2, 2))
    torch.testing.assert_close(y.crop(index, box, flip, (2, 3), (2, 2)), of_mirrored)


def test_any_number_of_axes() -> None:
    values = torch.arange(10.0).reshape(1, 5, 2).half()
    line = FeatureStore(values, (10,), (10.0,))
    still = torch.zeros(1, dtype=torch.bool)
    found = line.crop(torch.tensor([0]), torch.tensor([[2, 4]]), still, (2,), (2,))
    torch.testing.assert_close(found, torch.tensor([[[2.0, 4.0], [3.0, 5.0]]]))


def test_sliced_features_are_those_of_an_encoded_crop(tmp_path: Path) -> None:
    """Of an encoder that sees nothing else than the pixels of a place."""
    data = Data(tiny.picture)
    encoder = map_encoder(ENCODER, data, EncoderOptions())
    y = stored(encoder, data, Preparation(), None)
    index, still = torch.arange(3), torch.zeros(3, dtype=torch.bool)
    sliced = y.crop(index, box_of(3, (4, 8), (8, 8)), still, (2, 2), (4, 4))
    crop = data.pictures(index)[:, 4:12, 8:16]
    torch.testing.assert_close(sliced, pixels(crop.movedim(-1, 1)), atol=1e-3, rtol=1e-3)


# ---- Stored once ----


def test_features_are_encoded_once(tmp_path: Path) -> None:
    data = Data(tiny.picture)
    encoder = map_encoder(ENCODER, data, EncoderOptions())
    plain = Preparation()
    tried = stored(encoder, data, plain, tmp_path, rehearsal=True)
    assert not list(tmp_path.iterdir()) and not tried.values.any()
    first = stored(encoder, data, plain, tmp_path, quiet=True)
    values, reads = first.values.clone(), data.reads
    again = stored(encoder, data, plain, tmp_path, quiet=True)
    assert data.reads == reads + 1  # one image, for the size
    assert torch.equal(values, again.values) and values.any()
    assert torch.equal(stored(encoder, data, plain, tmp_path, rehearsal=True).values, values)
    stored(encoder, data, Preparation(components=2), tmp_path, quiet=True)
    assert len([f for f in tmp_path.iterdir() if f.is_dir()]) == 2
    for file in tmp_path.glob("*/features.bin"):
        file.write_bytes(file.read_bytes()[:-1])  # cut short: made again
    assert torch.equal(stored(encoder, data, plain, tmp_path, quiet=True).values, values)


def test_principal_components_keep_what_is_large() -> None:
    x = torch.randn(200, 5, generator=torch.Generator().manual_seed(0)).double()
    x = x * torch.tensor([5.0, 4.0, 0.1, 0.1, 0.1]) + 0.3
    all_of_them = components(x.T @ x, 5)
    torch.testing.assert_close(all_of_them.T @ all_of_them, torch.eye(5).double())
    torch.testing.assert_close((x @ all_of_them) @ (x @ all_of_them).T, x @ x.T)
    two = all_of_them[:, :2]
    torch.testing.assert_close(components(x.T @ x, 2), two)
    assert float((x @ two).square().sum() / x.square().sum()) > 0.99
    assert bool((two.gather(0, two.abs().argmax(0, keepdim=True)) > 0).all())


def test_spatial_normalization() -> None:
    y = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
    full = Preparation(norm="spatial").normalized(y)
    torch.testing.assert_close(full.mean((1, 2)), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(full.std((1, 2), correction=0), torch.ones(2, 5), atol=1e-4, rtol=0)
    part = Preparation(norm="spatial", center=0.6).normalized(y)
    left = 0.4 * y.mean((1, 2)) / y.std((1, 2), correction=0)
    torch.testing.assert_close(part.mean((1, 2)), left, atol=1e-5, rtol=1e-4)
    assert torch.equal(Preparation().normalized(y), y)


# ---- Taps as maps ----


def test_taps_are_maps_of_all_networks() -> None:
    unet = tap_maps(tiny.NETWORK.build, (8, 12))
    assert unet["stem"].grid == (8, 12) and unet["mid.0"].grid == (4, 6)
    assert unet["mid.0"].cell == (2.0, 2.0)
    assert cell_of((9, 8), (3, 2), (4, 4)) == (4.0, 4.0)  # the last place is beyond the image
    half = tap_maps(replace(DIT, half_blocks=2, depth=4).build, (8, 12))
    assert half["blocks.1"].cell == (4.0, 4.0) and half["blocks.3"].cell == (2.0, 2.0)
    routed = tap_maps(replace(DIT, tokens=Route()).build, (8, 12))
    assert list(routed) == ["stem", "blocks.0"]  # others have some of the tokens
    bricks = tap_maps(LegoConfig(width=16, heads=2).for_canvas((16, 16)).build, (16, 16))
    assert bricks["bricks.1.blocks.0"].grid == (4, 4)
    x = torch.arange(24.0).reshape(1, 6, 4)
    assert torch.equal(as_map(x, (4, 6), (2, 2))[0, :, 1, 2], x[0, 5])
    with refuses("map", "4x6"):
        as_map(x[:, :5], (4, 6), (2, 2))


# ---- The term ----


def aligned(weight: float = 0.5, **changes: object) -> AlignLoss:
    config = replace(AlignConfig(encoder=(ENCODER,), weight=weight), **changes)  # pyright: ignore[reportArgumentType]
    loss = config.add(DenoisingLoss(), materials(DIT))
    assert isinstance(loss, AlignLoss)
    return loss


def test_the_term_is_the_mean_cosine() -> None:
    loss, batch = aligned(tap="blocks.0"), batch_of(3, (8, 8), corner=(4, 8))
    batch = replace(batch, flip=torch.tensor([True, False, True]))
    denoiser = NetDenoiser(alive(DIT), EDM())
    out = loss(denoiser, batch, draws(3))
    base = DenoisingLoss()(denoiser, batch, draws(3))
    assert out.reported is not None and torch.equal(out.reported, base.per_sample)
    term = (out.per_sample - base.per_sample) / 0.5
    tape = Tape(wants=("blocks.0",))
    DenoisingLoss()(denoiser.recording(tape), batch, draws(3))
    (target,) = loss.targets
    h = tape.activations["blocks.0"]
    p = target.projector.layers(h)  # tokens in order, [3, 16, D]
    y = target.store.crop(batch.index, batch.box, batch.flip, (4, 4), (2, 2)).flatten(2).mT
    expected = [
        -sum(F.cosine_similarity(a, b, dim=0) for a, b in zip(*rows, strict=True)) / 16
        for rows in zip(p, y, strict=True)
    ]
    torch.testing.assert_close(term, torch.stack(expected), atol=2e-5, rtol=1e-4)  # pyright: ignore[reportArgumentType]
    assert bool((term.abs() <= 1).all())
    torch.testing.assert_close(out.scalars["align"], term.mean(), atol=2e-5, rtol=1e-4)


def test_the_manifold_term_compares_all_pairs_of_places() -> None:
    loss, batch = aligned(tap="blocks.0", manifold=3.0), batch_of(2, (4, 4), corner=(4, 8))
    (target,) = loss.targets
    h = rng.normal(rng.keys(0, "h", 0, torch.arange(2)), (DIT.width, 2, 2))
    h[1] = h[1, :, :1, :1]  # all places alike, which those of the encoder are not
    p = target.projector(h).flatten(2)
    y = target.store.crop(batch.index, batch.box, batch.flip, (2, 2), (2, 2)).flatten(2)

    def cosine(x: Tensor, i: int, j: int) -> Tensor:
        return F.cosine_similarity(x[:, :, i], x[:, :, j])

    places = [(i, j) for i in range(4) for j in range(4)]
    pairs = [(cosine(y, i, j) - cosine(p, i, j)) ** 2 for i, j in places]
    plain = replace(loss, manifold=0.0).term(target, h, batch)
    expected = plain + 3 * torch.stack(pairs).mean(0)
    torch.testing.assert_close(loss.term(target, h, batch), expected, atol=1e-5, rtol=1e-5)


def test_terms_belong_to_their_samples() -> None:
    loss, batch = aligned(), batch_of(3, (8, 8))
    (target,) = loss.targets
    h = rng.normal(rng.keys(0, "h", 0, torch.arange(3)), (DIT.width, 4, 4))
    order = torch.tensor([2, 0, 1])
    other = replace(batch, index=batch.index[order], box=batch.box[order], flip=batch.flip[order])
    expected = loss.term(target, h, batch)[order]
    torch.testing.assert_close(loss.term(target, h[order], other), expected)


def test_no_gradient_reaches_later_blocks() -> None:
    network = alive(DIT)
    blind = replace(aligned(tap="blocks.1"), objective=_nothing)
    out = blind(NetDenoiser(network, EDM()), batch_of(2, (8, 8)), draws(2))
    out.per_sample.sum().backward()
    for name, p in network.named_parameters():
        before = name.startswith(("blocks.0", "blocks.1", "stem", "embed"))
        assert (p.grad is not None and bool(p.grad.any())) == before, name
    assert all(
        bool(p.grad.any()) for p in blind.targets[0].projector.parameters() if p.grad is not None
    )


def _nothing(denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
    denoiser(batch.images, torch.ones(len(batch.images)), batch.cond)
    return LossOut(per_sample=torch.zeros(len(batch.images)))


def gradients(loss: object, batch: Batch) -> list[Tensor]:
    network = alive(DIT)
    out = loss(NetDenoiser(network, EDM()), batch, draws(len(batch.images)))  # pyright: ignore[reportCallIssue]
    out.per_sample.sum().backward()
    return [p.grad for p in network.parameters() if p.grad is not None]


def test_after_its_time_the_gradient_is_that_without() -> None:
    loss, batch = aligned(stop_at=0.5), batch_of(2, (8, 8))
    base = gradients(DenoisingLoss(), batch)
    late = gradients(loss, replace(batch, progress=0.5))
    assert all(torch.equal(a, b) for a, b in zip(base, late, strict=True))
    early = gradients(loss, replace(batch, progress=0.49))
    assert not all(torch.equal(a, b) for a, b in zip(base, early, strict=True))
    assert all(p.grad is not None for p in loss.targets[0].projector.parameters())


def test_warped_images_have_no_term() -> None:
    batch = batch_of(2, (8, 8))
    warped = replace(batch, cond=replace(batch.cond, augment=torch.tensor([[0.0, 0], [0, 1]])))
    loss, denoiser = aligned(), NetDenoiser(alive(DIT), EDM())
    base = DenoisingLoss()(denoiser, warped, draws(2)).per_sample
    found = loss(denoiser, warped, draws(2)).per_sample
    assert not torch.equal(found[0], base[0]) and torch.equal(found[1], base[1])


def test_networks_with_down_sampling_follow_other_rules() -> None:
    """The middle of the network, projected and then enlarged to the grid of the encoder."""
    loss = AlignConfig(encoder=(ENCODER,)).add(DenoisingLoss(), materials(tiny.NETWORK))
    assert isinstance(loss, AlignLoss)
    assert loss.tap.name == "mid.0" and loss.manifold == 3 and aligned().manifold == 0
    coarse = replace(loss.tap, cell=(8.0, 8.0))
    fine = FeatureStore(torch.zeros(1, 8, 8, 2), (16, 16), (16.0, 16.0))
    assert factor_of(coarse, (1.0, 1.0), fine) == 4 and factor_of(coarse, (8.0, 8.0), fine) == 1
    x = torch.arange(4.0).reshape(1, 1, 4)
    torch.testing.assert_close(enlarged(x, 2)[0, 0, 1:3], torch.tensor([0.25, 0.75]))
    denoiser, batch = NetDenoiser(tiny.NETWORK.build(), EDM()), batch_of(2, (8, 8), labels=True)
    assert loss(denoiser, batch, draws(2)).per_sample.shape == (2,)


def test_projectors() -> None:
    torch.manual_seed(0)
    a, b = (Projector("mlp", 8, 5, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    h = torch.randn(2, 8, 3, 4)
    assert Projector("conv", 8, 5)(h).shape == (2, 5, 3, 4) == Projector("mlp", 8, 5)(h).shape
    assert Projector("mlp", 8, 5).macs == 8 * 16 + 16 * 16 + 16 * 5


# ---- Runs ----


def config(images: Path, **changes: object) -> TrainConfig:
    addition = replace(AlignConfig(encoder=(ENCODER,)), **changes)  # pyright: ignore[reportArgumentType]
    return replace(tiny.config(images, network=DIT), additions=(addition,))


def test_an_interrupted_run_is_the_same_run(images: Path, tmp_path: Path) -> None:
    both = config(
        images, encoder=(ENCODER, ENCODER), pca=4, target_norm="spatial", projector="conv"
    )
    straight = check_resumed(both, tmp_path)
    assert all(
        -1 <= r["scalars"]["align"] <= 1 for r in read_log(straight) if r["kind"] == "status"
    )
    neutral = tiny.run(config(images, weight=0.0), tmp_path / "neutral")
    plain = tiny.run(replace(config(images), additions=()), tmp_path / "plain")
    assert tiny.weights(neutral) == tiny.weights(plain) != tiny.weights(straight)
    assert tiny.history(neutral) == tiny.history(plain)
    names = {f.name: f.stat().st_size for f in (straight / "model").iterdir()}
    assert names["model.safetensors"] == (plain / "model" / "model.safetensors").stat().st_size


def test_micro_batches_are_the_same_training(images: Path, tmp_path: Path) -> None:
    check_micro_batches(config(images, manifold=1.0), tmp_path)


def test_an_encoder_of_our_own(tmp_path: Path, capsys: Capture) -> None:
    """A classifier, whose digest a resumed run must have; what cannot be is said in one line."""
    data = tiny.write_images(tmp_path / "images")
    small = "--network dit --network.width 16 --network.heads 2 --network.depth 2 --threads 1"
    short = [*small.split(), "--images=8", "--batch=4", "--preview.samples=1"]
    run, encoder, flag = tmp_path / "run", tmp_path / "encoder", "--additions.align.encoder"
    works(capsys, "train", "classifier", data, *short, "--out", encoder)
    aligned = ("train", data, *short, "--out", run, "--additions", "align")
    told = works(capsys, *aligned, flag, encoder, "--dry-run")
    assert "aligned to encoder (16 features on" in told and "blocks.0" in told
    works(capsys, *aligned, flag, encoder)
    assert "is finished" in works(capsys, "train", run)
    for flags, parts in (
        ((), ("encoder", "missing")),
        ((flag, tmp_path / "none"), ("none", "exist")),
        ((flag, data), ("holds no model",)),
        ((flag, "mapped:nothing"), ("mapped:nothing", "loaded")),
        ((flag, encoder, "--additions.align.tap", "blocks.7"), ("blocks.7", "blocks.1")),
        ((flag, encoder, "--additions.align.layer", "blocks.7"), ("blocks.7", "blocks.1")),
        ((flag, encoder, "--additions.align.pca", "99"), ("pca", "16", "99")),
        ((flag, encoder, "--data.resolution", "8"), ("16x16", "8x8")),
    ):
        line = fails(capsys, *aligned, *flags, "--fresh", "--dry-run")
        assert all(part in line for part in parts), line


def test_what_cannot_be_aligned(images: Path) -> None:
    for changes in ({"weight": -1.0}, {"projector": "x"}, {"stop_at": 2.0}, {"sigma": 0.0}):
        with refuses(*changes):
            replace(AlignConfig(), **changes)  # pyright: ignore[reportArgumentType]
    with refuses("align", "few-step"):
        few = replace(tiny.config(images), objective=ConsistencyConfig())
        replace(few, additions=(AlignConfig(encoder=(ENCODER,)),))
    with refuses("taps", "dit"):
        AlignConfig(encoder=(ENCODER,)).add(DenoisingLoss(), materials(ToyNet()))
    with refuses("maps", "B, D, h, w"):
        AlignConfig(encoder=("mapped:vectors",)).add(DenoisingLoss(), materials(DIT))


def test_stored_configurations_execute_nothing(
    images: Path, tmp_path: Path, capsys: Capture
) -> None:
    run = tiny.run(config(images), tmp_path / "run")
    line = fails(capsys, "train", run)
    assert ENCODER in line and "code" in line


def test_a_vision_transformer(tmp_path: Path) -> None:
    """Its patch tokens without class and registers, of images in its own size and colors."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    shape = transformers.Dinov2Config(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=2, patch_size=4, image_size=32
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = transformers.Dinov2Model(shape).eval()
    network.save_pretrained(tmp_path / "dino")
    data = Data(tiny.picture)
    encoder = map_encoder(str(tmp_path / "dino"), data, EncoderOptions(side=32))
    found = encoder(torch.arange(2))
    assert found.shape == (2, 8, 8, 12)
    x = data.pictures(torch.arange(2)).movedim(-1, 1) / 255.0
    x = F.interpolate(x, (32, 32), mode="bicubic", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (x.clamp(0, 1) - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        expected = network(pixel_values=x).last_hidden_state[:, 1:].unflatten(1, (8, 8))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    other = map_encoder(str(tmp_path / "dino"), data, EncoderOptions(side=32, layer="1"))
    assert other.digest != encoder.digest and other(torch.arange(1)).shape == (1, 8, 8, 12)
    with refuses("layers", "9"):
        map_encoder(str(tmp_path / "dino"), data, EncoderOptions(layer="9"))
