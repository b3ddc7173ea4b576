"""What the service costs beside the bare tools, measured: ``tools/bench``.

Absolute times say little on a machine that others use as well. So whatever has a counterpart is measured against it
in the same run, in pairs whose order alternates (ABBA): a slow moment of the machine hits both sides of a pair, and a
machine that gets slower favours neither. What is judged is the median of the pairs' ratios.

``figures`` has the arithmetic, ``stage`` the laboratory, ``material`` the disks, ``worker`` the processes whose work
is timed. The measurements themselves are in ``mounting``, ``listing``, ``reading`` and ``footprint``; ``report`` and
``plots`` show what they found.
"""
