"""The processor of this machine and its vector instructions."""

import functools
import platform
from pathlib import Path

# Flags in /proc/cpuinfo that decide how fast the dtypes are → their usual names.
FEATURES = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx_vnni": "AVX VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "avx512_fp16": "AVX-512 FP16",
    "amx_tile": "AMX",
    "amx_int8": "AMX INT8",
    "amx_bf16": "AMX BF16",
    "asimddp": "NEON dot product",
    "bf16": "NEON BF16",
    "i8mm": "NEON I8MM",
}


@functools.cache
def describe_cpu(path: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of the processor, and its features among `FEATURES`.

    Args:
        path: A file in the format of Linux. If it does not exist, the features are unknown.
    """
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return f"{platform.processor() or platform.machine()}, features unknown"
    fields = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = {*fields.get("flags", fields.get("Features", "")).split()}
    features = [title for flag, title in FEATURES.items() if flag in flags]
    # Models of a processor may share a name, e.g. in virtual machines.
    numbers = [fields[name] for name in ("cpu family", "model") if name in fields]
    name = fields.get("model name", platform.machine())
    return f"{name} ({' '.join(numbers)}), {', '.join(features) or 'no known features'}"
