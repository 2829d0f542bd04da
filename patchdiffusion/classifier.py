"""Classifiers of noisy images: p(class | x; sigma), in data units as denoisers are."""

from torch import Tensor, nn

from patchdiffusion.cond import Cond, Tape
from patchdiffusion.denoiser import NetDenoiser
from patchdiffusion.noise import NoiseLaw
from patchdiffusion.parameterisation import Precond


class NoisyClassifier(nn.Module):
    """A network that returns logits, under the input scaling of a preconditioner.

    arXiv 2105.05233, section 4; fits `guidance.classifier`.
    """

    def __init__(
        self,
        network: nn.Module,
        precond: Precond,
        law: NoiseLaw | None = None,
        tape: Tape | None = None,
    ):
        """`law` and `tape` are those of `NetDenoiser`."""
        super().__init__()
        self.inner = NetDenoiser(network, precond, law, tape)

    def recording(self, tape: Tape) -> "NoisyClassifier":
        """This classifier with a tape that records passes with gradients."""
        return NoisyClassifier(self.inner.network, self.inner.precond, self.inner.law, tape)

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """Noisy x [B, C, *S], sigma [B] or scalar -> logits [B, K]; `cond.labels` is ignored."""
        cond = (cond or Cond()).without("labels")
        return self.inner.raw(*self.inner.scaled(x, sigma, cond)[:3])
