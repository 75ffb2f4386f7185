"""Description of the processor."""

from jaxvid.cpu_info import describe_cpu


def test_name_and_features_are_read_from_cpuinfo(tmp_path):
    path = tmp_path / "cpuinfo"
    core = "processor : 0\ncpu family : 26\nmodel : 2\nmodel name : AMD EPYC\n"
    path.write_text(f"{core}flags : fpu avx2 avx512f avx512_bf16\n\n{core}flags : fpu\n")
    assert describe_cpu(path) == "AMD EPYC (26 2), AVX2, AVX-512, AVX-512 BF16"
    arm = tmp_path / "arm"
    arm.write_text("processor : 0\nFeatures : fp asimd asimddp\n")
    assert describe_cpu(arm).endswith(", NEON dot product")
    assert "features unknown" in describe_cpu(tmp_path / "missing")
