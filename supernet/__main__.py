"""`python -m tossup.supernet` is `tossup`."""

import sys

from .cli import main

sys.exit(main())
