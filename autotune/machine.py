"""Where a measurement was taken, and of what."""

import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("triton", "numba", "numpy", "mamba-ssm", "causal-conv1d", "transformers")


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and, where it is known, commit, as JSON. Of a CPU also the threads that
    ran, and how many were ready to run on its cores in the last five minutes, ours and others'."""
    about: dict[str, Any] = {"device": name_of(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about["multiprocessors"] = properties.multi_processor_count
        about["memory"] = properties.total_memory
        about["cuda"] = torch.version.cuda
    else:
        about["threads"] = torch.get_num_threads()
        about["cores"] = os.cpu_count()
        about["load"] = os.getloadavg()[1]
    about["python"] = platform.python_version()
    # torch's own names the build, which what is installed need not
    about["packages"] = {"torch": torch.__version__}
    about["packages"] |= {name: found for name in PACKAGES if (found := version_of(name))}
    if (at := commit()) is not None:
        about["commit"] = at
    return about


def name_of(device: torch.device) -> str:
    """As the driver, or the CPU, calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Of the checkout that this file belongs to, with "-dirty" appended where files were changed.
    Where it belongs to none, as a copy or a wheel, even one installed within a checkout, what
    TOSSUP_COMMIT says, or None."""
    this = Path(__file__).resolve()

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=this.parent, text=True, capture_output=True)
        return done.stdout.strip() if done.returncode == 0 else None

    if shutil.which("git") is None or git("ls-files", "--error-unmatch", this.name) is None:
        return os.environ.get("TOSSUP_COMMIT")
    return git("describe", "--always", "--abbrev=12", "--exclude=*", "--dirty")
