import json

from t5x_like.commands.main import main
from tests import toy

STAGE = '''
from t5x_like.configurable import configurable
from t5x_like.data.prepare.document import Document, Dropped, Stage


@configurable
class WithoutFilter(Stage):
    """Drops documents with a word.

    Attributes:
      word: the word.
    """

    word: str

    def process(self, document: Document) -> Document | Dropped:
        return Dropped(f"says {self.word}") if self.word in document.text.split() else document
'''


def test_a_stage_of_prepare(train, plugin, tmp_path, capsys):
    toy.write_text(tmp_path)
    words = (tmp_path / "text.txt").read_text().split()
    documents = [" ".join(words[at : at + 5]) for at in range(0, len(words), 5)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    kept = sum("dog" not in text.split() for text in documents)
    assert 0 < kept < len(documents)
    flags = [f"--from={tmp_path}/in.jsonl", f"--to={tmp_path}/corpus", "--workers=1", plugin(STAGE)]
    stages = ["--gin.PrepareConfig.stages=(@NormalizeText(), @WithoutFilter())", "--gin.WithoutFilter.word=dog"]
    plain = {"Deduplication.near": None, "Deduplication.documents": False}
    plain["PrepareConfig.tokenizer"] = "@ByteTokenizerConfig()"
    stages += [f"--gin.{name}={value}" for name, value in plain.items()]
    assert main(["prepare", "--gin_file=prepare/default.gin", *flags, *stages]) == 0
    assert f"{kept} of {len(documents)} documents" in capsys.readouterr().out
    source = {"DataConfig.source": "@PreparedSource()", "PreparedSource.directory": tmp_path / "corpus"}
    plain = {"DataConfig.tokenizer": "None", "DataConfig.split": "document", "TEXT_FILES": None}
    train(STAGE, **source, **plain)
