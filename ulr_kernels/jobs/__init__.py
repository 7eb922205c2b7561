"""Parts shared by `ulr train` and `ulr finetune`: run folders, checkpoints, settings, memory, plots, schedules."""


class JobError(Exception):
    """A job that cannot be done, for a reason that one line explains; nothing has been written."""
