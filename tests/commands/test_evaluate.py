"""Tasks from end to end: train, evaluate, and fine-tune from a run."""

import json

import pytest

from t5x_like.commands.main import main

TINY = {"STEPS": 30, "BATCH_SIZE": 8, "SEQUENCE_LENGTH": 24, "WARMUP_STEPS": 2, "LEARNING_RATE": 1e-2}
TINY |= {"StackConfig.num_layers": 1, "MLPConfig.d_ff": 32, "AttentionConfig.num_heads": 2}
TINY |= {"LoggingConfig.sample_tokens": 0, "LoggingConfig.tensorboard": "False"}


def flags(run, folder, **changes):
    bindings = {**TINY, "MODEL_DIR": folder / "run", "TRAIN": folder / "train.jsonl", **changes}
    return [
        "train",
        f"--gin_file=runs/{run}.gin",
        "--num_cpu_devices=8",
        "--gin.RunConfig.logging=@LoggingConfig()",
        *(f"--gin.{name}={value}" for name, value in bindings.items()),
    ]


def write(folder, rows):
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def scores_of(folder, capsys):
    capsys.readouterr()
    assert main(["evaluate", f"--model_dir={folder}/run"]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_text_to_text(tmp_path, capsys):
    write(tmp_path, [{"inputs": f"{i} is", "targets": "even" if i % 2 == 0 else "odd"} for i in range(0, 600, 3)])
    tiny = {"EncoderDecoderConfig.d_model": 32, "TextToText.target_length": 8}
    assert main(flags("t5_tiny_task", tmp_path, **tiny)) == 0
    scores = scores_of(tmp_path, capsys)
    assert {"loss", "perplexity", "accuracy", "exact_match"} <= set(scores)
    # What it writes greedily are whole answers, one of the two.
    assert scores["exact_match"] >= 0.3


@pytest.fixture
def reviews(tmp_path):
    words = ("dull", "fine")
    write(tmp_path, [{"text": f"{i} {words[i % 2]}", "label": words[i % 2]} for i in range(200)])
    return tmp_path


def test_classification_from_a_run(reviews, capsys):
    tiny = {"EncoderConfig.d_model": 32, "LABELS": "('dull', 'fine')"}
    assert main(flags("bert_tiny_task", reviews, **tiny)) == 0
    scores = scores_of(reviews, capsys)
    assert scores["accuracy"] > 0.9
    again = flags("bert_tiny_task", reviews, **tiny, STEPS=4, MODEL_DIR=reviews / "again", FROM=reviews / "run")
    assert main([*again, "--gin_file=tasks/encoder_from_run.gin"]) == 0
    assert "Training complete" in capsys.readouterr().out


def test_mistakes_are_told(reviews, capsys):
    assert main([*flags("bert_tiny_task", reviews, LABELS="('a', 'b', 'c')"), "--dry_run"]) == 2
    assert "num_classes is 2, but ClassificationTask.labels names 3 classes" in capsys.readouterr().err
    assert (
        main([*flags("bert_tiny_task", reviews, **{"EncoderConfig.head": "@RegressionHeadConfig()"}), "--dry_run"]) == 2
    )
    assert "RegressionHeadConfig" in capsys.readouterr().err


def test_classes_of_words(tmp_path, capsys):
    words = ("Ann", "saw", "Bob", "there")
    rows = [[str(i), words[i % 4], words[i // 4 % 4]] for i in range(160)]
    write(tmp_path, [{"words": row, "tags": ["name" if word.istitle() else "other" for word in row]} for row in rows])
    assert main(flags("bert_tiny_tags", tmp_path, **{"EncoderConfig.d_model": 32}, STEPS=20)) == 0
    assert scores_of(tmp_path, capsys)["accuracy"] > 0.6


def test_a_reward_from_preferences(tmp_path, capsys):
    write(tmp_path, [{"prompt": f"Is {i} fine?", "chosen": "yes", "rejected": "not at all"} for i in range(160)])
    assert main(flags("reward_tiny", tmp_path, **{"DecoderConfig.d_model": 32}, STEPS=20)) == 0
    assert scores_of(tmp_path, capsys)["accuracy"] == 1


def test_pairs_of_rows_are_not_parted(tmp_path, capsys):
    write(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    for change, message in {
        "RunConfig.gradient_accumulation=2": "RunConfig.gradient_accumulation is 2, which would part the pairs",
        "DataConfig.batch_size=7": "DataConfig.batch_size is 7, which would part the pairs of rows",
    }.items():
        assert (
            main([*flags("reward_tiny", tmp_path, **{"DecoderConfig.d_model": 32}), f"--gin.{change}", "--dry_run"])
            == 2
        )
        assert message in capsys.readouterr().err
