"""Additions on top of objectives: what they are built from, their order, the contrastive term."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import tiny
import torch
from commands import refuses
from oracles import Little, batch, draws
from safetensors.torch import load_file
from stepping import GROUPS, IMAGES, LABELS
from torch import Tensor, nn

from patchdiffusion import TrainConfig
from patchdiffusion.data.columns import Filled, Label
from patchdiffusion.data.feed import Feed
from patchdiffusion.denoiser import Denoiser, NetDenoiser
from patchdiffusion.losses import Batch, DenoisingLoss, LossOut, Objective, UncertaintyLoss
from patchdiffusion.objectives import (
    AdditionUnion,
    ContrastConfig,
    DenoisingConfig,
    MeanFlowConfig,
)
from patchdiffusion.objectives.base import Addition, Materials, Stages, with_additions
from patchdiffusion.objectives.reward import RewardWeighted
from patchdiffusion.parameterisation import EDM
from patchdiffusion.plans import Group
from patchdiffusion.rng import Draws
from patchdiffusion.system import families
from patchdiffusion.train import loop
from patchdiffusion.weighting import EDMWeight, FlowWeight, LogVariance, Weighting

FEED = Feed(IMAGES, [Filled(Label(), LABELS)], torch.arange(12), seed=7, flip=True)
FIRST, SECOND = GROUPS


def crops(group: Group, chunk: range | None = None) -> tuple[Batch, Draws]:
    first = 0 if group is FIRST else FIRST.count
    return FEED.batch(group, step=5, position=30, first=first, chunk=chunk or range(group.count))


# ---- Other crops of a step ----


def test_another_sample_is_any_other_one_alike() -> None:
    own = draws(5)
    counts = torch.zeros(5, 5)
    for step in range(2000):
        other = replace(own, step=step).others("contrast")
        counts[own.rank, other.rank] += 1
        assert torch.equal(other.index - own.index, other.rank - own.rank)
    assert not counts.diagonal().any()
    assert float((counts[counts > 0] / 500 - 1).abs().max()) < 0.2
    with refuses("group", 1):
        draws(1).others("contrast")


@pytest.mark.parametrize("group", GROUPS)
def test_other_crops_are_those_of_the_step(group: Group) -> None:
    whole, of_whole = crops(group)
    other, of_other = FEED.others(whole, "contrast")
    rank = of_other.rank
    assert not (rank == of_whole.rank).any()
    for a, b in ((other.images, whole.images), (other.box, whole.box), (other.flip, whole.flip)):
        assert torch.equal(a, b[rank])
    assert torch.equal(of_other.keys("noise"), of_whole.keys("noise")[rank])
    parts = [FEED.others(crops(group, chunk)[0], "contrast") for chunk in (range(1), range(1, 3))]
    assert torch.equal(torch.cat([part.images for part, _ in parts]), other.images[:3])


def test_a_second_view_is_of_the_same_images() -> None:
    whole, _ = crops(SECOND)
    view = FEED.view(whole, "teacher")
    assert torch.equal(view.index, whole.index) and view.images.shape == whole.images.shape
    assert not torch.equal(view.box, whole.box) and not torch.equal(view.flip, whole.flip)
    assert torch.equal(FEED.view(crops(SECOND, range(2, 4))[0], "teacher").box, view.box[2:4])
    assert not torch.equal(FEED.view(whole, "student").box, view.box)
    with refuses("origin"):
        FEED.view(batch(whole.images), "teacher")


# ---- The contrastive term ----


def materials(**parts: object) -> Materials:
    network = tiny.NETWORK.build()
    plain = Materials(
        network=network, average=lambda: NetDenoiser(network, EDM()), groups=GROUPS,
        others=FEED.others,
    )  # fmt: skip
    return replace(plain, **parts)  # pyright: ignore[reportArgumentType]


def with_contrast(objective: Objective, weight: float = 0.2) -> Objective:
    return ContrastConfig(weight=weight).add(objective, materials())


def by_hand(denoiser: Denoiser, group: Group, weighting: Weighting, weight: float) -> Tensor:
    """The paper's term, sample by sample, with its velocities weighed like the loss."""
    whole, given = crops(group)
    partner = given.others("contrast").rank.tolist()
    sigma = DenoisingLoss().levels(given, whole.noise)
    noise = given.normal("noise", tuple(whole.images.shape[1:]))
    found = []
    for i, j in enumerate(partner):
        s, one = float(sigma[i]), slice(i, i + 1)
        t = s / (1 + s)
        z = (1 - t) * whole.images[one] + t * noise[one]  # the straight path
        estimate = denoiser(z * (1 + s), sigma[one], whole.cond.take(one))
        velocity = (z - estimate) / t  # as z = D + t v
        own, other = (noise[k] - whole.images[k] for k in (i, j))
        errors = [(velocity[0] - v).square().mean() for v in (own, other)]
        found.append(weighting(sigma[one])[0] * t**2 * (errors[0] - weight * errors[1]))
    return torch.stack(found)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("weighting", [FlowWeight(), EDMWeight()])
