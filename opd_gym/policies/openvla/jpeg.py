"""
What storing a picture as JPEG leaves of it, bit by bit as TensorFlow writes and reads it.

OpenVLA's training pictures were JPEGs (quality 95, colours at half the resolution), so its evaluation code encodes and
decodes every picture. Entropy coding loses nothing and is left out. What remains is integer arithmetic, defined to the
last bit by libjpeg: the accurate integer DCT to encode, the fast one to decode, "fancy" upsampling of colours.
"""

from __future__ import annotations

import torch as th

# Annex K of the JPEG standard: luminance and chrominance, quality 50
_LUMINANCE = [
    [16, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
]
_CHROMINANCE = [
    [17, 18, 24, 47, 99, 99, 99, 99],
    [18, 21, 26, 66, 99, 99, 99, 99],
    [24, 26, 56, 99, 99, 99, 99, 99],
    [47, 66, 99, 99, 99, 99, 99, 99],
    *[[99] * 8] * 4,
]
_QUALITY = 95
# Scale factors of the fast DCT (Arai, Agui, Nakajima)
_AAN = [1.0, 1.387039845, 1.306562965, 1.175875602, 1.0, 0.785694958, 0.541196100, 0.275899379]

Rows = list[th.Tensor]


def _rounded_shift(x: th.Tensor, bits: int) -> th.Tensor:
    return (x + (1 << (bits - 1))) >> bits


def _extend(x: th.Tensor, rows: int, columns: int) -> th.Tensor:
    """Repeat the last row and the last column."""
    x = th.cat([x, x[..., -1:, :].repeat_interleave(rows, dim=-2)], dim=-2)
    return th.cat([x, x[..., -1:].repeat_interleave(columns, dim=-1)], dim=-1)


def _dct(d: Rows, even_bits: int, bits: int) -> Rows:
    """
    Accurate integer DCT of eight numbers, constants in 13 bits.

    :param d: the numbers
    :param even_bits: outputs 0 and 4 are shifted right by so many bits (left, if negative)
    :param bits: the others by so many
    """
    sums = [d[i] + d[7 - i] for i in range(4)]
    t4, t5, t6, t7 = (d[i] - d[7 - i] for i in (3, 2, 1, 0))
    t10, t11, t12, t13 = sums[0] + sums[3], sums[1] + sums[2], sums[1] - sums[2], sums[0] - sums[3]
    even = [t10 + t11, t10 - t11]
    even = [x << -even_bits if even_bits < 0 else _rounded_shift(x, even_bits) for x in even]
    z = (t12 + t13) * 4433
    out2, out6 = z + t13 * 6270, z - t12 * 15137
    z1, z2, z3, z4 = (t4 + t7) * -7373, (t5 + t6) * -20995, t4 + t6, t5 + t7
    z5 = (z3 + z4) * 9633
    z3, z4 = z3 * -16069 + z5, z4 * -3196 + z5
    out7, out5 = t4 * 2446 + z1 + z3, t5 * 16819 + z2 + z4
    out3, out1 = t6 * 25172 + z2 + z3, t7 * 12299 + z1 + z4
    out1, out2, out3, out5, out6, out7 = (_rounded_shift(x, bits) for x in (out1, out2, out3, out5, out6, out7))
    return [even[0], out1, out2, out3, even[1], out5, out6, out7]


def _inverse_dct(d: Rows) -> Rows:
    """Fast integer inverse DCT of eight numbers, constants in 8 bits."""
    t10, t11, t13 = d[0] + d[4], d[0] - d[4], d[2] + d[6]
    t12 = ((d[2] - d[6]) * 362 >> 8) - t13
    even = [t10 + t13, t11 + t12, t11 - t12, t10 - t13]
    z13, z10, z11, z12 = d[5] + d[3], d[5] - d[3], d[1] + d[7], d[1] - d[7]
    t7 = z11 + z13
    z5 = (z10 + z12) * 473 >> 8
    t6 = (z10 * -669 >> 8) + z5 - t7
    t5 = ((z11 - z13) * 362 >> 8) - t6
    t4 = (z12 * 277 >> 8) - z5 + t5
    odd = [t7, t6, t5, -t4]
    return [e + o for e, o in zip(even, odd, strict=True)] + [e - o for e, o in zip(even[::-1], odd[::-1], strict=True)]


def _code_plane(plane: th.Tensor, base: list[list[int]]) -> th.Tensor:
    """
    :param plane: int32 ``(B, H, W)`` in [0, 255]; W a multiple of 8
    :param base: table of quantisation at quality 50
    :return: what is decoded, with rows up to a multiple of 8
    """
    # The encoder fills up colours after it has halved them
    plane = _extend(plane, -plane.shape[1] % 8, 0)
    table = ((th.tensor(base, dtype=th.int32) * (200 - 2 * _QUALITY) + 50) // 100).clamp(1, 255)
    aan = th.tensor(_AAN, dtype=th.float64)
    multipliers = _rounded_shift(table * (aan[:, None] * aan * 2**14).round().int(), 12).to(plane.device)
    table = table.to(plane.device)
    batch, height, width = plane.shape
    blocks = plane.view(batch, height // 8, 8, width // 8, 8).transpose(2, 3) - 128
    blocks = th.stack(_dct(list(blocks.unbind(-1)), -2, 11), dim=-1)
    blocks = th.stack(_dct(list(blocks.unbind(-2)), 2, 15), dim=-2)
    divisor = 8 * table
    levels = blocks.sign() * ((blocks.abs() + divisor // 2) // divisor)
    blocks = levels * multipliers
    blocks = th.stack(_inverse_dct(list(blocks.unbind(-2))), dim=-2)
    blocks = th.stack(_inverse_dct(list(blocks.unbind(-1))), dim=-1)
    return ((blocks >> 5) + 128).clamp(0, 255).transpose(2, 3).reshape(batch, height, width)


def _halve(plane: th.Tensor) -> th.Tensor:
    """Mean of each 2 x 2 pixels, rounded down and up in turn."""
    sums = plane[:, ::2, ::2] + plane[:, 1::2, ::2] + plane[:, ::2, 1::2] + plane[:, 1::2, 1::2]
    bias = 1 + th.arange(sums.shape[2], dtype=th.int32, device=plane.device) % 2
    return (sums + bias) >> 2


def _double(plane: th.Tensor) -> th.Tensor:
    """Twice the size: each new pixel is 9/16 of the nearest, 3/16 of the next ones and 1/16 of the diagonal one."""
    batch, height, width = plane.shape
    above = th.cat([plane[:, :1], plane[:, :-1]], dim=1)
    below = th.cat([plane[:, 1:], plane[:, -1:]], dim=1)
    rows = th.stack([3 * plane + above, 3 * plane + below], dim=2).view(batch, 2 * height, width)
    left = th.cat([rows[..., :1], rows[..., :-1]], dim=2)
    right = th.cat([rows[..., 1:], rows[..., -1:]], dim=2)
    return th.stack([(3 * rows + left + 8) >> 4, (3 * rows + right + 7) >> 4], dim=3).view(batch, 2 * height, 2 * width)


def jpeg_round_trip(images: th.Tensor) -> th.Tensor:
    """
    Encode and decode as ``tf.image.encode_jpeg`` and ``tf.io.decode_image`` do by default.

    :param images: uint8 ``(B, 3, H, W)``; TensorFlow's bits where W is at least 5
    :return: uint8, the same shape
    """
    height, width = images.shape[-2:]
    x = _extend(images, height % 2, -width % 16).int()
    r, g, b = x.unbind(1)
    half = 1 << 15
    y = (19595 * r + 38470 * g + 7471 * b + half) >> 16
    chroma_bias = (128 << 16) + half - 1
    cb = (-11059 * r - 21709 * g + 32768 * b + chroma_bias) >> 16
    cr = (32768 * r - 27439 * g - 5329 * b + chroma_bias) >> 16
    y = _code_plane(y, _LUMINANCE)[:, :height, :width]
    halves = (_code_plane(_halve(plane), _CHROMINANCE) for plane in (cb, cr))
    # The last pixels of a row or column have no neighbours to be blended with but what is inside the picture
    cb, cr = (_double(plane[:, : (height + 1) // 2, : (width + 1) // 2])[:, :height, :width] - 128 for plane in halves)
    r = y + ((91881 * cr + half) >> 16)
    g = y + ((-22554 * cb - 46802 * cr + half) >> 16)
    b = y + ((116130 * cb + half) >> 16)
    return th.stack([r, g, b], dim=1).clamp(0, 255).to(th.uint8)
