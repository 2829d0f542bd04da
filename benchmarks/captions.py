"""Do prompts steer a model that was trained on captions? Colored letters, described in a sentence.

    python benchmarks/captions.py data letters
    patchdiffusion train ./letters --captions bytes --out runs/letters
    python benchmarks/captions.py measure runs/letters --data letters

`data` draws letters of the fonts that ship with matplotlib, with a caption such as "a small red
letter A" in a text file beside each image. Eight combinations of letter and color are left out:
nothing of the data shows them. `measure` asks for every combination, and judges the samples by a
color that is computed and a letter that a small network, trained on the images, reads; it writes
benchmarks/results/DATE-captions.json and docs/captions.png. `encoder` trains a small text encoder
of transformers on the captions, as CLIP is trained, for `train --captions FOLDER`.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from patchdiffusion import load
from patchdiffusion.system.files import write_json
from patchdiffusion.system.optional import require
from patchdiffusion.system.png import enlarge, save_png

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / f"{time.strftime('%Y-%m-%d')}-captions.json"
LETTERS = "ABCEHKTX"
COLORS = {
    "red": (230, 40, 40),
    "green": (40, 190, 60),
    "blue": (60, 90, 255),
    "yellow": (240, 220, 40),
    "pink": (250, 110, 200),
    "white": (245, 245, 245),
}
SIZES = {"small": 9, "large": 14}
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral")
SIDE = 16


def unseen(letter: str, color: str) -> bool:
    """True for the combinations that are in no image: one color of each letter."""
    return list(COLORS).index(color) == LETTERS.index(letter) % len(COLORS)


def caption(letter: str, color: str, size: str) -> str:
    return f"a {size} {color} letter {letter}"


# ---- Images ----


def drawn(letter: str, color: str, size: str, rng: np.random.Generator) -> np.ndarray:
    """A letter somewhere on a dark gray square: uint8 [SIDE, SIDE, 3]."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    scale, font = 4, FONTS[rng.integers(len(FONTS))]
    type_size = round(SIZES[size] * scale * rng.uniform(1.1, 1.4))
    face = ImageFont.truetype(str(folder / f"{font}.ttf"), type_size)
    left, top, right, bottom = face.getbbox(letter)
    room = [max(SIDE * scale - length, 0) for length in (right - left, bottom - top)]
    x, y = (rng.uniform(0.1, 0.9) * r for r in room)
    gray = int(rng.integers(0, 50))
    canvas = Image.new("RGB", (SIDE * scale, SIDE * scale), (gray, gray, gray))
    ink = tuple(int(np.clip(c + rng.integers(-12, 13), 0, 255)) for c in COLORS[color])
    ImageDraw.Draw(canvas).text((x - left, y - top), letter, fill=ink, font=face)
    return np.asarray(canvas.resize((SIDE, SIDE), Image.Resampling.BOX))


