"""`python -m bench.law` from one end to the other, on small images."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from bench import law


@pytest.mark.parametrize("model", ["mlp", "spiking"])
def test_law(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(law.WITHOUT_GRADIENT, "spiking", 256)
    how = "--data digits --images 80 --batch 10 --copies 2 16 --learn 2 --trained 2 --steps 2 --seeds 1"
    techniques = ["--techniques", "pairs", "single copies", "support"]
    monkeypatch.setattr(
        sys, "argv", ["law", "--model", model, *how.split(), *techniques, "--out", str(tmp_path / "law")]
    )
    law.main()
    rows = json.loads((tmp_path / "law.json").read_text())["rows"]
    assert [(row["technique"], row["copies"]) for row in rows] == [(t, n) for t in techniques[1:] for n in (2, 16)]
    for few, many in zip(rows[::2], rows[1::2], strict=True):
        assert few["errors"].keys() == many["errors"].keys() and len(few["errors"]) == (3 if model == "mlp" else 2)
        assert sum(many["errors"].values()) < sum(few["errors"].values()), few["technique"]
    assert (tmp_path / "law.png").stat().st_size > 1000
    assert len(capsys.readouterr().out.splitlines()) == len(rows) + 1
