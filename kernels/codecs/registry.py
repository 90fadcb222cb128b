"""The codecs that a policy can name. To add one: a file with it, and a line here."""

from __future__ import annotations

import torch
from kvpass.kernels.codecs.codec import Codec
from kvpass.kernels.codecs.floats import Float8, Float16
from kvpass.kernels.codecs.integers import Asymmetric, Symmetric
from kvpass.kernels.codecs.normal import Normal
from kvpass.kernels.codecs.signs import Ternary, TwoAndOne
from kvpass.kernels.codecs.sparse import Sparse

DENSE = "dense"
"""The name of no codec: numbers as the model has them."""

_CODECS: tuple[Codec, ...] = (
    Asymmetric("int8", 8),
    Asymmetric("int4", 4),
    Asymmetric("int3", 3),
    Asymmetric("int2", 2),
    Symmetric("int8_symmetric", 8),
    Symmetric("int4_symmetric", 4),
    Float8("fp8_e4m3", torch.float8_e4m3fn),
    Float8("fp8_e5m2", torch.float8_e5m2),
    Float16(),
    Normal("turbo4", 4),
    Normal("turbo3", 3),
    Normal("turbo2", 2),
    Ternary(),
    TwoAndOne(),
    Sparse("csr8", 8),
    Sparse("csr4", 4),
)

CODECS = {codec.name: codec for codec in _CODECS}
