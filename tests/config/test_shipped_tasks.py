"""The shipped tasks build, and pose examples as their papers do."""

import pytest

from t5x_like.config import parse_config
from t5x_like.config.parse import SHIPPED
from t5x_like.data.tasks.texts import TextToTextTask
from t5x_like.training.experiment import Experiment

NAMES = sorted(str(path.relative_to(SHIPPED)) for path in (SHIPPED / "tasks").glob("*/*.gin"))
GIVEN = ("FROM='run'", "SPIECE_MODEL='spiece.model'"), ("FROM='run'", "TOKENIZER_FILE='tokenizer.json'")

# Raffel et al. 2020, appendix D: original fields and label, processed input, processed target.
PUBLISHED = {
    "cola": (
        {"sentence": "John made Bill master of himself.", "label": 1},
        "cola sentence: John made Bill master of himself.",
        "acceptable",
    ),
    "rte": (
        {
            "sentence1": "A smaller proportion of Yugoslavia's Italians were settled in Slovenia (at the 1991 national "
            "census, some 3078).",
            "sentence2": "Slovenia has 3,078 inhabitants.",
            "label": 1,
        },
        "rte sentence1: A smaller proportion of Yugoslavia's Italians were settled in Slovenia (at the 1991 national "
        "census, some 3078). sentence2: Slovenia has 3,078 inhabitants.",
        "not_entailment",
    ),
    "mnli": (
        {
            "hypothesis": "The St. Louis Cardinals have always won.",
            "premise": "yeah well losing is i mean i'm i'm originally from Saint Louis and Saint Louis Cardinals when "
            "they were there were uh a mostly a losing team but",
            "label": 2,
        },
        "mnli hypothesis: The St. Louis Cardinals have always won. premise: yeah well losing is i mean i'm i'm "
        "originally from Saint Louis and Saint Louis Cardinals when they were there were uh a mostly a losing team but",
        "contradiction",
    ),
    "stsb": (
        {
            "sentence1": "Representatives for Puretunes could not immediately be reached for comment Wednesday.",
            "sentence2": "Puretunes representatives could not be located Thursday to comment on the suit.",
            "label": 3.25,
        },
        "stsb sentence1: Representatives for Puretunes could not immediately be reached for comment Wednesday. "
        "sentence2: Puretunes representatives could not be located Thursday to comment on the suit.",
        "3.2",
    ),
}


def build(name: str) -> Experiment:
    is_t5 = name.startswith("tasks/t5/")
    run = "runs/t5_base_task.gin" if is_t5 else "runs/bert_base_task.gin"
    return parse_config([run, name], GIVEN[0 if is_t5 else 1], []).build(Experiment)


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_task_fits_its_model(name):
    [task] = build(name).data.tasks
    assert task.metrics
    assert task.records.name


@pytest.mark.parametrize("name", PUBLISHED)
def test_examples_are_those_of_the_paper(name):
    record, inputs, targets = PUBLISHED[name]
    [task] = build(f"tasks/t5/{name}.gin").data.tasks
    assert isinstance(task, TextToTextTask)
    assert task.texts(record) == [inputs, targets]


def test_a_task_in_place_of_another_keeps_none_of_its_settings():
    files = ["runs/t5_base_task.gin", "tasks/t5/mnli.gin", "tasks/t5/squad.gin", "tasks/t5/wmt14_en_de.gin"]
    data = parse_config([*files, "tasks/t5/stsb.gin"], GIVEN[0], []).build(Experiment).data
    assert data == build("tasks/t5/stsb.gin").data
    files = ["runs/bert_base_task.gin", "tasks/bert/mnli.gin", "tasks/bert/cola.gin"]
    experiment = parse_config(files, GIVEN[1], []).build(Experiment)
    assert experiment.data.source.second == ""
    assert experiment.model.head.num_classes == 2


def test_another_run_and_records_of_ones_own():
    files = ["runs/t5_tiny_task.gin", "tasks/from_run.gin"]
    experiment = parse_config(files, ["FROM='runs/t5_tiny'", "TRAIN='a.jsonl'"], []).build(Experiment)
    assert experiment.data.tokenizer.model_dir == experiment.run.initialize_from.model_dir == "runs/t5_tiny"
    bindings = [*GIVEN[1], "RECORDS=@JsonRecords()", "JsonRecords.train='a.jsonl'"]
    experiment = parse_config(["runs/bert_base_task.gin", "tasks/bert/rte.gin"], bindings, []).build(Experiment)
    assert experiment.data.source.records.train == "a.jsonl"


@pytest.mark.parametrize("name", ["chat", "instructions"])
def test_tasks_of_decoders(name):
    files = ["runs/llama3_8b.gin", f"tasks/{name}.gin"]
    bindings = ["TOKENIZER_FILE='tokenizer.json'", "TRAIN='a.jsonl'"]
    experiment = parse_config(files, bindings, []).build(Experiment)
    assert experiment.data.tasks
