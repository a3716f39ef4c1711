"""What `make gpu` says of the machine, on a GPU."""

import pytest


@pytest.mark.cuda
def test_the_machine_is_described_with_its_matrix_rate(repo, monkeypatch):
    monkeypatch.syspath_prepend(repo / "benchmarks")
    import gpu

    machine = gpu.describe_machine("cuda")
    assert machine["matrix_rate"] > 1e12 and machine["matrix_size"] == 8192
    assert machine["device_memory_gb"] > 1 and machine["versions"]["torch"]
