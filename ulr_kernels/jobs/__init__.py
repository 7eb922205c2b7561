"""What `ulr train` and `ulr finetune` share: run folders, checkpoints, rules for settings, memory, plots, schedules."""


class JobError(Exception):
    """A job that cannot be done, for a reason that one line explains; nothing has been written."""