def test_the_term_by_hand(group: Group, weighting: Weighting) -> None:
    denoiser = NetDenoiser(Little(channels=3), EDM())
    out = with_contrast(DenoisingLoss(weighting))(denoiser, *crops(group))
    expected = by_hand(denoiser, group, weighting, 0.2)
    torch.testing.assert_close(out.per_sample, expected, rtol=1e-4, atol=1e-4)
    plain = DenoisingLoss(weighting)(denoiser, *crops(group)).per_sample
    assert out.reported is not None and torch.equal(out.reported, plain)
    assert float(out.scalars["contrast"]) > 0
    weights = list(denoiser.parameters())
    (found,) = torch.autograd.grad(out.per_sample.sum(), weights)
    (wanted,) = torch.autograd.grad(expected.sum(), weights)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_parts_of_a_step_have_the_term_of_the_whole() -> None:
    denoiser, loss = NetDenoiser(Little(channels=3), EDM()), with_contrast(DenoisingLoss())
    whole = loss(denoiser, *crops(SECOND)).per_sample
    parts = [loss(denoiser, *crops(SECOND, chunk)).per_sample for chunk in (range(4), range(4, 6))]
    assert torch.equal(torch.cat(parts), whole)


def test_wrappers_scale_the_term_with_the_loss() -> None:
    """A weight on the loss is one on the term, and a log-variance is not moved by it."""
    denoiser, rewards = NetDenoiser(Little(channels=3), EDM()), torch.arange(12) / 3
    plain = with_contrast(DenoisingLoss())(denoiser, *crops(SECOND)).per_sample
    weighted = RewardWeighted(DenoisingLoss(), rewards, 0.5)
    inside = with_contrast(weighted)(denoiser, *crops(SECOND)).per_sample
    factor = weighted.weights[crops(SECOND)[0].index].float()
    torch.testing.assert_close(inside, factor * plain, rtol=1e-5, atol=1e-5)

    head = LogVariance(4)
    with torch.no_grad():
        head.weight.fill_(0.5)
    uncertain = UncertaintyLoss(DenoisingLoss(), head)
    without, inside = (
        loss(denoiser, *crops(SECOND)) for loss in (uncertain, with_contrast(uncertain))
    )
    own, moved = (
        torch.autograd.grad(out.per_sample.sum(), [head.weight])[0] for out in (without, inside)
    )
    torch.testing.assert_close(own, moved)
    assert not torch.allclose(inside.per_sample, without.per_sample)


