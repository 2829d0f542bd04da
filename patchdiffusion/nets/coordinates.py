"""Coordinates as a further input of an existing network."""

import torch
from torch import Tensor, nn

from patchdiffusion.nets.embed import exact_convolution


class CoordinateStem(nn.Module):
    """Conditions an existing network on coordinates: `net.conv_in = CoordinateStem(net.conv_in)`.

    Takes the image with the coordinates as further channels, [B, C + 2, H, W]. The coordinates go
    through a separate convolution in float32 that starts with zero weights: the network is
    unchanged at first, bit for bit, and can be fine-tuned on crops.
    """

    def __init__(self, conv: nn.Conv2d, axes: int = 2):
        super().__init__()
        self.image = conv
        kernel, stride, padding = conv.kernel_size, conv.stride, conv.padding
        if conv.dilation != (1, 1) or conv.padding_mode != "zeros":
            raise ValueError("the stem must be a convolution without dilation, padded with zeros")
        self.coordinates = nn.Conv2d(
            axes,
            conv.out_channels,
            (kernel[0], kernel[1]),
            (stride[0], stride[1]),
            padding if isinstance(padding, str) else (padding[0], padding[1]),
            bias=False,
            device=torch.device("meta"),  # consumes no draws of the global generator
        ).to_empty(device=conv.weight.device)
        nn.init.zeros_(self.coordinates.weight)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C + 2, H, W] -> the sum of both convolutions [B, C', H', W']."""
        channels = self.image.in_channels
        h = self.image(x[:, :channels])
        return h + exact_convolution(self.coordinates, x[:, channels:]).to(h.dtype)
