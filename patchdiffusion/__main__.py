"""python -m patchdiffusion"""

from patchdiffusion.cli import program

program()
