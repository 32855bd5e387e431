"""Before anything imports Triton: without a GPU its kernels run in the interpreter, on the CPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The tensors of tests are tiny: a second thread costs more than it brings.
torch.set_num_threads(1)
