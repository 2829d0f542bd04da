"""Cross-entropy on noisy crops: the loss of classifiers of noisy images."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from patchdiffusion.classifier import NoisyClassifier
from patchdiffusion.losses import Batch, LossOut
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.paths import per_sample
from patchdiffusion.rng import Draws


@dataclass(frozen=True)
class ClassificationLoss:
    """-ln p(class | x0 + sigma n; sigma), a mean over crops that have a class (arXiv 2105.05233).

    At its minimum the classifier is Bayes' rule, p(class) p(x | class; sigma) / p(x; sigma). Noise
    levels and noise equal those of `DenoisingLoss`.
    """

    smoothing: float = 0.0
    """Share of the probability that is spread over all classes."""

    def levels(self, draws: Draws, law: NoiseLaw) -> Tensor:
        """Noise level of each sample, stratified over the percentiles of the law: float32 [B]."""
        return law.icdf(draws.stratified("sigma")).to(torch.float32)

    def __call__(self, classifier: NoisyClassifier, batch: Batch, draws: Draws) -> LossOut:
        """The loss and the accuracy; raises `ValueError` for crops without labels."""
        labels = batch.cond.labels
        if labels is None:
            raise ValueError("a classifier is trained on labels, and these crops have none")
        sigma = self.levels(draws, batch.noise)
        noise = draws.normal("noise", tuple(batch.images.shape[1:]))
        x = batch.images + per_sample(sigma, noise) * noise
        logits = classifier(x, sigma, batch.cond).float()
        labeled = labels >= 0
        target = labels.clamp(min=0)
        loss = F.cross_entropy(logits, target, reduction="none", label_smoothing=self.smoothing)
        correct = (logits.argmax(1) == target) & labeled
        accuracy = correct.sum() / labeled.sum().clamp(min=1)
        return LossOut(torch.where(labeled, loss, 0.0), {"accuracy": accuracy})
