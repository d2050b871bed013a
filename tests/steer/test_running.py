"""A value that belongs to the running call."""

import threading

from modeling_dms.steer.running import Running


def test_threads_that_overlap_leave_nothing_behind():
    running, entered, ended = Running("test", None), threading.Event(), threading.Event()

    def begins_first():
        with running.set("first"):
            entered.set()
            ended.wait(10)

    thread = threading.Thread(target=begins_first)
    thread.start()
    entered.wait(10)
    with running.set("second"):
        ended.set()
        thread.join()
        assert running.get() == "second"
    assert running.get() is None
    assert running._last is running._in_thread.get()
