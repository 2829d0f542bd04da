"""One self-contained page about a run: curves, grids, configuration. Also while it runs."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

from patchdiffusion.files import read_json, write_bytes

Record = dict[str, Any]
