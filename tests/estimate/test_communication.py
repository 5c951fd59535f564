"""Bytes that ranks send, and the time that this takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from voxtral_dist.config import load_config
from voxtral_dist.config.builtin import recipes
from voxtral_dist.errors import UserError
from voxtral_dist.estimate.communication import Collective, Communication
from voxtral_dist.estimate.estimator import meta_model_of
from voxtral_dist.estimate.gpus import named_gpu
from voxtral_dist.estimate.interconnect import Interconnect, named_network
from voxtral_dist.estimate.sharding import Fsdp2Sharding, ZeroSharding, zero_sharding
from voxtral_dist.model.voxtral import TrainedVoxtral

from corpora import REPOSITORY

MINI = 4_676_271_104
EMBEDDING = 131_072 * 3072


@pytest.fixture(scope="module")
def mini() -> TrainedVoxtral:
    config = load_config(recipes()["voxtral_mini_fsdp2"], [])
    return meta_model_of(config.model, config.trainable)


@pytest.mark.parametrize(
    ("sharding", "num_micro_batches", "values"),
    [
        # Rajbhandari et al. (arXiv 1910.02054, section 7): 2 P for ZeRO-2, 3 P for ZeRO-3.
        (ZeroSharding(2, all_reduces=False), 1, 2 * MINI),
        (ZeroSharding(2, all_reduces=False), 4, (4 + 1) * MINI),
        (ZeroSharding(3, prefetch_bucket=0, max_reuse=0, persistent_size=0), 2, 2 * 3 * MINI),
        # DeepSpeed's default.
        (zero_sharding({"stage": 1}), 1, 3 * MINI),
        (zero_sharding({"stage": 2}), 4, (4 * 2 + 1) * MINI),
        # Neither the embedding nor the last layer is gathered again; sums are in float32, two values of bfloat16.
        (Fsdp2Sharding(), 1, (1 + 1 + 2) * MINI - 2 * EMBEDDING),
        (Fsdp2Sharding(reshards=False, reduce_bytes=2), 3, 3 * 2 * MINI),
    ],
)
def test_volumes_of_engines_are_those_of_the_literature(mini, sharding, num_micro_batches, values):
    sent = Communication(mini, sharding, 8).sent_bytes(num_micro_batches)
    # Norms, biases and the positions of the encoder, which are frozen.
    assert sent == pytest.approx(2 * values * 7 / 8, rel=2e-3)
    assert Communication(mini, sharding, 1).sent_bytes(num_micro_batches) == 0


@pytest.mark.parametrize(
    ("zero", "kind"),
    [
        ({"stage": 2}, "all-reduce"),
        ({"stage": 2, "use_multi_rank_bucket_allreduce": False}, "reductions"),
        ({"stage": 2, "use_multi_rank_bucket_allreduce": False, "reduce_scatter": False}, "all-reduce"),
        # `mini` is in bfloat16.
        ({"stage": 1, "use_multi_rank_bucket_allreduce": False}, "all-reduce"),
    ],
)
def test_how_zero_sums_gradients(mini, zero, kind):
    kinds = {one.kind for one in Communication(mini, zero_sharding(zero), 8).step(1)}
    assert kinds == {kind, "all-gather"}


def test_replicas_exchange_their_parts_once(mini):
    of_node = Communication(mini, Fsdp2Sharding(), 8).sent_bytes(2)
    replicated = Communication(mini, Fsdp2Sharding(ranks_per_replica=8), 32)
    between = [one for one in replicated.step(2) if one.stride == 8]
    assert replicated.sent_bytes(2) == pytest.approx(of_node + 4 * MINI / 8 * 2 * 3 / 4, rel=1e-3)
    assert sum(one.sent_bytes() for one in between) == pytest.approx(4 * MINI / 8 * 2 * 3 / 4, rel=1e-3)


def test_chunks_of_the_encoder_are_gathered_each(mini):
    one, three = (Communication(mini, Fsdp2Sharding(), 8, chunks).sent_bytes(1) for chunks in (1, 3))
    blocks = sum(parameter.numel() for parameter in mini.model.audio_tower.layers.parameters())
    assert three - one == pytest.approx(2 * 2 * blocks * 7 / 8)


def collective(num_ranks: int, kind: str = "all-gather", **changes) -> Collective:
    return Collective(
        **{
            "kind": kind,
            "moment": "update",
            "num_bytes": 8e9,
            "num_ranks": num_ranks,
            "num_calls": 1,
            "is_hidden": False,
        }
        | changes
    )


def test_a_group_is_as_fast_as_its_narrowest_link():
    links = Interconnect(named_gpu("H200"), named_network("ib-ndr"), 8)
    assert links.bandwidth(collective(8)) == pytest.approx(0.78 * 450e9)
    # Eight cards of 50 GB/s, which all GPUs of a node share.
    assert links.bandwidth(collective(16)) == pytest.approx(0.78 * 450e9)
    assert links.bandwidth(collective(4, "all-reduce", stride=8)) == pytest.approx(0.9 * 50e9)
    slow = Interconnect(named_gpu("H200"), named_network("800Gbps"), 8)
    assert slow.bandwidth(collective(8)) == pytest.approx(0.78 * 450e9)
    assert slow.bandwidth(collective(16)) == pytest.approx(0.9 * 100e9)
    seconds = [links.seconds(collective(number)) for number in (2, 8, 64, 512)]
    assert seconds == sorted(seconds)
    # Many small calls take the time of their hops: 511 of a ring, 63 of them between nodes.
    small = links.seconds(collective(512, num_bytes=0, num_calls=100))
    assert small == pytest.approx(100 * (8.4e-6 + 448 * 3.4e-6 + 63 * 9.6e-6))
    tree = links.seconds(collective(512, "all-reduce", num_bytes=0, num_calls=100))
    assert tree == pytest.approx(100 * (8.4e-6 + 14 * 3.4e-6 + 12 * 9.6e-6))


def test_an_unknown_network_is_refused():
    with pytest.raises(UserError, match=r"`--network` must be one of ib-hdr, .* but is 'fast' instead"):
        named_network("fast")


@pytest.mark.slow
def test_computed_bytes_are_those_that_the_kernel_counts(tmp_path):
    """On 2, 3 and 4 ranks, under every engine: within 3 %."""
    output = tmp_path / "communication.json"
    command = [sys.executable, REPOSITORY / "benchmarks" / "communication.py", "--output", output]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(output.read_text(encoding="utf-8"))
    if not result["is_private"]:
        pytest.skip("this system makes no network of its own, and other processes send over its loopback interface")
    assert {row["ranks"] for row in result["rows"]} == {2, 3, 4}
    assert {row["engine"] for row in result["rows"]} == {"zero0", "zero1", "zero2", "zero3", "fsdp2"}
    assert [row for row in result["rows"] if row["agreement"] < 0.97] == []
