"""The control plane: owns block devices and mounts; never reads a guest file itself."""
