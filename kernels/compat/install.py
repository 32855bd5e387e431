"""Tossup's functions under the import names of flash-attn, mamba-ssm and causal-conv1d.

A finder on `sys.meta_path` answers for those names: it makes their modules, and the metadata that
`importlib.metadata` reports of them. So `import`, `importlib.util.find_spec` and probes for a
version all see one and the same package, and with the finder all of it is gone.
"""

import importlib
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from . import bert_padding, causal_conv1d, flash_attn, mamba_ssm

__all__ = ["Installation", "install"]


class Package(NamedTuple):
    """What stands in for a package of upstream's."""

    distribution: str
    version: str
    modules: dict[str, tuple[ModuleType, Sequence[str]]]  # by full name: our module, its exports


SCAN = ("mamba_inner_fn", "selective_scan_fn")
MIXER = ("Mamba",)
UPDATE = ("selective_state_update",)
NOTHING: tuple[str, ...] = ()
PACKAGES = {
    "flash_attn": Package(
        "flash-attn",
        "2.8.3",
        {
            "flash_attn": (flash_attn, flash_attn.__all__),
            "flash_attn.bert_padding": (bert_padding, bert_padding.__all__),
            "flash_attn.flash_attn_interface": (flash_attn, flash_attn.__all__),
        },
    ),
    # The newest version that says to those who probe for Mamba-2 (transformers from 2.0.4 on) that
    # there is none. Signatures are those of 2.3.2, which only adds arguments.
    "mamba_ssm": Package(
        "mamba-ssm",
        "2.0.3",
        {
            "mamba_ssm": (mamba_ssm, (*SCAN, *MIXER)),
            "mamba_ssm.modules": (mamba_ssm, NOTHING),
            "mamba_ssm.modules.mamba_simple": (mamba_ssm, MIXER),
            "mamba_ssm.ops": (mamba_ssm, NOTHING),
            "mamba_ssm.ops.selective_scan_interface": (mamba_ssm, (*SCAN, "selective_scan_ref")),
            "mamba_ssm.ops.triton": (mamba_ssm, NOTHING),
            "mamba_ssm.ops.triton.selective_state_update": (mamba_ssm, UPDATE),
        },
    ),
    "causal_conv1d": Package(
        "causal-conv1d",
        "1.7.0",
        {
            "causal_conv1d": (causal_conv1d, causal_conv1d.__all__),
            "causal_conv1d.causal_conv1d_interface": (causal_conv1d, causal_conv1d.__all__),
        },
    ),
}


def install(
    *,
    force: bool = False,
    packages: Iterable[str] = ("flash_attn", "mamba_ssm", "causal_conv1d"),
) -> "Installation":
    """Let imports of flash-attn, mamba-ssm and causal-conv1d find Tossup's functions and Mamba.

    Call it before anything imports those names: a module that is imported while this is in force
    keeps the functions it found, and one that was imported before keeps its own. In particular,
    transformers' model files look for them when they are imported.

    force: hide packages of these names that are there, imported or not, until `uninstall`.
    packages: which of them, by import name. One that is in place already is left as it is.

    Returns the installation, to `uninstall`, or to leave as a context manager. The modules have the
    versions `flash_attn` 2.8.3, `mamba_ssm` 2.0.3 and `causal_conv1d` 1.7.0, and `__tossup__` True.
    Raises ValueError for other names, and ImportError where force is False and a package of the
    name is there; then nothing has changed.
    """
    if isinstance(packages, str):
        raise ValueError(f"packages must be a list of names, got the one string {packages!r}")
    wanted = tuple(packages)
    for name in wanted:
        if name not in PACKAGES:
            raise ValueError(f"packages must be of {', '.join(PACKAGES)}, got {name!r}")
    new = tuple(name for name in dict.fromkeys(wanted) if not installed(name))
    taken = [name for name in new if present(name)]
    if taken and not force:
        raise ImportError(
            f"force must be True to hide the package {' and '.join(taken)} that is there, got False"
        )
    return Installation(new)


