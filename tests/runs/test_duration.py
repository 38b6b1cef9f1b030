"""How long a run will take."""

import pandas as pd

from jaxprune.runs.duration import estimate


def test_time_is_estimated_by_an_earlier_run(tmp_path):
    assert "no times" in estimate(["a"], tmp_path, "row", "seconds")
    rows = [{"row": "a", "seconds": 60}, {"row": "b", "seconds": 240}]
    pd.DataFrame(rows).to_csv(tmp_path / "metrics.csv", index=False)
    (tmp_path / "environment.json").write_text('{"cpu_count": 2, "device": "cpu"}')
    shown = estimate(["a", "b", "new"], tmp_path, "row", "seconds")
    assert shown.startswith("3 rows; about 8 min")
    assert "2 cores" in shown
    assert "5.0 h" in estimate(["a"] * 300, tmp_path, "row", "seconds")
    assert "no times" in estimate(["a"], tmp_path, "variant", "seconds")
