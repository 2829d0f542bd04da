"""Little images with captions, runs on them, and a frozen encoder that needs no package."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import tiny
import torch
from encoders import look_alike, write_look_alike
from PIL import Image

from patchdiffusion import TrainConfig
from patchdiffusion.conditioners import ConditionerUnion
from patchdiffusion.conditioners.captions import CaptionBytes
from patchdiffusion.conditioners.encoded import CaptionTokens
from patchdiffusion.encoders.text import TextEncoder, folder_of
from patchdiffusion.nets.text import ByteText
from patchdiffusion.system import families

FEW = ("--count", 3, "--steps", 2)
SHORT = "--clock steps --images 3 --batch 4 --preview.samples 1 --preview.grid 2 --threads 1"
SHORT += " --preview.sample-steps 1 --preview.held-out 2 --preview.status 1000000"
SHORT += " --network.base 4 --network.mult 1 2 --network.blocks 1 --network.attention 1"
TEXTS = ("a red letter A", "a blue letter B", "blurry", "", "a red B")


def write_captioned(folder: Path, count: int = 40, texts: tuple[str, ...] = TEXTS) -> Path:
    """PNG files in two class folders, with a text file beside each that has a text."""
    tiny.write_images(folder, count)
    for number, file in enumerate(sorted(folder.rglob("*.png"), key=lambda file: file.name)):
        if text := texts[number % len(texts)]:
            file.with_suffix(".txt").write_text(text)
    return folder


def with_bytes(config: TrainConfig, length: int = 16) -> TrainConfig:
    """The configuration with a text encoder inside its network."""
    network = replace(config.network, attention=(1,), text=ByteText(width=8, depth=1, heads=2))  # pyright: ignore[reportCallIssue]
    return replace(config, network=network, conditioners=(CaptionBytes(length=length),))


@dataclass(frozen=True, kw_only=True)
class WordTokens(CaptionTokens):
    """A frozen encoder of words, in a folder with a table."""

    word: ClassVar[str] = "word-tokens"

    length: int = 6
    opened: ClassVar[list[str]] = []
    """Devices on which it was opened."""

    def facts(self) -> tuple[str, int, int]:
        if not (Path(self.path) / "table.json").exists():
            folder_of(self.path)  # raises
        return look_alike(Path(self.path), length=self.length).digest, 5, 64

    def open(self, device: torch.device | str) -> TextEncoder:
        self.opened.append(str(device))
        return look_alike(Path(self.path), length=self.length)


def with_words(config: TrainConfig, folder: Path) -> TrainConfig:
    """The configuration with a frozen encoder."""
    write_look_alike(folder)
    network = replace(config.network, attention=(1,), context=5)  # pyright: ignore[reportCallIssue]
    return replace(config, network=network, conditioners=(WordTokens(path=str(folder)),))


@pytest.fixture(autouse=True, scope="module")
def joined() -> Iterator[None]:
    """The encoder that needs no package is a member during these tests alone."""
    families.add(ConditionerUnion, WordTokens)
    yield
    families.remove(ConditionerUnion, WordTokens)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images with captions; do not change it."""
    return write_captioned(tmp_path_factory.mktemp("captioned") / "images")


def caption_of(file: Path, entry: str = "prompt") -> str | None:
    """The text entry of a picture."""
    with Image.open(file) as image:
        return image.text.get(entry)  # pyright: ignore[reportAttributeAccessIssue]
