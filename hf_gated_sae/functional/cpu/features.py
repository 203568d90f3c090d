"""What this CPU and this build of torch multiply fast: every choice that depends on the CPU is made from here.

Choices depend on the features of the CPU, not on its maker (except `intel_blas`), and only on features that torch may
use: `ONEDNN_MAX_CPU_ISA` and `ATEN_CPU_CAPABILITY` restrict torch to those of an older CPU, for instance to measure on
one machine what another one would do.

Projections are searched by a product in bfloat16 where the CPU has instructions for it, and by the product in float32
everywhere else. Three other ways were measured for CPUs without bfloat16, at 4,096 tokens, 2304 x 16,384, 64 active
latents (1.0 is the product in float32):

* int8 with VNNI: the product takes 0.33. By Cauchy-Schwarz, rounding a vector to 8 bits changes a projection by up to
  0.9 of its standard deviation, so that 4 % of all projections must be computed again, which takes 0.71. Without VNNI
  only 7 bits are left, as products of two bytes are added in 16 bits, where they overflow.
* Strassen's method (Winograd's form), one or two levels: 0.93 to 1.0 with AVX2, 0.97 to 1.1 with AVX-512.
* Cauchy-Schwarz on a part of the dimensions, as in maximum inner-product search: half of 2,304 dimensions leave a
  bound of 24 standard deviations, where the cut is at 2.7.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

_NATIVE_BF16 = ("BF16", "FP16", "AMX", "AVX10", "DEFAULT", "ALL")
"""Parts of the values of `ONEDNN_MAX_CPU_ISA` that leave oneDNN the instructions for bfloat16."""

_VECTORS = {"AVX512": "AVX-512", "AVX2": "AVX2"}
"""Names of torch's capabilities; others are shown as torch names them."""


@dataclass(frozen=True)
class CPUFeatures:
    """What a CPU multiplies fast.

    Attributes:
        name: the maker's name of the CPU; empty if it is not known.
        vectors: the widest vectors that torch uses, such as ``"AVX2"`` or ``"AVX-512"``.
        int8: whether it has instructions for sums of products of bytes (VNNI, AMX).
        bf16: whether it has instructions for products in bfloat16 (AVX512_BF16, AMX).
        intel_blas: whether this is an Intel CPU with Intel's BLAS (MKL), which is as fast there as oneDNN.
    """

    name: str = ""
    vectors: str = ""
    int8: bool = False
    bf16: bool = False
    intel_blas: bool = False

    @classmethod
    def detect(cls) -> CPUFeatures:
        """Return what this process may use; what cannot be determined counts as missing."""
        vectors = torch.backends.cpu.get_cpu_capability()
        try:
            found = torch.cpu.get_capabilities()
        except (AttributeError, RuntimeError):  # another version of torch
            return cls(vectors=_VECTORS.get(vectors, vectors))
        name = str(found.get("cpu_name", ""))
        limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "ALL")).upper()
        onednn = torch.backends.mkldnn.is_available()
        bf16 = any(found.get(each, False) for each in ("avx512_bf16", "amx_bf16"))
        int8 = any(found.get(each, False) for each in ("avx512_vnni", "avx_vnni", "amx_int8"))
        return cls(
            name=name,
            vectors=_VECTORS.get(vectors, vectors),
            int8=int8 and onednn and ("VNNI" in limit or any(part in limit for part in _NATIVE_BF16)),
            bf16=bf16 and onednn and any(part in limit for part in _NATIVE_BF16),
            intel_blas="intel" in name.lower() and torch.backends.mkl.is_available(),
        )

    def __str__(self) -> str:
        """Return one line for tables, run facts and messages, such as ``AMD EPYC (AVX-512, int8, bf16)``."""
        parts = [self.vectors, *(["int8"] if self.int8 else []), *(["bf16"] if self.bf16 else [])]
        return f"{self.name or 'CPU'} ({', '.join(filter(None, parts))})"


CPU = CPUFeatures.detect()
