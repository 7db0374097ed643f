"""What can be learned: one file per task, all behind one protocol."""

from attnzoo.errors import unknown
from train.config import Config
from train.tasks.base import Task
from train.tasks.digits import Digits
from train.tasks.text import Text

TASKS: dict[str, type[Task]] = {task.name: task for task in (Text, Digits)}


def task_class(name: str) -> type[Task]:
    """The task called `name`; raises ValueError, with the nearest names, if there is none."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]


def make_task(config: Config) -> Task:
    """The task of a configuration, with its data opened."""
    return task_class(config.task)(config)
