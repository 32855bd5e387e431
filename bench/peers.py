"""Builds the CUDA peers, mamba-ssm's scan and causal-conv1d, from their source distributions.

    python -m bench.peers SDISTS OUTPUT     then PYTHONPATH=OUTPUT to find them

SDISTS is a folder that holds mamba_ssm-*.tar.gz and causal_conv1d-*.tar.gz, as `pip download
--no-binary :all: --no-deps` leaves them: nothing is fetched here. They are compiled for the GPU
that is there, or for those that TORCH_CUDA_ARCH_LIST names, by nvcc and ninja, with the flags of
their own setup.py. OUTPUT/peers.json says of each extension how long its build took, or why there
is none.
"""

import json
import os
import shutil
import sys
import tarfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from tossup.autotune.errors import said
from tossup.supernet.files import write_atomically

# By the name of the module: the distribution, and the folder of its sources
EXTENSIONS = {
    "causal_conv1d_cuda": ("causal_conv1d", "csrc"),
    "selective_scan_cuda": ("mamba_ssm", "csrc/selective_scan"),
}
TYPES = ("HALF", "BFLOAT16", "BFLOAT162")
FLAGS = ["-O3", "--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math"]
FLAGS += [f"-U__CUDA_NO_{kind}_CONVERSIONS__" for kind in TYPES]
FLAGS += [f"-U__CUDA_NO_{kind}_OPERATORS__" for kind in TYPES]


class NotBuilt(Exception):
    """The message says why."""


def sources_of(distribution: str, folder: str, sdists: Path, output: Path) -> list[Path]:
    """Of one extension, unpacked below `output`."""
    archives = sorted(sdists.glob(f"{distribution}-*.tar.gz"))
    if not archives:
        raise NotBuilt(f"{sdists} holds no {distribution}-*.tar.gz")
    with tarfile.open(archives[-1]) as archive:
        archive.extractall(output, filter="data")
    unpacked = output / archives[-1].name.removesuffix(".tar.gz") / folder
    return sorted(p for p in unpacked.iterdir() if p.suffix in (".cpp", ".cu"))


def build(name: str, sdists: Path, output: Path) -> str:
    """Build one extension into `output`; what to say of it."""
    from torch.utils import cpp_extension

    start = time.monotonic()
    try:
        if "TORCH_CUDA_ARCH_LIST" not in os.environ:
            if not torch.cuda.is_available():
                raise NotBuilt("torch sees no GPU, and TORCH_CUDA_ARCH_LIST names none")
            major, minor = torch.cuda.get_device_capability()
            os.environ["TORCH_CUDA_ARCH_LIST"] = f"{major}.{minor}"
        if cpp_extension.CUDA_HOME is None or shutil.which("nvcc", path=nvcc_path()) is None:
            raise NotBuilt("there is no nvcc")
        if not cpp_extension.is_ninja_available():
            raise NotBuilt("there is no ninja")
        sources = sources_of(*EXTENSIONS[name], sdists, output / "sources")
        folder = output / "build" / name
        folder.mkdir(parents=True, exist_ok=True)
        module = cpp_extension.load(
            name, [str(path) for path in sources],
            extra_cflags=["-O3"], extra_cuda_cflags=FLAGS,
            extra_include_paths=[str(sources[0].parent)], build_directory=str(folder),
        )  # fmt: skip
    except (NotBuilt, RuntimeError, OSError, ImportError) as error:
        print(error, file=sys.stderr)
        faults = [line for line in str(error).splitlines() if "error:" in line]  # the compiler's
        return f"not built: {faults[0] if faults else said(error)}"
    built = Path(module.__file__)
    shutil.copy(built, output / f".{built.name}")
    (output / f".{built.name}").rename(output / built.name)
    return f"built in {time.monotonic() - start:.0f} s"


def nvcc_path() -> str:
    from torch.utils.cpp_extension import CUDA_HOME

    return os.pathsep.join((os.environ.get("PATH", ""), f"{CUDA_HOME}/bin"))


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    sdists, output = (Path(argument).resolve() for argument in sys.argv[1:])
    output.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(len(EXTENSIONS), get_context("spawn")) as pool:
        count = len(EXTENSIONS)
        said = pool.map(build, EXTENSIONS, [sdists] * count, [output] * count)
        result = dict(zip(EXTENSIONS, said, strict=True))
    write_atomically(output / "peers.json", json.dumps(result, indent=1) + "\n")
    print(*(f"{name}: {words}" for name, words in result.items()), sep="\n")


if __name__ == "__main__":
    main()
