"""The step that describes the machine and its software."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys

from benchmarks.gpu.context import ROOT, Context

# Package → the module that it provides, where the names differ.
MODULES = {
    "absl-py": "absl",
    "orbax-checkpoint": "orbax.checkpoint",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "tensorflow-datasets": "tensorflow_datasets",
}
ALSO = ("torch", "triton", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cudnn-cu13")
QUERY = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"


def environment(ctx: Context) -> None:
    """Report the hardware, the versions of packages, and the modules that are missing."""
    rows = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "processor": f"{processor_name()}, {os.cpu_count()} cores",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "git revision": run(["git", "describe", "--always", "--dirty", "--abbrev=12"]),
    }
    for name, value in rows.items():
        ctx.add("machine", {"name": name, "value": value})
    packages(ctx)
    if shutil.which("nvidia-smi"):
        values = run(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"])
        ctx.add("machine", {"name": f"nvidia-smi ({QUERY})", "value": values})
    jax_devices(ctx)


def packages(ctx: Context) -> None:
    """Report the version of each required package, and name the missing modules."""
    required, missing = requirements(), []
    for package, version in {**required, **dict.fromkeys(ALSO, "")}.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed = ""
        module = MODULES.get(package, package.replace("-", "_"))
        if package in required and not is_available(module):
            missing.append(module)
        row = {"package": package, "required": version, "installed": installed}
        ctx.add("packages", row)
    if missing:
        ctx.add("machine", {"name": "missing modules", "value": ", ".join(missing)})
        ctx.failures.append(
            f"missing modules: {', '.join(missing)}; steps that import them will fail"
        )


def requirements() -> dict[str, str]:
    """Return package → version in requirements.txt, for this version of Python."""
    pattern = re.compile(r'^([\w-]+)==([\w.]+)(?:; python_version (<|>=) "3\.12")?')
    is_new, versions = sys.version_info >= (3, 12), {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if match := pattern.match(line):
            name, version, comparison = match.groups()
            if comparison is None or (comparison == ">=") == is_new:
                versions[name] = version
    return versions


def is_available(module: str) -> bool:
    """Return whether a module can be found; parent packages are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def processor_name() -> str:
    """Return the name of the processor."""
    with open("/proc/cpuinfo") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def run(command: list[str]) -> str:
    """Return the output of a command, or its error."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"failed: {error}"
    return done.stdout.strip() or done.stderr.strip()


def jax_devices(ctx: Context) -> None:
    """Report the devices that JAX sees."""
    import jax

    device = jax.devices()[0]
    value = f"{jax.device_count()} × {device.device_kind} ({jax.default_backend()})"
    ctx.add("machine", {"name": "JAX's devices", "value": value})
