"""The parts of the offline API: what a call gives and gets, and how it is fed to the engine. Knows no HTTP."""