def test_what_cannot_be_contrasted() -> None:
    few = TrainConfig(objective=MeanFlowConfig(), network=replace(tiny.NETWORK, jump=True))
    with refuses("contrast", "MeanFlowConfig", "denoising"):
        replace(few, additions=(ContrastConfig(),))
    with refuses("contrast", "2 crops", "4x4", "--batch"):
        ContrastConfig().add(DenoisingLoss(), materials(groups=(Group((4, 4), 1, 1.0),)))
    for weight in (-0.1, 1.0, float("nan")):
        with refuses("weight", "[0, 1)", weight):
            ContrastConfig(weight=weight)

    def blind(denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        return LossOut(batch.images.flatten(1).sum(1))

    with refuses("contrast", "estimate"):
        with_contrast(blind)(NetDenoiser(Little(), EDM()), *crops(SECOND))


# ---- Runs ----


def run(images: Path, out: Path, *additions: AdditionUnion, **changes: object) -> Path:
    config = tiny.config(images, additions=additions, patches=tiny.LAW, batch=8, images=30.0)
    return tiny.run(config, out, **changes)


def test_a_weight_of_zero_is_no_term(images: Path, tmp_path: Path) -> None:
    plain, neutral, other = (
        run(images, tmp_path / str(n), *added)
        for n, added in enumerate([(), (ContrastConfig(weight=0.0),), (ContrastConfig(),)])
    )
    assert tiny.weights(neutral) == tiny.weights(plain) != tiny.weights(other)
    assert tiny.history(neutral) == tiny.history(plain)


def test_an_interrupted_run_is_the_same_run(images: Path, tmp_path: Path) -> None:
    straight = run(images, tmp_path / "straight", ContrastConfig(weight=0.3))
    folder = run(images, tmp_path / "run", ContrastConfig(weight=0.3), max_hours=1e-9)
    run(images, folder, ContrastConfig(weight=0.3))
    assert len(tiny.history(folder)) > 3 and tiny.history(folder) == tiny.history(straight)
    assert tiny.weights(folder) == tiny.weights(straight)


@dataclass(frozen=True, kw_only=True)
class Scale(Addition):
    """The loss times a learned number, and a note of when it was applied."""

    word: ClassVar[str] = "scale"
    name: str = "scale"

    def add(self, objective: Objective, materials: Materials) -> Objective:
        factor = nn.Linear(1, 1, bias=False)
        nn.init.ones_(factor.weight)
        materials.learn(self.name, factor)

        def scaled(denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
            out = objective(denoiser, batch, draws)
            told = {**out.scalars, self.name: torch.tensor(float(len(out.scalars)))}
            return replace(out, per_sample=factor(out.per_sample[:, None])[:, 0], scalars=told)

        return scaled


def test_additions_are_applied_in_order() -> None:
    given = materials()
    both = with_additions(DenoisingLoss(), [Scale(name="a"), Scale(name="b")], given)
    out = both(NetDenoiser(Little(channels=3), EDM()), *crops(SECOND))
    assert {name: value.item() for name, value in out.scalars.items()} == {"a": 0, "b": 1}
    assert [name for name, _ in given.learned.named_parameters()] == ["a.weight", "b.weight"]


class Watching:
    """An objective that notes what it is told after each update."""

    def __init__(self, objective: Objective):
        self.objective = objective
        self.told: list[float] = []

    def __call__(self, denoiser: Denoiser, batch: Batch, draws: Draws) -> LossOut:
        return self.objective(denoiser, batch, draws)

    def after_step(self, applied: Tensor) -> None:
        self.told.append(float(applied))


@dataclass(frozen=True, kw_only=True)
class Watch(Addition):
    """The objective, watching."""

    neutral: bool = False

    def add(self, objective: Objective, materials: Materials) -> Objective:
        return objective if self.neutral else Watching(objective)


def test_every_stage_is_told_of_each_update_once(images: Path, tmp_path: Path) -> None:
    additions = (Watch(), Watch(neutral=True), Watch())
    training = tiny.training(tiny.config(images, additions=additions), tmp_path / "run")
    loop.one_step(training)
    assert isinstance(training.objective, Stages)
    plain, inner, outer = training.objective.stages
    assert isinstance(outer, Watching) and outer.objective is inner
    assert isinstance(inner, Watching) and inner.objective is plain
    assert outer.told == inner.told == [1.0]


@pytest.fixture
def scale() -> Iterator[type[Scale]]:
    families.add(AdditionUnion, Scale)
    yield Scale
    families.remove(AdditionUnion, Scale)


def learned_of(folder: Path) -> dict[str, Tensor]:
    return load_file(max((folder / "checkpoints").iterdir()) / "objective.safetensors")


def test_what_an_addition_learns_is_saved_and_goes_on(
    scale: type[Scale], images: Path, tmp_path: Path
) -> None:
    objective = DenoisingConfig(log_variance=4)
    config = tiny.config(images, objective=objective, additions=(scale(), ContrastConfig()))
    config = replace(config, batch=8, images=30.0)
    straight = tiny.run(config, tmp_path / "straight")
    folder = tiny.run(config, tmp_path / "run", max_hours=1e-9)
    tiny.run(config, folder)
    found, expected = learned_of(folder), learned_of(straight)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert found["scale.weight"].item() != 1 and "log_variance.weight/step" in found
    # Without it, what is left of the objective goes on.
    fewer = replace(config, additions=(), images=36.0)
    tiny.run(fewer, folder, allow_config_change=True)
    found = learned_of(folder)
    assert "scale.weight" not in found
    assert found["log_variance.weight/step"] > expected["log_variance.weight/step"]
