"""Transformers in parts: blocks around others, and an encoder before a decoder; see `cuts`."""

from typing import Protocol

from torch import Tensor

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.nets.cuts import Cut, Kept, Passage, within
from patchdiffusion.nets.tokens import Tokens


class Blocks(Protocol):
    """A transformer, as a row of blocks between tokens and the image."""

    def run(
        self,
        tokens: Tokens,
        cond: Cond,
        first: int = 0,
        last: int | None = None,
        *,
        tape: Tape | None = None,
    ) -> Tokens: ...

    def finish(self, tokens: Tokens) -> Tensor: ...


def cut_of(depth: int, stage: range, first: int | None, last: int | None) -> Cut:
    """A cut of so many blocks; `stage` are those of a stage of fewer tokens, if there is one.

    Raises `ValueError` for numbers of blocks that leave no inner part, or part the stage.
    """
    if depth < 2:
        raise ValueError("this transformer has a single block, of which nothing can be kept")
    usual = max(1, depth // 4)
    if first is None and last is None and stage:
        first, last = min(usual, stage.start), min(usual, depth - stage.stop)
    if first is None:
        first = max(1, min(usual, depth - 1 - (last or 0)))
    first = within("first", first, 1, depth - 1, f"of {depth} blocks")
    if last is None:
        last = min(usual, depth - 1 - first)
    last = within("last", last, 0, depth - 1 - first, f"of {depth} blocks")
    if not stage.start < first <= depth - last < stage.stop:
        check_stage("first and last", stage, first, depth - last)
    return Cut(first, last)


def encoder_blocks(depth: int, stage: range, blocks: int | None) -> int:
    """Blocks of the encoder, by default 9 of 14; see `Encoder.encoder_blocks`."""
    if depth < 2:
        raise ValueError("this transformer has a single block, which is no encoder and decoder")
    usual = min(max(1, round(depth * 9 / 14)), depth - 1)
    if stage.start < usual < stage.stop:
        usual = stage.stop if stage.stop < depth else stage.start
    blocks = within("blocks", usual if blocks is None else blocks, 1, depth - 1, "blocks")
    check_stage("blocks", stage, blocks, depth)
    return blocks


def check_stage(name: str, stage: range, first: int, end: int) -> None:
    """Raise `ValueError` if the blocks first ... end - 1 are only a part of a stage."""
    if not stage or end <= stage.start or first >= stage.stop:
        return
    if not first <= stage.start < stage.stop <= end:
        raise ValueError(
            f"{name} must not part the blocks {stage.start} to {stage.stop - 1}, a stage of fewer "
            f"tokens, by a cut before block {first if first > stage.start else end}"
        )


def passage(
    network: Blocks, start: Tokens, cond: Cond, cut: tuple[int, int], tape: Tape | None
) -> Passage:
    """The pass of tokens, whose inner part are the blocks cut[0] ... cut[1] - 1.

    The signal is what the first blocks add to the tokens. What is kept is the sum of what the inner
    blocks add to tokens and registers, and the summary of features that they make.
    """
    first, end = cut
    tokens = network.run(start, cond, 0, first, tape=tape)

    def finished(deep: Tokens) -> Tensor:
        return network.finish(network.run(deep, cond, end, tape=tape))

    def full() -> tuple[Tensor, Kept]:
        deep = network.run(tokens, cond, first, end, tape=tape)
        added = [deep.h - tokens.h]
        if deep.registers is not None and tokens.registers is not None:
            added.append(deep.registers - tokens.registers)
        if tokens.summary is None and deep.summary is not None:
            added.append(deep.summary)
        return finished(deep), tuple(added)

    def reuse(kept: Kept) -> Tensor:
        registers, summary = tokens.registers, tokens.summary
        if registers is not None:
            registers = registers + kept[1]
        if len(kept) > 1 + (registers is not None):
            summary = kept[-1]
        deep = tokens._replace(h=tokens.h + kept[0], registers=registers, summary=summary)
        return finished(deep)

    alike = tokens.h.shape == start.h.shape  # not within a stage of half resolution
    return Passage(tokens.h - start.h if alike else tokens.h, full, reuse)