def make(folder: Path, count: int) -> None:
    """Images with a text file beside each."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        while True:
            letter, color, size = (str(rng.choice(list(x))) for x in (LETTERS, COLORS, SIZES))
            if not unseen(letter, color):
                break
        image = Image.fromarray(drawn(letter, color, size, rng))
        image.save(folder / f"{number:05d}.png")
        (folder / f"{number:05d}.txt").write_text(caption(letter, color, size))


def read(folder: Path) -> tuple[Tensor, list[str]]:
    """Images in [-1, 1], [N, 3, SIDE, SIDE], and their captions."""
    files = sorted(folder.glob("*.png"))
    images = np.stack([np.asarray(Image.open(file)) for file in files])
    return pixels(images), [file.with_suffix(".txt").read_text() for file in files]


def pixels(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


# ---- Judges ----


class Reader(nn.Sequential):
    """Tells letters and sizes apart in gray images: logits [N, letters + sizes]."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU(),
            nn.Linear(128, len(LETTERS) + len(SIZES)),
        )  # fmt: skip

    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of letter and size of each image [N, 3, SIDE, SIDE]."""
        letters, sizes = self(gray(images)).split([len(LETTERS), len(SIZES)], dim=1)
        return letters.argmax(1), sizes.argmax(1)


def gray(images: Tensor) -> Tensor:
    """The ink alone, 1 wherever it is full whatever its color: [N, 1, SIDE, SIDE]."""
    bright = images.amax(1, keepdim=True) + 1
    return (bright / bright.amax((2, 3), keepdim=True).clamp(min=1e-3)) * 2 - 1


def taught(images: Tensor, texts: list[str], steps: int = 1500) -> Reader:
    """A reader trained on nine tenths of the images."""
    words = [text.split() for text in texts]
    letters = torch.tensor([LETTERS.index(w[4]) for w in words])
    sizes = torch.tensor([list(SIZES).index(w[1]) for w in words])
    torch.manual_seed(0)
    reader, order = Reader(), torch.arange(len(images) * 9 // 10)
    optimizer = torch.optim.AdamW(reader.parameters(), 1e-3)
    for _ in range(steps):
        some = order[torch.randint(len(order), (64,))]
        letter, size = reader(gray(images[some])).split([len(LETTERS), len(SIZES)], dim=1)
        loss = F.cross_entropy(letter, letters[some]) + F.cross_entropy(size, sizes[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rest = torch.arange(len(order), len(images))
    with torch.no_grad():
        read_letters, read_sizes = reader.judge(images[rest])
    good = (
        (read_letters == letters[rest]).float().mean(),
        (read_sizes == sizes[rest]).float().mean(),
    )
    print(f"the reader is right about {good[0]:.1%} of the letters and {good[1]:.1%} of the sizes")
    return reader


def colors(images: Tensor) -> Tensor:
    """Number of the nearest color of the ink of each image: int64 [N]."""
    table = torch.tensor(list(COLORS.values())).float() / 127.5 - 1  # [K, 3]
    weight = gray(images).add(1).div(2).pow(4)
    mean = (images * weight).sum((2, 3)) / weight.sum((2, 3))
    return torch.cdist(mean, table).argmin(1)


# ---- Samples ----


def measure(run: Path, data: Path, options: argparse.Namespace) -> dict[str, object]:
    """Share of samples with the letter, color and size that was asked for."""
    images, texts = read(data)
    reader, pipeline = taught(images, texts), load(run)
    real = colors(images)
    wanted = torch.tensor([list(COLORS).index(t.split()[2]) for t in texts])
    print(f"the color is right in {(real == wanted).float().mean():.1%} of the images")
    asked = [(x, c, s) for x in LETTERS for c in COLORS for s in SIZES] * options.repeats
    result: dict[str, object] = {"prompts": len(asked), "steps": options.steps}
    for weight in options.weights:
        samples = pixels(
            pipeline.sample(
                len(asked),
                prompts=[caption(*each) for each in asked],
                guidance=weight,
                steps=options.steps,
                batch=96,
            )
        )
        with torch.no_grad():
            letters, sizes = reader.judge(samples)
        right = torch.stack(
            [
                letters == torch.tensor([LETTERS.index(x) for x, _, _ in asked]),
                colors(samples) == torch.tensor([list(COLORS).index(c) for _, c, _ in asked]),
                sizes == torch.tensor([list(SIZES).index(s) for _, _, s in asked]),
            ]
        ).float()
        new = torch.tensor([unseen(x, c) for x, c, _ in asked])
        kinds = {"seen": ~new, "unseen": new}
        names = ("letter", "color", "size")
        result[f"guidance {weight:g}"] = {
            kind: dict(
                zip(names, (round(float(v), 4) for v in right[:, where].mean(1)), strict=True)
            )
            | {"all": round(float(right[:, where].prod(0).mean()), 4)}
            for kind, where in kinds.items()
        }
        print(weight, result[f"guidance {weight:g}"])
    return result


def picture(run: Path, file: Path, options: argparse.Namespace) -> None:
    """Samples of every letter in every color, unseen combinations in a frame."""
    asked = [(x, c) for c in COLORS for x in LETTERS]
    samples = load(run).sample(
        len(asked),
        prompts=[caption(x, c, "large") for x, c in asked],
        guidance=options.weights[-1],
        steps=options.steps,
        batch=96,
    )
    tiles = []
    for (letter, color), sample in zip(asked, samples, strict=True):
        tile = np.full((SIDE + 4, SIDE + 4, 3), 255, np.uint8)
        if unseen(letter, color):
            tile[:] = (255, 140, 0)
        tile[1:-1, 1:-1] = 255
        tile[2:-2, 2:-2] = sample
        tiles.append(tile)
    rows = [
        np.concatenate(tiles[i : i + len(LETTERS)], 1) for i in range(0, len(tiles), len(LETTERS))
    ]
    save_png(file, enlarge(np.concatenate(rows)))


# ---- A small text encoder of transformers, trained as CLIP is ----


def encoder(folder: Path, data: Path, steps: int) -> None:
    """Train text and image encoder so that pairs agree (arXiv 2103.00020); keep that of texts."""
    tokenizers, transformers = (
        require(name, extra="features") for name in ("tokenizers", "transformers")
    )
    images, texts = read(data)
    words = sorted({word for text in texts for word in text.split()})
    names = {"[PAD]": 0, "[UNK]": 1, "[END]": 2} | {word: i + 3 for i, word in enumerate(words)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(names, unk_token="[UNK]"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    )
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=len(names), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    tower, eyes = transformers.CLIPTextModel(config), Reader()
    eyes[0], eyes[-1] = nn.Conv2d(3, 32, 3, padding=1), nn.Linear(128, 64)
    ids = tokenizer(texts, padding="max_length", max_length=8, return_tensors="pt")
    parameters = [*tower.parameters(), *eyes.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3)
    for step in range(steps):
        some = torch.randint(len(images), (128,))
        out = tower(input_ids=ids["input_ids"][some], attention_mask=ids["attention_mask"][some])
        mask = ids["attention_mask"][some][..., None].float()
        text = F.normalize((out.last_hidden_state * mask).sum(1) / mask.sum(1), dim=1)
        logits = 20 * text @ F.normalize(eyes(images[some]), dim=1).T
        same = torch.tensor([[texts[i] == texts[j] for j in some] for i in some]).float()
        goal = same / same.sum(1, keepdim=True)
        loss = F.cross_entropy(logits, goal) + F.cross_entropy(logits.T, goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(step, round(float(loss), 3), flush=True)
    tower.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    some = commands.add_parser("data")
    some.add_argument("folder", type=Path)
    some.add_argument("--count", type=int, default=6000)
    some = commands.add_parser("encoder")
    some.add_argument("folder", type=Path)
    some.add_argument("--data", type=Path, required=True)
    some.add_argument("--steps", type=int, default=600)
    some = commands.add_parser("measure")
    some.add_argument("run", type=Path)
    some.add_argument("--data", type=Path, required=True)
    some.add_argument("--weights", type=float, nargs="+", default=[1.0, 2.0, 3.0])
    some.add_argument("--steps", type=int, default=12)
    some.add_argument("--repeats", type=int, default=4)
    some.add_argument("--picture", type=Path, help="file of the picture; none without")
    some.add_argument("--out", type=Path, default=RESULT, help="file of the results")
    options = parser.parse_args()
    if options.command == "data":
        make(options.folder, options.count)
    elif options.command == "encoder":
        encoder(options.folder, options.data, options.steps)
    else:
        facts = json.loads(options.out.read_text()) if options.out.exists() else {}
        facts[options.run.name] = measure(options.run, options.data, options)
        write_json(options.out, facts)
        if options.picture:
            picture(options.run, options.picture, options)


if __name__ == "__main__":
    main()
