"""All kinds of tasks that are configured."""

from t5x_like.data.tasks.chat import ChatTask
from t5x_like.data.tasks.labels import ClassificationTask, RegressionTask
from t5x_like.data.tasks.spans import SpanTask
from t5x_like.data.tasks.task import Task
from t5x_like.data.tasks.texts import TextToTextTask

AnyTask = TextToTextTask | ChatTask | ClassificationTask | RegressionTask | SpanTask | Task
