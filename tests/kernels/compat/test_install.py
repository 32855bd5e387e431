"""`install()`: upstreams' import names, in processes where nothing is imported yet."""

import json
import subprocess
import sys
from functools import lru_cache
from types import ModuleType

import pytest

from tossup.kernels.compat.install import LAZY, PROBES, forget_probes

# mamba-ssm is there, as an oracle: it is hidden where a test says so.
PRELUDE = """
import importlib, importlib.metadata, importlib.util, sys
from tossup.kernels import compat
OTHERS = ("flash_attn", "causal_conv1d")
"""


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRELUDE + script], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_names_are_there_until_they_are_uninstalled():
    run("""
path = list(sys.meta_path)
installation = compat.install(packages=OTHERS)
from flash_attn import flash_attn_func
from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_varlen_func
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
import flash_attn
assert flash_attn_func is compat.flash_attn_func and flash_attn.__version__ == "2.8.3"
assert causal_conv1d_fn is compat.causal_conv1d_fn and flash_attn.__tossup__
assert importlib.metadata.version("flash-attn") == "2.8.3"
assert importlib.metadata.version("causal_conv1d") == "1.7.0"
assert importlib.util.find_spec("causal_conv1d") is not None
try:
    import flash_attn.ops
    raise SystemExit("a module that is not there was found")
except ModuleNotFoundError:
    pass
installation.uninstall()
installation.uninstall()
assert sys.meta_path == path
assert not any(name.partition(".")[0] in OTHERS for name in sys.modules)
assert all(importlib.util.find_spec(name) is None for name in OTHERS)
""")


def test_a_real_package_is_not_hidden_unless_told_to():
    run("""
real = importlib.util.find_spec("mamba_ssm").origin
path = list(sys.meta_path)
try:
    compat.install()
    raise SystemExit("mamba_ssm was hidden")
except ImportError as error:
    assert str(error) == "force must be True to hide the package mamba_ssm that is there, got False"
assert sys.meta_path == path
with compat.install(force=True):
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    assert selective_scan_fn is compat.selective_scan_fn
    assert selective_state_update is compat.selective_state_update
    assert importlib.metadata.version("mamba-ssm") == "2.0.3"
    import mamba_ssm
    import mamba_ssm.ops.selective_scan_interface as interface
    assert interface.selective_scan_ref is compat.selective_scan_ref
    assert "tossup.supernet" not in sys.modules  # the functions need no more than their floor
    from mamba_ssm import Mamba
    from mamba_ssm.modules.mamba_simple import Mamba as simple
    import tossup
    assert Mamba is simple is tossup.Mamba and "Mamba" in mamba_ssm.__all__
    assert not hasattr(mamba_ssm, "Mamba2") and not hasattr(interface, "Mamba")
assert importlib.util.find_spec("mamba_ssm").origin == real
""")


def test_other_names_are_refused():
    with pytest.raises(ValueError, match=r"packages must be of flash_attn, .* got 'fla'"):
        from tossup.kernels import compat

        compat.install(packages=["fla"])
    with pytest.raises(ValueError, match=r"packages must be a list of names, .* 'flash_attn'$"):
        compat.install(packages="flash_attn")


@pytest.mark.parametrize("other", [PROBES, LAZY])
def test_a_transformers_of_other_names_is_told_of(other, monkeypatch):
    for name in (PROBES, LAZY):
        module = ModuleType(name)
        if name != other:
            module._flash_fn = lru_cache(lambda: True)
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.warns(UserWarning, match=f"{other} keeps none of the names"):
        forget_probes(["flash_attn"])


MAMBA = """
import torch
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba as module
torch.manual_seed(0)
config = MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=2)
model = MambaForCausalLM(config).eval()
tokens = torch.arange(14).view(2, 7)
logits = model(tokens).logits
logits.square().sum().backward()
gradient = model.backbone.layers[0].mixer.A_log.grad
print(torch.cat([logits.flatten(), gradient.flatten()]).tolist())
"""


def test_mamba_of_transformers_takes_them_and_computes_the_same():
    spies = """
calls = []
def counted(function):
    import functools
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        calls.append(function.__name__)
        return function(*args, **kwargs)
    return wrapper
from tossup.kernels.compat import causal_conv1d, install, mamba_ssm
for module, name in ((mamba_ssm, "selective_scan_fn"), (mamba_ssm, "mamba_inner_fn"),
                     (causal_conv1d, "causal_conv1d_fn")):
    setattr(module, name, counted(getattr(module, name)))
compat.install(force=True)
"""
    ours = run(spies + MAMBA + "print(sorted(set(calls)))").splitlines()
    hidden = "sys.modules.update(mamba_ssm=None)\n"  # its CUDA extension is not there
    theirs = run(hidden + MAMBA).splitlines()
    assert "mamba_inner_fn" in ours[-1] or "selective_scan_fn" in ours[-1]
    numbers, expected = (json.loads(lines[0]) for lines in (ours, theirs))
    assert numbers == pytest.approx(expected, rel=1e-3, abs=1e-4)


LLAMA = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)
model = LlamaForCausalLM(config).eval()
tokens = torch.arange(14).view(2, 7)
mask = torch.ones(2, 7, dtype=torch.long)
mask[0, :3] = 0
"""


ATTENTION = """
from transformers import modeling_flash_attention_utils as utils
utils.is_flash_attn_2_available = lambda: True
utils.lazy_import_flash_attention("flash_attention_2")

def logits(attention, **options):
    model.config._attn_implementation_internal = attention
    return model(tokens, **options).logits

for options, kept in (({}, slice(None)), ({"attention_mask": mask}, mask.bool())):
    ours, theirs = (logits(name, **options)[kept] for name in ("flash_attention_2", "eager"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.equal(ours, theirs)  # two implementations did run
"""


def test_flash_attention_of_transformers_takes_them_and_computes_the_same():
    """transformers refuses to choose it on a CPU, so that its check is passed by."""
    run("compat.install(packages=OTHERS)" + LLAMA + ATTENTION)
