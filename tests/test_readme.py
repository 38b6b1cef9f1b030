"""The README's example runs as it is printed."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(compile(example, "README.md", "exec"), names)
    errors = [float(number) for number in capsys.readouterr().out.split()]
    assert len(errors) == 4
    assert all(0 < error < 1 for error in errors)
    assert names["wanda"].keep_mask.shape == (3, 16, 4)
