"""``python -m sendense_restored.reader``: started by the daemon, of no use by hand."""

import sys

from .main import main

main(sys.argv[1:])
