"""The Inception network of 2015 that defines FID (Szegedy et al., CVPR 2016, arXiv 1512.00567).

Names and shapes are those of the public state dict `pt_inception-2015-12-05-6726825d.pth`, which
holds the weights of the TensorFlow graph of 5 December 2015. That graph differs from the paper: its
average pools do not count the padding, and the last block pools by the maximum.
Shapes: B batch, C channels, H and W height and width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 299
Kernel = int | tuple[int, int]


class BasicConv2d(nn.Module):
    """Convolution, batch normalization with fixed statistics, ReLU."""

    def __init__(self, cin: int, cout: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0):
        super().__init__()
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W']."""
        return F.relu(self.bn(self.conv(x)))


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class InceptionA(nn.Module):
    """Block at 35 x 35."""

    def __init__(self, cin: int, pool: int):
        super().__init__()
        self.branch1x1 = BasicConv2d(cin, 64, 1)
        self.branch5x5_1 = BasicConv2d(cin, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(cin, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(cin, pool, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 224 + pool, H, W]."""
        five = self.branch5x5_2(self.branch5x5_1(x))
        three = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, three, self.branch_pool(_average(x))], dim=1)


class InceptionB(nn.Module):
    """Block from 35 x 35 to 17 x 17."""

    def __init__(self, cin: int):
        super().__init__()
        self.branch3x3 = BasicConv2d(cin, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(cin, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 480 + C, H', W']."""
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionC(nn.Module):
    """Block at 17 x 17."""

    def __init__(self, cin: int, mid: int):
        super().__init__()
        across, down = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
        self.branch1x1 = BasicConv2d(cin, 192, 1)
        self.branch7x7_1 = BasicConv2d(cin, mid, 1)
        self.branch7x7_2 = BasicConv2d(mid, mid, *across)
        self.branch7x7_3 = BasicConv2d(mid, 192, *down)
        self.branch7x7dbl_1 = BasicConv2d(cin, mid, 1)
        self.branch7x7dbl_2 = BasicConv2d(mid, mid, *down)
        self.branch7x7dbl_3 = BasicConv2d(mid, mid, *across)
        self.branch7x7dbl_4 = BasicConv2d(mid, mid, *down)
        self.branch7x7dbl_5 = BasicConv2d(mid, 192, *across)
        self.branch_pool = BasicConv2d(cin, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 768, H, W]."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([self.branch1x1(x), seven, double, self.branch_pool(_average(x))], dim=1)


class InceptionD(nn.Module):
    """Block from 17 x 17 to 8 x 8."""

    def __init__(self, cin: int):
        super().__init__()
        self.branch3x3_1 = BasicConv2d(cin, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(cin, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 512 + C, H', W']."""
        seven = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
        three = self.branch3x3_2(self.branch3x3_1(x))
        return torch.cat([three, self.branch7x7x3_4(seven), F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionE(nn.Module):
    """Block at 8 x 8; the last one pools by the maximum."""

    def __init__(self, cin: int, *, last: bool):
        super().__init__()
        self.last = last
        self.branch1x1 = BasicConv2d(cin, 320, 1)
        self.branch3x3_1 = BasicConv2d(cin, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3_2b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch3x3dbl_1 = BasicConv2d(cin, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, (1, 3), padding=(0, 1))
        self.branch3x3dbl_3b = BasicConv2d(384, 384, (3, 1), padding=(1, 0))
        self.branch_pool = BasicConv2d(cin, 192, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 2048, H, W]."""
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = F.max_pool2d(x, 3, stride=1, padding=1) if self.last else _average(x)
        parts = [
            self.branch1x1(x),
            *(branch(three) for branch in (self.branch3x3_2a, self.branch3x3_2b)),
            *(branch(double) for branch in (self.branch3x3dbl_3a, self.branch3x3dbl_3b)),
            self.branch_pool(pooled),
        ]
        return torch.cat(parts, dim=1)


class Inception(nn.Module):
    """Features of the layer before the 1008 classes; `fc` is loaded and not used."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b = InceptionA(192, pool=32)
        self.Mixed_5c = InceptionA(256, pool=64)
        self.Mixed_5d = InceptionA(288, pool=64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, mid=128)
        self.Mixed_6c = InceptionC(768, mid=160)
        self.Mixed_6d = InceptionC(768, mid=160)
        self.Mixed_6e = InceptionC(768, mid=192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, last=False)
        self.Mixed_7c = InceptionE(2048, last=True)
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> Tensor:
        """Features of images [B, 3, 299, 299] in [-1, 1]: [B, 2048]."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return x.mean(dim=(2, 3))


# ---- Resizing of its input ----


def resize_antialiased(images: Tensor) -> Tensor:
    """Resize float [B, 3, H, W] to 299 x 299 by bicubic interpolation with a low-pass filter.

    As in clean-fid (Parmar et al., arXiv 2104.11222): each channel as Pillow resizes floats,
    overshoots at edges clipped to 0 ... 255, without rounding.
    """
    size = (SIDE, SIDE)
    resized = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 255)


def resize_legacy(images: Tensor) -> Tensor:
    """Resize to 299 x 299 by the bilinear interpolation of TensorFlow 1, as in most published FIDs.

    Pixel i of n takes its value at i * H / n, without a filter.
    """
    for axis in (2, 3):
        length = images.shape[axis]
        source = torch.arange(SIDE, device=images.device, dtype=torch.float64) * (length / SIDE)
        low = source.floor().long()
        high = (low + 1).clamp(max=length - 1)
        part = (source - low).to(images.dtype).view(-1, *[1] * (3 - axis))
        near, far = images.index_select(axis, low), images.index_select(axis, high)
        images = near + (far - near) * part
    return images
