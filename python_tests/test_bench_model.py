"""The performance model says what its arithmetic must."""

from __future__ import annotations

import pytest

from bench import model
from ulr_kernels import cli

H100 = model.DEVICES["h100"]


@pytest.mark.parametrize("size,many_copies", [(2, "instructions"), (4, "memory")])  # fp32 outputs take the bytes
def test_many_copies_are_limited_by_their_noise_or_outputs_and_long_products_are_not(size, many_copies) -> None:
    assert model.predict(model.linear(8192, 4096, 16, 64, size), H100)[2] == many_copies
    assert model.predict(model.linear(8192, 4096, 8192, 1, size), H100)[2] in ("shared memory", "L2")


def test_work_counts() -> None:
    short, long = (model.linear(8192, 4096, inputs, 1, 2).phases[0].seconds(H100) for inputs in (1024, 2048))
    assert long["tensor cores"] == pytest.approx(2 * short["tensor cores"])
    # 2 M N K operations at 0.6 of 989 TFLOP/s; 2048 blocks in 16 rounds of 132 are 3 % more than that.
    assert short["tensor cores"] == pytest.approx(2 * 8192 * 4096 * 1024 / (0.6 * 949e12), rel=0.05)
    assert long["instructions"] == short["instructions"]
    least, most, _ = model.predict(model.linear(8192, 4096, 1024, 1, 2), H100)
    assert least < most < 2 * least


def test_the_table_says_that_it_predicts(capsys) -> None:
    cli.main(["bench", "--model", "h100"])
    text = capsys.readouterr().out
    assert text.startswith("Predicted for H100") and "no goal is met" in text
    lines = text.strip().splitlines()[4:]
    assert len(lines) == 1 + len(list(model.works(H100)))
    assert all(line.split()[0] in ("kernel", "noisy_linear", "noisy_linear_grad_", "noisy_mlp_step") for line in lines)
