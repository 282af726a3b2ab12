"""`python -m axk1`, which torchrun and accelerate launch."""

import sys

from axk1 import main

sys.exit(main())
