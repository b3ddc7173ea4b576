"""The laboratory: a machine around the daemon, made for the demo and the tests and gone with them.

A mount namespace with a ``/run`` of its own, a system bus, the real polkitd, users, and guests whose disks are
backed up while they run. Everything is a context manager that undoes what it did; what a killed laboratory leaves
behind is undone by the kernel (the namespace, the parent-death signals).
"""
