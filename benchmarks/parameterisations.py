"""Print the tables of docs/parameterisations.md, from formulas that a test evaluates.

    python benchmarks/parameterisations.py

The formulas are Python in the symbols of the page. They are written from the papers, independent of
the code of the library, with which the test compares each of them.
"""

SOURCES = {"x0": "x0", "eps": "eps", "S": "score", "v": "v", "u": "velocity"}
"""Symbol in the formulas and name in `convert`."""

CONVERSIONS: dict[str, dict[str, str]] = {
    "x0": {
        "eps": "(z - a * x0) / s",
        "S": "-(z - a * x0) / s**2",
        "v": "(a * z - (a**2 + s**2) * x0) / s",
        "u": "(s_ / s) * z + (a_ - a * s_ / s) * x0",
    },
    "eps": {
        "x0": "(z - s * eps) / a",
        "S": "-eps / s",
        "v": "((a**2 + s**2) * eps - s * z) / a",
        "u": "(a_ / a) * z + (W / a) * eps",
    },
    "S": {
        "x0": "(z + s**2 * S) / a",
        "eps": "-s * S",
        "v": "-s * (z + (a**2 + s**2) * S) / a",
        "u": "(a_ / a) * z - (s * W / a) * S",
    },
    "v": {
        "x0": "(a * z - s * v) / (a**2 + s**2)",
        "eps": "(s * z + a * v) / (a**2 + s**2)",
        "S": "-(s * z + a * v) / (s * (a**2 + s**2))",
        "u": "((a * a_ + s * s_) * z + W * v) / (a**2 + s**2)",
    },
    "u": {
        "x0": "(s_ * z - s * u) / W",
        "eps": "(a * u - a_ * z) / W",
        "S": "(a_ * z - a * u) / (s * W)",
        "v": "((a**2 + s**2) * u - (a * a_ + s * s_) * z) / W",
    },
}
"""Conversions between predictions at z = a x0 + s eps; a_ and s_ are time derivatives."""

# Word, c_skip, c_out, c_in, c_noise, weight on |D - x0|^2 and density of sigma up to a factor.
BASES: dict[str, tuple[str, str, str, str, str, str]] = {
    "edm": (
        "d**2 / (sigma**2 + d**2)",
        "sigma * d / sqrt(sigma**2 + d**2)",
        "1 / sqrt(sigma**2 + d**2)",
        "log(sigma) / 4",
        "(sigma**2 + d**2) / (sigma * d)**2",
        "normal(log(sigma), -1.2, 1.2) / sigma",
    ),
    "eps": (
        "1",
        "-sigma",
        "1 / sqrt(1 + sigma**2)",
        "999 * t",
        "1 / sigma**2",
        "sigma / ((1 + sigma**2) * (0.1 + 19.9 * t))",
    ),
    "ddpm": ("1", "-sigma", "1 / sqrt(1 + sigma**2)", "i", "1 / sigma**2", "discrete"),
    "betas": ("1", "-sigma", "1 / sqrt(1 + sigma**2)", "i", "1 / sigma**2", "discrete"),
    "v": (
        "1 / (1 + sigma**2)",
        "-sigma / sqrt(1 + sigma**2)",
        "1 / sqrt(1 + sigma**2)",
        "999 * t",
        "(1 + sigma**2) / sigma**2",
        "1 / (1 + sigma**2)",
    ),
    "x0": (
        "0",
        "1",
        "1 / sqrt(1 + sigma**2)",
        "log(sigma) / 4",
        "min(1 / sigma**2, 5)",
        "normal(log(sigma), -1.2, 1.2) / sigma",
    ),
    "flow": (
        "1 / (1 + sigma)",
        "-sigma / (1 + sigma)",
        "1 / (1 + sigma)",
        "1000 * sigma / (1 + sigma)",
        "(1 + sigma)**2 / sigma**2",
        "1 / (1 + sigma)**2",
    ),
    "flow-x0": (
        "(1 - min(25 * sigma / (1 + sigma), 1)) / (1 + sigma)",
        "min(25 * sigma / (1 + sigma), 1)",
        "1 / (1 + sigma)",
        "1000 * sigma / (1 + sigma)",
        "min((1 + sigma)**2 / sigma**2, 400)",
        "normal(log(sigma), 0.8, 0.8) / sigma",
    ),
    "flow-asym": (
        "(1 - min(25 * sigma / (1 + sigma), 1)) / (1 + sigma)",
        "min(25 * sigma / (1 + sigma), 1)",
        "1 / (1 + sigma)",
        "1000 * sigma / (1 + sigma)",
        "min((1 + sigma)**2 / sigma**2, 400)",
        "normal(log(sigma), 0.8, 0.8) / sigma",
    ),
    "trigflow": (
        "d**2 / (sigma**2 + d**2)",
        "-sigma * d / sqrt(sigma**2 + d**2)",
        "1 / sqrt(sigma**2 + d**2)",
        "1000 * atan(sigma / d)",
        "(sigma**2 + d**2) / (sigma * d)**2",
        "normal(log(sigma), -1.2, 1.2) / sigma",
    ),
}

# Word, weight on |D - x0|^2 and description.
WEIGHTS: dict[str, tuple[str, str]] = {
    "x0": ("1", "error of the image"),
    "eps": ("1 / sigma**2", "error of eps; SNR"),
    "score": ("1 / sigma**4", "error of the score"),
    "v": ("(1 + sigma**2) / sigma**2", "error of v; SNR + 1"),
    "flow": ("(1 + sigma)**2 / sigma**2", "error of the velocity on the straight path"),
    "edm": ("(sigma**2 + d**2) / (sigma * d)**2", "EDM"),
    "min-snr": ("min(1 / sigma**2, gamma)", "arXiv 2303.09556, gamma = 5"),
    "soft-min-snr": ("1 / (sigma**2 + 1 / gamma)", "arXiv 2401.11605, gamma = 4"),
    "p2": ("1 / (sigma**2 * (k + 1 / sigma**2)**gamma)", "arXiv 2204.00227, k = 1, gamma = 1"),
}


def shown(formula: str) -> str:
    """Formula as code in Markdown."""
    text = formula.replace("a_", "a'").replace("s_", "s'").replace("**", "^").replace(" * ", " ")
    return f"`{text}`"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables() -> list[str]:
    """All computed tables of the page."""
    converted = [
        [shown(source), *(shown(row[target]) if target in row else "-" for target in SOURCES)]
        for source, row in CONVERSIONS.items()
    ]
    bases = [[f"`{word}`", *map(shown, row)] for word, row in BASES.items()]
    weights = [[f"`{word}`", shown(formula), text] for word, (formula, text) in WEIGHTS.items()]
    columns = ["word", "c_skip", "c_out", "c_in", "c_noise", "loss weight", "density of sigma"]
    return [
        table(["from \\ to", *map(shown, SOURCES)], converted),
        table(columns, bases),
        table(["word", "weight", "description"], weights),
    ]


if __name__ == "__main__":
    print("\n\n".join(tables()))
