"""The engines that are compared, each in a process of its own and behind one interface. `job.py` has the interface."""
