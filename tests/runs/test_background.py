"""Jobs beside each other: their order, and what becomes of them when the work is given up."""

import threading

import pytest

from jaxprune.runs.background import in_background


def test_jobs_begin_in_order_and_as_many_as_asked_for_run_at_once():
    begun, together = [], threading.Barrier(2, timeout=30)

    def job(i):
        begun.append(i)
        together.wait()
        return i

    with in_background(2) as pool:
        jobs = [pool.submit(job, i) for i in range(6)]
        assert [each.result(timeout=30) for each in jobs] == list(range(6))
    assert {*begun[:2]} == {0, 1}


def test_what_has_begun_comes_to_its_end_and_the_rest_never_begins():
    begun, go_on = threading.Event(), threading.Event()
    ended, jobs = [], []

    def first():
        begun.set()
        go_on.wait(timeout=30)
        ended.append("first")

    def given_up():
        with in_background(1) as pool:
            pool.submit(first)
            jobs.append(pool.submit(ended.append, "second"))
            begun.wait(timeout=30)
            threading.Timer(0.2, go_on.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        given_up()
    assert ended == ["first"]
    assert jobs[0].cancelled()
