"""Python imports this when it starts, where `protections.py` asks for it: a protection is gone."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import protections

protections.take_out(os.environ["FAULTS_WITHOUT"])
