"""The texts of `sample`: typed as words of a flag, or lines of a file."""

from collections.abc import Sequence
from pathlib import Path

from patchdiffusion.system.files import expanded


def prompts_of(prompt: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """Texts of `--prompt`, or the lines of the file of `--prompts` that are not empty.

    Raises `ValueError` in one line for both, a file that cannot be read and one without texts.
    """
    if file is None:
        return tuple(prompt)
    if prompt:
        raise ValueError("--prompt and --prompts exclude each other: give texts or a file of them")
    try:
        content = expanded(file).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"--prompts {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {file} is not text in UTF-8 (byte {error.start})") from error
    lines = tuple(line.strip() for line in content.splitlines() if line.strip())
    if not lines:
        raise ValueError(f"--prompts {file} has no texts; write one on each line")
    return lines
