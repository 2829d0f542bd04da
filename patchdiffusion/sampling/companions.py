"""Loading of the further trained models that guidance uses."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from patchdiffusion.cond import Cond
from patchdiffusion.conditioners.base import Wish, fill
from patchdiffusion.denoiser import Denoiser
from patchdiffusion.guidance.base import Classifier
from patchdiffusion.model import Model, ModelConfig, load_model
from patchdiffusion.nets.base import Weights
from patchdiffusion.patches import Size
from patchdiffusion.sampling.pictures import read_picture, to_network
from patchdiffusion.solvers.schedules import support
from patchdiffusion.system.files import SEAL, sealed


class Companions:
    """Loads each model once, and checks that it fits the main model, if there is one."""

    def __init__(self, device: torch.device | str = "cpu", main: Model | None = None):
        self.device = device
        self.main = main
        self._models: dict[tuple[str, str], Model] = {}
        self._files: dict[str, str] = {}

    @property
    def digests(self) -> dict[str, str]:
        """Digests of the models and files that have been loaded, by their paths."""
        return {path: model.digest for (path, _), model in self._models.items()} | self._files

    def denoiser(self, path: str, weights: Weights, levels: tuple[float, float]) -> Denoiser:
        """The denoiser in a run or model folder; it must cover the lowest and highest level."""
        model = self._load(path, weights)
        self.admit(model, levels)
        return model.denoiser

    def admit(self, model: Model, levels: tuple[float, float]) -> None:
        """Raise `ValueError` for a guide of other images, classes or noise levels."""
        if not model.config.objective.denoises:
            raise ValueError("a consistency model is no denoiser and cannot be a guide")
        if self.main is None:
            return
        _check_alike(model, self.main)
        low, high = support(model.config.noise)
        if levels[0] < low or levels[1] > high:
            raise ValueError(
                f"the guide was trained on noise levels {low:.4g} to {high:.4g} and is needed on "
                f"{levels[0]:.4g} to {levels[1]:.4g}; set sigma_min and sigma_max"
            )

    def classifier(self, path: str, weights: Weights) -> Classifier:
        """The classifier in a run or model folder; raises `ValueError` for another model."""
        model = self._load(path, weights)
        if model.config.head.kind != "classifier":
            raise ValueError(
                f"{path} is a {model.config.head.kind}, and guidance needs a classifier of noisy "
                "images: patchdiffusion train classifier DATA"
            )
        return self._fitted(model)

    def config(self, path: str, weights: Weights) -> ModelConfig:
        """Configuration of the model in a run or model folder."""
        return self._load(path, weights).config

    def picture(self, path: str, size: Size | None = None) -> Tensor:
        """The image in a file, in the units of the network: [C, *S].

        Raises `ValueError` unless it has the size, by default that of the model's canvas.
        """
        assert self.main is not None, "only a sampled model has a size"
        config = self.main.config
        if config.space.random:
            raise ValueError(
                f"the model samples {config.space.word}, in which no picture can be given, such as "
                f"{path}; train a model of pixels"
            )
        values = read_picture(path, config.space, config.network.channels, size or config.canvas)
        self._files[path] = hashlib.sha256(values.tobytes()).hexdigest()
        return to_network(values, config.space)

    def record(self, name: str) -> dict[str, Any] | None:
        """Facts about the sampled weights in a file of their folder, see `Model.record`."""
        facts = None if self.main is None else self.main.record(name)
        if facts is not None:
            self._files[name] = sealed(facts)[SEAL]
        return facts

    def prompt(self, text: str) -> Cond:
        """Condition of the sampled model by a text, of batch 1; `ValueError` if it reads none."""
        model = self.main
        readers = [] if model is None else [c for c in model.config.conditioners if c.reads_prompts]
        if model is None or not readers:
            raise ValueError(
                f"negative is {text!r}, a text, and the model was trained without captions; leave "
                "it out, or train with --captions bytes"
            )
        seeds, canvas = torch.zeros(1, dtype=torch.int64), model.config.canvas
        wish = Wish(seeds, canvas, prompts=(text,), device=self.device, folder=model.folder)
        return fill(readers, wish, Cond())

    def require_condition(self) -> None:
        """Raise `ValueError` if the model that samples has neither classes nor reads texts."""
        if self.main is None:
            return
        config = self.main.config
        if self.drops():
            return
        if not config.num_classes and not {"context", "tokens"} & config.network.reads:
            raise ValueError(
                "the model was trained without classes or captions, and classifier-free guidance "
                "leads towards one: use --guidance none, autoguidance (--guidance.model RUN, a "
                "worse model), or classifier (--guidance.model RUN, a classifier)"
            )

    def drops(self) -> tuple[str, ...]:
        """Fields that the conditioners of the model that samples have dropped in training."""
        conditioners = () if self.main is None else self.main.config.conditioners
        return tuple(name for conditioner in conditioners for name in conditioner.drops)

    def require_unconditional(self) -> None:
        """Raise `ValueError` if the model that samples was never trained without its classes."""
        if self.main is not None and not self.main.config.unconditional:
            raise ValueError(
                "the model was trained with label_dropout 0 and makes nothing without a class or "
                "text, which this guidance leads away from: use --guidance none or autoguidance, "
                "or train with --label-dropout 0.1"
            )

    def _fitted(self, model: Model) -> Classifier:
        """The classifier with its logits in the order of the main model's classes."""
        classifier = model.classifier
        if self.main is None:
            return classifier
        _check_alike(model, self.main, but=("classes",))
        names, trained = self.main.config.classes, model.config.classes
        if names == trained or not names:
            return classifier
        if unknown := [name for name in names if name not in trained]:
            raise ValueError(
                f"the classifier was not trained on the classes {', '.join(unknown[:10])}; "
                f"allowed: {', '.join(trained[:20])}"
            )
        order = torch.tensor([trained.index(name) for name in names], device=self.device)

        def reordered(x: Tensor, sigma: Tensor, cond: Cond | None = None) -> Tensor:
            return classifier(x, sigma, cond)[:, order]

        return reordered

    def _load(self, path: str, weights: Weights) -> Model:
        key = (path, weights)
        if key not in self._models:
            self._models[key] = load_model(path, weights=weights, device=self.device)
        return self._models[key]


def _check_alike(guide: Model, model: Model, *, but: tuple[str, ...] = ()) -> None:
    """Raise `ValueError` unless both are of equal images and classes, `but` for some facts."""
    facts, needed = _interface(guide), _interface(model)
    for name in needed:
        if name not in but and facts[name] != needed[name]:
            raise ValueError(
                f"the guide has {name} {facts[name]} and the model {needed[name]}; "
                "they must be equal"
            )


def _interface(model: Model) -> dict[str, object]:
    config = model.config
    classes = ", ".join(config.classes) or config.network.num_classes
    return {
        "canvas": config.canvas,
        "channels": config.network.channels,
        "classes": classes,
        "space": config.space,
    }
