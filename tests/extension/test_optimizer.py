import re
from pathlib import Path

SIGNUM = re.search(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs" / "parts.md").read_text(), re.S)[1]


def test_the_optimizer_of_the_documentation(train, tmp_path):
    train(SIGNUM, **{"OptimizerConfig.algorithm": "@SignumConfig()", "SignumConfig.weight_decay": 0.01})
    assert "SignumConfig.weight_decay = 0.01" in (tmp_path / "run" / "operative_config.gin").read_text()
