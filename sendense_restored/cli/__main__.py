"""``python -m sendense_restored.cli``."""

from .main import main

main()
