from collections.abc import Iterator

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from hy_prfl.runtime.context_parallel import ContextParallelGroup


@pytest.fixture
def one_of_512_ranks() -> Iterator[None]:
    """torch's pretended process group, which sends nothing."""
    dist.init_process_group("fake", rank=9, world_size=512, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_one_process_has_nobody_to_share_with() -> None:
    with pytest.raises(ValueError, match="`context_parallel_degree` 2 does not divide the number of processes, 1"):
        ContextParallelGroup(2)


@pytest.mark.usefixtures("one_of_512_ranks")
@pytest.mark.parametrize(("ring_degree", "num_groups"), [(1, 1), (2, 3)])
def test_a_rank_makes_only_its_own_groups(ring_degree: int, num_groups: int) -> None:
    """A mesh over 512 ranks would make one for each clip, on every rank."""
    own, of_all_ranks = len(dist.distributed_c10d._world.pg_map), dist.distributed_c10d.get_pg_count()
    group = ContextParallelGroup(4, ring_degree=ring_degree)
    assert len(dist.distributed_c10d._world.pg_map) - own == num_groups
    # Groups whose making takes all 512 ranks.
    assert dist.distributed_c10d.get_pg_count() == of_all_ranks
    assert dist.get_process_group_ranks(group.process_group) == [8, 9, 10, 11]
    assert (group.index, group.num_groups, group.is_first_rank) == (2, 128, False)
    # diffusers' attention with cuDNN compares it with 1.
    assert group.config._world_size == 4
