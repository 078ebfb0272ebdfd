"""`python -m espl_train` is `espl-train`; torchrun starts it that way."""

import sys

from espl_train.cli import main

sys.exit(main())
