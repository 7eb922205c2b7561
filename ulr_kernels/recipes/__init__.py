"""Whole jobs from one command: data, models, training with checkpoints, and reports. The command line calls these."""


class JobError(Exception):
    """What the user asked for cannot be done, for a reason that one line explains; nothing has been written."""
