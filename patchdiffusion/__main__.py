"""python -m patchdiffusion"""

try:
    from patchdiffusion.cli import program
except KeyboardInterrupt:
    raise SystemExit(130) from None

program()
