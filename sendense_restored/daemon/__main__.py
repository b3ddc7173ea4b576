"""``python -m sendense_restored.daemon``."""

from .main import main

main()
