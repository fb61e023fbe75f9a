"""`python -m train` is `jaxmods`."""

import sys

from train.cli import main

sys.exit(main())
