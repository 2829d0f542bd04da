"""Estimated duration of an evaluation, from timing a few images of each kind."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from patchdiffusion.metrics.compare import multiply_adds
from patchdiffusion.metrics.evaluate import Evaluation
from patchdiffusion.sampling.pipeline import Pipeline

FEATURES = 8
LOSSES = 16
"""Images that are timed; of samples a whole batch."""


def time_each(work: Callable[[int], object], count: int) -> float:
    """Seconds for each image: `work` is called with `count` of them, twice, and timed once."""
    work(count)  # prepares kernels and buffers, which are of this size
    start = time.perf_counter()
    work(count)
    return (time.perf_counter() - start) / count


def estimate(
    evaluation: Evaluation,
    pipeline: Pipeline | None,
    samples: int,
    kept: Mapping[str, int],
) -> float:
    """Estimated duration in seconds of an evaluation on all of its processes.

    `kept` has the numbers of losses, samples and real images that need not be measured again.
    """
    seconds, unshared, left = 0.0, 0.0, max(samples - kept["samples"], 0)
    if evaluation.extract is not None:
        pack, reference = evaluation.pack, evaluation.reference
        count = min(FEATURES, len(pack))
        features, images = reference.features, pack.pictures
        each = time_each(lambda n: features(images[:n], 0, pack.space), count)
        seconds += each * (left + max(reference.uncached - kept["real images"], 0))
        dims = features(images[:1], 0, pack.space).shape[1]
        unshared = _seconds_of(multiply_adds(len(reference), samples, dims))
    if pipeline is not None:
        losses = evaluation.loss_images(pipeline)
        if len(losses):
            seconds += max(len(losses) - kept["losses"], 0) * time_each(
                lambda n: evaluation.losses(pipeline, losses, range(n)), min(LOSSES, len(losses))
            )
        if evaluation.draws(pipeline):
            seconds += left * _seconds_of_sample(evaluation, pipeline)
    return seconds / evaluation.team.size + unshared


def _seconds_of_sample(evaluation: Evaluation, pipeline: Pipeline) -> float:
    config, labels = evaluation.config, evaluation.labels(pipeline)
    sampler = pipeline.sampler(config.sampler)
    # Two steps: the first evaluation, of noise alone, is faster than those that follow.
    short = replace(
        config.sampler,
        steps=min(2, sampler.count),
        guidance=config.sampler.guidance.everywhere(),
    )

    def draw(count: int) -> object:
        classes = None if labels is None else labels[:count]
        return pipeline.sample(count, classes=classes, config=short, batch=config.batch)

    share = sampler.evaluations / pipeline.sampler(short).evaluations
    return share * time_each(draw, min(config.batch, config.samples))


def _seconds_of(multiply_adds: float) -> float:
    """Seconds for so many multiply-adds in float64, which every process does by itself."""
    side = 512
    square = torch.ones(side, side, dtype=torch.float64)
    each = time_each(lambda n: [square @ square for _ in range(n)], 3)
    return each * multiply_adds / side**3
