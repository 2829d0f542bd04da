"""Archives written by tests."""

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def tar(path: Path, files: Mapping[str, bytes], **form: Any) -> Path:
    """Write an archive."""
    with tarfile.open(path, "w", **form) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
