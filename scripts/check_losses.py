"""Says how a short run went, and fails if it did not learn: `python scripts/check_losses.py MODEL_DIR`."""

import math
import statistics
import sys
from pathlib import Path

from t5x_like.reporting.metrics import read_metrics


def main(model_dir: str) -> int:
    records = [r for r in read_metrics(Path(model_dir) / "metrics.jsonl") if r["split"] == "train"]
    losses = [record["loss"] for record in records]
    if len(losses) < 4 or not all(map(math.isfinite, losses)):
        print(f"{model_dir}: losses are missing or not finite: {losses}")
        return 1
    first, last = losses[0], statistics.mean(losses[-2:])
    speed = statistics.median(record["tokens_per_second"] for record in records[1:])
    mfu = f", MFU {statistics.median(r['mfu'] for r in records[1:]):.1%}" if "mfu" in records[-1] else ""
    print(f"{model_dir}: loss {first:.3f} -> {last:.3f}, {speed:,.0f} tokens/s{mfu}")
    return 0 if last < 0.9 * first else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
