"""What is believed of a CPU follows from its features and from the limits that the environment sets."""

import pytest
import torch

from hf_gated_sae.functional.cpu.features import CPUFeatures

ZEN_4 = {"cpu_name": "AMD EPYC", "avx2": True, "avx512_vnni": True, "avx512_bf16": True}
SAPPHIRE = {"cpu_name": "Intel Xeon", "avx2": True, "avx512_vnni": True, "amx_int8": True, "amx_bf16": True}
ALDER = {"cpu_name": "Intel Core", "avx2": True, "avx_vnni": True, "avx512_vnni": False, "avx512_bf16": False}
OLD = {"cpu_name": "AMD Ryzen", "avx2": True}


@pytest.fixture
def detected(monkeypatch):
    def detect(capabilities, vectors, limit=None):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            monkeypatch.delenv(name, raising=False)
        if limit:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        return CPUFeatures.detect()

    return detect


@pytest.mark.parametrize(
    ("capabilities", "vectors", "limit", "int8", "bf16"),
    [
        (ZEN_4, "AVX512", None, True, True),
        (ZEN_4, "AVX512", "ALL", True, True),
        (ZEN_4, "AVX512", "avx512_core_bf16", True, True),
        (ZEN_4, "AVX512", "AVX512_CORE_VNNI", True, False),
        (ZEN_4, "AVX512", "AVX512_CORE", False, False),
        (ZEN_4, "AVX2", "AVX2", False, False),
        (SAPPHIRE, "AVX512", None, True, True),
        (SAPPHIRE, "AVX512", "AVX512_CORE_AMX", True, True),
        (ALDER, "AVX2", None, True, False),
        (OLD, "AVX2", None, False, False),
    ],
)
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs a build of torch with oneDNN")
def test_features_within_the_limit_of_the_environment(detected, capabilities, vectors, limit, int8, bf16):
    found = detected(capabilities, vectors, limit)
    assert (found.int8, found.bf16) == (int8, bf16)
    assert found.vectors == {"AVX512": "AVX-512"}.get(vectors, vectors)


def test_blas_counts_as_fast_on_intels_cpus_alone(detected):
    assert detected(SAPPHIRE, "AVX512").intel_blas == torch.backends.mkl.is_available()
    assert not detected(ZEN_4, "AVX512").intel_blas


def test_it_is_shown_in_one_line(detected):
    assert str(detected(ZEN_4, "AVX512", "ALL")) == "AMD EPYC (AVX-512, int8, bf16)"
    assert str(detected(OLD, "AVX2")) == "AMD Ryzen (AVX2)"


def test_an_unknown_cpu_has_no_features(monkeypatch):
    def missing():
        raise AttributeError

    monkeypatch.setattr(torch.cpu, "get_capabilities", missing)
    found = CPUFeatures.detect()
    assert not (found.int8 or found.bf16 or found.intel_blas) and str(found).startswith("CPU (")
