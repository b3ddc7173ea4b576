"""The data plane: one unprivileged process per mount, the only one that touches guest files."""
