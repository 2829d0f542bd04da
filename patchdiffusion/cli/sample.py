"""patchdiffusion sample RUN [options]"""

import contextlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from patchdiffusion.accel.base import Spent
from patchdiffusion.adapted import digest_of
from patchdiffusion.cli.claimed import check_out, claimed, resumable
from patchdiffusion.cli.drawn import Drawn, batches, check_space
from patchdiffusion.cli.flags import flat, positional, read
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_run, home
from patchdiffusion.cli.prompts import prompts_of
from patchdiffusion.cond import Cond
from patchdiffusion.nets.base import Weights
from patchdiffusion.patches import Size, size_name
from patchdiffusion.sampling.canvas import CanvasRegion
from patchdiffusion.sampling.pipeline import Pipeline, SamplerConfig, load
from patchdiffusion.system.device import use_threads
from patchdiffusion.system.dist import LONGEST_WORK, Team, join
from patchdiffusion.system.files import read_json
from patchdiffusion.system.progress import progress_bar
from patchdiffusion.system.text import counted, share

MEETING = 2.0
"""Minutes to wait for the other processes at the start."""


@dataclass(frozen=True, kw_only=True)
class SampleArguments:
    """Sample images from a run, also while it trains, or from a model, also on the hub.

    Seeds are SEED, SEED + 1, ...; the same seed gives the same image for any batch size. Files are
    written to a new folder, batch by batch, with their seed and the digest of the model; the same
    command resumes one that was interrupted. Also under torchrun.
    """

    example: ClassVar[str] = "patchdiffusion sample runs/photos --count 25"
    common: ClassVar[str] = (
        "count seed classes prompt negative steps solver guidance canvas weights out singles batch "
        "device threads"
    )

    path: Path = field(default=Path(), metadata=positional("RUN"))
    """Folder of a run or model, or user/name on the hub."""
    count: int = 16
    """Number of images."""
    seed: int = 0
    """Seed of the first image."""
    classes: tuple[str, ...] = ()
    """Names or numbers of classes, used in turn; none for all in turn, -1 for no class."""
    prompt: tuple[str, ...] = ()
    """Texts for a model that was trained on captions, used in turn; none or "" is no text."""
    prompts: Path | None = None
    """File of texts, one on each line, instead of --prompt."""
    negative: str | None = None
    """Text to lead away from, by --guidance cfg."""
    adapter: tuple[str, ...] = ()
    """Adapters that change the model, with a strength if it is not 1: runs/new, or runs/new:0.7."""
    control: tuple[str, ...] = ()
    """Branches that pictures control, with a strength if it is not 1: runs/edges, or
    runs/edges:0.7."""
    image: tuple[str, ...] = ()
    """Pictures for the branches, used in turn: they see the edges, or whatever their map is."""
    map: tuple[str, ...] = ()
    """Maps themselves instead of --image, of the size of the samples; one for each branch."""
    condition: str = ""
    """Map of a branch that has several, such as edges; the default is its first."""
    instruction: str = ""
    """Text about the map instead of --condition, for a map that the branch was not trained on."""
    weights: Weights = "averaged"
    """averaged: moving average of the weights; raw: weights as trained."""
    out: Path | None = None
    """Folder for the files; the default is generated/0001, 0002, ... in the folder of the run."""
    singles: bool = True
    """Also write one file per image: PNG, animated for clips, or TIFF for floats of one channel."""
    batch: int = 64
    """Batch size: number of images per evaluation of the network."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to sample on; auto is CUDA if available."""
    threads: int | None = None
    """CPU threads of each process; None leaves it to PyTorch (one per core)."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the network."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig, metadata=flat("sampler"))


def main(arguments: Sequence[str]) -> None:
    """Sample images, and write single files batch by batch and a grid at the end."""
    options = _with_texts(parse(SampleArguments(), arguments, "sample", _classes_of(arguments)))
    path = options.path
    check_run(path)
    check_out(options.out)
    use_threads(options.threads)
    with join(MEETING) as team:  # which gives each process a device of its own
        team.patience(LONGEST_WORK)
        pipeline = load(
            path,
            weights=options.weights,
            device=options.device,
            precision=options.precision,
            adapters=(*options.adapter, *options.control),
        )
        team.agree("the processes disagree", {"model": pipeline.model.digest}, code=2)
        batch = min(options.batch, options.count)
        size = pipeline.check(options.count, seed=options.seed, batch=batch, config=options.sampler)
        pipeline.labels(
            1, options.classes or None, config=options.sampler
        )  # raises for unknown classes
        pipeline.filled(Cond(), 1, options.seed, options.prompt or None)  # and for texts
        cond = _condition(options, pipeline)
        root = home(path) / "generated"
        if team.is_main:
            _warn_of_size(size, pipeline.model.config.canvas)
            _warn_of_outside(options.sampler, pipeline.model.config.canvas)
        with contextlib.ExitStack() as held:

            def claim() -> str:
                check_space(options.out or root, _bytes(options, pipeline, size))
                return str(
                    held.enter_context(
                        claimed(root, options.out, _request(options, pipeline, cond))
                    )
                )

            drawn = _drawn(Path(team.on_main(claim)), options, pipeline, size)
            spent = _draw(drawn, options, pipeline, team, cond)
            if team.is_main:
                drawn.finish()
                if spent.evaluations:
                    print(f"computed  {spent}" + (f", {spent.summary}" if spent.steps else ""))
                if drawn.preview:
                    print(f"pictures show the channels {drawn.preview}")
                print(f"{counted(options.count, 'image')} in {drawn.folder}")


def _draw(
    drawn: Drawn, options: SampleArguments, pipeline: Pipeline, team: Team, cond: Cond
) -> Spent:
    """Draw the missing images; each process takes every `team.size`-th batch, or a part of each.

    Returns the operations of all processes, as far as they are counted.
    """
    missing = team.on_main(drawn.missing)
    together = options.sampler.splits
    own = Team() if together else team  # the processes that have batches of their own
    size = min(options.batch, -(-len(missing) // own.size) or 1)
    parts = batches(missing, size)
    names = pipeline.labeled(options.sampler).classes
    done, steps = options.count - len(missing), pipeline.sampler(options.sampler).count
    if done and team.is_main:
        print(f"resume    {_written(drawn)}")
    counted: list[Spent] = []
    with progress_bar(options.count, "image", disable=not team.is_main) as bar:

        def watch(step: int) -> None:
            bar.set_postfix_str(f"step {step} of {steps}", refresh=False)
            bar.update(0)

        bar.update(done)
        with resumable(lambda: _written(drawn)):
            for turn in range(0, len(parts), own.size):
                for part in parts[turn : turn + own.size][own.place.rank :][:1]:
                    labels = pipeline.labels(
                        len(part), options.classes or None, part.start, config=options.sampler
                    )
                    images = pipeline.sample(
                        len(part),
                        seed=options.seed + part.start,
                        cond=replace(cond.take(slice(part.start, part.stop)), labels=labels),
                        prompts=drawn.prompts_of(part),
                        config=options.sampler,
                        batch=len(part),
                        watch=watch,
                        spent=counted.append,
                    )
                    if team.is_main or not together:
                        drawn.add(part.start, images, _names(labels, names))
                team.gather(turn)
                bar.update(sum(map(len, parts[turn : turn + own.size])))
    return sum(team.gather(sum(counted, Spent())), Spent())


def _condition(options: SampleArguments, pipeline: Pipeline) -> Cond:
    """Condition of all samples by the pictures for branches; empty for a model without any."""
    if not (options.image or options.map):
        if pipeline.model.network.controls:
            raise ValueError(
                "the model has a branch that is controlled by pictures: give some by --image FILE, "
                "or maps by --map FILE"
            )
        return Cond()
    return pipeline.controlled(
        options.count,
        options.image,
        maps=options.map,
        condition=options.condition,
        instruction=options.instruction,
        config=options.sampler,
    )


def _with_texts(options: SampleArguments) -> SampleArguments:
    """Arguments with all texts in `prompt`, and the negative one in the guidance."""
    return replace(
        options,
        prompt=prompts_of(options.prompt, options.prompts),
        sampler=options.sampler.but(negative=options.negative),
    )


def _written(drawn: Drawn) -> str:
    written = drawn.count - len(drawn.missing())
    return f"{share(written, drawn.count, 'image', 'is', 'are')} in {drawn.folder}"


def _names(labels: Tensor | None, names: Sequence[str]) -> list[str]:
    """Name of the class of each image, or its number."""
    numbers: list[int] = [] if labels is None else labels.tolist()
    return [names[label] if 0 <= label < len(names) else str(label) for label in numbers]


def _warn_of_size(size: Size, canvas: Size) -> None:
    times = math.prod(size) / math.prod(canvas)
    if times > 4:
        print(
            f"warning: {size_name(size)} is {times:.0f} times the pixels of training "
            f"({size_name(canvas)}), and takes at least that much more time",
            file=sys.stderr,
        )


def _warn_of_outside(sampler: SamplerConfig, canvas: Size) -> None:
    if not isinstance(sampler.canvas, CanvasRegion):
        return
    size, corner = sampler.canvas.place(canvas)
    if any(c < 0 or c + s > side for c, s, side in zip(corner, size, canvas, strict=True)):
        print(
            f"warning: {size_name(size)} from {corner} reaches beyond the canvas of training, "
            f"{size_name(canvas)}: what is outside is extrapolated; for larger images there is "
            "--canvas tiles",
            file=sys.stderr,
        )


def _bytes(options: SampleArguments, pipeline: Pipeline, size: Size) -> int:
    """Approximate disk space of the images."""
    model = pipeline.model.config
    values = options.count * math.prod(model.space.shape_of(size, model.network.channels))
    return values * (1 if model.space.pictured.word == "pixels" else 8)


def _request(options: SampleArguments, pipeline: Pipeline, cond: Cond) -> dict[str, Any]:
    """Settings on which the images depend; a folder with equal ones is resumed."""
    tensors = {"control": cond.control, "instruction": cond.instruction}
    control = {name: x for name, x in tensors.items() if x is not None}
    return {
        **pipeline.texts(options.sampler),
        "count": options.count,
        "seed": options.seed,
        "classes": list(options.classes),
        **({"prompts": list(options.prompt)} if options.prompt else {}),
        "singles": options.singles,
        "precision": options.precision,
        **({"control": digest_of(control)} if control else {}),
    }


def _drawn(folder: Path, options: SampleArguments, pipeline: Pipeline, size: Size) -> Drawn:
    config = pipeline.model.config
    return Drawn(
        folder,
        count=options.count,
        seed=options.seed,
        texts=pipeline.texts(options.sampler),
        prompts=options.prompt,
        singles=options.singles,
        shape=config.space.shape_of(size, config.network.channels),
        space=config.space,
    )


def _classes_of(arguments: Sequence[str]) -> str:
    """Classes of the run named by the arguments, for the help."""
    words, _ = read(arguments)
    files = [Path(word) / name for word in words for name in ("model/config.json", "config.json")]
    for file in files:
        facts = read_json(file) if file.is_file() else {}
        classes = facts.get("classes") if isinstance(facts, dict) else None
        if classes and isinstance(classes, list):
            return f"; classes of {words[0]} are {', '.join(map(str, classes))}"
    return ""
