import pytest

from hy_prfl.runtime.context_parallel import ContextParallelGroup


def test_one_process_has_nobody_to_share_with() -> None:
    with pytest.raises(ValueError, match="`context_parallel_degree` 2 does not divide the number of processes, 1"):
        ContextParallelGroup(2)
