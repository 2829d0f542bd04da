"""Evaluation of autoencoders: reconstructions against their images, and statistics of latents."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchdiffusion.data.pack import Pack
from patchdiffusion.encoders.autoencoder import Autoencoder
from patchdiffusion.encoders.features import Extractor
from patchdiffusion.metrics.frechet import Moments, frechet_distance
from patchdiffusion.metrics.kernel import kernel_distance
from patchdiffusion.metrics.reconstruct import peak_of, psnr, sharpness, ssim
from patchdiffusion.nets.autoencoder import gaussian_kl


@dataclass
class Rows:
    """Measurements of images, gathered batch by batch."""

    psnr: list[Tensor] = field(default_factory=list)
    ssim: list[Tensor] = field(default_factory=list)
    sharpness: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    mean: list[Tensor] = field(default_factory=list)
    std: list[Tensor] = field(default_factory=list)
    real: list[Tensor] = field(default_factory=list)
    fake: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def evaluated(
    autoencoder: Autoencoder,
    pack: Pack,
    indices: Tensor,
    *,
    extract: Extractor | None = None,
    batch: int = 32,
    progress: Callable[[int], object] = bool,
) -> dict[str, Any]:
    """PSNR, SSIM and sharpness of reconstructions of images, distances of features, and latents.

    Reconstructed from the mean of the posterior. Distances are those of the same images, original
    and reconstructed (rFID, rKID). Raises `ValueError` without images.
    """
    if not len(indices):
        raise ValueError(f"{pack.name} has no image to reconstruct; hold out some, or give --data")
    rows, space = Rows(), pack.space
    codes = torch.zeros(autoencoder.network.num_codes, dtype=torch.int64)
    for some in indices.split(batch):
        stored = pack.images[some].movedim(-1, 1).to(autoencoder.device, torch.float32)
        x = space.to_network(stored.contiguous())
        mean, std = autoencoder.moments(x)
        y = autoencoder.decode(mean, (x.shape[2], x.shape[3]))
        peak = peak_of(space, x.shape[1])
        y = y.clamp(-1, 1) if getattr(space, "limits", None) else y
        rows.psnr.append(psnr(x, y, peak).cpu())
        rows.ssim.append(ssim(x, y, peak).cpu())
        rows.sharpness.append(sharpness(x, y).cpu().expand(len(x)))
        rows.mean.append(mean.movedim(1, 0).flatten(1).double().cpu())
        rows.std.append(std.movedim(1, 0).flatten(1).double().cpu())
        if len(codes):
            numbers = autoencoder.network.codes_of(mean).flatten().cpu()
            codes += torch.bincount(numbers, minlength=len(codes))
        else:
            rows.kl.append(gaussian_kl(mean, std).cpu())
        if extract is not None:
            for found, images in ((rows.real, x), (rows.fake, y)):
                pictures = space.to_picture(space.to_values(images))
                found.append(extract(torch.from_numpy(pictures)))
        progress(len(some))
    return _summary(rows, codes, len(indices))


def _summary(rows: Rows, codes: Tensor, count: int) -> dict[str, Any]:
    def average(values: list[Tensor]) -> float:
        return float(torch.cat(values).double().mean())

    mean, std = torch.cat(rows.mean, dim=1), torch.cat(rows.std, dim=1)
    result: dict[str, Any] = {
        "images": count,
        "psnr": average(rows.psnr),
        "ssim": average(rows.ssim),
        "sharpness": average(rows.sharpness),
        "latents": {
            "mean": mean.mean(1).tolist(),
            "std": mean.std(1).tolist(),
            "posterior_std": std.mean(1).tolist(),
        },
    }
    if rows.kl:
        result["kl"] = average(rows.kl)
    if len(codes):
        share = codes / codes.sum().clamp(min=1)
        entropy = -(share * share.clamp(min=1e-30).log()).sum()
        result["codes_used"] = float((codes > 0).double().mean())
        result["perplexity"] = float(entropy.exp())
    if rows.real and count > 1:
        real, fake = torch.cat(rows.real), torch.cat(rows.fake)
        result["rfid"] = frechet_distance(Moments.of(real), Moments.of(fake))
        result["rkid"] = kernel_distance(real, fake)[0]
    return result
