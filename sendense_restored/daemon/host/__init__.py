"""Everything that touches the kernel, one module per kind of thing."""
