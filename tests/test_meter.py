import logging

import jax.numpy as jnp
import pytest

from tinyvit_jax import meter as meters


class Clock:
    now = 100.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    return clock


def run(meter, clock, computing, waiting, updates=2):
    """So many updates, each of so many seconds of both kinds; the line that is logged after."""
    for i in range(updates):
        with meter.waiting():
            clock.now += waiting
        clock.now += computing
        meter.add({"loss": jnp.float32(i), "skipped": jnp.int32(i), "learning_rate": 0.5})
    return meter.read(updates)


def test_a_line_is_the_mean_since_the_last(clock):
    meter = meters.Meter("run", 8, steps=10, seconds_before=50.0)
    clock.now += 30  # compiling
    meter.forget_time()
    line, left = run(meter, clock, computing=3.0, waiting=1.0)
    assert line == {"loss": 0.5, "skipped": 1.0, "learning_rate": 0.5, "images_per_second": 2.0,
                    "data_wait": 0.25, "seconds": 88.0}
    assert left == 32.0
    line, _ = run(meter, clock, computing=4.0, waiting=0.0)
    assert (line["images_per_second"], line["data_wait"]) == (2.0, 0.0)


def test_a_long_wait_for_data_is_said_once(clock, caplog):
    meter = meters.Meter("student", 8, steps=10)
    with caplog.at_level(logging.WARNING):
        run(meter, clock, computing=0.1, waiting=1.0)  # two seconds: chance
        run(meter, clock, computing=9.0, waiting=1.0)
        assert not caplog.messages
        run(meter, clock, computing=6.0, waiting=2.0)
        run(meter, clock, computing=6.0, waiting=2.0)
    assert len(caplog.messages) == 1
    for word in ("student: 25 %", "data.workers", "data.threads", "--short_side=320"):
        assert word in caplog.text


def test_a_wait_while_the_devices_work_costs_nothing(clock):
    class Running:
        def is_ready(self):
            return False

    meter = meters.Meter("run", 8, steps=10)
    meter.add({"loss": Running()})
    with meter.waiting():
        clock.now += 5
    assert meter.waited == 0
    meter.add({"loss": jnp.float32(1)})
    with meter.waiting():
        clock.now += 5
    assert meter.waited == 5


def test_the_queue_is_bound(monkeypatch):
    waited = []
    monkeypatch.setattr(meters.jax, "block_until_ready", waited.append)
    meter = meters.Meter("run", 8, steps=10)
    for i in range(4):
        meter.add({"loss": i})
        meter.bound_queue(2)
    assert waited == [0, 1, 2]  # one at work and one that follows, whatever the number
