"""Length-bucketed batches: the padding of a fixed data set, and properties of the sampler."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard

from petl.data.batch_sampler import Buckets, padding_fraction
from petl.data.bucketing import BucketBatchSampler, bucket_edges
from petl.errors import InputError
from petl.experiments.planning.bucket_estimate import describe
from petl.training.dataloader import buckets_of
from petl.training.runs.settings import TrainConfig

LENGTHS = np.clip(np.random.default_rng(0).lognormal(4.5, 0.8, 20_000), 4, 1024).astype(int)
SOME = LENGTHS[:500]


def lengths_of(batches, lengths=LENGTHS) -> list[list[int]]:
    return [[int(lengths[i]) for i in batch] for batch in batches]


# The fixture


@pytest.mark.parametrize(
    ("n_buckets", "padding"), [(1, 0.61), (5, 0.257), (10, 0.151), (20, 0.084), (30, 0.057)]
)
def test_buckets_lower_the_padding_of_the_fixture(n_buckets, padding):
    sampler = BucketBatchSampler(LENGTHS, n_buckets=n_buckets, max_tokens=4096)
    assert sampler.padding_ratio() == pytest.approx(padding, abs=0.01)
    positions = sum(len(batch) * max(batch) for batch in lengths_of(sampler))
    assert sampler.padding_ratio() == pytest.approx(1 - LENGTHS.sum() / positions)


def test_sub_buckets_lower_the_padding_of_noisy_outputs_and_leave_that_of_inputs():
    # outputs with lognormal noise, whose spread gives 64 % of padding with one sub-bucket
    noise = np.random.default_rng(1).lognormal(0, 0.62, len(LENGTHS))
    outputs = np.maximum(1, (LENGTHS * noise * 0.3).astype(int))
    samplers = [
        BucketBatchSampler(LENGTHS, out_lengths=outputs, sub_buckets=n, max_tokens=4096)
        for n in (1, 2, 3, 5)
    ]
    found = [sampler.padding_ratio(outputs=True) for sampler in samplers]
    assert found == pytest.approx([0.64, 0.45, 0.35, 0.24], abs=0.04)
    inputs = [sampler.padding_ratio() for sampler in samplers]
    assert inputs == pytest.approx([0.151] * 4, abs=0.02)


# Edges


def test_edges_follow_the_cumulative_sum():
    def walk(lengths, n_buckets):
        edges, running = [], 0
        for length in sorted(lengths):
            running += length
            if running > sum(lengths) / n_buckets:
                edges.append(length)
                running = 0
        return edges

    for n_buckets in (1, 2, 7, 30):
        assert bucket_edges(SOME, n_buckets) == walk(SOME.tolist(), n_buckets)
    assert bucket_edges([5] * 8, 4) == [5, 5]  # three rows each, and two that are no bucket


def test_a_length_equal_to_an_edge_is_in_the_lower_bucket():
    sampler = BucketBatchSampler([3, 5, 6, 9, 5], edges=[5, 8], batch_sizes=[2, 1, 1])
    assert [rows.tolist() for rows in sampler.buckets] == [[0, 1, 4], [2], [3]]


def test_outlier_outputs_do_not_move_edges_and_no_row_is_lost():
    lengths, outputs = np.full(200, 10), np.r_[np.arange(1, 200) % 10 + 1, 900]
    settings = {"out_lengths": outputs, "n_buckets": 1, "sub_buckets": 2, "batch_sizes": 8}
    usual = BucketBatchSampler(lengths, **settings).buckets
    assert 199 in usual[-1]
    moved = BucketBatchSampler(lengths, **settings, ratio_sigma=1e9).buckets
    assert len(moved[-1]) < len(usual[-1])


def test_lenient_lookup_moves_a_long_output_to_a_longer_bucket():
    lengths = np.r_[np.full(100, 10), np.full(50, 100), 10]
    outputs = np.r_[np.arange(100) % 5 + 1, np.arange(50) % 50 + 1, 30]
    settings = {"out_lengths": outputs, "edges": [10], "sub_buckets": 2, "batch_sizes": 4}
    strict, lenient = (BucketBatchSampler(lengths, **settings, strict=s) for s in (True, False))
    assert [150 in rows for rows in strict.buckets] == [False, True, False, False]
    assert [150 in rows for rows in lenient.buckets] == [False, False, True, False]
    for sampler in (strict, lenient):
        assert sorted(i for batch in sampler for i in batch) == list(range(151))


def test_merged_edges_get_a_multiple_of_sub_buckets():
    lengths, outputs = np.r_[np.full(90, 10), np.full(10, 20)], np.arange(100) % 50 + 1
    sampler = BucketBatchSampler(
        lengths, out_lengths=outputs, n_buckets=5, sub_buckets=2, batch_sizes=4
    )
    assert sampler.edges == [10]
    assert bucket_edges(lengths, 5) == [10, 10, 10, 20]  # 20 is the longest: no bucket above it
    assert len(sampler.buckets) == 3 * 2 + 2 * 2


# Batches


def test_every_row_is_in_one_batch_and_epochs_differ_in_order():
    sampler = BucketBatchSampler(SOME, max_tokens=2048)
    first, again = list(sampler), list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    assert first == again != second
    for batches in (first, second):
        assert sorted(i for batch in batches for i in batch) == list(range(len(SOME)))


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_cover_all_rows_in_equal_steps_of_one_bucket(world):
    sampler = BucketBatchSampler(SOME, n_buckets=6, max_tokens=2048, world_size=world)
    shards = [list(BatchSamplerShard(sampler, world, rank)) for rank in range(world)]
    assert len({len(shard) for shard in shards}) == 1
    counts = Counter(i for shard in shards for batch in shard for i in batch)
    assert set(counts) == set(range(len(SOME)))
    last = {i for shard in shards for i in shard[-1]}
    assert {i for i, count in counts.items() if count > 1} <= last
    buckets = sampler.bucket_indices()
    whole = len(buckets) // world * world
    steps = [buckets[i : i + world] for i in range(0, whole, world)]
    assert all(len(set(step)) == 1 for step in steps[:-1])


def test_single_remaining_rows_are_grouped_at_the_end():
    # two processes, three buckets of one row in each batch: 3, 3 and 1 of them
    sampler = BucketBatchSampler([1] * 3 + [2] * 3 + [3], edges=[1, 2], batch_sizes=1, world_size=2)
    assert sorted(sampler.bucket_indices()[:4]) == [0, 0, 1, 1]
    assert sampler.bucket_indices()[4:] == [0, 1, 2]


def test_incomplete_batches_can_be_left_out():
    batches = [*BucketBatchSampler([5] * 11, batch_sizes=4, drop_last=True)]
    assert [len(batch) for batch in batches] == [4, 4]
    assert len([*BucketBatchSampler([5] * 12, batch_sizes=4, drop_last=True)]) == 3


def test_no_batch_exceeds_the_budget_and_each_is_filled():
    budget = 2048
    sampler = BucketBatchSampler(SOME, n_buckets=3, max_tokens=budget)
    by_bucket: dict[int, list[list[int]]] = {}
    for batch, bucket in zip(lengths_of(sampler), sampler.bucket_indices(), strict=True):
        assert len(batch) * max(batch) <= budget
        by_bucket.setdefault(bucket, []).append(batch)
    for batches in by_bucket.values():
        longest = max(map(max, batches))
        short = [b for b in batches if (len(b) + 1) * longest <= budget]
        assert len(short) <= 1  # the last of the bucket


def test_a_row_longer_than_the_budget_may_be_a_batch_of_its_own():
    sampler = BucketBatchSampler([5, 30, 6], n_buckets=1, max_tokens=20, too_long="alone")
    assert [1] in list(sampler)


def test_quadratic_lengths_count_twice_at_the_penalty():
    sampler = BucketBatchSampler([100] * 40, n_buckets=1, max_tokens=1000, quadratic=100)
    assert {len(batch) for batch in sampler} == {5}


@pytest.mark.parametrize("case", range(20))
def test_length_is_the_number_of_batches(case):
    draw = np.random.default_rng(case)
    lengths = draw.integers(1, 200, draw.integers(1, 300))
    outputs = draw.integers(1, 50, len(lengths)) if case % 2 else None
    limit = {"max_tokens": int(draw.integers(200, 900))} if case % 3 else {"batch_sizes": 7}
    sampler = BucketBatchSampler(
        lengths,
        out_lengths=outputs,
        sub_buckets=1 + case % 2,
        n_buckets=int(draw.integers(1, 12)),
        world_size=int(draw.integers(1, 5)),
        drop_last=bool(case % 4 == 0),
        shuffle=bool(case % 5),
        **limit,
    )
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(sampler) == len(batches)
        rows = [i for batch in batches for i in batch]
        assert len(set(rows)) == len(rows)
        if sampler.drop_last:
            assert len(batches) % sampler.world_size == 0
        else:
            assert len(rows) == len(lengths)


def test_accelerate_loses_no_batch_of_another_size():
    sampler = BucketBatchSampler([2] * 5, n_buckets=1, batch_sizes=[3], world_size=2)
    assert not hasattr(sampler, "batch_size")
    shards = [list(BatchSamplerShard(sampler, 2, rank)) for rank in range(2)]
    assert sorted(i for shard in shards for batch in shard for i in batch) == list(range(5))


# Resuming


def test_a_sampler_resumes_at_its_saved_state():
    settings = {"max_tokens": 2048, "n_buckets": 4, "seed": 3, "world_size": 2}
    sampler = BucketBatchSampler(SOME, **settings)
    sampler.set_epoch(2)
    stream = iter(sampler)
    for _ in range(7):
        next(stream)
    state = sampler.state_dict()
    again = BucketBatchSampler(SOME, **settings)
    again.load_state_dict(state)
    assert list(again) == list(stream)
    # the state after a complete epoch: nothing of it is left
    done = BucketBatchSampler(SOME, **settings)
    done.load_state_dict(sampler.state_dict())
    assert list(done) == []
    for each in (again, done):
        assert len(list(each)) == len(each)  # the epoch after that is whole
    with pytest.raises(InputError):
        BucketBatchSampler(SOME, **{**settings, "seed": 4}).load_state_dict(state)


# Steps of petl's own loop


@pytest.mark.parametrize(("count", "padding"), [(5, 0.32), (10, 0.18), (20, 0.095), (30, 0.065)])
def test_steps_of_a_fixed_size_are_as_many_as_without_buckets(count, padding):
    buckets = Buckets.of_equal_tokens(LENGTHS.astype(np.int32), count, batch_size=32)
    assert len(buckets.sizes) == 20_000 // 32
    assert set(buckets.sizes) == {32}
    assert padding_fraction(LENGTHS, buckets.batches(0, 0)) < padding
    uneven = Buckets.of_equal_tokens(LENGTHS[:500].astype(np.int32), count, batch_size=32)
    assert sorted(uneven.sizes)[:2] == [500 % 32, 32]


def test_the_automatic_number_is_the_fewest_that_leave_little_padding():
    lengths = LENGTHS[:4000].astype(np.int32)
    positions = {}
    for count in (1, 2, 4, 8, 16, 32):  # 64 would have fewer than 3 of the 125 steps each
        buckets = Buckets.of_equal_tokens(lengths, count, batch_size=32)
        positions[count] = sum(len(rows) * lengths[rows].max() for rows in buckets.batches(0, 0))
    fewest = min(n for n in positions if positions[n] <= 1.02 * min(positions.values()))
    assert fewest > 1
    found = Buckets.of_best_count(lengths, 32)
    expected = Buckets.of_equal_tokens(lengths, fewest, batch_size=32)
    assert len(found.rows) == len(expected.rows)
    for one, other in zip(found.batches(5, 2), expected.batches(5, 2), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("lengths", "most"),
    [([9] * 400, 1), ([5, 90] * 8, 1)],
    ids=["equal", "few steps"],
)
def test_the_automatic_number_is_small_where_more_save_nothing(lengths, most):
    assert len(Buckets.of_best_count(np.array(lengths, np.int32), 4).rows) <= most


def test_automatic_buckets_are_none_where_they_save_nothing():
    settings = TrainConfig(buckets="auto", batch_size=4)
    assert buckets_of(np.full(400, 9, np.int32), settings) is None
    sorted_ = buckets_of(LENGTHS[:4000].astype(np.int32), settings)
    assert sorted_ is not None
    assert padding_fraction(LENGTHS[:4000], sorted_.batches(0, 0)) < 0.1
    # with max_tokens, buckets are what limits a step
    assert buckets_of(np.full(400, 9, np.int32), replace(settings, max_tokens=36)) is not None


@pytest.mark.parametrize(("count", "padding"), [(10, 0.151), (30, 0.057)])
def test_steps_of_a_token_budget_keep_it_and_pad_as_the_sampler(count, padding):
    buckets = Buckets.of_equal_tokens(
        LENGTHS.astype(np.int32), count, batch_size=1, max_tokens=4096
    )
    batches = [LENGTHS[rows] for rows in buckets.batches(0, 0)]
    assert all(len(lengths) * lengths.max() <= 4096 for lengths in batches)
    assert padding_fraction(LENGTHS, buckets.batches(0, 0)) == pytest.approx(padding, abs=0.01)


def test_largest_batch_has_the_maximum_number_of_positions():
    lengths = LENGTHS[:3000].astype(np.int32)
    buckets = Buckets.of_equal_tokens(lengths, 10, batch_size=1, max_tokens=4096)
    most = max(len(rows) * lengths[rows].max() for e in range(3) for rows in buckets.batches(0, e))
    heaviest = lengths[buckets.largest_batch(max(buckets.sizes))]
    assert most <= len(heaviest) * heaviest.max() <= 4096
    assert len(buckets.largest_batch(4)) == 4
    assert lengths[buckets.largest_batch(4)].max() == lengths.max()


def test_largest_batch_of_a_process_has_its_part_of_the_rows():
    buckets = Buckets.of_batch_sizes(np.r_[[3] * 100, [9] * 12].astype(np.int32), {3: 50, 9: 12})
    assert len(buckets.largest_batch()) == 50
    assert len(buckets.largest_batch(processes=8)) == 7
    assert set(buckets.largest_batch(5, processes=2)) <= set(range(100, 112))  # 5 * 9 > 5 * 3


def test_long_rows_count_more_against_the_budget():
    lengths = LENGTHS[:3000].astype(np.int32)
    buckets = Buckets.of_equal_tokens(lengths, 10, 1, max_tokens=4096, quadratic=512)
    for rows in buckets.batches(0, 0):
        longest = int(lengths[rows].max())
        assert len(rows) * (longest + longest**2 / 512) <= 4096
    plain = Buckets.of_equal_tokens(lengths, 10, 1, max_tokens=4096)
    assert buckets.steps[-1] < plain.steps[-1]


# Steps of petl's own loop with a size for each bucket


def test_steps_have_at_most_the_rows_of_their_bucket_and_are_as_few_as_possible():
    lengths, sizes = np.array([4] * 33 + [7] * 12 + [9] * 2, np.int32), {4: 32, 6: 9, 7: 5, 20: 4}
    buckets = Buckets.of_batch_sizes(lengths, sizes)
    assert sorted(buckets.sizes) == [2, 4, 4, 4, 16, 17]  # 33 = 17 + 16, 12 = 4 + 4 + 4
    for epoch in range(2):
        batches = list(buckets.batches(0, epoch))
        assert sorted(np.concatenate(batches)) == list(range(47))
        for rows in batches:
            bound = next(bound for bound in sizes if lengths[rows].max() <= bound)
            assert len(rows) <= sizes[bound]
            assert len(set(lengths[rows])) == 1


def test_an_estimate_has_edges_counts_and_padding():
    found = describe(LENGTHS.astype(np.int32), TrainConfig(buckets=30, max_tokens=4096))
    assert found["padding"] == {
        "before": pytest.approx(0.75, abs=0.01),
        "after": pytest.approx(0.057, abs=0.01),
    }
    assert sum(bucket["rows"] for bucket in found["buckets"]) == found["rows"] == 20_000
    assert all(bucket["batch_size"] * bucket["longest"] <= 4096 for bucket in found["buckets"])
    sampler = BucketBatchSampler(LENGTHS, edges=found["edges"], max_tokens=4096)
    assert sampler.padding_ratio() == pytest.approx(found["padding"]["after"], abs=0.01)
