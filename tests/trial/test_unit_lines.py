"""Lines of a shard, wherever it is cut, against a loop over single weights."""

import pytest
import torch

from raysearch.training.engine import Shard
from raysearch.trial.unit_lines import SCALE, Lines

ROWS, COLUMNS = 5, 4


@pytest.mark.parametrize("are_rows", [True, False])
@pytest.mark.parametrize(("start", "stop"), [(0, 20), (0, 11), (11, 20), (6, 7), (4, 12), (3, 18)])
def test_sums_and_products_are_those_of_single_weights(are_rows: bool, start: int, stop: int) -> None:
    unit = torch.tensor([1, 0, 1, 3, 2]) if are_rows else torch.tensor([2, 0, 3, 0])  # 3 is of no unit
    whole = torch.randn(ROWS * COLUMNS, generator=torch.Generator().manual_seed(0))
    flat, factors = whole[start:stop].clone(), torch.tensor([2.0, 3.0, 5.0, 1.0])
    here = unit[start // COLUMNS:-(-stop // COLUMNS)] if are_rows else unit
    lines = Lines(Shard("w", 0, start, flat, flat, 0), here, are_rows, start % COLUMNS, COLUMNS)
    sums = torch.zeros(4, dtype=torch.int64)
    lines.add_to(sums, flat)
    wanted_sums, wanted = [0.0] * 4, []
    for place in range(start, stop):
        of = int(unit[place // COLUMNS if are_rows else place % COLUMNS])
        wanted_sums[of] += float(whole[place])
        wanted.append(float(whole[place]) * float(factors[of]))
    assert (sums / SCALE).tolist() == pytest.approx(wanted_sums, abs=1e-6)
    lines.scale_(flat, factors)
    assert flat.tolist() == pytest.approx(wanted)
