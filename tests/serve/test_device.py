"""Whose turn it is, and whose place on the device."""

from qlora_jax.serve.adapters.device import DeviceSlots
from qlora_jax.serve.job import Job
from qlora_jax.serve.queue import FairQueue
from qlora_jax.serve.request import Request


def put(device, key):
    number = device.room()
    device.put(number, key, key, 4)
    assert device.take(number)
    return number


def test_the_least_recently_used_makes_room():
    device = DeviceSlots(2)
    a, b = put(device, "a"), put(device, "b")
    assert (a, b) == (1, 2)
    device.release(a), device.release(b)
    assert device.take(a)
    device.release(a)
    assert put(device, "c") == b
    assert (device.find("a"), device.find("b"), device.find("c")) == (1, None, 2)
    assert device.evictions == 1


def test_an_adapter_in_use_never_makes_room():
    device = DeviceSlots(2)
    a, _ = put(device, "a"), put(device, "b")
    assert device.room() is None
    assert device.find("a") == 1 and device.find("b") == 2
    device.release(a)
    device.forget_claims()
    assert put(device, "c") == a


def test_a_claimed_place_is_not_taken_again():
    """Or an adapter that is asked for without a pause would keep the others out for ever."""
    device = DeviceSlots(1)
    a = put(device, "a")
    assert device.room() is None  # for b, which waits
    assert not device.take(a)
    assert device.room() is None
    device.release(a)
    device.forget_claims()
    assert put(device, "b") == a


def jobs(queue, *names):
    found = [Job(Request(prompt=(1,), max_new_tokens=1, adapter=name), lambda event: None, None) for name in names]
    for job in found:
        queue.add(job)
    return found


def served(queue):
    order = []
    while queue.fronts():
        job = queue.fronts()[0]
        queue.take(job)
        order.append(job)
    return order


def test_adapters_take_turns_and_each_serves_in_order():
    queue = FairQueue(9)
    a1, a2, a3, b1, base, b2 = jobs(queue, "a", "a", "a", "b", None, "b")
    assert len(queue) == 6
    assert served(queue) == [a1, b1, base, a2, b2, a3]


def test_who_cannot_be_served_keeps_its_turn():
    queue = FairQueue(9)
    a1, a2, b1, b2 = jobs(queue, "a", "a", "b", "b")
    queue.take(b1)
    assert queue.fronts() == [a1, b2]
    assert queue.remove(lambda job: job is a1) == [a1]
    assert queue.fronts() == [a2, b2]
    assert len(queue) == 2
