"""The command line: a D-Bus client like any other."""
