"""``python -m ctrport`` is the command ``ctrport``."""

from .cli import main

main()
