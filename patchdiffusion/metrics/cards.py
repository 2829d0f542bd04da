"""Cards of evaluations: all settings and versions that the metrics depend on."""

from datetime import date
from importlib.metadata import version
from typing import Any

import torch

from patchdiffusion.data.pack import Pack
from patchdiffusion.encoders.features import Extractor
from patchdiffusion.metrics.kernel import SUBSET, SUBSETS
from patchdiffusion.metrics.sliced import PROJECTIONS
from patchdiffusion.sampling.pipeline import Pipeline
from patchdiffusion.system.serialize import encode


def data_card(pack: Pack) -> dict[str, Any]:
    """Card of an evaluation on a pack."""
    return {
        "date": date.today().isoformat(),
        "versions": {"patchdiffusion": version("patchdiffusion"), "torch": torch.__version__},
        "data": {
            "name": pack.name,
            "fingerprint": pack.fingerprint[:16],
            "size": list(pack.info.shape[1:]),
            "space": encode(pack.space),
        },
    }


def features_card(extract: Extractor, channels: int) -> dict[str, Any]:
    """Card of metrics by features of images of so many channels, and of the code behind them."""
    facts = {"name": extract.name, **extract.facts}
    if channels != 3:
        three = "grayscale repeated" if channels == 1 else "alpha composed over white"
        facts["channels"] = f"3, {three}"
    evaluator = {
        "name": f"patchdiffusion {version('patchdiffusion')}",
        "kernel_distance": f"{SUBSETS} subsets of {SUBSET:,}",
        "sliced_distance": f"{PROJECTIONS:,} projections",
        "neighbors": "ties count as inside",
    }
    return {"extractor": facts, "evaluator": evaluator}


def model_card(pipeline: Pipeline) -> dict[str, Any]:
    """Card of a model."""
    return {
        "digest": pipeline.model.digest,
        "equivalents": pipeline.model.config.images,
        "precision": pipeline.precision,
    }
