"""What is refused before sharding; tests/test_checkpoint/test_sharding.py has the rest."""

import pytest

import mmpeft
from mmpeft.errors import UsageError
from mmpeft.training.sharding import shard_adapters
from tests.test_checkpoint.sharded_run import network


def test_adapters_of_activations_stay_in_their_block():
    model = network('transformer')
    mmpeft.inject(model, dict(type='ParallelAdapter'))
    with pytest.raises(UsageError, match=r'blocks\.0\.\S+ \(ParallelAdapter\) acts on activations'):
        shard_adapters(model)
