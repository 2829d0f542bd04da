"""python -m patchdiffusion"""

import sys

from patchdiffusion.cli import main

sys.exit(main())
