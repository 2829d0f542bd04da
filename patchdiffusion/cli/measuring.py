"""Measuring for `evaluate`, which goes on where an earlier command was interrupted."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from patchdiffusion.apps.likelihood import LikelihoodConfig, estimated_seconds, held_out_bits
from patchdiffusion.cli.claimed import PARTS, claimed, discard, resumable
from patchdiffusion.cli.flags import flat
from patchdiffusion.data.pack import Pack
from patchdiffusion.data.source import UNFINISHED
from patchdiffusion.metrics.estimate import estimate
from patchdiffusion.metrics.evaluate import Evaluation
from patchdiffusion.sampling.pipeline import Pipeline
from patchdiffusion.system.parts import Parts
from patchdiffusion.system.progress import progress_bar
from patchdiffusion.system.serialize import encode
from patchdiffusion.system.text import counted
from patchdiffusion.train.log import duration

_KINDS = {
    "losses": ("losses",),
    "likelihoods": ("likelihoods",),
    "real images": ("real",),
    "samples": ("samples/features", "samples/images", "samples/copies", "samples/seams"),
}
"""Results that are kept of an evaluation, and the folders of their parts."""


@dataclass(frozen=True, kw_only=True)
class BitsArguments:
    """Likelihood of held-out images."""

    images: int = 0
    """Largest number of held-out images for bits per dimension; 0 measures none."""
    equation: LikelihoodConfig = field(default_factory=LikelihoodConfig, metadata=flat("bits"))

    def __post_init__(self) -> None:
        if self.images < 0:
            raise ValueError(f"bits.images must be at least 0, not {self.images}")


@dataclass(frozen=True)
class Measuring:
    """An evaluation with all that it depends on."""

    evaluation: Evaluation
    pipeline: Pipeline | None
    images: Pack | None
    """Images that are measured instead of samples of a model."""
    name: str
    """Path of these images."""
    bits: BitsArguments

    def outlook(self, kept: Mapping[str, int]) -> str:
        """Estimate of the time of an evaluation, with its parts, without the results `kept`."""
        evaluation, pipeline, bits = self.evaluation, self.pipeline, self.bits
        count = evaluation.config.samples if self.images is None else len(self.images)
        seconds, parts = estimate(evaluation, pipeline, count, kept), []
        if pipeline is not None:
            parts += [(len(evaluation.loss_images(pipeline)), "losses")]
            count = count if evaluation.draws(pipeline) else 0
            if bits.images:
                pack, batch = evaluation.pack, evaluation.config.batch
                number = len(pack.some_held_out(bits.images))
                parts += [(number, "likelihoods")]
                seconds += (
                    estimated_seconds(
                        pipeline, pack, bits.equation, images=bits.images, batch=batch
                    )
                    * (1 - kept["likelihoods"] / max(number, 1))
                    / evaluation.team.size
                )
        parts += [(count, "samples" if self.images is None else "images")]
        if evaluation.extract is not None:
            parts += [(len(evaluation.reference), "real images")]
        left = [
            (number - kept["samples" if name == "images" else name], name) for number, name in parts
        ]
        return f"this will take about {duration(seconds)}: {_listed(left) or 'all is measured'}"

    def run(self, root: Path, write: Callable[[dict[str, Any]], None]) -> None:
        """Measure, `write` the result on rank 0, and delete what was kept in `root` until then."""
        team = self.evaluation.team
        with contextlib.ExitStack() as held:

            def claim() -> str:
                return str(held.enter_context(claimed(root, None, self._request())))

            folder = Path(team.on_main(claim))
            if team.is_main:
                _report(folder)
            with resumable(lambda: _done(folder)):
                if team.is_main:
                    print(self.outlook(_counts(folder)))
                result = self._measured(Parts(folder / PARTS, self._check_sizes))
            if team.is_main:
                write(result)
                discard(folder)

    @property
    def _packs(self) -> tuple[Pack | None, ...]:
        return self.evaluation.pack, self.evaluation.compared, self.images

    def _check_sizes(self) -> None:
        for pack in self._packs:
            if pack is not None:
                pack.check_sizes()

    def _request(self) -> dict[str, Any]:
        """Everything that the numbers depend on; the parts of an equal one are used."""
        evaluation, pipeline = self.evaluation, self.pipeline
        card = evaluation.card(pipeline)
        return {
            "card": {name: value for name, value in card.items() if name != "date"},
            "config": encode(replace(evaluation.config, swept=())),
            "bits": encode(self.bits),
            "images": [pack and pack.fingerprint for pack in self._packs],
            "device": None if pipeline is None else pipeline.model.device.type,
            "processes": evaluation.team.size,
        }

    def _measured(self, kept: Parts) -> dict[str, Any]:
        measured_bits = self._bits(kept.within("likelihoods"))
        result = self._metrics(kept)
        if measured_bits is not None:
            result["bits"], result["card"]["bits"] = measured_bits
        self._check_sizes()
        if not result.keys() - {"card", "left_out"}:
            why = [f"{name}: {reason}" for name, reason in result["left_out"].items()]
            raise ValueError("; ".join(why) or "nothing is measured; choose --features.extractor")
        return result

    def _metrics(self, kept: Parts) -> dict[str, Any]:
        evaluation, pipeline, images = self.evaluation, self.pipeline, self.images
        total = 0 if evaluation.extract is None else evaluation.reference.uncached
        if pipeline is not None:
            total += len(evaluation.loss_images(pipeline))
            total += evaluation.config.samples if evaluation.draws(pipeline) else 0
        total += 0 if images is None else len(images)
        team = evaluation.team
        with progress_bar(total // team.size, "image", disable=not team.is_main) as bar:
            watched = replace(evaluation, progress=bar.update, kept=kept)
            if pipeline is not None:
                return watched.of_model(pipeline)
            assert images is not None
            return watched.of_images(images.images, self.name)

    def _bits(self, kept: Parts) -> tuple[dict[str, Any], dict[str, Any]] | None:
        pack, team, bits = self.evaluation.pack, self.evaluation.team, self.bits
        if self.pipeline is None or not bits.images:
            return None
        count = len(pack.some_held_out(bits.images)) // team.size
        with progress_bar(count, "image", name="likelihood", disable=not team.is_main) as bar:
            return held_out_bits(
                self.pipeline,
                pack,
                bits.equation,
                images=bits.images,
                batch=self.evaluation.config.batch,
                team=team,
                progress=bar.update,
                kept=kept,
            )


def _report(folder: Path) -> None:
    """Say what is used again, and what other evaluations have left."""
    if any((folder / PARTS).rglob("*.npy")):
        print(f"resume    {_done(folder)}")
    others = [mark.parent.name for mark in folder.parent.glob(f"*/{UNFINISHED}")]
    others = sorted(name for name in others if name != folder.name)
    if others:
        print(
            f"note: {folder.parent} holds unfinished evaluations of another model or with other "
            f"settings ({', '.join(others)}); their commands resume them, or delete them",
            file=sys.stderr,
        )


def _done(folder: Path) -> str:
    """Numbers of results in the folder of an unfinished evaluation."""
    listed = _listed((number, kind) for kind, number in _counts(folder).items())
    return f"{listed} are in {folder}" if listed else "nothing is measured yet"


def _counts(folder: Path) -> dict[str, int]:
    """Number of results of each kind in the folder of an unfinished evaluation."""
    parts, counts = Parts(folder / PARTS), {}
    for kind, names in _KINDS.items():
        written = (part for name in names for part in parts.within(name).written())
        counts[kind] = len({number for numbers, _ in written for number in numbers})
    return counts


def _listed(counts: Iterable[tuple[int, str]]) -> str:
    """Numbers with their nouns: 2 losses, 1 likelihood."""
    singular = {"losses": "loss"}
    return ", ".join(
        counted(number, singular.get(name, name.removesuffix("s")), name)
        for number, name in counts
        if number > 0
    )
