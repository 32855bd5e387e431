"""`python -m tossup.supernet` is `tossup`."""

import os
import sys

from .cli import main

code = main()
if "RANK" in os.environ:  # one of torchrun's
    from .ranks import end

    end(code)
sys.exit(code)
