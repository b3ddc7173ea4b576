"""Virtual machines that the tests run in: a real systemd, D-Bus, polkit, udev and NBD.

``image`` builds a Debian system once and keeps it, ``project`` puts what is tested on a disk of its own, ``qemu``
boots the two, ``outside`` makes pytest run tests in there, ``runner`` and ``inside`` are its part in the machine.
"""
