"""The table of what noise costs: every sampler has a row, and each is measured as often as asked."""

from __future__ import annotations

from benchmarks import noise


def test_every_sampler_has_a_row_of_positive_times() -> None:
    said: list[str] = []
    found = noise.measure(2, said.append, numbers=20_000, clients=3)
    names = [row["name"] for row in found["rows"]]
    assert len(names) == len(said) == 2 + 2 * len(noise.DEVIATIONS)
    assert "Skellam, sigma 4,096" in names
    assert all(len(row["ms_per_million"]) == 2 and min(row["ms_per_million"]) > 0 for row in found["rows"])
    (_, headings, rows), (_, _, client), (_, wide, server) = noise.grids(found)
    assert {len(row) for row in [*rows, *client]} == {len(headings)}
    assert [len(row) for row in server] == [len(wide)] * len(noise.SERVERS)
    around = {"date": "2020-01-01T", "command": ["x"], "versions": {"numpy": "2"}, "machine": {"processor": "p"}}
    assert "Skellam, sigma 300" in noise.section(found, around, 2)