class Installation(MetaPathFinder, Loader):
    """Packages of upstream's names in force, from its making until `uninstall`.

    packages: their import names; each is undone by the installation that put it in place.
    """

    def __init__(self, packages: tuple[str, ...]):
        self.packages = packages
        self._hidden = self._withdraw()
        self._lazy = forget_probes(packages)
        sys.meta_path.insert(0, self)

    def uninstall(self) -> None:
        """Put sys.modules and sys.meta_path back, and what was hidden. Twice is as good as once."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self._withdraw()
            sys.modules.update(self._hidden)
            forget_probes(self.packages, self._lazy)

    def __enter__(self) -> "Installation":
        return self

    def __exit__(self, *error: object) -> None:
        self.uninstall()

    def _withdraw(self) -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.partition(".")[0] in self.packages]
        return {name: sys.modules.pop(name) for name in names}

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        package = fullname.partition(".")[0]
        if package not in self.packages or fullname not in PACKAGES[package].modules:
            return None
        source, _ = PACKAGES[package].modules[fullname]
        inner = any(name.startswith(f"{fullname}.") for name in PACKAGES[package].modules)
        return spec_from_file_location(
            fullname,
            source.__file__,
            loader=self,
            submodule_search_locations=[] if inner else None,
        )

    def exec_module(self, module: ModuleType) -> None:
        package = PACKAGES[module.__name__.partition(".")[0]]
        source, exports = package.modules[module.__name__]
        here = vars(source)
        contents: dict[str, Any] = {name: here[name] for name in exports if name in here}
        if len(contents) < len(exports):  # the others the source brings when they are asked for
            contents["__getattr__"] = here["__getattr__"]
        vars(module).update(contents, __doc__=source.__doc__, __all__=[*exports], __tossup__=True)
        if module.__name__ in PACKAGES:
            vars(module).update(__version__=package.version)
            for name in package.modules:  # upstream's roots import theirs, so `a.b.c` needs no more
                importlib.import_module(name)

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterator[Distribution]:
        name = None if context is None else context.name
        for package in self.packages:
            if name is None or normalized(name) == PACKAGES[package].distribution:
                yield Metadata(package)


class Metadata(Distribution):
    """What `importlib.metadata` knows about an installed package."""

    def __init__(self, package: str):
        self._package = package

    def read_text(self, filename: str) -> str | None:
        name, version, _ = PACKAGES[self._package]
        files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            "top_level.txt": f"{self._package}\n",
        }
        return files.get(filename)

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent / path


def normalized(name: str) -> str:
    """A distribution's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(package: str) -> bool:
    finders = (finder for finder in sys.meta_path if isinstance(finder, Installation))
    return any(package in finder.packages for finder in finders)


def present(package: str) -> bool:
    """Whether a package of that name is there. A mere folder of that name is none."""
    if package in sys.modules:
        return True
    spec = find_spec(package)
    return spec is not None and spec.origin is not None


# transformers remembers what it found: answers of probes, and the functions of flash-attn.
PROBES = "transformers.utils.import_utils"
LAZY = "transformers.modeling_flash_attention_utils"
LAZY_NAMES = (
    "_loaded_implementation",
    "_flash_fn",
    "_flash_varlen_fn",
    "_flash_with_kvcache_fn",
    "_pad_fn",
    "_unpad_fn",
    "_process_flash_kwargs_fn",
    "_process_with_kvcache_kwargs_fn",
)


def warn_of(module: str) -> None:
    warnings.warn(
        f"{module} keeps none of the names that are known here: import transformers after this",
        stacklevel=4,
    )


def forget_probes(packages: Sequence[str], lazy: dict[str, Any] | None = None) -> dict[str, Any]:
    """Let an imported transformers probe anew, and set what it keeps of flash-attn to `lazy`.

    Returns what it kept. Warns where a transformers has no such names, as it may go on believing
    that the packages are absent.
    """
    if PROBES in sys.modules:
        probes = [p for p in vars(sys.modules[PROBES]).values() if hasattr(p, "cache_clear")]
        for probe in probes:
            probe.cache_clear()
        if not probes:
            warn_of(PROBES)
    if "flash_attn" not in packages or LAZY not in sys.modules:
        return {}
    names = vars(sys.modules[LAZY])
    kept = {name: names[name] for name in LAZY_NAMES if name in names}
    if not kept:
        warn_of(LAZY)
    names.update({name: (lazy or {}).get(name) for name in kept})
    return kept
