"""Builds what stands for CUDA where there is no GPU, and says how a process comes to use it."""

import ctypes
import os
import subprocess
from pathlib import Path

import torch
import triton

HERE = Path(__file__).parent
TRITONS = Path(triton.__file__).parent / "backends/nvidia/include"


def driver(folder: Path) -> dict[str, str]:
    """The environment of a process whose driver is libcuda.c, which is built in `folder`."""
    library = folder / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, HERE / "libcuda.c"], check=True)
    library.with_suffix("").symlink_to(library)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return environment | {"LD_LIBRARY_PATH": str(folder), "TRITON_LIBCUDA_PATH": str(folder)}


def runtime(folder: Path) -> dict[str, str]:
    """That of a process in which torch's CUDA build finds a GPU, of libcudart.c."""
    library = folder / "libstandin.so"
    headers = [f"-I{folder}" for folder in (*torchs_headers(), TRITONS)]
    compiler = ["cc", "-shared", "-fPIC", *headers, "-o", library, HERE / "libcudart.c"]
    subprocess.run(compiler, check=True)
    # torch asks NVML, which is not there, how many GPUs are
    unasked = {"PYTORCH_NVML_BASED_CUDA_CHECK": "0"}
    return driver(folder) | {"LD_PRELOAD": str(library)} | unasked


def torchs_headers() -> list[Path]:
    """The folders of the runtime's headers, as torch's CUDA build brings them."""
    packages = Path(torch.__file__).parents[1]
    return [found.parent for found in packages.glob("nvidia/*/include/cuda_runtime_api.h")]


class Tally(ctypes.Structure):
    """See libcudart.c."""

    counts = "launched", "captured", "joined", "waits", "host_copies"
    _fields_ = [(name, ctypes.c_ulong) for name in counts] + [("broken_by", ctypes.c_char * 64)]


def tally() -> Tally:
    """Of this process, counting on."""
    return Tally.in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "tally")
