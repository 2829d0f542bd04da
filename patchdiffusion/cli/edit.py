"""patchdiffusion edit inpaint|outpaint|local|change RUN IMAGE, edit translate A B IMAGE"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from patchdiffusion.apps import cycle, edit
from patchdiffusion.cli.flags import positional
from patchdiffusion.cli.parse import parse
from patchdiffusion.cli.places import check_run, home
from patchdiffusion.cli.remade import Remade, RemakingArguments, for_each, pictures_of, remaking
from patchdiffusion.cli.words import did_you_mean
from patchdiffusion.sampling.inpaint import known_pixels
from patchdiffusion.sampling.pictures import read_picture
from patchdiffusion.sampling.pipeline import Pipeline

Kind = Literal["inpaint", "outpaint", "local", "change", "translate"]


@dataclass(frozen=True, kw_only=True)
class EditArguments(RemakingArguments):
    """Make parts of images anew, continue them beyond their borders, vary or change them.

    inpaint: what a mask leaves white; outpaint: what surrounds an image, up to --size; local:
    samples near an image, by --strength; change: another class or text, --from CAT --to DOG, by the
    same noise; translate: what model B makes of the noise of which model A makes the image. What is
    kept comes back bit for bit. Interrupted, the same command goes on.
    """

    example: ClassVar[str] = "patchdiffusion edit local runs/photos face.png"
    common: ClassVar[str] = (
        "mask size corner strength from to by count seed classes steps out device"
    )

    subject: tuple[str, ...] = field(default=(), metadata=positional("KIND RUN IMAGE..."))
    """inpaint, outpaint, local, change or translate; the folder of a run or model, or two for
    translate; images, or folders of them."""
    mask: str | None = None
    """Picture of the size of the images: white is made anew, black is kept."""
    size: tuple[int, ...] | None = None
    """outpaint: height and width of the result, or one number for a square."""
    corner: tuple[int, ...] | None = None
    """outpaint: top and left of the image in the result; None is the middle."""
    strength: float | None = None
    """local: from 0, the image itself, to below 1, a new one; at .5 as much noise as image; None is
    .3. change, translate: the lower, the closer; None is all of the noise."""
    sigma: float | None = None
    """local, change, translate: noise level, instead of the strength."""
    from_: str | None = None
    """change, translate: class or text of the images; None is none."""
    to: str | None = None
    """change, translate: class or text that is wanted."""
    by: edit.By = "resampling"
    """inpaint, outpaint: each step several times (RePaint); replacement: once; guidance: the
    posterior of a Gaussian with the network's own covariance, slower."""


def main(arguments: Sequence[str]) -> None:
    """Edit images one after another."""
    options = parse(EditArguments(), arguments, "edit")
    kind, origin, run, words = _subject(options.subject)
    for folder in (origin, run):
        check_run(folder)
    _check(kind, options)
    files = pictures_of(words)
    pipeline = options.pipeline(run)
    source = pipeline if origin == run else options.pipeline(origin)
    names = ("mask", "size", "corner", "strength", "sigma", "from_", "to", "by")
    settings = {name: getattr(options, name) for name in names}
    settings["source"] = source.model.digest
    texts = {
        **pipeline.texts(options.sampler),
        **options.settings(),
        "edit": json.dumps({"kind": kind, **settings}),
    }
    with remaking(home(run) / "edited", options.out, texts, files, options.mask) as made:
        for_each(
            files,
            made,
            lambda file: _edit(kind, file, made, options, pipeline, source),
            lambda name: options.named(name, options.count - 1),
        )


def _subject(words: Sequence[str]) -> tuple[Kind, Path, Path, Sequence[str]]:
    """Kind of edit, the run that the images come from, the run that edits them, and images."""
    kinds = get_args(Kind)
    if not words or words[0] not in kinds:
        given = f"{words[0]!r} is no edit" if words else "what to do is missing"
        near = did_you_mean(words[0], kinds) if words else ""
        raise ValueError(
            f"{given}; allowed are {', '.join(kinds)}: patchdiffusion edit inpaint RUN IMAGE{near}"
        )
    kind: Any = words[0]
    parts = ("A", "B", "IMAGE") if kind == "translate" else ("RUN", "IMAGE")
    if missing := parts[len(words) - 1 :]:
        verb = "is" if len(missing) == 1 else "are"
        raise ValueError(
            f"{' and '.join(missing)} {verb} missing; type patchdiffusion edit {kind} "
            f"{' '.join(parts)}"
        )
    runs = [Path(word) for word in words[1 : len(parts)]]
    return kind, runs[0], runs[-1], words[len(parts) :]


def _check(kind: Kind, options: EditArguments) -> None:
    """Raise `ValueError` unless the flags belong to what is done."""
    needs = {
        "inpaint": ("mask", "--mask FILE.png"),
        "outpaint": ("size", "--size H W"),
        "change": ("to", "--to CLASS or --to TEXT"),
    }
    if kind in needs and getattr(options, needs[kind][0]) is None:
        raise ValueError(f"edit {kind} needs {needs[kind][1]}")
    changes = ("change", "translate")
    belongs: dict[str, tuple[Kind, ...]] = {
        "size": ("outpaint",),
        "corner": ("outpaint",),
        "sigma": ("local", *changes),
        "strength": ("local", *changes),
        "from_": changes,
        "to": changes,
        "mask": ("inpaint", "local"),
    }
    for name, owners in belongs.items():
        if getattr(options, name) is not None and kind not in owners:
            raise ValueError(
                f"--{name.rstrip('_')} belongs to edit {' and '.join(owners)}, not to edit {kind}"
            )
    if options.strength is not None and options.sigma is not None:
        raise ValueError("--strength and --sigma are the same: give one of them")


def _edit(
    kind: Kind,
    file: Path,
    made: Remade,
    options: EditArguments,
    pipeline: Pipeline,
    source: Pipeline,
) -> None:
    model = pipeline.model.config
    image = read_picture(str(file), model.space, model.network.channels)
    common: dict[str, Any] = {
        "count": options.count,
        "seed": options.seed,
        "classes": options.classes or None,
        "config": options.sampler,
    }
    sigma = options.sigma
    if options.strength is not None:
        sigma = edit.sigma_of(options.strength)
    known = None
    if options.mask is not None:
        known = known_pixels(options.mask, image.shape[:2]).numpy()
    if kind == "inpaint":
        assert known is not None
        images = edit.inpaint(pipeline, image, known, by=options.by, **common)
    elif kind == "outpaint":
        assert options.size is not None
        size = options.size * 2 if len(options.size) == 1 else options.size
        if len(size) != 2:
            raise ValueError(f"size must be height and width, not {options.size}")
        images = edit.outpaint(
            pipeline, image, size, corner=options.corner, by=options.by, **common
        )
    elif kind in ("change", "translate"):
        del common["classes"]
        images = cycle.change(
            pipeline,
            image,
            source=source,
            before=options.from_,
            after=options.to,
            sigma=sigma,
            **common,
        )
    else:
        sigma = edit.sigma_of(0.3) if sigma is None else sigma
        images = edit.local_sample(pipeline, image, sigma, known=known, **common)
    for number, result in enumerate(images):
        facts = {"source": file.name, "seed": str(options.seed + number)}
        made.write(options.named(file.stem, number), result, facts)
