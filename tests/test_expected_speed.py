"""experiments/expected_speed.py: the arithmetic by hand, and the table of docs/scaling.md."""

import json
import pathlib

import pytest

from experiments import expected_speed

ROOT = pathlib.Path(__file__).resolve().parent.parent
PRESET = {"problems_per_iteration": 100, "rollouts_per_problem": 8, "rollout_batch": 20}


@pytest.fixture
def config():
    """Qwen2.5-3B's."""
    return json.loads((ROOT / "examples" / "qwen2.5-3b" / "config.json").read_text())


def test_the_speed_by_hand(config):
    """20 problems, 11 nodes a round.  Guards against a factor lost, and bytes taken for numbers."""
    assert expected_speed.count_parameters(config) == 3_085_938_688
    before, now, _ = expected_speed.make_cases(config)
    assert before.kv_bytes == 19.5 * 1024
    assert now.kv_bytes == 3.5 * 1024
    column = expected_speed.expected(before, config, PRESET)
    assert column["nodes a round"] == "11"
    assert column["weights, ms"] == "1.8"  # 6.17 GB / 3.35 TB/s
    assert column["K/V, ms"] == "0.8"  # 11 nodes * 343 tokens * 36 layers * 20 kB / 3.35 TB/s
    assert column["launches, ms"] == "8.7"  # 1,734 kernels * 5 us
    assert column["a round, ms"] == "9.2"  # and 11 nodes * 50 us
    assert column["model tokens a second"] == "1,193"  # 11 / 9.22 ms
    assert column["rollouts, s"] == "268"  # 800 leaves * 400 tokens / 1,193
    assert column["update, s"] == "27"  # 8 * 3.09e9 * 800 * 543 tokens / 396 TFLOP/s
    assert expected_speed.expected(now, config, PRESET)["update, s"] == "27"


def test_the_table_of_the_page_is_what_the_script_prints(capsys):
    expected_speed.main()
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 17
    assert table in (ROOT / "docs" / "scaling.md").read_text()
