"""What `prepare` is told."""

from t5x_like.configurable import configurable, import_parts
from t5x_like.data.prepare.document import Stage
from t5x_like.data.prepare.extraction import HtmlExtraction
from t5x_like.data.prepare.readers import Reading
from t5x_like.data.prepare.signatures import NearDuplicates
from t5x_like.data.prepare.stages.text import NormalizeText
from t5x_like.data.subwords import SentencePieceConfig
from t5x_like.data.tokenizers import TokenizerConfig
from t5x_like.errors import UserError


@configurable
class Deduplication:
    """What is kept once only; of duplicates the first in the order of the files stays.

    Attributes:
      documents: Whether documents with the same text are.
      near: How near duplicates are found; None: they are not looked for.
      lines: Whether lines are, over the whole corpus: notices that stand on every page. Lines are the same if their
        letters are, in lower case.
      min_line_letters: Lines with fewer letters are always kept.
    """

    documents: bool = True
    near: NearDuplicates | None = NearDuplicates()
    lines: bool = False
    min_line_letters: int = 40


@configurable
class PrepareConfig:
    """A corpus from files: documents are read, extracted, cleaned, deduplicated, tokenised and kept in shards.

    Attributes:
      files: Paths, directories or globs (`**` descends), local or remote (`gs://...`); one string, or several. Each
        is a source in the report.
      directory: Where the corpus goes: a local directory, new or of the same preparation, which is then finished.
      reading: How files become documents.
      html: How web pages become text.
      stages: What is done to every document, in this order.
      deduplication: What is kept once only.
      tokenizer: Trained on a sample of the corpus, or loaded.
      shard_bytes: Input that becomes one shard, as it is on disk; a unit of work, too.
      keep_text: Whether the cleaned text is kept beside the tokens (`text/*.jsonl.gz`).
    """

    files: str | tuple[str, ...]
    directory: str
    reading: Reading = Reading()
    html: HtmlExtraction = HtmlExtraction()
    stages: tuple[Stage, ...] = (NormalizeText(),)
    deduplication: Deduplication = Deduplication()
    tokenizer: TokenizerConfig = SentencePieceConfig(vocab_size=32_000)
    shard_bytes: int = 2**26
    keep_text: bool = False

    def __post_init__(self):
        if not self.files:
            raise UserError("PrepareConfig.files is empty: give at least one path, directory or glob.")
        if "://" in self.directory:
            raise UserError(
                f"PrepareConfig.directory={self.directory!r}: shards are written to, and read from, a file system; "
                "mount the bucket (gcsfuse), or copy the finished directory."
            )
        if self.shard_bytes < 1:
            raise UserError(f"PrepareConfig.shard_bytes={self.shard_bytes}: must be positive.")

    @property
    def patterns(self) -> tuple[str, ...]:
        return (self.files,) if isinstance(self.files, str) else self.files


import_parts("t5x_like.data", "t5x_like.data.prepare.stages")
