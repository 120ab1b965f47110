"""`python -m hywia_kernels.cli`."""

import sys

from .entry import main

sys.exit(main())
