"""`python -m hywia_kernels`, which is how torchrun starts the command line."""

import sys

from .cli import main

sys.exit(main())
